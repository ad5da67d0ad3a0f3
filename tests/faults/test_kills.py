"""Our own processes die, freeze and come back: every slot is done once, with undisturbed values."""

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from search import run
from search.outbox import Outbox
from search.settings import Settings
from tests.faults.conftest import SIX
from tests.oracle import results, trials, verdict
from tests.processes import (
    AN_EPOCH,
    await_slices,
    family,
    finish,
    publisher,
    seconds_to_the_next_slice,
    send,
    sieve,
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
        runner = sieve(settings, "launch", path, *QUIETLY, slices=AN_EPOCH, SIEVE_FAILPOINT=point)
        said = finish(runner)
        assert runner.returncode == -signal.SIGKILL, (point, said)
    last = sieve(settings, "launch", path, *QUIETLY, slices=AN_EPOCH)
    recovery = seconds_to_the_next_slice(settings, last)
    said = finish(last)
    assert last.returncode == 0, said
    figures("runner killed between two writes", verdict(settings, "quick", calm(**SIX).results), len(points), recovery)


@pytest.mark.long
def test_workers_may_die_in_their_slices(settings: Settings, tmp_path: Path, calm: Calms, figures: Figures) -> None:
    """Twenty workers are killed at random moments, and each costs its slice at most."""
    runner = sieve(settings, "launch", study_file(tmp_path, **SIX), *QUIETLY, slices=AN_EPOCH)
    chance, recoveries = random.Random(1), list[float]()
    await_slices(settings, runner, 1)
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


@pytest.mark.long
@pytest.mark.parametrize("who", ["worker", "runner", "publisher"])
def test_who_is_frozen_goes_on_when_thawed(
    new_home: Home, tmp_path: Path, calm: Calms, figures: Figures, who: str
) -> None:
    """Stopped for four seconds in the midst of its work, a process of ours takes it up again; nothing is doubled."""
    settings = new_home("home")
    runner = sieve(settings, "launch", study_file(tmp_path, **SIX), "--workers", "2", slices=AN_EPOCH)
    await_slices(settings, runner, 1)
    found = {"worker": workers, "runner": lambda pid: [psutil.Process(pid)], "publisher": publisher}[who](runner.pid)
    found[0].suspend()
    time.sleep(4)
    found[0].resume()
    recovery = seconds_to_the_next_slice(settings, runner)
    said = finish(runner)
    assert runner.returncode == 0, said
    send(settings)
    found_ = verdict(settings, "quick", calm(**SIX).results, settings.home / "mlflow.db")
    figures(f"{who} frozen for 4 s", found_, 1, recovery)


def said_until(command: subprocess.Popen[str], word: str) -> float:
    """When the command has printed a line that begins so."""
    assert command.stdout is not None
    while line := command.stdout.readline():
        if line.startswith(word):
            return time.monotonic()
    raise AssertionError(f"it ended without {word!r}")


def test_a_frozen_publisher_keeps_nobody_from_the_result(new_home: Home, tmp_path: Path) -> None:
    """Stopped for good, it is waited for as long as is allowed, after the result was shown, and then killed."""
    settings = new_home("home")
    path = study_file(tmp_path, **SIX)
    runner = sieve(settings, "launch", path, "--workers", "2", slices=AN_EPOCH, patience=2, PYTHONUNBUFFERED="1")
    await_slices(settings, runner, 1)
    (frozen,) = publisher(runner.pid)
    frozen.suspend()
    try:
        shown = said_until(runner, "chosen:")
        said = finish(runner, timeout=40)
        assert 1 < time.monotonic() - shown < 2 + 5 + 15  # the last of these for a busy machine
    finally:
        with suppress(psutil.NoSuchProcess):
            frozen.kill()
    assert runner.returncode == 0, said
    assert "are not sent yet; `sieve sync` sends them" in said


@pytest.mark.parametrize("handler", ["signal.SIG_IGN", "lambda *_: sys.exit(7)"])
def test_a_publisher_that_does_not_listen_is_killed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, handler: str
) -> None:
    """One that ignores SIGTERM ends at the limit; one that heeds it ends by itself; neither is left behind."""
    settings.home.mkdir(parents=True)
    script = f"import signal, sys, time; signal.signal(signal.SIGTERM, {handler}); print(1, flush=True); time.sleep(60)"
    log = settings.home / "publisher.log"
    monkeypatch.setattr(run, "END_SECONDS", 1.0)
    monkeypatch.setattr(run, "COMMAND", (sys.executable, "-c", script))
    with Outbox(settings.outbox) as box, run.publishing(box, "quick", settings, lambda: False):
        until(lambda: log.exists() and log.read_text() == "1\n")
        begun = [child for child in psutil.Process().children() if script in child.cmdline()]
        since = time.monotonic()
    assert time.monotonic() - since < 10
    assert begun
    assert not [process for process in begun if process.is_running()]


