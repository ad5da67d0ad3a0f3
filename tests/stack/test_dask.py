"""A Dask cluster as the executor: a real scheduler and real workers, which come, go and die."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest

from search import run
from search import runner as runner_
from search.errors import DataError, SettingsError
from search.outcome import open_study
from search.runner import Runner
from search.settings import Settings
from search.study import StudySpec
from tests import failing
from tests.oracle import results, verdict
from tests.stack.conftest import Cluster, free_port
from tests.test_run import slow, values

distributed = pytest.importorskip("distributed", reason="needs Dask: pip install distributed")
pytestmark = [pytest.mark.stack, pytest.mark.filterwarnings("ignore::ResourceWarning")]

Spec = Callable[..., StudySpec]
Home = Callable[..., Settings]
launch = partial(run.launch, publish=False)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    folder = tmp_path / "cluster"
    folder.mkdir()
    cluster = Cluster(folder)
    yield cluster
    cluster.close()


def test_a_cluster_gives_the_same_values(home: Home, cluster: Cluster, quick: Spec) -> None:
    """Three workers elsewhere, without credentials, give what local ones do, bit for bit."""
    for _ in range(3):
        cluster.add()
    spec = quick(search={"method": "coarse-to-fine", "stages": 2, "trials_per_stage": 4}, confirm=False)
    launch(spec, home("local"), workers=2)
    launch(spec, home("dask", SIEVE_EXECUTOR=cluster.address))
    assert values(home("dask")) == values(home("local"))


@pytest.mark.fault
def test_workers_may_die_and_come(home: Home, cluster: Cluster, quick: Spec, figures: Callable[..., None]) -> None:
    """One worker is killed in its slice, a whole host is, and another joins: the values stay undisturbed."""
    spec = quick(**slow(base={"batch_size": 5, "epochs": 50, "hidden_sizes": [60]}))
    launch(spec, home("local"), workers=2)
    first, second = cluster.add(), cluster.add()

    def disturb() -> None:
        time.sleep(2.5)
        for process in cluster.processes(first):
            process.kill()
        cluster.add()
        time.sleep(2.5)
        for process in [*cluster.processes(second), psutil.Process(second.pid)]:
            process.kill()

    disturber = threading.Thread(target=disturb)
    settings = home("dask", SIEVE_EXECUTOR=cluster.address)
    launch(spec, settings, started=lambda runner: disturber.start())
    disturber.join()
    figures("Dask: a worker and a host killed, one joins", verdict(settings, "quick", results(home("local"), "quick")))


@pytest.mark.fault
def test_a_study_waits_for_workers_and_for_its_scheduler(
    home: Home, cluster: Cluster, quick: Spec, figures: Callable[..., None]
) -> None:
    """With no worker it waits; a scheduler that dies and comes back, with new workers, costs a slice at most."""
    spec = quick(**slow(base={"batch_size": 5, "epochs": 30, "hidden_sizes": [60]}))
    launch(spec, home("local"), workers=2)
    said: list[str] = []
    disturbed: list[Future[None]] = []

    def disturb(runner: Runner) -> None:
        time.sleep(1.5)
        gone = cluster.add()
        while not runner.flying:
            time.sleep(0.1)
        time.sleep(0.5)
        cluster.scheduler.kill()
        cluster.scheduler.wait()
        cluster.start()
        cluster.add()
        gone.wait(30)

    settings = home("dask", SIEVE_EXECUTOR=cluster.address)
    disturber = ThreadPoolExecutor(1)
    launch(spec, settings, warn=said.append, started=lambda runner: disturbed.append(disturber.submit(disturb, runner)))
    disturbed[0].result()
    assert any("no worker" in line for line in said)
    figures("Dask: scheduler killed", verdict(settings, "quick", results(home("local"), "quick")))


@pytest.mark.fault
def test_a_slot_that_kills_three_workers_fails_alone(
    home: Home, cluster: Cluster, quick: Spec, figures: Callable[..., None]
) -> None:
    """The slot that kills whoever trains it fails with that reason; its company, and the rest, is done."""
    points = [{"eta": eta} for eta in (0.1, 0.2, 0.3, 0.4)]
    spec = quick(search={"method": "list", "settings": points}, space={}, confirm=False)
    for _ in range(2):
        cluster.add(SIEVE_FAILPOINT="eta=0.3")
    settings = home("dask", SIEVE_EXECUTOR=cluster.address)
    outcome = launch(spec, settings)
    attempts = {a.params["eta"]: a for a in open_study("quick", settings).attempts()}
    assert {eta: a.state.name for eta, a in attempts.items()} == {
        0.1: "COMPLETE",
        0.2: "COMPLETE",
        0.3: "FAIL",
        0.4: "COMPLETE",
    }
    assert "its worker died 3 times" in attempts[0.3].attrs["reason"]
    assert outcome.failed == 1
    launch(spec, home("local"), workers=1)
    others = results(home("local"), "quick")
    others.pop(str(attempts[0.3].slot))
    figures(
        "Dask: a slot that kills its worker", verdict(settings, "quick", others), 3, also="it fails, with its reason"
    )


def test_each_host_opens_its_own_copy_and_vouches_for_it(
    home: Home, cluster: Cluster, quick: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker finds the file in its own data folder; a host with other data stops the study, and is named."""
    rng = np.random.default_rng(0)
    x, y = rng.random((60, 5), dtype=np.float32), rng.integers(0, 3, 60)
    for name, pixels in (("here", x), ("same", x), ("other", x + 1)):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "own.npz", x=pixels, y=y)
    monkeypatch.chdir(tmp_path / "here")

    def far_away(_: object) -> None:
        """On other hosts that file is not there."""
        (tmp_path / "here" / "own.npz").rename(tmp_path / "kept.npz")

    spec = quick(
        dataset={"name": "npz", "path": "own.npz", "validation": 10, "test": 10},
        base={"batch_size": 10, "epochs": 2},
        search={"method": "random", "trials": 2},
        confirm=False,
    )
    good = cluster.add(SIEVE_DATA_DIR=str(tmp_path / "same"))
    launch(spec, home("good", SIEVE_EXECUTOR=cluster.address), started=far_away)
    (tmp_path / "kept.npz").rename(tmp_path / "here" / "own.npz")
    for process in [*cluster.processes(good), psutil.Process(good.pid)]:
        process.kill()
    cluster.add(SIEVE_DATA_DIR=str(tmp_path / "other"))
    settings = home("bad", SIEVE_EXECUTOR=cluster.address)
    with pytest.raises(DataError, match=r"worker .*: its copy of npz is another one"):
        launch(spec, settings, started=far_away)
    assert {a.state.name for a in open_study("quick", settings).attempts()} == {"RUNNING"}


