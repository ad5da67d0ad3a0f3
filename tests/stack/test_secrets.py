"""A password in every address of a whole run: it is seen nowhere but in the environment."""

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import sqlalchemy

from search.settings import Settings
from tests.processes import sieve, study_file
from tests.servers import Server, free_port
from tests.stack.conftest import PASSWORD

pytestmark = [pytest.mark.stack, pytest.mark.fault, pytest.mark.slow, pytest.mark.long]

THREE = {"search": {"method": "random", "trials": 3}, "confirm": False}


@contextmanager
def watched_command_lines() -> Iterator[set[str]]:
    """The names of all processes seen meanwhile with the password in their command line."""
    found, over = set[str](), threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    if PASSWORD.encode() in path.read_bytes():
                        found.add(psutil.Process(int(path.parent.name)).name())
                except (OSError, psutil.Error):
                    continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()


def dumped(url: str) -> str:
    """Every row of every table of a database, as text."""
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
    tables = sqlalchemy.inspect(engine).get_table_names()
    assert "trials" in tables or "runs" in tables
    with engine.connect() as connection:
        return "".join(str(connection.execute(sqlalchemy.text(f'SELECT * FROM "{name}"')).all()) for name in tables)


def test_no_password_is_seen(new_database: Callable[[], str], new_mlflow: Path, tmp_path: Path) -> None:
    """In no answer, log, record, database, command line or file of a study, whether its servers answer or not."""
    shutil.copy(new_mlflow, tmp_path / "server.db")
    server = Server(tmp_path, free_port())
    server.start()
    storage = new_database()
    assert PASSWORD in storage
    uri = server.uri.replace("://", f"://sieve:{PASSWORD}@")
    given = {"SIEVE_HOME": str(tmp_path / "home"), "SIEVE_STORAGE": storage, "MLFLOW_TRACKING_URI": uri}
    settings = Settings.from_environment(given)
    path, said = study_file(tmp_path, **THREE), ""

    def run(settings: Settings, code: int, *words: str | Path) -> None:
        nonlocal said
        command = sieve(settings, *words, patience=2)
        out, err = command.communicate(timeout=240)
        assert command.returncode == code, out + err
        said += out + err

    with watched_command_lines() as seen:
        run(settings, 0, "launch", path, "--workers", "2")
        for words in (["sync"], ["status"], ["best", "quick"], ["report", "quick"], ["migrate"]):
            run(settings, 0, *words)
        server.kill()
        run(settings, 1, "doctor")
        run(settings, 1, "sync", "--redo")
        here, _, port = storage.rpartition("@")[2].partition("/")[0].partition(":")
        away = replace(settings, storage=storage.replace(f"{here}:{port}", f"{here}:{free_port()}"))
        run(away, 1, "launch", path)
        run(away, 1, "status")
    assert not seen
    assert "could not be sent" in said
    assert "does not answer" in said
    assert PASSWORD not in said
    assert PASSWORD not in dumped(storage)
    assert PASSWORD not in dumped(f"sqlite:///{server.database}")
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert any(file.name == "publisher.log" for file in files)
    assert [file for file in files if PASSWORD.encode() in file.read_bytes()] == []
