"""`sieve serve`: runs the studies that wait in the storage, oldest first, until it is told to end.

Any number of services may share a storage: a study's owner is alone, and what a dead one left is taken up by the
next. Waiting for whatever else is down is all that a service does about it.
"""

import os
import sqlite3
import subprocess
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from search import COMMAND, run
from search.errors import (
    FULL,
    DiskError,
    Interrupted,
    SettingsError,
    SieveError,
    StorageLost,
    StudyBusy,
    StudyGone,
    StudyTaken,
    StudyUnreadable,
    UnknownStudy,
    WorkersLost,
)
from search.outbox import Outbox
from search.outcome import INTERRUPTED, open_study, standing
from search.process import on_end
from search.runner import Runner, Status
from search.settings import Settings
from search.show import progress_line
from search.storage import Storage, open_storage, owned, registered, stored_states, study_names
from search.study import StudySpec

POLL_SECONDS = 2.0
SYNC_SECONDS = 30.0  # between attempts to send what earlier studies left unsent
SAY_SECONDS = 30.0  # between lines about a running study
TAKEN_SECONDS = 10.0  # in which a service that has nothing to do takes up what a dead runner left
COUNTS = ("complete", "running", "pruned", "diverged", "failed", "waiting")  # of trials, as far as there are any
WAITING = ("queued", "running")  # one that runs and has no owner lost its runner


def enqueue(spec: StudySpec, settings: Settings, warn: Callable[[str], None] = lambda text: None) -> str:
    """Register a study for `sieve serve`; says so. `warn` gets what a person should know.

    Raises DataError, StudyConflict, StudyFileError; StudyBusy while it runs.
    """
    spec = run.resolved(spec, settings)
    datasets = run.open_datasets(spec, settings, warn)
    digests = {stage: data.digest for stage, data in datasets.items()}
    settings.make_home()
    with (
        Outbox(settings.outbox) as box,
        registered(settings.storage, spec, digests, meet=lambda found: run.identify(found, box, settings)) as record,
    ):
        record.set_attr("state", "queued")
    return f"study '{spec.name}' waits for `sieve serve`; `sieve status {spec.name} --follow` shows it"


