"""Ctrl-C and SIGTERM: the first ends the slices and saves them, the second leaves at once; neither loses anything."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from search.outbox import Outbox
from search.settings import Settings
from tests.faults.conftest import SIX
from tests.oracle import study_id, verdict
from tests.processes import (
    AN_EPOCH,
    await_slices,
    finish,
    seconds_to_the_next_slice,
    sieve,
    slices,
    study_file,
    workers,
)
from tests.servers import free_port, proxy, rule, until

STOP = 10.0  # seconds from the first signal to the end
LEAVE = 2.0  # seconds from the second

pytestmark = [pytest.mark.fault, pytest.mark.slow]

Calms = Callable[..., Any]
Figures = Callable[..., None]

QUIETLY = ("--workers", "2", "--no-publish")


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_the_first_signal_saves_and_says_how_to_go_on(
    settings: Settings, tmp_path: Path, calm: Calms, figures: Figures, number: signal.Signals
) -> None:
    """Sent to the whole group at random moments, as a terminal or a service manager does, five times in one study."""
    path, chance, took = study_file(tmp_path, **SIX), random.Random(2), list[float]()
    for _ in range(5):
        runner = sieve(settings, "launch", path, *QUIETLY, slices=AN_EPOCH)
        await_slices(settings, runner, chance.randint(1, 30))
        since = time.monotonic()
        os.killpg(runner.pid, number)
        said = finish(runner)
        took.append(time.monotonic() - since)
        assert "Traceback" not in said, said
        assert runner.returncode == 130, said
        assert "`sieve launch` with its file goes on from here" in said
    assert max(took) < STOP
    last = sieve(settings, "launch", path, *QUIETLY)
    recovery = seconds_to_the_next_slice(settings, last)
    said = finish(last)
    assert last.returncode == 0, said
    found = verdict(settings, "quick", calm(**SIX).results)
    figures(f"{number.name} to all processes", found, len(took), recovery, f"ended within {max(took):.1f} s")


@pytest.mark.parametrize("signals", [pytest.param(1, marks=pytest.mark.long), 2])
def test_nobody_waits_for_a_slice_that_does_not_end(
    settings: Settings, tmp_path: Path, calm: Calms, figures: Figures, signals: int
) -> None:
    """With its workers frozen, the first signal ends a study within ten seconds and the second at once."""
    path = study_file(tmp_path, **SIX)
    runner = sieve(settings, "launch", path, *QUIETLY, slices=AN_EPOCH)
    await_slices(settings, runner, 1)
    frozen = workers(runner.pid)
    for worker in frozen:
        worker.suspend()
    since = time.monotonic()
    runner.send_signal(signal.SIGTERM)
    said = heard(runner, "once more to leave at once")
    assert runner.poll() is None
    if signals == 2:
        since = time.monotonic()
        runner.send_signal(signal.SIGTERM)
    runner.wait(60)
    took = time.monotonic() - since
    for worker in frozen:
        with suppress(psutil.NoSuchProcess):
            worker.resume()  # else it could not even notice that its runner is gone
    said += finish(runner)
    assert (runner.returncode, took < (STOP, LEAVE)[signals - 1]) == (130, True), said
    last = sieve(settings, "launch", path, *QUIETLY)
    said = finish(last)
    assert last.returncode == 0, said
    fault = ("a signal while workers are frozen", "a second signal")[signals - 1]
    figures(fault, verdict(settings, "quick", calm(**SIX).results), also=f"left within {took:.1f} s")


def heard(process: subprocess.Popen[str], words: str) -> str:
    """What the command says on stderr until it has said these words."""
    assert process.stderr is not None
    said = ""
    while words not in said and (line := process.stderr.readline()):
        said += line
    assert words in said
    return said


def test_a_signal_ends_the_wait_for_a_tracking_server_that_hangs(settings: Settings, tmp_path: Path) -> None:
    """With all trials done and their records unsent, the first signal is enough, and the result is shown."""
    parts = {"search": {"method": "random", "trials": 2}, "confirm": False}
    with proxy(free_port(), rule(api="hang")) as address:
        away = replace(settings, tracking_uri=address)
        runner = sieve(away, "launch", study_file(tmp_path, **parts), "--workers", "2", patience=60)

        def ended() -> bool:
            with Outbox(settings.outbox) as box:
                return bool(box.records(study_id(settings, "quick"), "study_ended"))

        until(lambda: slices(settings) > 0 and ended())
        since = time.monotonic()
        runner.send_signal(signal.SIGINT)
        out, said = runner.communicate(timeout=60)
    assert time.monotonic() - since < STOP
    assert runner.returncode == 0, said
    assert "val_accuracy" in out
    assert "tracking records are not sent yet; `sieve sync` sends them" in said