@pytest.mark.long
def test_other_homes_take_a_study_over(new_home: Home, tmp_path: Path, calm: Calms, figures: Figures) -> None:
    """What a dead home had begun is begun anew, under runs of their own: no point is lost, and none shown twice."""
    settings, path = new_home("home"), study_file(tmp_path, **SIX)
    points = ("recorded:1", "curves:2", "told:1")
    for point in points:
        home = replace(settings, home=tmp_path / point)
        runner = sieve(home, "launch", path, "--workers", "2", slices=AN_EPOCH, SIEVE_FAILPOINT=point)
        said = finish(runner)
        assert runner.returncode == -signal.SIGKILL, (point, said)
        send(home)
    last = sieve(settings, "launch", path, "--workers", "2", slices=AN_EPOCH)
    said = finish(last)
    assert last.returncode == 0, said
    left = [t for t in trials(settings, "quick") if t.state.name == "FAIL"]
    assert len(left) >= len(points)
    assert {t.user_attrs["reason"] for t in left} == {"its runner is gone, and its checkpoint with it"}
    found = verdict(settings, "quick", calm(**SIX).results, settings.home / "mlflow.db")
    figures("other homes take over", found, len(points), also=f"{len(left)} trials were begun anew")


@pytest.mark.long
def test_everything_may_die_at_once(new_home: Home, tmp_path: Path, calm: Calms, figures: Figures) -> None:
    """Runner, workers and publisher are killed together, as in a power cut, three times."""
    settings, path = new_home("home"), study_file(tmp_path, **SIX)
    recoveries = []
    for _ in range(3):
        runner = sieve(settings, "launch", path, "--workers", "2", slices=AN_EPOCH)
        recoveries.append(seconds_to_the_next_slice(settings, runner))
        for process in family(runner.pid):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        runner.communicate()
    last = sieve(settings, "launch", path, "--workers", "2")
    said = finish(last)
    assert last.returncode == 0, said
    send(settings)
    found = verdict(settings, "quick", calm(**SIX).results, settings.home / "mlflow.db")
    figures("all processes killed at once", found, len(recoveries), max(recoveries[1:]))


@pytest.mark.long
def test_of_many_runners_started_at_once_one_runs(
    settings: Settings, tmp_path: Path, calm: Calms, figures: Figures
) -> None:
    """Four runners, and a new home each time they race for: one makes the tables and runs; the others say who does."""
    path, rounds = study_file(tmp_path, **SIX), 3
    for n in range(rounds):
        home = replace(settings, home=settings.home / str(n), storage=f"sqlite:///{settings.home}/{n}/sieve.db")
        runners = [sieve(home, "launch", path, *QUIETLY) for _ in range(4)]
        ends = [(finish(runner), runner.returncode) for runner in runners]
        assert sorted(code for _, code in ends) == [0, 2, 2, 2], ends
        assert all(
            "is being run by another process" in said and len(said.splitlines()) == 1 for said, code in ends if code
        )
        found = verdict(home, "quick", calm(**SIX).results)
        assert not any(found), found
    figures("four runners at once, an empty home", found, rounds)


