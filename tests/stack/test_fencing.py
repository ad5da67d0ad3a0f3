"""A study has one runner: who was away while another took it writes nothing more, whatever it remembers."""

import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest

from search.settings import Settings
from tests.oracle import Results, results, studies, trials, verdict
from tests.processes import AN_EPOCH, await_slices, family, finish, run, sieve, study_file
from tests.servers import until
from tests.stack.conftest import execute
from tests.stack.test_storage_faults import CUT, SIX, database

pytestmark = [pytest.mark.stack, pytest.mark.fault, pytest.mark.slow, pytest.mark.long]

Home = Callable[..., Settings]

QUIETLY = ("--workers", "2", "--no-publish")
PRUNERS: dict[str, dict[str, Any]] = {
    "no pruner": {},
    "a barrier": {"pruner": {"method": "successive-halving", "barrier": True, "least": 20}},
}
HOLDERS = (
    "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted AND "
    "database = (SELECT oid FROM pg_database WHERE datname = '{name}')"
)


@pytest.fixture(params=PRUNERS)
def parts(request: pytest.FixtureRequest) -> dict[str, Any]:
    """SIX, and how its trials are pruned."""
    return SIX | PRUNERS[request.param]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], Results]:
    """A study of these parts when nothing happens, on SQLite."""
    known: dict[str, Results] = {}

    def results_of(parts: dict[str, Any]) -> Results:
        if str(parts) not in known:
            folder = tmp_path_factory.mktemp("calm")
            settings = Settings.from_environment({"SIEVE_HOME": str(folder / "home")})
            run(settings, "launch", study_file(folder, **parts), *QUIETLY)
            known[str(parts)] = results(settings, "quick")
        return known[str(parts)]

    return results_of


def holds_a_file(settings: Settings) -> bool:
    """Whether a transaction of the runner's is open on a file, which nobody else could write before it wakes."""
    files = [settings.outbox]
    if settings.storage.startswith("sqlite"):
        files.append(Path(settings.storage.removeprefix("sqlite:///")))
    for file in files:
        try:
            with closing(sqlite3.connect(file, timeout=0)) as db:
                db.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return True
    return False


class Away:
    """A runner in the midst of a study, suspended with all its family; nothing says any more that it owns the study."""

    def __init__(self, settings: Settings, file: Path) -> None:
        self.settings = settings
        self.process = sieve(settings, "launch", file, *QUIETLY, slices=AN_EPOCH)
        await_slices(settings, self.process, 3)
        while True:
            self.family = family(self.process.pid)
            for one in self.family:
                one.suspend()
            if not holds_a_file(settings):
                break
            self.resume()
            time.sleep(0.05)
        if settings.storage.startswith("sqlite"):
            shutil.rmtree(Path(settings.storage.removeprefix("sqlite:///")).parent / "locks")
        else:
            execute(settings.storage.rpartition("/")[0] + "/postgres", CUT.format(name=database(settings)))

    def resume(self) -> None:
        for one in reversed(self.family):
            with suppress(psutil.NoSuchProcess):
                one.resume()

    def wake(self) -> str:
        """The one line that it says then, beside how it got on and what it waited for; it ends, and not with 0."""
        self.resume()
        said = finish(self.process)
        assert self.process.returncode in (1, 2), said
        assert "Traceback" not in said, said
        lines = [line for line in said.splitlines() if " | " not in line and not line.endswith("waiting for it")]
        assert len(lines) == 1, said
        assert "quick" in lines[0]
        return lines[0]


@pytest.fixture
def suspend() -> Iterator[Callable[[Settings, Path], Away]]:
    """Begins a runner and suspends it; whatever fails, none is left behind."""
    begun: list[Away] = []

    def begin(settings: Settings, file: Path) -> Away:
        begun.append(Away(settings, file))
        return begun[-1]

    yield begin
    for away in begun:
        for one in away.family:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        away.process.communicate()


def everything(settings: Settings) -> list[Any]:
    """All that the storage holds of the study."""
    attrs, stored = studies(settings)["quick"]
    return [attrs, *stored]


@pytest.mark.parametrize("whose", ["another home", "its own home"])
def test_who_wakes_when_another_has_finished_the_study_writes_nothing(
    storage: str, home: Home, tmp_path: Path, parts: dict[str, Any], calm: Any, figures: Any, suspend: Any, whose: str
) -> None:
    """Suspended, its lock lost, the study finished by another runner: the first one wakes and ends with one line."""
    file = study_file(tmp_path, **parts)
    one = home("one", SIEVE_STORAGE=storage)
    two = home("two", SIEVE_STORAGE=storage) if whose == "another home" else one
    away = suspend(one, file)
    run(two, "launch", file, *QUIETLY)
    before = everything(two)
    away.wake()
    assert everything(two) == before
    figures("runner away while another finished", verdict(two, "quick", calm(parts)), 4, also="exit not 0, one line")


