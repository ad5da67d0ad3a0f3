"""`sieve serve`: registered studies are run once, in their order, by however many services, across their deaths."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from search import run, serve
from search.outcome import open_study, standing
from search.settings import Settings
from search.study import StudySpec
from tests.stack.conftest import PASSWORD
from tests.test_run import slow, values

pytestmark = pytest.mark.stack

Spec = Callable[..., StudySpec]
Home = Callable[..., Settings]


@pytest.fixture
def home(home: Home, new_mlflow: Path) -> Home:
    """Homes whose MLflow database is ready."""

    def make(*words: str, **given: str) -> Settings:
        settings = home(*words, **given)
        settings.home.mkdir(exist_ok=True)
        shutil.copy(new_mlflow, settings.home / "mlflow.db")
        return settings

    return make


def service(settings: Settings, log: Path) -> subprocess.Popen[bytes]:
    """`sieve serve` in a process of its own."""
    environment = os.environ | {
        "SIEVE_HOME": str(settings.home),
        "SIEVE_STORAGE": settings.storage,
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, "-c", "from search.cli import app; app()", "serve", "--workers", "1"]
    with log.open("ab") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file)


def await_states(settings: Settings, wanted: dict[str, str], timeout: float = 90.0) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        rows = standing(settings)
        if {row["study"]: row["state"] for row in rows} == wanted:
            return
        time.sleep(0.3)
    raise AssertionError(rows)


LONG = slow(base={"batch_size": 5, "epochs": 60, "hidden_sizes": [60]}, search={"method": "random", "trials": 3})


def small(name: str, **parts: object) -> dict[str, object]:
    return {"name": name, "search": {"method": "random", "trials": 3}, "confirm": False} | parts


def test_two_services_share_studies_and_a_death_costs_nothing(
    home: Home, new_database: Callable[[], str], quick: Spec, tmp_path: Path
) -> None:
    """Three studies, two services, one of which is killed: each is done once, with undisturbed values."""
    settings = home("service", SIEVE_STORAGE=new_database())
    specs = [quick(**small("a")), quick(**LONG, name="b"), quick(**small("c"))]
    for spec in specs:
        assert "waits for `sieve serve`" in serve.enqueue(spec, settings)
        run.launch(spec, home("calm"), workers=1, publish=False)
    log = tmp_path / "log"
    services = [service(settings, log) for _ in range(2)]
    try:
        deadline = time.monotonic() + 60
        while "study 'b' is running" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(1.0)
        services[0].kill()
        await_states(settings, dict.fromkeys("abc", "done"))
        services[1].send_signal(signal.SIGTERM)
        assert services[1].wait(15) == 0
    finally:
        for process in services:
            process.kill()
            process.wait()
    for name in "abc":
        assert values(settings, name) == values(home("calm"), name)
    said = log.read_text()
    assert "Traceback" not in said
    assert PASSWORD not in said


def test_a_service_that_ends_leaves_its_study_to_the_next(home: Home, quick: Spec, tmp_path: Path) -> None:
    """SIGTERM saves what runs within ten seconds and queues the study; a stopped study is left alone."""
    settings, log = home(), tmp_path / "log"
    serve.enqueue(quick(**LONG, name="long"), settings)
    serve.enqueue(quick(**small("unwanted")), settings)
    assert "does not wait" in run.request("unwanted", "stop", settings)
    process = service(settings, log)
    while "is running" not in log.read_text():
        time.sleep(0.1)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    assert process.wait(12) == 0
    await_states(settings, {"long": "queued", "unwanted": "stopped"}, timeout=5)
    process = service(settings, log)
    try:
        await_states(settings, {"long": "done", "unwanted": "stopped"})
    finally:
        process.terminate()
        process.wait(15)
    assert {len(tries) for tries in values(settings, "long").values()} == {1}


def test_a_study_that_cannot_run_does_not_hold_up_the_others(home: Home, quick: Spec, tmp_path: Path) -> None:
    """A study without data is marked as failed with the reason, and the next one is run."""
    settings = home()
    own = tmp_path / "own.npz"
    np.savez(own, x=np.random.default_rng(0).random((60, 4)), y=np.arange(60) % 3)
    dataset = {"name": "npz", "path": str(own), "validation": 30}
    serve.enqueue(quick(**small("bad", dataset=dataset, base={"epochs": 1, "batch_size": 10})), settings)
    own.unlink()
    serve.enqueue(quick(**small("good")), settings)
    process = service(settings, tmp_path / "log")
    try:
        await_states(settings, {"bad": "failed", "good": "done"})
    finally:
        process.terminate()
        process.wait(15)
    assert f"{own}: no such file" in open_study("bad", settings).attrs["problem"]


def test_a_study_is_registered_once(home: Home, quick: Spec) -> None:
    """Registering the same study again is fine; another one under its name takes its place while it has no trial."""
    settings = home()
    serve.enqueue(quick(**small("a")), settings)
    serve.enqueue(quick(**small("a")), settings)
    serve.enqueue(quick(**small("a", seed=9)), settings)
    assert len(standing(settings)) == 1
    assert open_study("a", settings).spec.seed == 9
