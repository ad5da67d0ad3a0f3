"""Publish the outbox to MLflow: everything once, whatever fails. The only module that imports mlflow.

A publisher is a process of its own. It asks MLflow for a run by the tag `sieve.uid`, creates it with that
tag if there is none, and deletes twins that a lost reply left behind; metrics carry the time at which they
were recorded, files have names that follow from what they show. So sending a record again changes nothing,
and a record is marked as sent only after the server has it. In the same way an experiment is the study's whose
id is its tag `sieve.id`, whatever it is called: names are given twice.
"""

import base64
import errno
import json
import logging
import math
import os
import shutil
import signal
import sqlite3
import tempfile
import threading
import time
import traceback
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import filelock
import psutil
from PIL.Image import Image
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential

from search import embedded, figures
from search.errors import FULL, SieveError, UnknownStudy, brief
from search.failpoint import failpoint
from search.outbox import OUR_FAULT, Outbox, Record, artifact_id, formerly, markdown, progress_points, unpack
from search.settings import Settings, redact

POLL_SECONDS = 0.3
PATIENCE = 30.0  # seconds without success after which a publisher that nobody waits for gives up
BATCH = 64  # records fetched at a time
MOST_FAILURES = 10  # of one trial's records while the server answers everything else
OF_THE_MACHINE = (  # errors that would befall any record: a disk that takes nothing, or no more files
    *FULL, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE,
)  # fmt: skip
LOCK = ".publisher.lock"  # a name that no study can have
UID = "sieve.uid"
ID = "sieve.id"
STUDY = "sieve.study"
VIEW = "sieve"
WIDE = {"Which setting won": 480, "Weights and confusion matrices": 800}  # sections of one column, and its height
NAME = {"attributes.`Run Name`": 340}  # the table's first column, and its width ...
WHEN = {"runDateAndNestInfo": 130, "duration": 80}  # ... and its last
NOTE = "mlflow.note.content"
LOG10 = "log10_"
MOST_REASONS = 3
LONGEST_PARAM = 6000  # MLflow cuts longer ones without a word
LONGEST_DIGEST = 36
LONGEST_NOTE = 8000
NEVER = (400, 413, 422)  # a server that answers so will answer so again ...
RACE = ("IntegrityError", "UniqueViolation")  # ... but for 400 where another client wrote the same row just before
GONE = "must be in the 'active' state"  # 400 for a run, or an experiment, that was deleted

ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the retrying is ours
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "DO_NOT_TRACK": "true",
}


class _Waiting(Exception):
    """Something could not be sent now; it may be later."""


def publish(
    settings: Settings,
    *,
    follow: bool = False,
    parent: int | None = None,
    study: str | None = None,
    timeout: float | None = None,
    warn: Callable[[str], None] = lambda text: None,
    show: Callable[[int], None] = lambda left: None,
) -> int:
    """Send what the outbox holds (of one study, by its id, or all) and say how many records are left in it.

    follow: go on while the process `parent` lives; without, drain the outbox once, and send again what
    the server refused or has lost. After `timeout` seconds (30) in which nothing could be sent it
    gives up, but never while the parent lives, and warns why. A home has one publisher at a time: a second one waits.
    Before each batch it shows how many records are left. SIGTERM, SIGINT and SIGHUP end one that follows, between
    two records.
    """
    patience = PATIENCE if timeout is None else timeout
    alive = _watch(parent) if follow else lambda: False
    if follow:
        os.nice(10)
    with _told_to_end(follow) as ended, Outbox(settings.outbox) as box:

        def wanted() -> bool:
            return alive() and not ended.is_set()

        def needed() -> bool:
            return wanted() or (not ended.is_set() and box.unsent(study) > 0)

        with _turn(settings, needed, wanted, patience) as mine:
            publisher = _Publisher(settings, box, warn, ended)
            if mine and (trouble := _drain(publisher, wanted, study, patience, show, repair=not follow)):
                warn(trouble)
        complaints = box.complaints(study)
        for line in complaints[:MOST_REASONS]:
            warn(line)
        if len(complaints) > MOST_REASONS:
            warn(f"... and {len(complaints) - MOST_REASONS} more")
        counts = [n for known, n in box.counts().items() if study in (None, known)]
        return sum(n.unsent + n.refused for n in counts)


@contextmanager
def _told_to_end(follow: bool) -> Iterator[threading.Event]:
    """Set by the first signal to end: who is in the middle of a database's update must not be cut short there."""
    ended = threading.Event()
    if not follow or threading.current_thread() is not threading.main_thread():
        yield ended
        return
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, lambda *_: ended.set()) for number in signals}
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ids(settings: Settings, name: str) -> list[str]:
    """The ids of all studies of that name of which the outbox holds anything. Raises UnknownStudy."""
    with Outbox(settings.outbox) as box:
        if not (found := box.ids(name)):
            raise UnknownStudy(name, sorted(set(box.names().values())))
        return found


def conclusion(settings: Settings, left: int, studies: Sequence[str]) -> str:
    """What to say of the records (of these studies, or all) that are left in the outbox."""
    with Outbox(settings.outbox) as box:
        counts = [n for study, n in box.counts().items() if not studies or study in studies]
    aside = sum(n.refused for n in counts)
    parts = [f"{left - aside} records could not be sent; try again later"] if left > aside else []
    parts += [f"{aside} records are set aside; each `sieve sync` tries them again"] if aside else []
    return "; ".join(parts) or "everything is sent"


