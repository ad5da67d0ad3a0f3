import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from search.outbox import Outbox, study_begun
from search.samplers import NEEDS
from search.settings import Settings
from tests.conftest import QUICK

SMALL = QUICK | {"search": {"method": "random", "trials": 3}, "confirm": False}


def sieve(home: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command in a process of its own, as a user does."""
    command = [str(Path(sys.executable).with_name("sieve")), *words]
    given = os.environ | {"SIEVE_HOME": str(home), "COLUMNS": "200"} | environment
    return subprocess.run(command, env=given, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


def test_mistakes_in_study_files_are_one_line_each(tmp_path: Path) -> None:
    """`validate` names file, place and mend of each mistake, and exits with 2."""
    path = tmp_path / "x.yaml"
    space = {"lambda": {"low": 0.0, "high": 1.0, "log": True}, "etta": [1]}
    path.write_text(yaml.safe_dump(SMALL | {"space": space}))
    done = sieve(tmp_path, "validate", str(path))
    assert done.returncode == 2
    assert sorted(done.stderr.splitlines()) == [
        f"{path}: space.etta: unknown key; did you mean eta?",
        f"{path}: space.lambda.low: a log range needs low > 0, got 0.0",
    ]


@pytest.mark.slow
def test_sync_takes_a_studys_name(new_home: Callable[[str], Settings]) -> None:
    """All studies that have or had it are sent, others are not; a name that is not known is one line."""
    home = new_home("home")
    with Outbox(home.outbox) as box:
        box.put(
            study_begun(i, {"name": name}, {}, 1.0) for i, name in [("1a", "mine"), ("2b", "mine"), ("3c", "other")]
        )
    done = sieve(home.home, "sync", "mine")
    assert (done.returncode, done.stdout) == (0, "everything is sent\n"), done.stderr
    assert "MLflow's experiment 'mine' of an earlier study is 'mine (1a)' now" in done.stderr
    with Outbox(home.outbox) as box:
        assert [record.study for record in box.pending()] == ["3c"]
    done = sieve(home.home, "sync", "mime")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "no study is called 'mime'; did you mean mine?\n"
    assert sieve(home.home, "sync", "1a", "--redo").returncode == 2


@pytest.mark.parametrize(("method", "package"), [("gp", "torch"), ("cmaes", "cmaes")])
def test_a_missing_package_is_a_mistake_in_the_file(tmp_path: Path, file: Path, method: str, package: str) -> None:
    """`validate` and `launch` name the package that the method needs, exit with 2, and write nothing."""
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('No module named {package}')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    file.write_text(yaml.safe_dump(SMALL | {"search": {"method": method}}))
    needs = f"search.method: {method} needs the package {package}, which cannot be imported"
    for words, source in (
        (["validate"], str(file)),
        (["launch"], "study 'quick'"),
        (["launch", "--dry-run"], "study 'quick'"),
    ):
        done = sieve(tmp_path / "home", *words, str(file), PYTHONPATH=path)
        assert done.returncode == 2
        assert done.stderr.startswith(source)
        assert needs in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "home").exists()


MIXED = {
    "base": {"epochs": 1},
    "space": QUICK["space"] | {"dropout": {"low": 0.0, "high": 0.5}, "batch_size": {"low": 20, "high": 60}},
    "confirm": {"top": 1, "repeats": 2},
}
SEARCHES = {
    "coarse-to-fine": {"stages": 2, "trials_per_stage": 12},
    "random": {"trials": 4},
    "grid": {"points": 2},
    "tpe": {"trials": 16},
    "cmaes": {"trials": 16},
    "gp": {"trials": 16},
}


@pytest.mark.parametrize("method", SEARCHES)
def test_a_healthy_study_prints_no_warning(tmp_path: Path, file: Path, method: str) -> None:
    """Over numbers and choices together, no method has anything to warn of, nor has a library beneath it."""
    pytest.importorskip(NEEDS.get(method, "optuna"))
    file.write_text(yaml.safe_dump(SMALL | MIXED | {"search": {"method": method, **SEARCHES[method]}}))
    done = sieve(tmp_path / "home", "launch", str(file), "--json", "--workers", "1", "--no-publish")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_study_from_launch_to_export(new_home: Callable[[str], Settings], tmp_path: Path, file: Path) -> None:
    """Launch, status, best and export of one study agree with each other."""
    new_home("home")
    launched = sieve(tmp_path / "home", "launch", str(file), "--json", "--workers", "1")
    assert launched.returncode == 0, launched.stderr
    outcome = json.loads(launched.stdout)
    assert json.loads(sieve(tmp_path / "home", "best", "quick", "--json").stdout)["params"] == outcome["params"]
    (row,) = json.loads(sieve(tmp_path / "home", "status", "--json").stdout)
    assert (row["complete"] + row["pruned"], row["waiting"], row["state"]) == (3, 0, "done")
    written = sieve(tmp_path / "home", "export", "quick", "--weights", str(tmp_path / "w.npz"))
    assert written.returncode == 0, written.stderr
    assert (tmp_path / "w.npz").exists()


def test_values_can_be_set_on_the_command_line(tmp_path: Path, file: Path) -> None:
    """--set changes what the file says before it is checked; a mistake in it names the option."""
    done = sieve(tmp_path / "home", "launch", str(file), "--dry-run", "--json", "--set", "search.trials=7")
    (stage,) = json.loads(done.stdout)["stages"]
    assert (stage["name"], stage["trials"]) == ("random", 7)
    wrong = sieve(tmp_path / "home", "launch", str(file), "--set", "search.trials=none")
    assert wrong.returncode == 2
    assert "search.trials" in wrong.stderr


@pytest.mark.parametrize("words", [["status", "nope"], ["best", "nope"], ["stop", "nope"], ["retry", "nope"]])
def test_an_unknown_study_is_wrong_input(tmp_path: Path, words: list[str]) -> None:
    """A study that does not exist exits with 2 and one line, whatever the command."""
    done = sieve(tmp_path / "home", *words)
    assert done.returncode == 2
    assert "no study is called 'nope'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_dataset_says_how_to_get_it(tmp_path: Path) -> None:
    """Without CIFAR-10 on the machine, launch exits with 2 and names the command that fetches it."""
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(SMALL | {"dataset": "cifar10"}))
    done = sieve(tmp_path / "home", "launch", str(path), SIEVE_DATA_DIR=str(tmp_path))
    assert done.returncode == 2
    assert "sieve data fetch cifar10" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_is_light() -> None:
    """`--help` imports none of the heavy packages."""
    code = (
        "import sys; from search.cli import app; app(['--help'], standalone_mode=False); "
        "heavy = {'numpy', 'optuna', 'mlflow', 'matplotlib', 'pydantic', 'scipy'} & sys.modules.keys(); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("typed", "expected"),
    [("sieve la", {"launch"}), ("sieve data ", {"list", "fetch", "check"}), ("sieve best --", {"--json", "--help"})],
)
def test_the_shell_completes_commands_and_options(typed: str, expected: set[str], tmp_path: Path) -> None:
    """Bash's function, as --install-completion writes it, gives what fits what was typed."""
    home = {"HOME": str(tmp_path), "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    home |= {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}  # the shell is named, not guessed
    written = sieve(tmp_path, "--install-completion", "bash", **home)
    assert written.returncode == 0, written.stderr
    words = typed.split(" ")
    code = f"""source ~/.bashrc; COMP_WORDS=({typed}''); COMP_CWORD={len(words) - 1}; _sieve_completion sieve
    printf '%s\\n' "${{COMPREPLY[@]}}" """
    done = subprocess.run(["bash", "-c", code], env=os.environ | home, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == expected


def test_gradients_are_checked_from_the_command_line(tmp_path: Path) -> None:
    """`gradcheck` prints a relative error below 1e-7 for every configuration."""
    done = sieve(tmp_path, "gradcheck", "--json")
    assert done.returncode == 0, done.stderr
    assert max(row["numeric"] for row in json.loads(done.stdout)) < 1e-7


def test_settings_come_from_the_environment(tmp_path: Path) -> None:
    """A variable that cannot be meant is named, and the exit code is 2."""
    done = sieve(tmp_path, "status", SIEVE_EXECUTOR="dusk://x")
    assert done.returncode == 2
    assert "SIEVE_EXECUTOR" in done.stderr
    assert Settings.from_environment({"SIEVE_HOME": str(tmp_path)}).executor == "local"
