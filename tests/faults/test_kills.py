"""Our own processes die, freeze and come back: every slot is done once, with undisturbed values."""

import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from search.settings import Settings
from tests.faults.conftest import SIX
from tests.oracle import trials, verdict
from tests.processes import (
    family,
    finish,
    publisher,
    seconds_to_the_next_slice,
    sieve,
    slices,
    study_file,
    workers,
)
from tests.servers import until

pytestmark = [pytest.mark.fault, pytest.mark.slow]

Calms = Callable[..., Any]
Figures = Callable[..., None]
Home = Callable[[str], Settings]

QUIETLY = ("--workers", "2", "--no-publish")


def test_a_runner_may_die_between_any_two_writes(
    settings: Settings, tmp_path: Path, calm: Calms, figures: Figures
) -> None:
    """Killed in turn after each of its writes and in the midst of one: the next runner loses and repeats nothing."""
    points = ("begun:3", "putting:8", "recorded:2", "saving:2", "saved:1", "curves:2", "told:1")
    path = study_file(tmp_path, **SIX)
    for point in points:
        runner = sieve(settings, "launch", path, *QUIETLY, slices=0.3, SIEVE_FAILPOINT=point)
        said = finish(runner)
        assert runner.returncode == -signal.SIGKILL, (point, said)
    last = sieve(settings, "launch", path, *QUIETLY, slices=0.3)
    recovery = seconds_to_the_next_slice(settings, last)
    said = finish(last)
    assert last.returncode == 0, said
    figures("runner killed between two writes", verdict(settings, "quick", calm(**SIX).results), len(points), recovery)


def test_workers_may_die_in_their_slices(settings: Settings, tmp_path: Path, calm: Calms, figures: Figures) -> None:
    """Twenty workers are killed at random moments, and each costs its slice at most."""
    runner = sieve(settings, "launch", study_file(tmp_path, **SIX), *QUIETLY, slices=0.3)
    chance, recoveries = random.Random(1), list[float]()
    until(lambda: slices(settings) > 0)
    while len(recoveries) < 20 and runner.poll() is None:
        if found := workers(runner.pid):
            chance.choice(found).kill()
            recoveries.append(seconds_to_the_next_slice(settings, runner))
            time.sleep(chance.uniform(0, 0.3))
    said = finish(runner)
    assert runner.returncode == 0, said
    assert len(recoveries) >= 3
    found_ = verdict(settings, "quick", calm(**SIX).results)
    figures("worker killed in a slice", found_, len(recoveries), max(recoveries))


def test_a_slot_that_kills_its_workers_fails_alone(
    settings: Settings, tmp_path: Path, calm: Calms, figures: Figures
) -> None:
    """After three workers in a row died of one slot, it fails with that reason; its company is done as ever."""
    etas = (0.1, 0.2, 0.3, 0.4)
    parts = {"search": {"method": "list", "settings": [{"eta": eta} for eta in etas]}, "space": {}, "confirm": False}
    runner = sieve(settings, "launch", study_file(tmp_path, **parts), *QUIETLY, SIEVE_FAILPOINT="eta=0.3")
    said = finish(runner)
    assert runner.returncode == 0, said
    (failed,) = [t for t in trials(settings, "quick") if t.state.name == "FAIL"]
    assert failed.params["eta"] == 0.3
    assert "its worker died 3 times" in failed.user_attrs["reason"]
    others = {slot: result for slot, result in calm(**parts).results.items() if slot != failed.user_attrs["slot"]}
    figures("a slot that kills its worker", verdict(settings, "quick", others), 3, also="it fails, with its reason")


@pytest.mark.parametrize("who", ["worker", "runner", "publisher"])
def test_who_is_frozen_goes_on_when_thawed(
    new_home: Home, tmp_path: Path, calm: Calms, figures: Figures, who: str
) -> None:
    """Stopped for four seconds in the midst of its work, a process of ours takes it up again; nothing is doubled."""
    settings = new_home("home")
    runner = sieve(settings, "launch", study_file(tmp_path, **SIX), "--workers", "2", slices=0.3)
    until(lambda: slices(settings) > 0)
    found = {"worker": workers, "runner": lambda pid: [psutil.Process(pid)], "publisher": publisher}[who](runner.pid)
    found[0].suspend()
    time.sleep(4)
    found[0].resume()
    recovery = seconds_to_the_next_slice(settings, runner)
    said = finish(runner)
    assert runner.returncode == 0, said
    synced = sieve(settings, "sync")
    assert (finish(synced), synced.returncode) == ("", 0)
    found_ = verdict(settings, "quick", calm(**SIX).results, settings.home / "mlflow.db")
    figures(f"{who} frozen for 4 s", found_, 1, recovery)


def test_everything_may_die_at_once(new_home: Home, tmp_path: Path, calm: Calms, figures: Figures) -> None:
    """Runner, workers and publisher are killed together, as in a power cut, three times."""
    settings, path = new_home("home"), study_file(tmp_path, **SIX)
    recoveries = []
    for _ in range(3):
        runner = sieve(settings, "launch", path, "--workers", "2", slices=0.3)
        recoveries.append(seconds_to_the_next_slice(settings, runner))
        for process in family(runner.pid):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        runner.communicate()
    last = sieve(settings, "launch", path, "--workers", "2")
    said = finish(last)
    assert last.returncode == 0, said
    synced = sieve(settings, "sync")
    assert (finish(synced), synced.returncode) == ("", 0)
    found = verdict(settings, "quick", calm(**SIX).results, settings.home / "mlflow.db")
    figures("all processes killed at once", found, len(recoveries), max(recoveries[1:]))