def test_no_scheduler_is_said_at_once(home: Home, quick: Spec) -> None:
    """An address where nothing answers is a wrong setting, named with what to do."""
    settings = home("dask", SIEVE_EXECUTOR=f"dask://127.0.0.1:{free_port()}")
    with pytest.raises(SettingsError, match="no Dask scheduler answers"):
        launch(quick(), settings)


def test_a_finished_study_needs_no_worker(home: Home, cluster: Cluster, quick: Spec) -> None:
    """Launched again on a cluster that was scaled to nothing, it ends at once and shows what it came to."""
    spec = quick(search={"method": "random", "trials": 2}, confirm=False)
    settings = home("dask", SIEVE_EXECUTOR=cluster.address)
    worker = cluster.add()
    first = launch(spec, settings)
    for process in [*cluster.processes(worker), psutil.Process(worker.pid)]:
        process.kill()
    said: list[str] = []

    def not_for_ever(runner: Runner) -> None:
        timer = threading.Timer(20, runner.stop)
        timer.daemon = True
        timer.start()

    assert launch(spec, settings, started=not_for_ever, warn=said.append).chosen == first.chosen
    assert said == []


def test_why_a_trial_failed_elsewhere_is_one_line(
    home: Home, cluster: Cluster, quick: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker of a cluster says type and message of whatever was raised, as a local one does."""
    monkeypatch.setattr(runner_, "advance_elsewhere", failing.advance_elsewhere_or_fail)
    cluster.add(PYTHONPATH=str(Path(failing.__file__).parent.parent))
    points = [{"eta": eta} for eta in (0.1, *failing.ERRORS)]
    settings = home("dask", SIEVE_EXECUTOR=cluster.address)
    launch(quick(search={"method": "list", "settings": points}, space={}, confirm=False), settings)
    found = {a.params["eta"]: a.attrs.get("reason") for a in open_study("quick", settings).attempts()}
    assert found == {0.1: None} | {eta: line for eta, (_, line) in failing.ERRORS.items()}