@pytest.mark.long
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_the_budget_is_exact(settings: Settings, tmp_path: Path, calm: Calms, figures: Figures, count: int) -> None:
    """A hundred trials are a hundred results, numbered without a gap, for any number of workers."""
    parts = {"search": {"method": "random", "trials": 100}, "base": {"batch_size": 50, "epochs": 2}, "confirm": False}
    said = finish(
        runner := sieve(settings, "launch", study_file(tmp_path, **parts), "--workers", str(count), "--no-publish")
    )
    assert runner.returncode == 0, said
    assert [trial.number for trial in trials(settings, "quick")] == list(range(100))
    figures(f"exact budget, {count} workers", verdict(settings, "quick", calm(**parts).results), also="100 of 100")


@pytest.mark.long
def test_a_trial_without_memory_fails_alone(settings: Settings, tmp_path: Path, calm: Calms, figures: Figures) -> None:
    """A network that no memory holds, or a batch larger than the data, fails with its reason; the others are done."""
    fine = [{"hidden_sizes": [size], "batch_size": 20} for size in (8, 16)]
    wrong = [{"hidden_sizes": [100_000, 100_000], "batch_size": 20}, {"hidden_sizes": [8], "batch_size": 500}]
    parts: dict[str, Any] = {"base": {"epochs": 3}, "space": {}, "confirm": False}
    parts["search"] = {"method": "list", "settings": fine + wrong}
    limited = ["bash", "-c", 'ulimit -v 16000000; exec "$@"', "-"]  # 100,000 x 100,000 weights are 40 GB
    runner = sieve(settings, "launch", study_file(tmp_path, **parts), *QUIETLY, before=limited)
    said = finish(runner)
    assert runner.returncode == 0, said
    failed = {t.user_attrs["slot"]: t.user_attrs["reason"] for t in trials(settings, "quick") if t.state.name == "FAIL"}
    assert sorted(failed) == ["s0.i2.r0", "s0.i3.r0"]
    assert "cannot be trained: Unable to allocate" in failed["s0.i2.r0"]
    assert "expected at most the 300 training examples, got 500" in failed["s0.i3.r0"]
    parts["search"] = {"method": "list", "settings": fine}
    figures(
        "a trial without memory", verdict(settings, "quick", calm(**parts).results), also="it fails, with its reason"
    )


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_study_ends_though_somebody_dies_every_few_seconds(new_home: Home, tmp_path: Path, figures: Figures) -> None:
    """Every 1 to 5 s the runner, a worker or the publisher is killed, and a runner started again, until 40 trials end.

    That takes at most half as long again as without, beside a start for each runner or worker that was killed.
    """
    parts = SIX | {"search": {"method": "random", "trials": 40}, "base": {"batch_size": 5, "epochs": 400}}
    path, chance = study_file(tmp_path, **parts), random.Random(3)

    def start(settings: Settings) -> subprocess.Popen[str]:
        return sieve(settings, "launch", path, "--workers", "2", slices=0.3, patience=0)

    since = time.monotonic()
    calm = new_home("calm")
    finish(start(calm))
    undisturbed = time.monotonic() - since
    settings = new_home("home")
    killed, since = Counter[str](), time.monotonic()
    runner = start(settings)
    starting = seconds_to_the_next_slice(settings, runner)
    while True:
        with suppress(subprocess.TimeoutExpired):
            runner.wait(chance.uniform(1, 5))
            break
        kinds = {
            "runner": [psutil.Process(runner.pid)],
            "worker": workers(runner.pid),
            "publisher": publisher(runner.pid),
        }
        who, victim = chance.choice([(who, one) for who, found in kinds.items() for one in found])
        with suppress(psutil.NoSuchProcess):
            victim.kill()
            killed[who] += 1
        if who == "runner":
            runner.communicate()
            runner = start(settings)
    took = time.monotonic() - since
    said = finish(runner)
    assert runner.returncode == 0, said
    send(settings)
    found = verdict(settings, "quick", results(calm, "quick"), settings.home / "mlflow.db")
    ratio = (took - starting * (killed["runner"] + killed["worker"])) / undisturbed
    also = f"{', '.join(f'{n} x {who}' for who, n in killed.items())}; {ratio:.2f} of the calm time beside starts"
    figures("somebody killed every 1 to 5 s", found, killed.total(), starting, also)
    assert killed.total() >= 5
    assert ratio < 1.5
