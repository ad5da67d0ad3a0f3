"""`sieve doctor`: is everything there that a study needs, one line each, and what to do where it is not."""

import os
import re
import shlex
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from threadpoolctl import threadpool_info

from search import datasets, embedded, tracking
from search.errors import DiskError, SieveError, StorageLost
from search.executor import cores, open_executor
from search.outbox import Outbox
from search.settings import Settings, redact
from search.storage import is_empty, open_storage, study_names

PACKAGES = ("sieve", "numpy", "optuna", "optuna-dashboard", "mlflow", "sqlalchemy", "psycopg", "distributed")
FREE_BYTES = 1e9
ADVICE = {
    401: "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, to what it knows",
    403: "name this host in the server's --allowed-hosts, or give this user the right",
    407: "a proxy stands before it: correct https_proxy, or name the host in no_proxy",
}


@dataclass(frozen=True)
class Finding:
    """One line; `advice` is what to do about it."""

    what: str
    ok: bool
    text: str
    advice: str = ""

    def __str__(self) -> str:
        advice = f"; {self.advice}" if self.advice else ""
        return f"{'ok ' if self.ok else 'BAD'} {self.what:9} {self.text}{advice}"


def examine(settings: Settings) -> list[Finding]:
    """Every check; one that raises becomes a finding itself. Makes nothing that is not there."""
    checks: dict[str, Callable[[Settings], Iterator[Finding]]] = {
        "home": _home,
        "storage": _storage,
        "mlflow": _mlflow,
        "data": _data,
        "outbox": _outbox,
        "executor": _executor,
        "versions": _versions,
    }
    findings: list[Finding] = []
    for what, check in checks.items():
        try:
            findings += check(settings)
        except (SieveError, OSError) as error:
            findings.append(Finding(what, False, str(error)))
        except sqlite3.Error as error:
            findings.append(Finding(what, False, str(DiskError(str(settings.outbox), str(error)))))
    return findings


def _home(settings: Settings) -> Iterator[Finding]:
    place = next(folder for folder in (settings.home, *settings.home.parents) if folder.exists())
    writable, free = os.access(place, os.W_OK), _free(place)
    advice = "" if writable else "set SIEVE_HOME to a folder that this user may write to"
    if writable and free < FREE_BYTES:
        advice = "make room: checkpoints and the outbox need it"
    if not advice and (readable := _readable_by_others(settings)):
        advice = f"`chmod -R go= {shlex.quote(str(settings.home))}` keeps them from it"
        yield Finding("home", False, f"other users of this machine can read {readable}", advice)
        return
    text = f"{settings.home}" + ("" if place == settings.home else " (not there yet)")
    yield Finding("home", not advice, f"{text}, {free / 1e9:.1f} GB free", advice)


def _readable_by_others(settings: Settings) -> Path | None:
    """One of our files or folders, made by an older version, that others can get at."""
    if not settings.home.exists() or not settings.home.stat().st_mode & 0o011:
        return None
    folders = (settings.outbox.parent, settings.checkpoints, settings.artifacts, settings.data_cache)
    files = (settings.home / "sieve.db", settings.home / "mlflow.db")
    ours = [(path, 0o044) for path in files] + [(path, 0o011) for path in folders]
    return next((path for path, mode in ours if path.exists() and path.stat().st_mode & mode), None)


def _free(place: Path) -> float:
    disk = os.statvfs(place)
    return float(disk.f_bavail * disk.f_frsize)


def _storage(settings: Settings) -> Iterator[Finding]:
    if is_empty(settings.storage):
        yield Finding("storage", True, f"{settings.storage} (not there yet; the first launch makes it)")
        return
    began = time.monotonic()
    try:
        names = study_names(open_storage(settings.storage))
    except StorageLost as error:
        advice = "start it, or correct SIEVE_STORAGE; its password belongs in PGPASSWORD or PGPASSFILE"
        yield Finding("storage", False, str(error), advice)
        return
    took = 1000 * (time.monotonic() - began)
    yield Finding("storage", True, f"{redact(settings.storage)}: {len(names)} studies, opened in {took:.0f} ms")


def _mlflow(settings: Settings) -> Iterator[Finding]:
    uri = settings.tracking_uri
    if not uri.startswith(("http://", "https://")):
        yield from _embedded(settings)
        return
    shown = redact(uri)
    try:
        status, reason = tracking.ask(uri)
    except OSError as error:
        advice = "start it, or correct MLFLOW_TRACKING_URI; studies run without it, and `sieve sync` sends the rest"
        yield Finding("mlflow", False, f"{shown} does not answer: {redact(str(error))}", advice)
        return
    if status == 200:
        yield Finding("mlflow", True, f"{shown} answers")
    else:
        advice = ADVICE.get(status, "look into the server's log")
        yield Finding("mlflow", False, f"{shown} answers {status} {reason}".rstrip(), advice)