def redo(settings: Settings, study: str | None = None) -> int:
    """Mark everything (of one study, by its id) as unsent, so that it is published again; says how many records."""
    with Outbox(settings.outbox) as box:
        return box.requeue(study=study)


def ask(uri: str) -> tuple[int, str]:
    """The status and reason with which an MLflow server answers its own client: its credentials, its TLS, its proxies.

    The question needs the server's database; /health says OK even while that is away. Raises OSError, saying why.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow.exceptions import MlflowException
    from mlflow.tracking._tracking_service.utils import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    question = {"endpoint": "/api/2.0/mlflow/experiments/search", "method": "POST", "json": {"max_results": 1}}
    try:
        answer = http_request(get_default_host_creds(uri), **question, max_retries=0, timeout=10, raise_on_status=False)
    except MlflowException as error:
        first: BaseException = error
        while following := first.__cause__ or first.__context__:
            first = following
        raise OSError(_one_line(first)) from None
    return int(answer.status_code), str(answer.reason)


def links(settings: Settings, experiment_id: str) -> dict[str, str]:
    """The addresses of a study in MLflow: its charts and its table (the saved view), and its summary run."""
    page = f"{settings.mlflow_ui}/#/experiments/{experiment_id}/runs?workflowType=machine_learning"
    summaries = quote("tags.kind = 'summary'")
    return {
        "charts": f"{page}&compareRunsMode=CHART&viewStateShareKey={VIEW}",
        "table": f"{page}&viewStateShareKey={VIEW}",
        "summary": f"{page}&searchFilter={summaries}",
    }


def run_link(settings: Settings, experiment_id: str, run_id: str) -> str:
    """The address of one run in MLflow."""
    return f"{settings.mlflow_ui}/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


def _watch(parent: int | None) -> Callable[[], bool]:
    """Whether that process still lives, as a function; without one it is for ever."""
    if parent is None:
        return lambda: True
    try:
        process = psutil.Process(parent)
    except psutil.NoSuchProcess:
        return lambda: False

    def alive() -> bool:
        try:
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    return alive


@contextmanager
def _turn(
    settings: Settings, needed: Callable[[], bool], wanted: Callable[[], bool], patience: float
) -> Iterator[bool]:
    """Hold the lock of the home's one publisher; False if another kept it and there is nothing to wait for."""
    settings.locks.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(settings.locks / LOCK)
    since = time.monotonic()
    while True:
        try:
            lock.acquire(timeout=POLL_SECONDS)
            break
        except filelock.Timeout:
            if not needed() or (not wanted() and time.monotonic() - since > patience):
                yield False
                return
    try:
        yield True
    finally:
        lock.release()


def _drain(
    publisher: "_Publisher",
    wanted: Callable[[], bool],
    study: str | None,
    patience: float,
    show: Callable[[int], None],
    *,
    repair: bool,
) -> str | None:
    """Send batch after batch until nothing is left and nobody wants more, waiting longer after each failure.

    Returns why it gave up, if it did.
    """

    ended = publisher.ended

    def tired(state: RetryCallState) -> bool:
        return ended.is_set() or (not wanted() and (state.seconds_since_start or 0.0) > patience)

    def pause(seconds: float) -> None:
        ended.wait(seconds)

    def batch() -> bool:
        records = publisher.box.pending(BATCH, study)
        if records:
            show(publisher.box.unsent(study))
        publisher.send(records)
        return bool(records)

    retrying = Retrying(
        retry=retry_if_exception_type(_Waiting),
        wait=wait_random_exponential(multiplier=0.5, max=5),
        stop=tired,
        sleep=pause,
        reraise=True,
    )
    try:
        if repair:
            publisher.box.requeue(study=study, refused_only=True)
            retrying(publisher.repair, study)
        while not ended.is_set():
            last_look = not wanted()
            if not retrying(batch):
                if last_look:
                    return None
                ended.wait(POLL_SECONDS)
        return None
    except (_Waiting, SieveError) as error:
        return _one_line(error)


