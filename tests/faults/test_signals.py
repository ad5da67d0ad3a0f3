"""Ctrl-C and SIGTERM: the first ends the slices and saves them, the second leaves at once; neither loses anything."""

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from search.outbox import Outbox
from search.settings import Settings
from tests.faults.conftest import SIX
from tests.oracle import verdict
from tests.processes import finish, seconds_to_the_next_slice, sieve, slices, study_file, workers
from tests.servers import free_port, proxy, rule, until

STOP = 10.0  # seconds from the first signal to the end
LEAVE = 2.0  # seconds from the second

pytestmark = [pytest.mark.fault, pytest.mark.slow]

Calms = Callable[..., Any]
Figures = Callable[..., None]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_saves_and_says_how_to_go_on(
    settings: Settings, tmp_path: Path, calm: Calms, figures: Figures, number: signal.Signals
) -> None:
    """Sent to the whole group at random moments, as a terminal or a service manager does, five times in one study."""
    path, chance, took = study_file(tmp_path, **SIX), random.Random(2), list[float]()
    for _ in range(5):
        runner = sieve(settings, "launch", path, "--workers", "2", "--no-publish", slices=0.3)
        until(lambda pid=runner.pid: len(workers(pid)) > 0)  # type: ignore[misc]
        time.sleep(chance.uniform(0, 2))
        since = time.monotonic()
        with suppress(ProcessLookupError):
            os.killpg(runner.pid, number)
        said = finish(runner)
        took.append(time.monotonic() - since)
        assert "Traceback" not in said
        assert runner.returncode in (130, 0), said
        if runner.returncode == 130 and "stopping" in said:
            assert "`sieve launch` with its file goes on from here" in said
    assert max(took) < STOP
    last = sieve(settings, "launch", path, "--workers", "2", "--no-publish")
    recovery = seconds_to_the_next_slice(settings, last)
    said = finish(last)
    assert last.returncode == 0, said
    found = verdict(settings, "quick", calm(**SIX).results)
    figures(f"{number.name} to all processes", found, len(took), recovery, f"ended within {max(took):.1f} s")


def test_the_second_signal_leaves_at_once(settings: Settings, tmp_path: Path, calm: Calms, figures: Figures) -> None:
    """In the middle of a long slice: no waiting for it, nothing left behind, and nothing lost but that slice."""
    parts = SIX | {
        "base": {"batch_size": 5, "epochs": 400, "hidden_sizes": [60]},
        "search": {"method": "random", "trials": 2},
    }
    path = study_file(tmp_path, **parts)
    runner = sieve(settings, "launch", path, "--workers", "2", "--no-publish", slices=30)
    until(lambda: len(workers(runner.pid)) == 2)
    time.sleep(1)
    runner.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert runner.poll() is None
    since = time.monotonic()
    runner.send_signal(signal.SIGTERM)
    said = finish(runner)
    took = time.monotonic() - since
    assert (runner.returncode, took < LEAVE) == (130, True), said
    assert "once more to leave at once" in said
    last = sieve(settings, "launch", path, "--workers", "2", "--no-publish")
    said = finish(last)
    assert last.returncode == 0, said
    figures("a second signal", verdict(settings, "quick", calm(**parts).results), also=f"left within {took:.1f} s")


def test_a_signal_ends_the_wait_for_a_tracking_server_that_hangs(settings: Settings, tmp_path: Path) -> None:
    """With all trials done and their records unsent, the first signal is enough, and the result is shown."""
    parts = {"search": {"method": "random", "trials": 2}, "confirm": False}
    with proxy(free_port(), rule(api="hang")) as address:
        away = replace(settings, tracking_uri=address)
        runner = sieve(away, "launch", study_file(tmp_path, **parts), "--workers", "2", patience=60)

        def ended() -> bool:
            with Outbox(settings.outbox) as box:
                return bool(box.records("quick", "study_ended"))

        until(lambda: slices(settings) > 0 and ended())
        since = time.monotonic()
        runner.send_signal(signal.SIGINT)
        out, said = runner.communicate(timeout=60)
    assert time.monotonic() - since < STOP
    assert runner.returncode == 0, said
    assert "val_accuracy" in out
    assert "tracking records are not sent yet; `sieve sync` sends them" in said
