"""PostgreSQL dies, stands still, is cut off or full while a study runs: the runner waits and loses nothing."""

import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from search import run
from search.errors import StorageLost
from search.settings import Settings
from search.storage import open_storage
from search.study import restore
from tests.conftest import QUICK
from tests.oracle import DONE, Results, results, trials, verdict
from tests.processes import finish, seconds_to_the_next_slice, sieve, slices, study_file
from tests.servers import until
from tests.stack.conftest import PASSWORD, Gate, Postgres, execute
from tests.test_run import slow

pytestmark = [pytest.mark.stack, pytest.mark.fault, pytest.mark.slow]

SIX = slow(base={"batch_size": 5, "epochs": 60, "hidden_sizes": [60]}, search={"method": "random", "trials": 6})
CUT = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}' AND pid != pg_backend_pid()"

Home = Callable[..., Settings]
Begin = Callable[[Settings], subprocess.Popen[str]]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """SIX when nothing happens, on SQLite."""
    settings = Settings.from_environment({"SIEVE_HOME": str(tmp_path_factory.mktemp("calm"))})
    run.launch(restore(QUICK | SIX), settings, workers=2, publish=False)
    return results(settings, "quick")


@pytest.fixture
def begin(tmp_path: Path) -> Begin:
    """Launches SIX and waits until it is under way."""

    def launch(settings: Settings) -> subprocess.Popen[str]:
        path = study_file(tmp_path, **SIX)
        process = sieve(settings, "launch", path, "--workers", "2", "--no-publish", slices=0.3)
        until(lambda: slices(settings) >= 3 or process.poll() is not None)
        return process

    return launch


def database(settings: Settings) -> str:
    return settings.storage.rpartition("/")[2]


def ended(process: subprocess.Popen[str]) -> str:
    said = finish(process)
    assert process.returncode == 0, said
    assert PASSWORD not in said
    return said


def test_killed(
    home: Home, own_postgres: Postgres, new_database: Callable[[], str], begin: Begin, calm: Results, figures: Any
) -> None:
    """The server is killed twice and comes back two seconds later: each time training gets on, with the same values."""
    settings = home(SIEVE_STORAGE=new_database())
    process, recovery = begin(settings), 0.0
    for _ in range(2):
        own_postgres.kill()
        time.sleep(2)
        own_postgres.start()
        recovery = max(recovery, seconds_to_the_next_slice(settings, process))
    assert "does not answer" in ended(process)
    figures("PostgreSQL killed, back after 2 s", verdict(settings, "quick", calm), 2, recovery)


@pytest.mark.parametrize("seconds", [12, pytest.param(40, marks=pytest.mark.long)])
def test_standing_still(
    home: Home,
    own_postgres: Postgres,
    new_database: Callable[[], str],
    begin: Begin,
    calm: Results,
    figures: Any,
    seconds: int,
) -> None:
    """All processes of the server are frozen for longer than a connection may take: the runner waits for them."""
    settings = home(SIEVE_STORAGE=new_database())
    process = begin(settings)
    frozen = own_postgres.family()
    for one in frozen:
        one.suspend()
    time.sleep(seconds)
    assert process.poll() is None
    for one in frozen:
        one.resume()
    recovery = seconds_to_the_next_slice(settings, process)
    ended(process)
    figures(f"PostgreSQL frozen for {seconds} s", verdict(settings, "quick", calm), 1, recovery)


def test_connections_cut(
    home: Home, server_url: str, new_database: Callable[[], str], begin: Begin, calm: Results, figures: Any
) -> None:
    """All connections of the runner, its lock's among them, are cut again and again: it makes them anew."""
    settings = home(SIEVE_STORAGE=new_database())
    process, cut = begin(settings), 0
    while process.poll() is None:
        cut += len(execute(server_url, CUT.format(name=database(settings))))
        time.sleep(0.4)
    ended(process)
    assert cut > 2
    figures("PostgreSQL connections cut", verdict(settings, "quick", calm), also=f"{cut} connections cut")


def test_no_connection_left(
    home: Home, own_postgres: Postgres, new_database: Callable[[], str], begin: Begin, calm: Results, figures: Any
) -> None:
    """Others take the last connection while the runner's are cut: it waits until there is one, and says for what."""
    user, name = f"plain_{os.getpid()}", new_database().rpartition("/")[2]
    execute(own_postgres.url, f"CREATE ROLE {user} LOGIN PASSWORD '{PASSWORD}'")
    execute(own_postgres.url, f'ALTER DATABASE "{name}" OWNER TO {user}')
    server = own_postgres.url.replace("//postgres:", f"//{user}:").rpartition("/")[0]
    settings = home(SIEVE_STORAGE=f"{server}/{name}")
    process = begin(settings)
    engine = sqlalchemy.create_engine(own_postgres.url, isolation_level="AUTOCOMMIT", poolclass=sqlalchemy.NullPool)
    with ExitStack() as others:
        take_all(engine, others).execute(sqlalchemy.text(CUT.format(name=name)))
        take_all(engine, others)
        with pytest.raises(StorageLost, match=r"too many clients|connection slots"):
            open_storage(settings.storage)
        time.sleep(3)
        assert process.poll() is None
    recovery = seconds_to_the_next_slice(settings, process)
    said = ended(process)
    assert "does not answer" in said
    assert "too many clients" in said or "connection slots" in said
    figures("PostgreSQL has no connection left", verdict(settings, "quick", calm), 1, recovery)


def take_all(engine: sqlalchemy.Engine, stack: ExitStack) -> sqlalchemy.Connection:
    """Connect until the server takes no more; gives the first connection."""
    connections: list[sqlalchemy.Connection] = []
    with suppress(sqlalchemy.exc.OperationalError):
        while True:
            connections.append(stack.enter_context(engine.connect()))
    return connections[0]


def test_cut_off(
    home: Home, own_postgres: Postgres, new_database: Callable[[], str], begin: Begin, calm: Results, figures: Any
) -> None:
    """Nothing passes between the runner and the server for longer than a connection may take, then all is reset."""
    with closing(Gate(own_postgres.port)) as gate:
        settings = home(SIEVE_STORAGE=new_database().replace(f":{own_postgres.port}/", f":{gate.port}/"))
        process = begin(settings)
        gate.shut = True
        time.sleep(15)
        assert process.poll() is None
        gate.open()
        recovery = seconds_to_the_next_slice(settings, process)
        ended(process)
        figures("PostgreSQL cut off for 15 s", verdict(settings, "quick", calm), 1, recovery)


def test_two_homes_share_a_study(
    home: Home, new_database: Callable[[], str], begin: Begin, calm: Results, tmp_path: Path
) -> None:
    """Of two homes on one storage one runs the study; once it is killed, the other does: no slot is done twice."""
    storage = new_database()
    one, other = home("one", SIEVE_STORAGE=storage), home("other", SIEVE_STORAGE=storage)
    first = begin(one)
    refused = sieve(other, "launch", study_file(tmp_path, **SIX), "--no-publish")
    assert "is being run by another process" in finish(refused)
    assert refused.returncode == 2
    first.kill()
    first.communicate()
    ended(begin(other))
    assert results(other, "quick") == calm
    done = Counter(trial.user_attrs["slot"] for trial in trials(other, "quick") if trial.state.name in DONE)
    assert done == Counter(calm.keys())  # what the first had begun may have an attempt that was left
