"""The same seed gives the same trials, whoever trains them and however often they are interrupted."""

import json
import os
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from search import run
from search.samplers import NEEDS
from search.settings import Settings
from search.study import restore
from tests.conftest import QUICK
from tests.oracle import Results, results
from tests.servers import until

HALVING = {"method": "successive-halving", "least": 1, "reduction": 2, "barrier": True}
SETTINGS = [{"eta": eta, "lambda": 0.0} for eta in (1e9, 0.3, 0.1, 0.03)]  # the first diverges
METHODS: dict[str, dict[str, Any]] = {
    "coarse-to-fine": {"search": {"method": "coarse-to-fine", "stages": 3, "trials_per_stage": 4}},
    "growing": {
        "search": {"method": "coarse-to-fine", "stages": [{"trials": 4}, {"trials": 4, "base": {"epochs": 4}}]},
        "repeats": 2,
        "confirm": {"top": 2, "repeats": 1, "base": {"epochs": 5}},
    },
    "sobol": {"search": {"method": "random", "trials": 6}, "confirm": False},
    "uniform": {"search": {"method": "random", "trials": 6, "points": "uniform"}, "confirm": False, "repeats": 2},
    "grid": {"search": {"method": "grid", "points": 2}},
    "list": {"search": {"method": "list", "settings": SETTINGS}, "space": {}, "repeats": 2, "confirm": False},
    "rungs": {
        "search": {"method": "coarse-to-fine", "stages": 2, "trials_per_stage": 6},
        "pruner": HALVING,
        "base": {"batch_size": 50, "epochs": 4},
    },
    **{
        method: {"search": {"method": method, "trials": 12, "generation": 4}, "confirm": {"top": 1, "repeats": 2}}
        for method in ("tpe", "cmaes", "gp")
        if find_spec(NEEDS.get(method, "optuna"))
    },
}
SPECS = [QUICK | parts | {"name": name} for name, parts in METHODS.items()]

# All studies one after the other, in slices of an epoch.
LAUNCH = """
import json, pathlib, sys
from search import run, runner
from search.settings import Settings
from search.study import restore
runner.SLICE_SECONDS = 1e-6
for spec in json.loads(pathlib.Path(sys.argv[1]).read_text()):
    run.launch(restore(spec), Settings.from_environment(), workers=int(sys.argv[2]), publish=False)
"""

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Results]:
    """Every study by one worker, in whole slices."""
    settings = Settings.from_environment({"SIEVE_HOME": str(tmp_path_factory.mktemp("calm"))})
    for spec in SPECS:
        run.launch(restore(spec), settings, workers=1, publish=False)
    return {name: results(settings, name) for name in METHODS}


@pytest.fixture
def begin(settings: Settings, tmp_path: Path) -> Callable[[int], subprocess.Popen[bytes]]:
    """Launches all studies with so many workers, in a process of its own."""
    path = tmp_path / "specs.json"
    path.write_text(json.dumps(SPECS))
    environment = os.environ | {"SIEVE_HOME": str(settings.home)}
    return lambda workers: subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(path), str(workers)], env=environment, stderr=subprocess.PIPE
    )


def records(settings: Settings) -> int:
    """How much was recorded so far."""
    with (
        suppress(sqlite3.OperationalError),
        closing(sqlite3.connect(f"file:{settings.outbox}?mode=ro", uri=True)) as db,
    ):
        return int(db.execute("SELECT COUNT(*) FROM records").fetchone()[0])
    return 0


def kill_after(settings: Settings, runner: subprocess.Popen[bytes], records_: int, seconds: float) -> bool:
    """Kill the runner so many seconds after it has made so many records; whether it was still running then."""
    enough = records(settings) + records_
    until(lambda: records(settings) >= enough or runner.poll() is not None, 240)
    time.sleep(seconds)
    running = runner.poll() is None
    runner.kill()
    runner.communicate()
    return running


def disturb(settings: Settings, begin: Callable[[int], subprocess.Popen[bytes]], rng: random.Random, kills: int) -> int:
    """Kill the runner at so many random moments, then let it end; two, eight or one worker each time.

    Returns how often it was still running then.
    """
    workers = cycle([8, 2, 1])
    killed = sum(
        kill_after(settings, begin(next(workers)), rng.randint(1, 200), rng.uniform(0, 0.05)) for _ in range(kills)
    )
    finish(begin(next(workers)))
    return killed


def finish(runner: subprocess.Popen[bytes]) -> None:
    said = runner.communicate(timeout=600)[1]
    assert runner.returncode == 0, said.decode()


def test_the_same_seed_gives_the_same_trials(
    settings: Settings, begin: Callable[[int], subprocess.Popen[bytes]], undisturbed: dict[str, Results]
) -> None:
    """By any method, slots, parameters, curves and values are equal bit for bit, however often the runner is killed."""
    assert disturb(settings, begin, random.Random(1), kills=5) >= 3
    assert {name: results(settings, name) for name in METHODS} == undisturbed


@pytest.mark.parametrize("workers", [2, 8])
def test_the_number_of_workers_changes_no_trial(
    settings: Settings, begin: Callable[[int], subprocess.Popen[bytes]], undisturbed: dict[str, Results], workers: int
) -> None:
    """By any method, several workers bring forth what one does, bit for bit."""
    finish(begin(workers))
    assert {name: results(settings, name) for name in METHODS} == undisturbed


@pytest.mark.parametrize("seed", range(2, 5))
def test_other_moments_change_nothing_either(
    settings: Settings, begin: Callable[[int], subprocess.Popen[bytes]], undisturbed: dict[str, Results], seed: int
) -> None:
    """The same as above with a dozen kills at other moments."""
    disturb(settings, begin, random.Random(seed), kills=12)
    assert {name: results(settings, name) for name in METHODS} == undisturbed
