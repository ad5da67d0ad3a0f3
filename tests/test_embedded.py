"""The embedded MLflow's database: whole or not there, up to date, and at home where the home is."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

import filelock
import pytest

from search import embedded, tracking
from search.errors import SieveError
from search.outbox import Outbox
from search.settings import Settings
from tests.servers import until
from tests.test_tracking import OLD_LOADER, begun, experiments, follower, mlflow_client, put, runs, trial

pytestmark = pytest.mark.filterwarnings(f"{OLD_LOADER}:sqlalchemy.exc.SADeprecationWarning")

PREPARE = """
from search import embedded
from search.settings import Settings
embedded.prepare(Settings.from_environment())
"""


def tables(path: Path) -> set[str]:
    with closing(sqlite3.connect(path)) as database:
        return {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def revision(path: Path) -> str:
    with closing(sqlite3.connect(path)) as database:
        return str(database.execute("SELECT version_num FROM alembic_version").fetchone()[0])


def spoil(path: Path) -> None:
    """As an older Sieve left it that was ended within an update of the tables."""
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE _alembic_tmp_runs (run_uuid TEXT)")
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_who_is_ended_while_the_tables_are_made_leaves_no_half_of_them(
    settings: Settings, number: signal.Signals, new_mlflow: Path
) -> None:
    """Whenever it happens: the next publisher makes them, and everything is sent."""
    put(settings, begun(), *trial(0))
    for delay in (0.0, 0.3, 1.0):
        publisher = follower(settings, os.getpid())
        until(lambda: any(path.stat().st_size for path in settings.home.glob("*mlflow.db*")) or publisher.poll() == 0)  # noqa: B023
        time.sleep(delay)
        publisher.send_signal(number)
        publisher.communicate()
        assert not (settings.home / "mlflow.db").exists() or revision(settings.home / "mlflow.db") == revision(
            new_mlflow
        )
        for path in settings.home.glob("mlflow.db"):
            path.unlink()
        tracking.redo(settings)
    assert tracking.publish(settings) == 0
    assert revision(settings.home / "mlflow.db") == revision(new_mlflow)
    assert [run.info.status for run in runs(settings.tracking_uri)] == ["FINISHED"]


@pytest.mark.slow
def test_two_that_begin_at_once_make_the_tables_once(settings: Settings, new_mlflow: Path) -> None:
    """Both succeed, and the file that the first has put there stays."""
    environment = os.environ | {"SIEVE_HOME": str(settings.home)}
    both = [subprocess.Popen([sys.executable, "-c", PREPARE], env=environment) for _ in range(2)]
    path = settings.home / "mlflow.db"
    until(path.exists)
    first = path.stat().st_ino
    assert [process.wait() for process in both] == [0, 0]
    assert path.stat().st_ino == first
    assert tables(path) == tables(new_mlflow)


@pytest.mark.slow
def test_tables_left_half_made_by_an_older_version_are_made_anew(new_home: Callable[[str], Settings]) -> None:
    """Nobody has a run in them: the file is replaced, and everything is sent."""
    home = new_home("home")
    spoil(home.home / "mlflow.db")
    put(home, begun(), *trial(0))
    assert tracking.publish(home) == 0
    assert "_alembic_tmp_runs" not in tables(home.home / "mlflow.db")
    assert [run.info.status for run in runs(home.tracking_uri)] == ["FINISHED"]


def test_tables_left_half_made_that_hold_runs_are_told_of(new_home: Callable[[str], Settings]) -> None:
    """One line says which file, why, and what to do; nothing is waited for, and the file stays as it is."""
    home = new_home("home")
    put(home, begun(), *trial(0)[:1])
    assert tracking.publish(home) == 0
    assert embedded.complaint(home) is None
    spoil(home.home / "mlflow.db")
    before = (home.home / "mlflow.db").read_bytes()
    put(home, *trial(0)[1:])
    said: list[str] = []
    since = time.monotonic()
    assert tracking.publish(home, warn=said.append) == 5
    assert time.monotonic() - since < 10
    assert said == [embedded.complaint(home)]
    for words in (str(home.home / "mlflow.db"), "move it away", "`sieve sync --redo`"):
        assert words in said[0]
    assert (home.home / "mlflow.db").read_bytes() == before


def test_a_file_that_is_no_database_is_told_of(settings: Settings) -> None:
    """It stays, and one line says what to do."""
    settings.home.mkdir()
    (settings.home / "mlflow.db").write_text("not a database" * 100)
    with pytest.raises(SieveError, match=r"mlflow\.db: file is not a database; move it away"):
        embedded.prepare(settings)
    assert (settings.home / "mlflow.db").read_text() == "not a database" * 100


OLDER = """
import sys
from alembic import command
from mlflow.store.db.utils import InitialBase, _get_alembic_config, create_sqlalchemy_engine_with_retry
engine = create_sqlalchemy_engine_with_retry(f"sqlite:///{sys.argv[1]}")
InitialBase.metadata.create_all(engine)
config = _get_alembic_config(str(engine.url))
with engine.begin() as connection:
    config.attributes["connection"] = connection
    command.upgrade(config, "acf3f17fdcc7")