class Service:
    """One `sieve serve`. `stop` may be called from a signal handler."""

    def __init__(self, settings: Settings, say: Callable[[str], None], workers: int | None = None) -> None:
        self.settings, self.say, self.workers = settings, say, workers
        self.stopping = threading.Event()
        self.runner: Runner | None = None
        self.storage: Storage | None = None
        self.trouble = ""  # said last
        self.left_alone: set[str] = set()  # studies that this version does not understand
        self.sync: subprocess.Popen[bytes] | None = None
        self.synced = self.said = -SAY_SECONDS

    def stop(self) -> None:
        """Save what runs, leave its study to the next service, and end."""
        self.stopping.set()
        if self.runner:
            self.runner.stop("later")

    def serve(self) -> None:
        """Until `stop`. Whatever does not answer is waited for."""
        while not self.stopping.is_set():
            try:
                self.storage = self.storage or open_storage(self.settings.storage)
                ran = any(self._run(name) for name in waiting(self.storage))
                self.trouble = ""
            except (StorageLost, SettingsError, WorkersLost, DiskError) as error:  # of a machine, not of the study
                ran = False
                self._say_once(f"{error}; trying again")
            if not ran:
                self._send_rest()
                self.stopping.wait(POLL_SECONDS)

    def _run(self, study: str) -> bool:
        """Whether this study was ours to run. Raises what `serve` waits for."""
        if self.stopping.is_set():
            return False
        try:
            spec = open_study(study, self.settings).spec
            outcome = run.launch(
                spec, self.settings, workers=self.workers, started=self._started, show=self._show, warn=self.say
            )
            self.say(f"study '{study}' is done: {outcome.metric} {outcome.chosen.mean:.4g}")
        except StudyBusy:
            return False
        except StudyUnreadable as error:  # another version may understand it
            if study not in self.left_alone:
                self.say(f"{error}; it is left alone")
            self.left_alone.add(study)
            return False
        except Interrupted as error:
            self.say(f"study '{study}' is left to the next service" if self.stopping.is_set() else str(error))
        except (StorageLost, SettingsError):
            raise
        except WorkersLost:
            self._mark(study, state="queued")
            raise
        except Exception as error:
            if trouble := _of_the_disk(error, self.settings):
                self._mark(study, state="queued")
                raise trouble from None
            if self.storage and study not in study_names(self.storage):
                self.say(f"study '{study}' was deleted while it ran; nothing more is done about it")
                return True
            text = str(error) if isinstance(error, SieveError) else traceback.format_exc()
            self.say(f"study '{study}' failed: {text}")
            self._mark(study, problem=text[-2000:], state="failed")
        finally:
            self.runner = None
        return True

    def _mark(self, study: str, **attrs: str) -> None:
        """Write down what became of a study, unless another one tries it now, or it was deleted."""
        assert self.storage is not None
        gone = (StudyBusy, StudyGone, StudyTaken, StudyUnreadable, UnknownStudy)
        with suppress(*gone), owned(open_study(study, self.settings)) as record:
            for key, value in attrs.items():
                record.set_attr(key, value)

    def _started(self, runner: Runner) -> None:
        self.runner = runner
        self.say(f"study '{runner.spec.name}' is running")
        if self.stopping.is_set():
            runner.stop("later")

    def _show(self, status: Status) -> None:
        if time.monotonic() - self.said > SAY_SECONDS:
            self.said = time.monotonic()
            self.say(progress_line(status))

    def _say_once(self, text: str) -> None:
        if text != self.trouble:
            self.say(text)
        self.trouble = text

    def _send_rest(self) -> None:
        """Between studies: a `sieve sync` for what MLflow did not get while they ran."""
        if (self.sync and self.sync.poll() is None) or time.monotonic() - self.synced < SYNC_SECONDS:
            return
        self.synced = time.monotonic()
        with Outbox(self.settings.outbox) as box:
            unsent = box.unsent()
        if unsent:
            self.sync = subprocess.Popen([*COMMAND, "sync"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def _of_the_disk(error: Exception, settings: Settings) -> DiskError | None:
    """What this machine's disk is to blame for, and no study."""
    if isinstance(error, sqlite3.OperationalError):
        return DiskError(str(settings.outbox), str(error))
    if isinstance(error, OSError) and error.errno in FULL:
        return DiskError(str(error.filename or settings.home), error.strerror or str(error))
    return error if isinstance(error, DiskError) else None


def waiting(storage: Storage) -> list[str]:
    """The studies that want a runner, oldest first."""
    return [name for name, state in stored_states(storage).items() if state in WAITING]


def follow(settings: Settings, study: str | None, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Say how studies get on, whenever that changes, until none waits or runs; then how they stand.

    What a dead runner left is taken up by a service, if there is one, within TAKEN_SECONDS of having nothing else to
    do. So an interrupted study is waited for as long as any study of the storage runs, and those seconds more.
    """
    said: dict[str, str] = {}
    idle_since: float | None = None
    while True:
        rows: list[dict[str, Any]] = []
        try:
            rows = every = standing(settings, study)
            if study is not None and rows[0]["state"] == INTERRUPTED:
                every = standing(settings)
        except StorageLost as error:
            rows = every = [{"study": "-", "state": "running", "problem": str(error)}]
        for row in rows:
            parts = (f"{row[key]} {key}" for key in COUNTS if row.get(key))
            how = ": ".join(filter(None, (row["state"], (row.get("problem") or "").strip().rpartition("\n")[2])))
            line = f"{row['study']}: {how}, {', '.join(parts)}".rstrip(", ")
            if said.get(row["study"]) != line:
                say(line)
            said[row["study"]] = line
        states = {row["state"] for row in rows}
        if not states & {*WAITING, INTERRUPTED}:
            return rows
        if states & {*WAITING} or any(row["state"] == "running" for row in every):
            idle_since = None
        elif idle_since is None:
            idle_since = time.monotonic()
        elif time.monotonic() - idle_since > TAKEN_SECONDS:
            return rows
        time.sleep(POLL_SECONDS)


def serve(settings: Settings, say: Callable[[str], None], workers: int | None = None) -> None:
    """Serve until SIGTERM, SIGHUP or Ctrl-C, which save what runs; the second one ends at once."""
    service = Service(settings, say, workers)

    def on_signal(_: int, __: Any) -> None:
        if service.stopping.is_set():
            os._exit(130)
        service.stop()

    on_end(on_signal)
    settings.make_home()
    say("waiting for studies")
    try:
        service.serve()
    finally:
        if service.sync and service.sync.poll() is None:
            service.sync.terminate()
    say("ended")