def test_who_wakes_while_another_runs_the_study_leaves_it_alone(
    storage: str, home: Home, tmp_path: Path, parts: dict[str, Any], calm: Any, figures: Any, suspend: Any
) -> None:
    """Suspended, its lock lost, another home at it: the first one wakes and ends, the other goes on."""
    file = study_file(tmp_path, **parts)
    one, two = home("one", SIEVE_STORAGE=storage), home("two", SIEVE_STORAGE=storage)
    away = suspend(one, file)
    other = sieve(two, "launch", file, *QUIETLY, slices=AN_EPOCH)
    await_slices(two, other, 2)
    away.wake()
    said = finish(other)
    assert other.returncode == 0, said
    figures("runner away while another runs", verdict(two, "quick", calm(parts)), 4, also="exit not 0, one line")


def test_who_comes_back_goes_on_if_nobody_took_the_study(
    storage: str, home: Home, tmp_path: Path, calm: Any, figures: Any, suspend: Any
) -> None:
    """Suspended and its lock lost, but nobody came: it goes on to the end, or another launch does."""
    file = study_file(tmp_path, **SIX)
    settings = home(SIEVE_STORAGE=storage)
    away = suspend(settings, file)
    away.resume()
    said = finish(away.process)
    if away.process.returncode:
        assert "Traceback" not in said
        run(settings, "launch", file, *QUIETLY)
    figures("runner away, nobody else came", verdict(settings, "quick", calm(SIX)), 2)


def test_a_study_deleted_under_its_runner_ends_it(
    storage: str, home: Home, tmp_path: Path, calm: Any, suspend: Any
) -> None:
    """Deleted and launched anew by another home while it was away: the first one touches nothing of the new study."""
    file = study_file(tmp_path, **SIX)
    one, two = home("one", SIEVE_STORAGE=storage), home("two", SIEVE_STORAGE=storage)
    away = suspend(one, file)
    opened = optuna.storages.RDBStorage(storage)
    optuna.delete_study(study_name="quick", storage=opened)
    opened.engine.dispose()
    run(two, "launch", file, *QUIETLY)
    before = everything(two)
    away.wake()
    assert everything(two) == before
    assert not any(verdict(two, "quick", calm(SIX)))


def test_only_the_lock_is_cut(
    new_database: Callable[[], str], home: Home, tmp_path: Path, parts: dict[str, Any], calm: Any, figures: Any
) -> None:
    """The connection that holds the lock is cut, again and again: the runner takes it back, or ends with one line."""
    file = study_file(tmp_path, **parts)
    settings = home(SIEVE_STORAGE=new_database())
    server = settings.storage.rpartition("/")[0] + "/postgres"
    runner, cut = sieve(settings, "launch", file, *QUIETLY, slices=AN_EPOCH), 0
    for _ in range(3):
        await_slices(settings, runner, 1)
        holders = execute(server, HOLDERS.format(name=database(settings)))
        cut += sum(len(execute(server, f"SELECT pg_terminate_backend({pid})")) for (pid,) in holders)
    said = finish(runner)
    assert cut >= 3
    if runner.returncode:
        assert "Traceback" not in said, said
        assert "quick" in said.splitlines()[-1]
        run(settings, "launch", file, *QUIETLY)
    figures("only the lock's connection cut", verdict(settings, "quick", calm(parts)), cut)


def test_the_lock_is_cut_and_another_takes_it(
    new_database: Callable[[], str], home: Home, tmp_path: Path, calm: Any, figures: Any
) -> None:
    """The lock's connection is cut while the runner goes on and another home wants the study: one of them runs it."""
    file = study_file(tmp_path, **SIX)
    storage = new_database()
    one, two = home("one", SIEVE_STORAGE=storage), home("two", SIEVE_STORAGE=storage)
    server = storage.rpartition("/")[0] + "/postgres"
    runner = sieve(one, "launch", file, *QUIETLY, slices=AN_EPOCH)
    await_slices(one, runner, 2)
    others: list[subprocess.Popen[str]] = []
    for _ in range(3):
        others.append(sieve(two, "launch", file, *QUIETLY, slices=AN_EPOCH))
        until(lambda: others[-1].poll() is not None or bool(cut(server, storage)), 30)
    ends = [(finish(process), process.returncode) for process in (runner, *others)]
    assert all("Traceback" not in said for said, _ in ends), ends
    run(one, "launch", file, *QUIETLY)
    done = [t.user_attrs["slot"] for t in trials(one, "quick") if t.state.name in ("COMPLETE", "PRUNED")]
    assert sorted(done) == sorted(calm(SIX))
    assert results(one, "quick") == calm(SIX)


def cut(server: str, storage: str) -> list[Any]:
    """Cut the connections that hold locks in a database."""
    holders = execute(server, HOLDERS.format(name=storage.rpartition("/")[2]))
    return [execute(server, f"SELECT pg_terminate_backend({pid})") for (pid,) in holders]
