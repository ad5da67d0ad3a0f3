"""`sieve serve`: runs the studies that wait in the storage, oldest first, until it is told to end.

Any number of services may share a storage: a study's owner is alone, and what a dead one left is taken up by the
next. Waiting for whatever else is down is all that a service does about it.
"""

import os
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from search import COMMAND, run
from search.errors import Interrupted, SettingsError, SieveError, StorageLost, StudyBusy, WorkersLost
from search.outbox import Outbox
from search.outcome import open_study, standing
from search.runner import Runner, Status
from search.settings import Settings
from search.show import progress_line
from search.storage import Storage, open_storage, owned, registered
from search.study import StudySpec

POLL_SECONDS = 2.0
SYNC_SECONDS = 30.0  # between attempts to send what earlier studies left unsent
SAY_SECONDS = 30.0  # between lines about a running study
COUNTS = ("complete", "running", "pruned", "diverged", "failed", "waiting")  # of trials, as far as there are any
WAITING = ("queued", "running")  # one that runs and has no owner lost its runner


def enqueue(spec: StudySpec, settings: Settings) -> str:
    """Register a study for `sieve serve`; says so. Raises StudyConflict, StudyFileError; StudyBusy while it runs."""
    spec = run.resolved(spec, settings)
    datasets = run.open_datasets(spec, settings, lambda note: None)
    digests = {stage: data.digest for stage, data in datasets.items()}
    with registered(settings.storage, spec, digests) as record:
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
            except (StorageLost, SettingsError, WorkersLost) as error:  # of this machine or another, not of the study
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
        except Interrupted as error:
            self.say(f"study '{study}' is left to the next service" if self.stopping.is_set() else str(error))
        except (StorageLost, SettingsError):
            raise
        except WorkersLost:
            self._mark(study, state="queued")
            raise
        except Exception as error:
            text = str(error) if isinstance(error, SieveError) else traceback.format_exc()
            self.say(f"study '{study}' failed: {text}")
            self._mark(study, problem=text[-2000:], state="failed")
        finally:
            self.runner = None
        return True

    def _mark(self, study: str, **attrs: str) -> None:
        assert self.storage is not None
        with suppress(StudyBusy), owned(open_study(study, self.settings)) as record:  # else another one tries it now
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


def waiting(storage: Storage) -> list[str]:
    """The studies that want a runner, oldest first."""
    studies = sorted(storage.get_all_studies(), key=lambda study: study._study_id)
    return [s.study_name for s in studies if "spec" in s.user_attrs and s.user_attrs.get("state") in WAITING]


def follow(settings: Settings, study: str | None, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Say how studies get on, whenever that changes, until none waits or runs; then how they stand."""
    said: dict[str, str] = {}
    while True:
        rows: list[dict[str, Any]] = []
        try:
            rows = standing(settings, study)
        except StorageLost as error:
            rows = [{"study": "-", "state": "running", "problem": str(error)}]
        for row in rows:
            parts = (f"{row[key]} {key}" for key in COUNTS if row.get(key))
            line = f"{row['study']}: {row.get('problem') or row['state']}, {', '.join(parts)}".rstrip(", ")
            if said.get(row["study"]) != line:
                say(line)
            said[row["study"]] = line
        if not any(row["state"] in WAITING for row in rows):
            return rows
        time.sleep(POLL_SECONDS)


def serve(settings: Settings, say: Callable[[str], None], workers: int | None = None) -> None:
    """Serve until SIGTERM or SIGINT, which save what runs; the second one ends at once."""
    service = Service(settings, say, workers)

    def on_signal(_: int, __: Any) -> None:
        if service.stopping.is_set():
            os._exit(130)
        service.stop()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    settings.home.mkdir(parents=True, exist_ok=True)
    say("waiting for studies")
    service.serve()
    if service.sync and service.sync.poll() is None:
        service.sync.terminate()
    say("ended")
