"""The embedded MLflow's database: whole or not there at all, and at home where the home is now.

MLflow makes its tables in seconds, in many steps; a process that ends within them leaves a file that no MLflow
opens any more. And it writes down absolute folders, which a home that was moved has not. Mended here, before
anybody opens the file.
"""

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

import filelock

from search.errors import SieveError, in_one_line
from search.settings import Settings, sqlite_url

MOVE_AWAY = "move it away, and `sieve sync --redo` makes everything of this home's studies again"
HOLDS_ADDRESSES = (("runs", "artifact_uri"), ("logged_models", "artifact_location"), ("trace_tags", "value"))


def prepare(settings: Settings) -> None:
    """Make the database, or bring it up to date, unless it is; and let it lead to this home's artifacts.

    Whoever comes meanwhile waits. Nothing to do with an MLflow server. Raises SieveError for a database that was
    left half-made and holds runs, and for a file that is none.
    """
    path = database(settings)
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_name(f".{path.name}.lock")):
        half, used = _examine(path)
        if not used and not _is_current(path):
            _replace(path, lambda part: None)
        elif half:
            raise SieveError(complaint(settings) or "")
        elif not _is_current(path):
            _bring_up_to_date(path)
        relocate(settings)


def _bring_up_to_date(path: Path) -> None:
    """Raises SieveError for tables that the installed MLflow cannot take over; they stay as they are."""
    from alembic.util import CommandError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        _replace(path, lambda part: _copy(path, part))
    except (CommandError, SQLAlchemyError) as error:
        cause = getattr(error, "orig", None) or error
        if getattr(cause, "sqlite_errorcode", sqlite3.SQLITE_ERROR) != sqlite3.SQLITE_ERROR:
            raise  # a full disk, say, which says nothing of the tables
        raise SieveError(
            f"{path}: its tables are of another version of MLflow and cannot be brought up to date "
            f"({in_one_line(cause)}); install that version, or {MOVE_AWAY}"
        ) from None


def complaint(settings: Settings) -> str | None:
    """What is wrong with the embedded database that `prepare` cannot mend, and what to do, in one line."""
    path = database(settings)
    if path is None or _examine(path) != (True, True):
        return None
    return f"{path}: an update of its tables was cut short, so that no MLflow opens it; {MOVE_AWAY}"


def database(settings: Settings) -> Path | None:
    """The file that MLflow opens; None where it is a server's, or no file."""
    if not settings.tracking_uri.startswith("sqlite:"):
        return None
    from sqlalchemy.engine import make_url

    name = make_url(settings.tracking_uri).database
    return Path(name).absolute() if name and name != ":memory:" else None


def _examine(path: Path) -> tuple[bool, bool]:
    """Whether the tables were left half-made, and whether anybody has a run or an experiment in them."""
    if not path.exists() or not path.stat().st_size:
        return False, False
    try:
        with closing(sqlite3.connect(path, timeout=30)) as db:
            tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            half = any(name.startswith("_alembic_tmp_") for name in tables)
            if "experiments" not in tables:  # nothing at all, or what somebody else keeps there
                return half, bool(tables - {"alembic_version"})
            rows = ["SELECT 1 FROM experiments WHERE experiment_id != 0"]
            rows += ["SELECT 1 FROM runs"] if "runs" in tables else []
            return half, any(db.execute(f"{row} LIMIT 1").fetchone() for row in rows)
    except sqlite3.OperationalError:  # locked, say: another time
        raise
    except sqlite3.DatabaseError as error:
        raise SieveError(f"{path}: {error}; {MOVE_AWAY}") from None


def _is_current(path: Path) -> bool:
    """Whether these are the tables of the MLflow that is installed."""
    if not path.exists() or not path.stat().st_size:
        return False
    from mlflow.store.db.utils import _get_latest_schema_revision

    with closing(sqlite3.connect(path, timeout=30)) as db:
        try:
            found = db.execute("SELECT version_num FROM alembic_version").fetchall()
        except sqlite3.OperationalError:  # no such table
            return False
    return found == [(_get_latest_schema_revision(),)]


def _replace(path: Path, begin: Callable[[Path], None]) -> None:
    """Put a database with all tables at its place in one step; what was begun and left before is removed."""
    from mlflow.store.db.utils import _initialize_tables, create_sqlalchemy_engine_with_retry

    part = path.with_name(f".{path.name}.part")
    for left in path.parent.glob(f"{part.name}*"):
        left.unlink()
    begin(part)
    engine = create_sqlalchemy_engine_with_retry(sqlite_url(part))
    _initialize_tables(engine)
    engine.dispose()
    with part.open("rb+") as made:
        os.fsync(made.fileno())
    part.replace(path)


def _copy(source: Path, target: Path) -> None:
    with closing(sqlite3.connect(source, timeout=30)) as db, closing(sqlite3.connect(target)) as copy:
        db.backup(copy)


def relocate(settings: Settings) -> None:
    """Let the experiments of a home that was moved or copied lead to the artifacts that came with it.

    Those are meant that Sieve made in HOME/artifacts, in a database within the home. Left alone is what leads to
    the artifacts of another home that is still there, unless this one has the same.
    """
    path = database(settings)
    if path is None or not path.exists() or settings.home not in path.parents:
        return
    with closing(sqlite3.connect(path, timeout=30, isolation_level=None)) as db:
        ours = db.execute(
            "SELECT DISTINCT artifact_location FROM experiments JOIN experiment_tags USING (experiment_id)"
            " WHERE key IN ('sieve.id', 'sieve.study')"
        ).fetchall()
        moved = [(old, new) for (old,) in ours if (new := _moved(old or "", settings.artifacts))]
        if not moved:
            return
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        db.execute("BEGIN IMMEDIATE")
        for old, new in moved:
            db.execute("UPDATE experiments SET artifact_location = ? WHERE artifact_location = ?", (new, old))
            for table, column in HOLDS_ADDRESSES:
                if table in tables:
                    db.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                        (new, len(old) + 1, len(old) + 1, f"{old}/"),
                    )
        db.execute("COMMIT")


def _moved(location: str, artifacts: Path) -> str | None:
    """Where that location is in this home, if it was meant and is not there."""
    parts = urlsplit(location)
    old = Path(unquote(parts.path) if parts.scheme else location)
    new = artifacts / old.name
    if parts.scheme not in ("", "file") or old.parent.name != artifacts.name or old == new:
        return None
    if os.path.exists(new):
        moved = not (os.path.exists(old) and old.samefile(new))
    else:
        moved = not os.path.exists(old.parent)
    return new.as_uri() if moved else None
