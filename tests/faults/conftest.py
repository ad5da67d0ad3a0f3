"""Studies to disturb, and what becomes of them when nothing does."""

import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from search.settings import Settings
from tests.oracle import Results, results
from tests.processes import finish, sieve, study_file

# Six trials that train for some seconds, in 360 slices if each is AN_EPOCH.
SIX: dict[str, Any] = {
    "base": {"batch_size": 5, "epochs": 60, "hidden_sizes": [60]},
    "space": {"eta": {"low": 1e-4, "high": 1e-2, "log": True}},
    "search": {"method": "random", "trials": 6},
    "confirm": False,
}


class Calm(NamedTuple):
    """A study that ran undisturbed."""

    results: Results
    seconds: float  # of the whole command


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Calm]:
    """Runs a study (QUICK with some parts replaced) where nothing happens, once; its name does not matter."""
    known: dict[str, Calm] = {}

    def run(**parts: Any) -> Calm:
        key = json.dumps(parts, sort_keys=True)
        if key not in known:
            folder = tmp_path_factory.mktemp("calm")
            settings, since = Settings.from_environment({"SIEVE_HOME": str(folder / "home")}), time.monotonic()
            launched = sieve(settings, "launch", study_file(folder, **parts), "--workers", "2", "--no-publish")
            said = finish(launched)
            assert launched.returncode == 0, said
            known[key] = Calm(results(settings, "quick"), time.monotonic() - since)
        return known[key]

    return run