def _embedded(settings: Settings) -> Iterator[Finding]:
    """An MLflow database of our own: whole, and of a layout that the MLflow here knows, or can bring up to date."""
    path = embedded.database(settings)
    if path is None or not path.exists():
        yield Finding("mlflow", True, f"{redact(settings.tracking_uri)} (embedded; `sieve ui` shows it)")
        return
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=10)) as db:
            tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            versioned = "alembic_version" in tables
            versions = db.execute("SELECT version_num FROM alembic_version").fetchall() if versioned else []
    except sqlite3.Error as error:
        yield Finding("mlflow", False, f"{path}: {error}", embedded.MOVE_AWAY)
        return
    unknown = {version for (version,) in versions} - known if (known := _layouts()) else set()
    if halves := sorted(name for name in tables if name.startswith("_alembic_tmp_")):
        text = f"{path}: an update of its tables was cut short and left {', '.join(halves)}"
        empty = "it holds nothing yet: the next `sieve launch` or `sieve sync` makes it anew"
        yield Finding("mlflow", False, text, embedded.MOVE_AWAY if embedded.complaint(settings) else empty)
    elif unknown:
        text = f"{path}: layout {', '.join(sorted(unknown))}, which MLflow {metadata.version('mlflow')} does not know"
        yield Finding("mlflow", False, text, f"install the MLflow that wrote it; or {embedded.MOVE_AWAY}")
    else:
        yield Finding("mlflow", True, f"{path} (embedded; `sieve ui` shows it)")


def _layouts() -> set[str]:
    """The layouts that the installed MLflow knows: read from its migrations, for it takes seconds to be imported."""
    migrations = (file for file in metadata.files("mlflow") or () if file.match("db_migrations/versions/*.py"))
    return {
        found for file in migrations for found in re.findall(r"^revision\b.*?= *[\"'](\w+)", file.read_text(), re.M)
    }


def _data(settings: Settings) -> Iterator[Finding]:
    for row in datasets.listing(settings):
        yield Finding("data", row.ok or row.name == "cifar10", f"{row.name}: {row.state}, {row.detail}")


def _outbox(settings: Settings) -> Iterator[Finding]:
    if not settings.outbox.exists():
        yield Finding("outbox", True, f"{settings.outbox} (not there yet)")
        return
    with Outbox(settings.outbox) as box:
        unsent, refused = box.unsent(), box.refusals()
    advice = "`sieve sync` sends them" if unsent else ""
    yield Finding("outbox", not unsent, f"{unsent} records not sent to MLflow", advice)
    if refused:
        uid, kind, reason = refused[-1]
        words = " ".join(str(reason).split())[:200]
        text = f"{len(refused)} records refused by MLflow, the last one ({kind} of {uid}): {words}"
        yield Finding("outbox", False, text, "`sieve sync` tries again")


def _executor(settings: Settings) -> Iterator[Finding]:
    """The workers, and how they calculate: asked there, where it matters."""
    executor, workers = open_executor(settings.executor, 1 if settings.executor == "local" else None)
    try:
        count = cores() if settings.executor == "local" else workers()
        advice = "" if count else "start some: `dask worker tcp://host:port --nthreads 1`; studies wait until then"
        yield Finding("executor", bool(count), f"{settings.executor}: {count} workers", advice)
        answers = [executor.submit(arithmetic) for _ in range(workers())]
        kinds = sorted({answer.result(timeout=60) for answer in answers})
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
    for kernel, threads, exact in kinds:
        advice = ""
        if threads != 1:
            advice = "set OPENBLAS_NUM_THREADS=1 and OMP_NUM_THREADS=1 for the workers: one runs on each core"
        elif len(kinds) > 1:
            advice = "other workers calculate otherwise: values may differ in the last digits; set SIEVE_BLAS_KERNEL"
        elif not exact:
            advice = "a trial's last digits depend on its company here; try another SIEVE_BLAS_KERNEL"
        yield Finding("blas", not advice, f"workers: {kernel}, threads: {threads}{', exact' if exact else ''}", advice)


def arithmetic() -> tuple[str, int, bool]:
    """Of this process: BLAS and its kernel, its threads, and whether a trial's result is its own."""
    from core.network import blas_is_exact

    libraries = [library for library in threadpool_info() if library["user_api"] == "blas"]
    names = {f"{one['internal_api']} with kernel {one.get('architecture', '?')}" for one in libraries}
    threads = max((one["num_threads"] for one in libraries), default=1)
    return " and ".join(sorted(names)) or "unknown BLAS", threads, blas_is_exact()


def _versions(_: Settings) -> Iterator[Finding]:
    here = []
    for package in PACKAGES:
        try:
            here.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    yield Finding("versions", True, ", ".join(here))