class _Publisher:
    """One connection to MLflow, and what it knows of the runs there."""

    def __init__(
        self,
        settings: Settings,
        box: Outbox,
        warn: Callable[[str], None] = lambda text: None,
        ended: threading.Event | None = None,
    ) -> None:
        self.settings, self.box, self.warn = settings, box, warn
        self.ended = ended or threading.Event()  # set: leave after the record at hand
        self.runs: dict[str, tuple[str, str]] = {}  # uid -> (experiment id, run id)
        self.experiments: dict[str, str] = {}
        self.found: set[str] = set()  # uids whose runs were there, though the journal did not know them
        self.failures: dict[str, int] = {}
        self.acknowledged: set[int] = set()  # ids of records whose points the server took from this publisher
        self._client: Any = None

    @property
    def client(self) -> Any:
        """MLflow's client. Opening an embedded store may fail, so this is tried again like any other call."""
        if self._client is None:
            for name, value in ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            for logger in ("alembic", "urllib3"):
                logging.getLogger(logger).setLevel(logging.ERROR)
            from mlflow import MlflowClient

            embedded.prepare(self.settings)
            self._client = MlflowClient(tracking_uri=self.settings.tracking_uri)
        return self._client

    # ---- sending, and what to do when it fails

    def send(self, records: Sequence[Record]) -> None:
        """Send records, those of one trial together. Raises _Waiting if some are to be tried again."""
        groups: dict[tuple[str, str], list[Record]] = {}
        for record in records:
            groups.setdefault((record.uid, record.kind if record.uid == record.study else ""), []).append(record)
        waiting: str | None = None
        for group in groups.values():
            if self.ended.is_set():
                return
            try:
                self._send_group(group)
            except Exception as error:
                if isinstance(error, SieveError):  # one line for a person, who alone can mend it
                    raise
                if (reason := _refusal(error)) is None:
                    waiting = f"{type(error).__name__}: {error}"
                    self._after_failure(group, error)
                elif len(group) == 1:
                    self.box.refuse([group[0].id], reason)
                else:
                    self._find_culprits(group)
        if waiting:
            raise _Waiting(waiting)

    def _send_group(self, group: Sequence[Record]) -> None:
        if group[0].uid == group[0].study:
            send = self._study_begun if group[0].kind == "study_begun" else self._study_ended
            for record in group:
                send(record)
        else:
            self._trial(group)
        failpoint("sent")
        self.box.mark_sent([record.id for record in group])
        self.failures.pop(group[0].uid, None)

    def _find_culprits(self, group: Sequence[Record]) -> None:
        """One of these was refused: send each by itself, and set aside those that are at fault."""
        for record in group:
            try:
                self._send_group([record])
            except Exception as error:
                if (reason := _refusal(error)) is None:
                    raise _Waiting(str(error)) from error
                self.box.refuse([record.id], reason)

    def _after_failure(self, group: Sequence[Record], error: Exception) -> None:
        """Go on with others if the server answers; a trial that fails again and again is set aside.

        What this machine does not let through, a full disk for example, is no trial's fault and waits.
        """
        if _is_gone(error):  # deleted by somebody, or MLflow was emptied meanwhile
            self.repair(group[0].study)
        try:
            self.client.search_experiments(max_results=1)
        except Exception as down:
            raise _Waiting(_one_line(down)) from down
        if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
            return
        uid = group[0].uid
        self.failures[uid] = self.failures.get(uid, 0) + 1
        if self.failures[uid] >= MOST_FAILURES:
            self.failures.pop(uid)
            self.box.refuse([record.id for record in group], _one_line(error))

    def repair(self, study: str | None = None) -> None:
        """Make unsent again what MLflow does not show any more: it is made again. Raises _Waiting."""
        for known in [known for known in self.box.counts() if study in (None, known)]:
            self.acknowledged.clear()
            self.experiments.pop(known, None)
            try:
                found = self._find(known)
                present = self._run_ids(self._experiment(known)) if found else set()
            except SieveError:
                raise
            except Exception as error:
                raise _Waiting(_one_line(error)) from error
            for uid, (_, run_id) in self.box.links(known).items():
                if run_id not in present:
                    self.runs.pop(uid, None)
                    self.box.requeue(study=known, uid=uid)
            if found is None:
                self._send_all_again(known)

    def _send_all_again(self, study: str) -> None:
        for uid in self.box.links(study):
            self.runs.pop(uid, None)
        self.box.requeue(study=study)

    def _run_ids(self, experiment_id: str) -> set[str]:
        return {run.info.run_id for run in self._all_runs(experiment_id, "")}

    def _all_runs(self, experiment_id: str, condition: str) -> list[Any]:
        """All active runs of an experiment that meet a condition."""
        runs: list[Any] = []
        token = None
        while True:
            page = self.client.search_runs([experiment_id], condition, max_results=1000, page_token=token)
            runs += page
            if not (token := page.token):
                return runs

    # ---- the study's experiment

    def _experiment(self, study: str) -> str:
        """The id of the study's experiment, found, taken over or made; never MLflow's experiment 0."""
        if study not in self.experiments:
            found = self._find(study) or self._make(study)
            experiment_id = str(found.experiment_id)
            if found.lifecycle_stage != "active":
                self.client.restore_experiment(experiment_id)
            if found.tags.get(ID) != study:
                self.client.set_experiment_tag(experiment_id, ID, study)
            for old in formerly(self._begun(study)):
                self._retag(experiment_id, old, study)
            if any(shown != experiment_id for shown, _ in self.box.links(study).values()):
                self._send_all_again(study)  # what an older version wrote into another study's runs, say
            self.experiments[study] = experiment_id
        return self.experiments[study]

    def _find(self, study: str) -> Any:
        """The experiment with the study's id, or with one that it had before; None without."""
        from mlflow.entities import ViewType

        before = formerly(self._begun(study))
        for known in (study, *reversed(before)):
            found = self.client.search_experiments(ViewType.ALL, filter_string=f"tags.`{ID}` = '{known}'")
            if found:  # the oldest, of twins that two publishers made at once
                return min(found, key=lambda e: (e.lifecycle_stage != "active", len(e.experiment_id), e.experiment_id))
        for name in (study, *before):  # an older version knew names only
            if name in (self._name(study), *before):
                found = self.client.get_experiment_by_name(name)
                if found is not None and ID not in found.tags and found.tags.get(STUDY) == name:
                    return found
        return None

    def _make(self, study: str) -> Any:
        """A new experiment under the study's name, or under its name and id where that is somebody else's."""
        from mlflow.exceptions import MlflowException

        name, ours = self._name(study), self.settings.tracking_uri.startswith("sqlite:")
        location = (self.settings.artifacts / study).as_uri() if ours else None
        for label in _labels(name, study):
            taken = self.client.get_experiment_by_name(label)
            if taken is not None and not self._step_aside(taken, study):
                continue
            made = None
            try:
                made = self.client.create_experiment(label, location, tags={ID: study, STUDY: name})
            except MlflowException as error:  # made meanwhile, or by a call whose reply was lost
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            if (found := self._find(study)) is not None:
                if made not in (None, found.experiment_id):
                    self.client.delete_experiment(made)
                if found.name != name:
                    self.warn(f"MLflow has an experiment '{name}' of somebody else: this study is '{found.name}' there")
                return found
        raise _Waiting(f"MLflow has experiments of somebody else under all names for study '{name}'")

    def _step_aside(self, taken: Any, study: str) -> bool:
        """Give the experiment of another study of this home another name; False if it is somebody else's."""
        other = taken.tags.get(ID)
        if other is None:  # of an older version
            linked = {shown for shown, _ in self.box.links(taken.name).values()}
            other = taken.name if taken.experiment_id in linked else None
        if other == study or other not in self.box.names():
            return False
        deleted = taken.lifecycle_stage != "active"
        if deleted:
            self.client.restore_experiment(taken.experiment_id)
        labels = _labels(taken.name, "earlier" if other == taken.name else other)[1:]
        free = [label for label in labels if self.client.get_experiment_by_name(label) is None]
        label = free[0] if free else f"{labels[0]} {taken.experiment_id}"
        self.client.rename_experiment(taken.experiment_id, label)
        if deleted:
            self.client.delete_experiment(taken.experiment_id)
        else:
            self.warn(f"MLflow's experiment '{taken.name}' of an earlier study is '{label}' now")
        return True

    def _retag(self, experiment_id: str, old: str, study: str) -> None:
        """Let the runs that carry an id which the study had before carry its own, and so their pictures at home."""
        runs = self._all_runs(experiment_id, f"tags.`{UID}` LIKE '{old}%'")
        for run in runs:
            before = run.data.tags[UID]
            if before != old and not before.startswith(f"{old}/"):
                continue
            uid = study + before[len(old) :]
            picture, target = (self.settings.trial_artifacts / artifact_id(name) for name in (before, uid))
            if picture.exists() and not target.exists():
                shutil.copyfile(picture, target)
            self.client.set_tag(run.info.run_id, UID, uid)

    def _name(self, study: str) -> str:
        return str(self._begun(study)["spec"].get("name") or study)

    def _begun(self, study: str) -> dict[str, Any]:
        """What the study said of itself at its start."""
        records = self.box.records(study, "study_begun")
        return records[0].payload if records else {"spec": {}, "dimensions": {}, "tags": {}, "optuna_study_id": None}

    def _study_begun(self, record: Record) -> None:
        experiment_id = self._experiment(record.study)
        for key, value in record.payload["tags"].items():
            self.client.set_experiment_tag(experiment_id, key, str(value))
        self._describe(record)

    def _describe(self, begun: Record) -> None:
        """The experiment's description and its saved view, with the result if there is one."""
        experiment_id, payload, spec = self._experiment(begun.study), begun.payload, begun.payload["spec"]
        charts, dashboard = links(self.settings, experiment_id)["charts"], self._dashboard(payload["optuna_study_id"])
        ended = self.box.records(begun.study, "study_ended", refused=False)[-1:]
        result = _result(ended[0].payload["summary"]) if ended else ""
        parts = [spec.get("description"), f"[Charts]({charts}) · [Optuna dashboard]({dashboard})", result]
        text = "\n\n".join([part for part in parts if part] + [f"```json\n{json.dumps(spec, indent=2)}\n```"])
        by_mean = bool(ended and ended[0].payload.get("repeated"))
        view = saved_view(spec, payload["dimensions"], _ms(begun.when), by_mean=by_mean)
        for key, value in {NOTE: text[:LONGEST_NOTE], f"mlflow.sharedViewState.{VIEW}": view}.items():
            self.client.set_experiment_tag(experiment_id, key, value)

    def _study_ended(self, record: Record) -> None:
        from mlflow.entities import Metric, RunTag

        summary = record.payload["summary"]
        experiment_id, run_id = self._run(record.study, record.study)
        chosen, numbers = summary.get("params") or {}, _numbers(summary)
        address, name = links(self.settings, experiment_id), self._name(record.study)
        note = f"Result of study **{name}**: [charts]({address['charts']}), [table]({address['table']})"
        note = f"{note}\n\n{_result(summary)}"
        tags = {f"chosen.{name}": str(value) for name, value in chosen.items()} | {NOTE: note[:LONGEST_NOTE]}
        metrics = [Metric(f"summary/{k}", float(v), _ms(record.when), 0) for k, v in numbers.items()]
        self.client.log_batch(run_id, metrics, tags=[RunTag(k, v) for k, v in tags.items()])
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "summary.json").write_text(json.dumps(summary, indent=2))
            if record.blob is not None:
                (Path(folder) / "report.html").write_bytes(record.blob)
            self.client.log_artifacts(run_id, folder)
        for uid in record.payload["best"]:
            with tempfile.TemporaryDirectory() as folder:
                if self._draw_curves(record.study, uid, Path(folder)):
                    self.client.log_artifacts(self._run(record.study, uid)[1], folder)
        for uid, figures_of in record.payload.get("repeated", {}).items():
            if self.box.records(uid, "trial_begun"):
                both = [Metric(f"repeats/{k}", round(float(v), 6), _ms(record.when), 0) for k, v in figures_of.items()]
                self.client.log_batch(self._run(record.study, uid)[1], both)
        for begun in self.box.records(record.study, "study_begun"):
            self._describe(begun)
        self.client.set_terminated(run_id, "FINISHED", _ms(record.when))

    # ---- a trial

    def _run(self, study: str, uid: str) -> tuple[str, str]:
        """(experiment id, run id) of a trial's attempt, or of the study's summary; made if need be."""
        experiment_id = self._experiment(study)  # first: what is known of the study's runs may change there
        if uid not in self.runs:
            known = self.box.links(study, uid).get(uid)
            self.runs[uid] = known or (experiment_id, self._create_run(study, uid))
        return self.runs[uid]

    def _create_run(self, study: str, uid: str) -> str:
        """The one run with this uid. Looks before and after creating it: replies get lost."""
        experiment_id = self._experiment(study)
        if uid == study:
            begun = self.box.records(study)[0]
            name, tags = "summary", {"study": self._name(study), "kind": "summary"}
        else:
            started = self.box.records(uid, "trial_begun")
            if not started:
                raise ValueError("its beginning was never recorded")
            begun = started[0]
            number, optuna_study = begun.payload["optuna"].get("number"), begun.payload["optuna"].get("study_id")
            name = begun.payload["name"]
            tags = {k: str(v) for k, v in begun.payload["tags"].items()} | {"study": self._name(study), "kind": "trial"}
            tags |= {"optuna.number": str(number), "optuna.url": self._dashboard(optuna_study, number)}
        runs = self._active_runs(experiment_id, uid)
        if runs:
            self.found.add(uid)
        else:
            self.client.create_run(experiment_id, _ms(begun.when), tags | {UID: uid}, name)
            failpoint("created")
            runs = self._active_runs(experiment_id, uid)
        for twin in runs[1:]:
            self.client.delete_run(twin)
        self.box.link(study, uid, experiment_id, runs[0])
        return runs[0]

    def _active_runs(self, experiment_id: str, uid: str) -> list[str]:
        order = ["attributes.start_time ASC", "attributes.run_id ASC"]
        found = self.client.search_runs([experiment_id], f"tags.`{UID}` = '{uid}'", order_by=order)
        return [run.info.run_id for run in found]

    def _trial(self, records: Sequence[Record]) -> None:
        """Records of one attempt: one batch of values, one directory of files, and its end if it is among them."""
        from mlflow.entities import Metric, RunTag

        study, uid = records[0].study, records[0].uid
        _, run_id = self._run(study, uid)
        by_kind = {kind: [r for r in records if r.kind == kind] for kind in {r.kind for r in records}}
        begun, ended = by_kind.get("trial_begun"), by_kind.get("trial_ended")
        metrics = _metrics(records)
        tags: dict[str, str] = {}
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            params = self._params(study, begun[0], folder) if begun else []
            # What the run may hold already, under times that this journal does not know:
            again = uid in self.found or any(record.payload.get("recovered") for record in records)
            named = self._pictures(run_id) if again else {}
            picture = self._draw_weights(uid, by_kind.get("trial_weights", []), bool(ended), folder, named)
            if picture is not None:
                tags["mlflow.loggedImages"] = "True"
            if ended:
                metrics += [
                    Metric(f"result/{key}", value, _ms(ended[0].when), 0)
                    for key, value in ended[0].payload["results"].items()
                ]
                tags |= self._end(study, ended[0], folder, named)
            if begun or picture is not None or ended:
                shown = picture or _last_picture(named)
                tags[NOTE] = self._note(study, uid, run_id, shown, tags.get("reason"))
            new = self._lacking(run_id, metrics) if again else metrics
            self.client.log_batch(run_id, new, params, [RunTag(k, v) for k, v in tags.items()])
            failpoint("logged")
            self.acknowledged |= {record.id for record in by_kind.get("trial_progress", [])}
            if any(folder.iterdir()):
                self.client.log_artifacts(run_id, name)
        if begun:
            self._name_dataset(run_id, begun[0].payload["tags"])
            self._link_attempts(study, uid, run_id)
        if ended:
            self._complete(uid, run_id)
            self.client.set_terminated(run_id, ended[0].payload["status"], _ms(ended[0].when))

    def _params(self, study: str, begun: Record, folder: Path) -> list[Any]:
        """What the trial was given; what was searched on a log scale also as log10, for linear axes."""
        from mlflow.entities import Param

        values = dict(begun.payload["params"])
        for name, scale in self._begun(study)["dimensions"].items():
            value = values.get(name)
            if scale == "log" and isinstance(value, int | float) and value > 0:
                values[LOG10 + name] = f"{math.log10(value):.6g}"
        texts = {name: str(value) for name, value in values.items()}
        for name, text in texts.items():
            if len(text) > LONGEST_PARAM:
                _file(folder / "params" / f"{name}.txt").write_text(text)
        return [Param(name, text) for name, text in texts.items() if len(text) <= LONGEST_PARAM]

    def _pictures(self, run_id: str) -> dict[str, str]:
        """The pictures of a run by what they show, each with the path that it has."""
        paths = [item.path for item in self.client.list_artifacts(run_id, "images") if item.path.endswith(".png")]
        return {path.partition("+timestamp")[0]: path.removesuffix(".png") for path in paths}

    def _draw_weights(
        self, uid: str, drawn: Sequence[Record], ended: bool, folder: Path, named: Mapping[str, str]
    ) -> str | None:
        """Pictures of the first layer as the image grid expects them; the path of the last, if there is one.

        W1 has a step for each picture; W1_final (and W1_pixels, for inputs standardised one by one) are
        the last at step 0, so that trials of different lengths can be compared.
        """
        if ended and not drawn:
            drawn = self.box.records(uid, "trial_weights")[-1:]
        path = None
        for record in drawn:
            final = ended and record is drawn[-1]
            shape, classes = record.payload["image_shape"], record.payload["classes"]
            arrays = unpack(record.blob or b"")
            image = figures.weight_tiles(arrays["w"], shape, classes=classes)
            names = [("W1", record.payload["step"]), *([("W1_final", 0)] if final else [])]
            path = _save_images(image, names, uid, record.when, folder, named)[0]
            if final:
                self._for_dashboard(uid, folder / path)
            if final and "scale" in arrays:
                pixels = figures.weight_tiles(arrays["w"], shape, scale=arrays["scale"], classes=classes)
                _save_images(pixels, [("W1_pixels", 0)], uid, record.when, folder, named)
        return path

    def _for_dashboard(self, uid: str, picture: Path) -> None:
        """The same picture where the Optuna dashboard looks for it."""
        target = _file(self.settings.trial_artifacts / artifact_id(uid))
        part = target.with_suffix(".part")
        shutil.copyfile(picture, part)
        part.replace(target)

    def _end(self, study: str, ended: Record, folder: Path, named: Mapping[str, str]) -> dict[str, str]:
        """The files of a trial's end; returns its tags."""
        payload = ended.payload
        tags = {key: str(value) for key, value in payload["tags"].items()}
        if payload["confusion"] is not None:
            image = figures.confusion_matrix(payload["confusion"], payload["classes"] or ())
            _save_images(image, [("confusion", 0)], ended.uid, ended.when, folder, named)
            tags["mlflow.loggedImages"] = "True"
        if ended.blob is not None:
            (folder / "weights.npz").write_bytes(ended.blob)
        if payload["best"]:
            self._draw_curves(study, ended.uid, folder)
        if reason := brief(payload["reason"]):
            tags["reason"] = reason
            whole = payload.get("details") or payload["reason"].strip()
            if whole != reason:
                (folder / "reason.txt").write_text(whole)
        return tags

    def _draw_curves(self, study: str, uid: str, folder: Path) -> bool:
        points = progress_points(self.box.records(uid, "trial_progress"))
        if not points:
            return False
        x, table = figures.stack([[(step, metrics) for step, _, metrics in points]])
        by_update = (self._begun(study)["spec"].get("base") or {}).get("eval_every")
        title = self.box.records(uid, "trial_begun")[0].payload["name"]
        figure = figures.curves(x, table, title=title, x_label="update" if by_update else "epoch")
        _file(folder / "figures" / "curves.png").write_bytes(figures.png(figure))
        return True

    def _note(self, study: str, uid: str, run_id: str, picture: str | None, reason: str | None) -> str:
        """A run's description: its picture, its place in the study, links."""
        experiment_id, _ = self.runs[uid]
        begun = self.box.records(uid, "trial_begun")[0].payload
        place, number = begun["tags"], begun["optuna"].get("number")
        parts = []
        if picture:
            source = f"/get-artifact?path={quote(picture, safe='')}&run_uuid={run_id}"
            parts.append(f"![first layer]({source})")
        parts.append(
            f"Stage **{place.get('stage', '?')}**, slot {place.get('slot', '?')}, attempt {place.get('attempt', 1)}"
            f" of study [{self._name(study)}]({links(self.settings, experiment_id)['charts']}) ·"
            f" [trial {number} in the Optuna dashboard]({self._dashboard(begun['optuna'].get('study_id'), number)})"
        )
        if reason:
            parts.append(f"Ended early: {reason}")
        return "\n\n".join(parts)[:LONGEST_NOTE]

    def _link_attempts(self, study: str, uid: str, run_id: str) -> None:
        """A retry points to the attempt before it, and that one to the retry."""
        from mlflow.entities import RunTag

        stem, _, attempt = uid.rpartition("/")
        before = f"{stem}/{int(attempt) - 1}" if attempt.isdigit() else ""
        known = self.box.links(study, before)
        if before not in known:
            return
        experiment_id, run_before = known[before]
        note = self.client.get_run(run_before).data.tags.get(NOTE, "")
        retry = f"Tried again as [attempt {attempt}]({run_link(self.settings, experiment_id, run_id)})"
        if retry not in note:
            note = f"{note}\n\n{retry}"
        self.client.log_batch(run_before, tags=[RunTag("retried_as", run_id), RunTag(NOTE, note)])
        self.client.set_tag(run_id, "retry_of", run_before)

    def _name_dataset(self, run_id: str, tags: Mapping[str, str]) -> None:
        """The Dataset column: name and digest, no data."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        if "dataset" in tags and "dataset_digest" in tags:
            source = json.dumps({"tags": {"digest": tags["dataset_digest"]}})
            dataset = Dataset(tags["dataset"], tags["dataset_digest"][:LONGEST_DIGEST], "code", source)
            self.client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])

    def _complete(self, uid: str, run_id: str) -> None:
        """Make sure that the run holds every curve point before it closes. Raises _Waiting if it does not.

        What another publisher sent, perhaps one that was killed, is looked up.
        """
        records = self.box.records(uid, "trial_progress", refused=False)
        if self.acknowledged >= {record.id for record in records}:
            return
        points = _metrics(records)
        for _ in range(2):
            if not (missing := self._lacking(run_id, points)):
                return
            self.client.log_batch(run_id, missing)
        raise _Waiting(f"run {run_id} lacks {len(missing)} of {len(points)} points")

    def _lacking(self, run_id: str, points: Sequence[Any]) -> list[Any]:
        """Those of these points at whose step the run has none; another time does not make another point."""
        there = {key: {m.step for m in self.client.get_metric_history(run_id, key)} for key in {p.key for p in points}}
        return [point for point in points if point.step not in there[point.key]]

    def _dashboard(self, study_id: int | None, number: int | None = None) -> str:
        """The address of a study, or of a trial, in the Optuna dashboard."""
        page = f"{self.settings.dashboard_ui}/dashboard"
        if study_id is None:
            return page
        return f"{page}/studies/{study_id}" + ("" if number is None else f"/trials?numbers={number}")


def _refusal(error: Exception) -> str | None:
    """Why a record can never be sent, as against: not now, which is None."""
    if isinstance(error, _Waiting | SieveError | MemoryError | sqlite3.Error) or _is_gone(error):
        return None
    if hasattr(error, "get_http_status_code"):  # an MlflowException
        never = error.get_http_status_code() in NEVER and not any(word in str(error) for word in RACE)
        return _one_line(error) if never else None
    if isinstance(error, OSError):  # connection, disk, or an HTTP answer about a file
        never = getattr(getattr(error, "response", None), "status_code", None) in NEVER
        return _one_line(error) if never else None
    frames = traceback.walk_tb(error.__traceback__)
    if any(frame.f_globals.get("__name__", "").startswith("mlflow.") for frame, _ in frames):
        return None  # an answer that MLflow's client could not read, say
    return f"{OUR_FAULT}: {type(error).__name__}: {_one_line(error)}"


def _is_gone(error: Exception) -> bool:
    """Whether the run or the experiment is not there any more, or deleted."""
    return getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST" or GONE in str(error)


def _labels(name: str, study: str) -> list[str]:
    """What the experiment of a study may be called, the best first."""
    return list(dict.fromkeys([name, f"{name} ({study[:8]})", f"{name} ({study})"]))


def _numbers(summary: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in summary.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def _result(summary: Mapping[str, Any]) -> str:
    """A study's result as tables: the choice, its figures, and the stages."""
    rows = (summary.get("params") or {}) | _numbers(summary)
    tables = [markdown({"chosen": k, "": v} for k, v in rows.items()), markdown(summary.get("stages") or [])]
    return "\n\n".join(table for table in tables if table)


