"""A folder full of files that are called like modules: none of them runs, whatever is started there."""

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

import search
from search.settings import Settings
from tests.processes import study_file
from tests.servers import free_port, until

NAMES = (
    "core", "json", "numpy", "multiprocessing", "pickle", "signal", "socket", "mlflow", "uvicorn", "optuna", "typing",
    "random", "threading", "sqlite3", "tests",
)  # fmt: skip
SIEVE = str(Path(sys.executable).with_name("sieve"))  # the console script, as people start it


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A folder whose modules tell on themselves, in the file `sprung`."""
    folder = tmp_path / "trap"
    (folder / "search").mkdir(parents=True)
    tell = (
        f"open({str(folder / 'sprung')!r}, 'a').write(__name__ + ' in ' + ' '.join(__import__('sys').argv) + '\\n')\n"
    )
    (folder / "search" / "__init__.py").write_text(tell)
    (folder / "search" / "cli.py").write_text(tell)
    for name in NAMES:
        (folder / f"{name}.py").write_text(tell)
    return folder


def sprung(folder: Path) -> str:
    return (folder / "sprung").read_text() if (folder / "sprung").exists() else ""


def begin(settings: Settings, folder: Path, *words: str) -> subprocess.Popen[str]:
    given = os.environ | {"SIEVE_HOME": str(settings.home), "PYTHONPATH": str(search.ROOT), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [SIEVE, *words], cwd=folder, env=given, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.mark.slow
def test_no_module_of_the_current_folder_runs_in_a_study(
    new_home: Callable[[str], Settings], trap: Path, tmp_path: Path
) -> None:
    """A launch with its workers and publisher, a dry run and a sync do their work, and import nothing from there."""
    settings = new_home("home")
    few = {"search": {"method": "random", "trials": 2}, "confirm": False}
    file = str(study_file(tmp_path, **few))
    for words in (["launch", file, "--dry-run"], ["launch", file, "--workers", "1"], ["sync", "--redo"]):
        command = begin(settings, trap, *words)
        said = command.communicate(timeout=200)[0]
        assert command.returncode == 0, said
        assert sprung(trap) == ""
    assert "everything is sent" in said


@pytest.mark.slow
def test_no_module_of_the_current_folder_runs_in_a_page(new_home: Callable[[str], Settings], trap: Path) -> None:
    """Both servers of `sieve ui`, and what MLflow's starts below itself, import nothing from there."""
    settings, ports = new_home("home"), [free_port(), free_port()]
    ui = begin(settings, trap, "ui", "--mlflow-port", str(ports[0]), "--dashboard-port", str(ports[1]))
    try:
        until(lambda: (answers(ports[0]) and answers(ports[1])) or ui.poll() is not None, 180)
        assert ui.poll() is None, ui.communicate()[0]
    finally:
        ui.send_signal(signal.SIGINT)
        ui.communicate(timeout=60)
    assert sprung(trap) == ""


def answers(port: int) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_a_command_of_our_own_finds_the_package_where_it_lies(tmp_path: Path) -> None:
    """Without an installation or PYTHONPATH, the processes that a checkout starts are of that checkout."""
    code = f"import sys; sys.path.insert(0, {str(search.ROOT)!r}); import search; print(*search.COMMAND, sep='\\0')"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    command = shown.stdout.strip().split("\0")
    assert str(search.ROOT) in command[-1]
    there = subprocess.run([*command, "--help"], cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert there.returncode == 0
