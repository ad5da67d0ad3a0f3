"""Whatever a user gives: no traceback, the exit code that is promised, and a line that names file, key and mend."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from core.data import Dataset
from core.train import Progress, State, TrainConfig, advance, start
from search import checkpoint
from search.cli import app
from search.settings import Settings
from tests.conftest import QUICK
from tests.oracle import trials
from tests.processes import finish, sieve, study_file

pytestmark = [pytest.mark.fault, pytest.mark.slow]

TWO: dict[str, Any] = {"search": {"method": "random", "trials": 2}, "confirm": False}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A home with a study of two trials."""
    folder = tmp_path_factory.mktemp("done")
    settings = Settings.from_environment({"SIEVE_HOME": str(folder / "home")})
    said = finish(launched := sieve(settings, "launch", study_file(folder, **TWO), "--no-publish"))
    assert launched.returncode == 0, said
    return settings


# what is typed, where {home}, {tmp} and {file} stand for folders and a study file: exit code, words of the answer
CASES: dict[str, tuple[list[str], int, list[str]]] = {
    "missing study file": (["launch", "{tmp}/none.yaml"], 2, ["none.yaml: No such file"]),
    "folder as study file": (["launch", "{tmp}"], 2, ["{tmp}: expected an ordinary file, got a folder"]),
    "misspelled study": (["best", "quik"], 2, ["no study is called 'quik'; did you mean quick?"]),
    "path as study": (["status", "../quick"], 2, ["no study is called '../quick'"]),
    "NUL in a study's name": (["best", "a\0b"], 2, ["no study is called"]),
    "shell words as study": (["stop", "$(touch {tmp}/canary)"], 2, ["no study is called"]),
    "501 characters": (["cancel", "x" * 501], 2, ["no study is called"]),
    "export into nowhere": (["export", "quick", "--weights", "{tmp}/no/w.npz"], 2, ["{tmp}/no/w.npz: expected a file"]),
    "export over a folder": (["export", "quick", "--weights", "{tmp}"], 2, ["{tmp}: expected a file"]),
    "report into a file": (["report", "quick", "--out", "{file}"], 2, ["{file}: File exists"]),
    "unknown dataset": (["data", "check", "mnist"], 2, ["expected digits, cifar10, or npz"]),
    "missing npz": (["data", "check", "npz", "{tmp}/none.npz"], 2, ["{tmp}/none.npz"]),
    "fetch of another": (["data", "fetch", "mnist"], 2, ["only cifar10 is fetched"]),
    "no workers": (["launch", "{file}", "--workers", "0"], 2, ["--workers"]),
    "unknown option": (["launch", "{file}", "--wrokers", "2"], 2, ["--wrokers"]),
    "unknown command": (["lanuch", "{file}"], 2, ["lanuch"]),
    "no such key": (["launch", "{file}", "--set", "search.trails=3"], 2, ["search.trails: unknown key; did you mean"]),
}  # fmt: skip


@pytest.mark.parametrize(("words", "code", "parts"), CASES.values(), ids=CASES)
def test_what_cannot_be_meant_is_answered(
    done: Settings, tmp_path: Path, words: list[str], code: int, parts: list[str]
) -> None:
    """The exit code is 2, the answer names what was given, and nothing new is at home."""
    places = {"home": done.home, "tmp": tmp_path, "file": study_file(tmp_path, **TWO)}
    before = sorted(done.home.rglob("*.npz")), trials(done, "quick")
    environment = {"SIEVE_HOME": str(done.home), "COLUMNS": "500"}
    answer = CliRunner().invoke(app, [word.format(**places) for word in words], env=environment)
    assert answer.exit_code == code, answer.output
    assert answer.exception is None or isinstance(answer.exception, SystemExit)
    assert all(part.format(**places) in answer.output for part in parts), answer.output
    assert (sorted(done.home.rglob("*.npz")), trials(done, "quick")) == before
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("words", [["launch", "{file}", "--no-publish"], ["sync"], ["doctor"]])
@pytest.mark.parametrize("home", ["{file}", "{file}/below", "/proc/none"])
def test_a_home_that_cannot_be_is_named(tmp_path: Path, home: str, words: list[str]) -> None:
    """A home that is a file, lies below one, or cannot be made: one line with its path, or a finding of doctor."""
    file = study_file(tmp_path, **TWO)
    settings = Settings.from_environment({"SIEVE_HOME": home.format(file=file)})
    command = sieve(settings, *(word.format(file=file) for word in words))
    out, said = command.communicate(timeout=120)
    assert "Traceback" not in out + said
    assert str(settings.home) in out + said
    if words != ["doctor"]:
        assert command.returncode in (1, 2)
        assert len(said.splitlines()) == 1