def _metrics(records: Sequence[Record]) -> list[Any]:
    """The curve points of these records as MLflow takes them, each with the time at which it was recorded."""
    from mlflow.entities import Metric

    return [
        Metric(key, float(value), _ms(when), step)
        for step, when, values in progress_points(records)
        for key, value in values.items()
    ]


def _save_images(
    image: Image, names: Sequence[tuple[str, int]], uid: str, when: float, folder: Path, named: Mapping[str, str]
) -> list[str]:
    """One picture under (key, step) names, with thumbnails, as `log_image` names them but for the random part.

    named: the paths of pictures that the run has, by what they show; one that shows the same takes its place.
    """
    data, thumbnail = figures.png(image), figures.thumbnail(image)
    paths = []
    for key, step in names:
        shows, same = f"images/{key}+step+{step}", uuid.uuid5(uuid.NAMESPACE_URL, f"{uid}/{key}/{step}")
        paths.append(named.get(shows, f"{shows}+timestamp+{_ms(when)}+{same}"))
        _file(folder / f"{paths[-1]}.png").write_bytes(data)
        (folder / f"{paths[-1]}+compressed.webp").write_bytes(thumbnail)
    return [f"{path}.png" for path in paths]


def _last_picture(named: Mapping[str, str]) -> str | None:
    """The newest picture of the first layer among those that a run has."""
    steps = [int(shows.rpartition("+")[2]) for shows in named if shows.startswith("images/W1+step+")]
    return f"{named[f'images/W1+step+{max(steps)}']}.png" if steps else None


