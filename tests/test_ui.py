"""`sieve ui`: what it says, and what it sends."""

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from search.outbox import Outbox
from search.outcome import open_study
from search.settings import Settings
from tests.processes import finish, sieve, study_file
from tests.servers import free_port


def lines_until(process: subprocess.Popen[str], begin: str) -> list[str]:
    """What a command prints up to the line that begins so."""
    assert process.stdout is not None
    found = []
    for line in process.stdout:
        found.append(line.strip())
        if found[-1].startswith(begin):
            return found
    raise AssertionError(f"it ended without {begin!r}: {found}")


@pytest.mark.slow
@pytest.mark.stack
def test_a_study_that_was_never_sent_gets_its_link(new_home: Callable[[str], Settings], tmp_path: Path) -> None:
    """What waits in the outbox is sent beside the servers, and the study's link is said once MLflow has it."""
    settings = new_home("home")
    few = {"search": {"method": "random", "trials": 2}, "confirm": False}
    finish(sieve(settings, "launch", study_file(tmp_path, **few), "--workers", "1", "--no-publish"))
    ports = [free_port(), free_port()]
    ui = sieve(settings, "ui", "--mlflow-port", str(ports[0]), "--dashboard-port", str(ports[1]), PYTHONUNBUFFERED="1")
    try:
        said = lines_until(ui, "quick: ")
    finally:
        ui.send_signal(signal.SIGINT)
        finish(ui)
    assert said[:2] == [f"MLflow: http://127.0.0.1:{ports[0]}", f"Optuna dashboard: http://127.0.0.1:{ports[1]}"]
    assert said[-2] == "Ctrl-C ends both"
    assert said[-1].startswith(f"quick: http://127.0.0.1:{ports[0]}/#/experiments/")
    with Outbox(settings.outbox) as box:
        assert open_study("quick", settings).id in box.links()
    assert ui.returncode == 0
