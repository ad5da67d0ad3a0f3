"""`sieve doctor`: is everything there that a study needs, one line each, and what to do where it is not."""

import json
import os
import sqlite3
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from threadpoolctl import threadpool_info

from search import datasets
from search.errors import DiskError, SieveError, StorageLost
from search.executor import cores, open_executor
from search.outbox import Outbox
from search.settings import Settings, redact
from search.storage import is_empty, open_storage, study_names

PACKAGES = ("sieve", "numpy", "optuna", "optuna-dashboard", "mlflow", "sqlalchemy", "psycopg", "distributed")
FREE_BYTES = 1e9


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
    text = f"{settings.home}" + ("" if place == settings.home else " (not there yet)")
    yield Finding("home", not advice, f"{text}, {free / 1e9:.1f} GB free", advice)


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
        yield Finding("mlflow", True, f"{redact(uri)} (embedded; `sieve ui` shows it)")
        return
    request = urllib.request.Request(
        f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search",
        data=json.dumps({"max_results": 1}).encode(),  # /health says OK even while the server's database is away
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            yield Finding("mlflow", answer.status == 200, f"{redact(uri)} answers")
    except urllib.error.HTTPError as error:
        advice = "name this host in the server's --allowed-hosts" if error.code == 403 else "look into the server's log"
        yield Finding("mlflow", False, f"{redact(uri)} answers {error.code} {error.reason}", advice)
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        advice = "start it, or correct MLFLOW_TRACKING_URI; studies run without it, and `sieve sync` sends the rest"
        yield Finding("mlflow", False, f"{redact(uri)} does not answer: {reason}", advice)


def _data(settings: Settings) -> Iterator[Finding]:
    for row in datasets.listing(settings):
        yield Finding("data", row.ok or row.name == "cifar10", f"{row.name}: {row.state}, {row.detail}")


def _outbox(settings: Settings) -> Iterator[Finding]:
    if not settings.outbox.exists():
        yield Finding("outbox", True, f"{settings.outbox} (not there yet)")
        return
    with Outbox(settings.outbox) as box:
        unsent = box.unsent()
    advice = "`sieve sync` sends them" if unsent else ""
    yield Finding("outbox", not unsent, f"{unsent} records not sent to MLflow", advice)


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