def _file(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _ms(when: float) -> int:
    return round(when * 1000)


def _one_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return redact(text.splitlines()[0])[:500]


# ---- the saved view: what a person sees when the link is opened


def saved_view(spec: Mapping[str, Any], dimensions: Mapping[str, str], created: int, *, by_mean: bool = False) -> str:
    """The value of the experiment tag that MLflow's UI opens as a view: columns, order, charts, image grids.

    dimensions: searched parameter -> "log" | "linear" | "choice". created: milliseconds. by_mean: order the runs
    by their configuration's mean over repeats, which is what the choice is made on; it is known at the end. The
    format is the UI's own, and not documented: it belongs to the MLflow version that pyproject.toml pins.
    """
    metric = f"result/{spec.get('metric', 'val_accuracy')}"
    ascending = metric.endswith(("loss", "cost"))
    axes = list(dimensions)
    logs = [LOG10 + name for name, scale in dimensions.items() if scale == "log"]
    parallel = [LOG10 + name if scale == "log" else name for name, scale in dimensions.items()]
    repeated = bool(spec.get("confirm")) or spec.get("repeats", 1) > 1
    shown = [*(["repeats/mean", "repeats/deviation"] if repeated else []), metric, "result/test_accuracy"]
    named = {"params": axes, "metrics": dict.fromkeys(shown), "tags": ["stage", "slot", "repeat"]}
    columns = {f"{kind}.`{name}`": 7 * max(len(name), 8) + 40 for kind, names in named.items() for name in names}
    charts: dict[str, list[dict[str, Any]]] = {
        "Which setting won": [
            {"type": "PARALLEL", "displayName": "Parameters and result", "selectedMetrics": [metric],
             "selectedParams": parallel, "showAllRuns": True},
            {"type": "BAR", "metricKey": metric, "displayName": metric},
        ],
        "Learning curves": [
            _lines("Cost: training and validation", "cost/train", "cost/val"),
            _lines("Loss: training and validation", "loss/train", "loss/val"),
            _lines("Accuracy: training and validation", "accuracy/train", "accuracy/val"),
            _lines("eta", "eta"),
        ],
        "Parameters": [
            {"type": "SCATTER", "displayName": f"{metric} by {name}", "xaxis": {"key": name, "type": "PARAM"},
             "yaxis": {"key": metric, "type": "METRIC"}, "runsCountToCompare": 100}
            for name in [*logs, *axes]
        ],
        "Weights and confusion matrices": [
            _grid("First layer at the end", "W1_final"),
            _grid("First layer while it trained", "W1", (spec.get("base") or {}).get("epochs") or 0),
            _grid("First layer at the end, in pixel space", "W1_pixels"),
            _grid("Confusion matrix", "confusion"),
        ],
    }  # fmt: skip
    common = {"runsCountToCompare": 10, "deleted": False, "isGenerated": False}
    numbered = [(f"s{i}", name, group) for i, (name, group) in enumerate(charts.items(), start=1)]
    state = {
        "searchFilter": "tags.kind = 'trial'",
        "orderByKey": "metrics.`repeats/mean`" if by_mean else f"metrics.`{metric}`",
        "orderByAsc": ascending,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": list(columns),
        "columnOrder": [*NAME, *columns, *WHEN],
        "columnWidths": NAME | columns | WHEN,
        "runsHiddenMode": "FIRST_20_RUNS",
        "viewMaximized": False,
        "runListHidden": False,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
        "isAccordionReordered": True,
        "compareRunCharts": [
            common | chart | {"uuid": f"{section}c{i}", "metricSectionId": section}
            for section, _, group in numbered
            for i, chart in enumerate(group)
        ],
        "compareRunSections": [
            {"uuid": section, "name": name, "display": True, "isReordered": False, "deleted": False,
             "isGenerated": False, "columns": 1 if name in WIDE else 3, "cardHeight": WIDE.get(name, 360)}
            for section, name, _ in numbered
        ],
    }  # fmt: skip
    packed = "deflate;" + base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    return json.dumps({"name": "Sieve", "createdAt": created, "updatedAt": created, "state": packed})


def _lines(title: str, *keys: str) -> dict[str, Any]:
    return {
        "type": "LINE", "displayName": title, "metricKey": keys[0], "selectedMetricKeys": list(keys),
        "lineSmoothness": 0, "xAxisScaleType": "linear", "scaleType": "linear", "range": {}, "xAxisKey": "step",
        "selectedXAxisMetricKey": "", "yAxisKey": "metric", "yAxisExpressions": [], "ignoreOutliers": False,
        "useGlobalXaxisKey": True, "useGlobalLineSmoothing": True,
    }  # fmt: skip


def _grid(title: str, key: str, step: int = 0) -> dict[str, Any]:
    return {"type": "IMAGE", "displayName": title, "imageKeys": [key], "step": step, "showRunParams": False}
