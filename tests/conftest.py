"""What several tests need: a home of their own, small studies, and the shared CIFAR-10 where it is."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from search.settings import Settings
from search.study import StudySpec, restore

if TYPE_CHECKING:
    from search.runner import Runner, Trial
    from tests.oracle import Verdict

# NumPy's threads and kernel are chosen when it is imported; the Makefile sets the same.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# The tests may be run under nohup, which ignores SIGHUP here and in every child.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

QUICK: dict[str, Any] = {
    "name": "quick",
    "dataset": {"name": "digits", "train": 300, "validation": 100, "test": 100, "split": "last"},
    "base": {"batch_size": 50, "epochs": 3, "momentum": 0.9},
    "space": {
        "lambda": {"low": 1e-6, "high": 1e-1, "log": True},
        "eta": {"low": 1e-3, "high": 1.0, "log": True},
        "hidden_sizes": [[], [16], [16, 8]],
    },
    "search": {"method": "coarse-to-fine", "stages": 3, "trials_per_stage": 4},
    "confirm": {"top": 2, "repeats": 2},
}


@pytest.fixture(scope="session")
def new_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs: making its tables takes ten seconds, copying it none."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    code = f"from mlflow import MlflowClient; MlflowClient('sqlite:///{path}').search_experiments()"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return path


@pytest.fixture
def new_home(tmp_path: Path, new_mlflow: Path) -> Callable[[str], Settings]:
    """Makes embedded homes in the folder of this test, each with an MLflow database that is ready."""

    def make(name: str) -> Settings:
        home = tmp_path / name
        home.mkdir()
        shutil.copy(new_mlflow, home / "mlflow.db")
        return Settings.from_environment({"SIEVE_HOME": str(home)})

    return make


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """An embedded home in a folder of this test, which does not exist yet."""
    return Settings.from_environment({"SIEVE_HOME": str(tmp_path / "home")})


@pytest.fixture
def quick() -> Callable[..., StudySpec]:
    """A study of seconds; keyword arguments replace parts of it."""
    return lambda **parts: restore(QUICK | parts)


def stop_after_first_slice(runner: "Runner") -> None:
    """For `started` of a launch: the runner is asked to stop whenever it has sent work out."""
    submit = runner._submit

    def submit_and_stop(trials: "list[Trial]") -> None:
        submit(trials)
        runner.stop()

    runner._submit = submit_and_stop  # type: ignore[method-assign]


# ---- the table of faults

FAULTS = pytest.StashKey[list[list[str]]]()
COUNTS = ("lost", "dup", "ghost", "orphan", "points", "values", "uids", "data", "params", "weights", "untold")
HEAD = ("fault", "rounds", *COUNTS, "recovery s", "also")


@pytest.fixture
def figures(pytestconfig: pytest.Config) -> Callable[..., None]:
    """Enters a fault into the table that ends the test run, and fails unless the oracle is at zero.

    recovery: seconds from the fault, or from its end, until training got on or everything was sent.
    """

    def enter(fault: str, verdict: "Verdict", rounds: int = 1, recovery: float | None = None, also: str = "") -> None:
        row = [fault, str(rounds), *map(str, verdict), "" if recovery is None else f"{recovery:.1f}", also]
        pytestconfig.stash.setdefault(FAULTS, []).append(row)
        assert not any(verdict), verdict

    return enter


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--figures", metavar="FILE", type=Path, help="bring the table of faults in this Markdown file up to date"
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = {row[0]: row for row in config.stash.get(FAULTS, [])}
    if not rows:
        return
    terminalreporter.section("faults")
    terminalreporter.write_line(_table(rows))
    if file := config.getoption("figures"):
        before, begin, rest = file.read_text().partition("<!-- faults -->\n")
        table, end, after = rest.partition("<!-- end of faults -->")
        head, _, *known = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
        by_name = [dict(zip(head, row, strict=True)) for row in known]  # the table may be of before a column was new
        old = {row["fault"]: [row.get(name, "") for name in HEAD] for row in by_name}
        file.write_text(f"{before}{begin}{_table(old | rows)}\n{end}{after}")


def _table(rows: dict[str, list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(HEAD, *rows.values(), strict=True)]
    lines = [list(HEAD), ["-" * width for width in widths], *sorted(rows.values())]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )
