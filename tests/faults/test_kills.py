"""Our own processes die, freeze and come back: every slot is done once, with undisturbed values."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from search.settings import Settings
from tests.oracle import verdict
from tests.processes import finish, seconds_to_the_next_slice, sieve, study_file

# Six trials that train for some seconds.
SIX: dict[str, Any] = {
    "base": {"batch_size": 5, "epochs": 60, "hidden_sizes": [60]},
    "space": {"eta": {"low": 1e-4, "high": 1e-2, "log": True}},
    "search": {"method": "random", "trials": 6},
    "confirm": False,
}

pytestmark = [pytest.mark.fault, pytest.mark.slow]

POINTS = ("begun:3", "putting:8", "recorded:2", "saving:2", "saved:1", "curves:2", "told:1")


def test_a_runner_may_die_between_any_two_writes(
    settings: Settings, tmp_path: Path, calm: Callable[..., Any], figures: Callable[..., None]
) -> None:
    """Killed in turn after each of its writes and in the midst of one: the next runner loses and repeats nothing."""
    path = study_file(tmp_path, **SIX)
    for point in POINTS:
        runner = sieve(settings, "launch", path, "--workers", "2", "--no-publish", slices=0.3, SIEVE_FAILPOINT=point)
        said = finish(runner)
        assert runner.returncode == -signal.SIGKILL, (point, said)
    last = sieve(settings, "launch", path, "--workers", "1", "--no-publish", slices=0.3)
    recovery = seconds_to_the_next_slice(settings, last)
    assert (finish(last), last.returncode)[1] == 0
    figures("runner killed between two writes", verdict(settings, "quick", calm(**SIX).results), len(POINTS), recovery)