@pytest.mark.parametrize("file", ["sieve.db", "outbox/outbox.db"])
@pytest.mark.parametrize("words", [["launch", "{file}", "--no-publish"], ["status"], ["sync"], ["doctor"]])
def test_rubbish_in_place_of_a_database_is_named(tmp_path: Path, file: str, words: list[str]) -> None:
    """What is no database is left as it is, and the line names it."""
    settings = Settings.from_environment({"SIEVE_HOME": str(tmp_path / "home")})
    rubbish = settings.home / file
    rubbish.parent.mkdir(parents=True)
    rubbish.write_bytes(b"not a database" * 100)
    study = study_file(tmp_path, **TWO)
    command = sieve(settings, *(word.format(file=study) for word in words))
    out, said = command.communicate(timeout=120)
    assert "Traceback" not in out + said
    assert command.returncode in (0, 1)
    if command.returncode:
        assert str(rubbish) in out + said
    assert rubbish.read_bytes() == b"not a database" * 100


def test_a_study_whose_trials_all_diverge_has_failed(settings: Settings, tmp_path: Path) -> None:
    """Exit code 1 and the reason; each trial stopped within its first epoch of ten."""
    parts = {"search": {"method": "list", "settings": [{"eta": 1e6}, {"eta": 1e7}]}, "space": {}, "confirm": False}
    file = study_file(tmp_path, **parts, base={"batch_size": 50, "epochs": 10})
    said = finish(launched := sieve(settings, "launch", file, "--no-publish"))
    assert launched.returncode == 1
    assert "none of 2 trials has a result: diverged" in said
    assert "Traceback" not in said, said
    assert all(len(t.intermediate_values) <= 1 for t in trials(settings, "quick"))


# ---- files that were damaged


@given(st.data())
@hypothesis_settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_study_files_are_never_a_traceback(tmp_path: Path, draw: st.DataObject) -> None:
    """A study file with flipped bits, or cut short: `validate` takes it or refuses it by name, line by line."""
    raw = bytearray(yaml.safe_dump(QUICK | TWO).encode())
    for _ in range(draw.draw(st.integers(1, 4))):
        raw[draw.draw(st.integers(0, len(raw) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    file = tmp_path / "damaged.yaml"
    file.write_bytes(bytes(raw[: draw.draw(st.integers(0, len(raw)))]))
    answer = CliRunner().invoke(app, ["validate", str(file)])
    assert answer.exit_code in (0, 2)
    assert answer.exception is None or isinstance(answer.exception, SystemExit)
    assert all(line.startswith(str(file)) for line in answer.output.splitlines())


CIFAR = os.environ.get("SIEVE_DATA_DIR")


@pytest.mark.skipif(not CIFAR, reason="needs CIFAR-10: set SIEVE_DATA_DIR")
@given(draw=st.data())
@hypothesis_settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_cifar10_never_passes_its_checksum(tmp_path: Path, draw: st.DataObject) -> None:
    """One flipped bit, or a cut, anywhere in a real batch: `data check` exits with 2 and names that file."""
    real = next(Path(str(CIFAR)).rglob("data_batch_1*"))
    folder = tmp_path / real.parent.name
    if not folder.exists():
        folder.mkdir()
        for file in real.parent.iterdir():
            (folder / file.name).symlink_to(file)
        sums = (f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}" for file in real.parent.iterdir())
        (folder / "SHA256SUMS").write_text("\n".join(sums))
    raw = bytearray(real.read_bytes())
    at = draw.draw(st.integers(0, len(raw) - 1))
    if draw.draw(st.booleans()):
        raw = raw[:at]
    else:
        raw[at] ^= 1 << draw.draw(st.integers(0, 7))
    (folder / real.name).unlink()
    (folder / real.name).write_bytes(raw)
    answer = CliRunner().invoke(app, ["data", "check", "cifar10", str(folder)], env={"COLUMNS": "500"})
    assert answer.exit_code == 2, answer.output
    assert answer.exception is None or isinstance(answer.exception, SystemExit)
    assert real.name in answer.output


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State, Progress]:
    rng = np.random.default_rng(0)
    data = Dataset.from_arrays(*[(rng.random((40, 3), np.float32), np.arange(40) % 2)] * 2)
    config = TrainConfig(hidden_sizes=(4,), optimizer="adam", batch_size=10)
    (state,), (progress,) = advance([start(config, data, (1,), (0,))], data, 2)
    path = tmp_path_factory.mktemp("checkpoint") / "c.npz"
    checkpoint.save(path, state, progress, "it")
    return path, state, progress


@given(at=st.integers(0, 1 << 20), bit=st.integers(0, 7), cut=st.booleans())
@hypothesis_settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_checkpoint_is_no_checkpoint(
    saved: tuple[Path, State, Progress], tmp_path: Path, at: int, bit: int, cut: bool
) -> None:
    """Cut short or with any one bit flipped, it is refused with a ValueError, or every array in it is unharmed."""
    path, state, progress = saved
    raw = bytearray(path.read_bytes())
    at %= len(raw)
    if cut:
        raw = raw[:at]
    else:
        raw[at] ^= 1 << bit
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(raw)
    try:
        loaded, curve = checkpoint.load(damaged, "it")
    except ValueError:
        return
    assert curve.evaluations == progress.evaluations
    assert loaded.update == state.update
    for (w, b), (w0, b0) in zip(loaded.layers, state.layers, strict=True):
        assert np.array_equal(w, w0)
        assert np.array_equal(b, b0)