"""


@pytest.mark.slow
def test_tables_of_an_older_mlflow_are_brought_up_to_date(settings: Settings, new_mlflow: Path) -> None:
    """With what they hold."""
    settings.home.mkdir()
    path = settings.home / "mlflow.db"
    subprocess.run([sys.executable, "-c", OLDER, str(path)], check=True, capture_output=True)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(
            "INSERT INTO experiments (experiment_id, name, artifact_location, lifecycle_stage)"
            " VALUES (7, 'theirs', 'file:///theirs', 'active')"
        )
    put(settings, begun(), *trial(0))
    assert tracking.publish(settings) == 0
    assert revision(path) == revision(new_mlflow)
    assert sorted(experiments(settings.tracking_uri)) == ["digits", "theirs"]


# ---- homes that are moved and copied

SEND = """
from search import tracking
from search.settings import Settings
assert tracking.publish(Settings.from_environment()) == 0
"""


def send(settings: Settings) -> None:
    """Publish in a process of its own, as always: a client of MLflow's remembers where a run's files are."""
    environment = os.environ | {"SIEVE_HOME": str(settings.home), "MLFLOW_TRACKING_URI": settings.tracking_uri}
    subprocess.run([sys.executable, "-c", SEND], env=environment, check=True)


def stored(settings: Settings) -> list[list[str]]:
    """The names of the files in the folder that each run names."""
    folders = [Path(unquote(urlsplit(run.info.artifact_uri).path)) for run in runs(settings.tracking_uri)]
    return [sorted(path.name for path in folder.rglob("*") if path.is_file()) for folder in folders]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["elsewhere", "with a space, é and 100%25"])
def test_a_home_that_is_moved_shows_its_pictures(
    new_home: Callable[[str], Settings], tmp_path: Path, name: str
) -> None:
    """Those that were there, and those that come; the old folder is not made again."""
    home = new_home("home")
    put(home, begun(), *trial(0), *trial(1)[:3])
    assert tracking.publish(home) == 0
    before = stored(home)
    home.home.rename(tmp_path / name)
    database = str(tmp_path / name / "mlflow.db").replace("%", "%25")
    given = {"SIEVE_HOME": str(tmp_path / name), "MLFLOW_TRACKING_URI": f"sqlite:///{database}"}
    moved = Settings.from_environment(given)
    embedded.prepare(moved)
    assert stored(moved) == before
    put(moved, *trial(1)[3:])
    send(moved)
    assert all("weights.npz" in names for names in stored(moved))
    tracking.redo(moved)
    send(moved)
    assert all("weights.npz" in names for names in stored(moved))
    assert not home.home.exists()


@pytest.mark.slow
def test_a_home_that_is_copied_writes_into_its_own_artifacts(
    new_home: Callable[[str], Settings], tmp_path: Path
) -> None:
    """What it sends from now on does not appear in the folders of the one that was copied."""
    home = new_home("home")
    put(home, begun(), *trial(0)[:3])
    assert tracking.publish(home) == 0
    shutil.copytree(home.home, tmp_path / "copy")
    copy = Settings.from_environment({"SIEVE_HOME": str(tmp_path / "copy")})
    before = stored(home)
    put(copy, *trial(0)[3:])
    send(copy)
    assert stored(home) == before
    assert "weights.npz" in stored(copy)[0]
    assert len(list(copy.artifacts.rglob("weights.npz"))) == 1


def test_artifacts_of_others_stay_where_they_are(new_home: Callable[[str], Settings], tmp_path: Path) -> None:
    """An experiment that is not Sieve's, and one of another home that is still there."""
    home = new_home("home")
    client = mlflow_client(home.tracking_uri)
    theirs, gone = tmp_path / "other" / "artifacts" / "theirs", tmp_path / "gone" / "artifacts" / "x"
    theirs.mkdir(parents=True)
    (home.artifacts / "x").mkdir(parents=True)
    client.create_experiment("theirs", theirs.as_uri(), tags={"sieve.id": "theirs"})
    client.create_experiment("not ours", gone.as_uri())
    client.create_experiment("ours", gone.as_uri().replace("gone", "gone too"), tags={"sieve.id": "ours"})
    embedded.prepare(home)
    found = {e.name: e.artifact_location for e in client.search_experiments(filter_string="name != 'Default'")}
    assert found == {
        "theirs": theirs.as_uri(), "not ours": gone.as_uri(), "ours": (home.artifacts / "x").as_uri()
    }  # fmt: skip


# ---- the lock


def test_a_study_called_publisher_does_not_hold_up_the_publisher(new_home: Callable[[str], Settings]) -> None:
    """Its runner holds a lock of that name, wherever older versions kept it; records are sent meanwhile."""
    home = new_home("home")
    put(home, begun("publisher"))
    home.locks.mkdir()
    with filelock.FileLock(home.locks / "publisher.lock"):
        assert tracking.publish(home, timeout=1) == 0
    with Outbox(home.outbox) as box:
        assert box.unsent() == 0
