"""A study's record in Optuna's storage, the one truth about what is done: one writer, few transactions.

The writer is the study's owner: it holds a file lock on SQLite, an advisory lock on PostgreSQL. A PostgreSQL that
goes away (crash, restart, cut connections) is waited for; what a lost reply leaves in doubt is looked up.
"""

import functools
import hashlib
import json
import math
import os
import socket
import sqlite3
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import filelock
import optuna
import sqlalchemy
from optuna.artifacts import FileSystemArtifactStore
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
    json_to_distribution,
)
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential

from search.errors import DiskError, SettingsError, StorageLost, StudyBusy, StudyConflict, UnknownStudy
from search.plan import Proposal, Slot, extends
from search.settings import redact
from search.study import Choice, Range, StudySpec, difference, restore

optuna.logging.set_verbosity(optuna.logging.WARNING)

PATIENCE = 600.0  # seconds that the owner of a study waits for a database that went away
LOCK_SECONDS = 0.5  # somebody who only looks whether a study is owned holds its lock for a moment
RETAKE_SECONDS = 30.0  # a lock may be held by our own dead connection until the server notices
LEFT = "left"  # user attribute of an attempt whose slot gets another one without being asked
SCHEMA = "schema of the database"  # what its lock is named after; no study can have this name

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Attempt:
    """One trial as it is stored: one attempt at a slot."""

    slot: Slot
    number: int
    trial_id: int
    attempt: int
    params: dict[str, Any]
    state: TrialState
    value: float | None
    attrs: dict[str, Any]

    @property
    def done(self) -> bool:
        return self.state in (TrialState.COMPLETE, TrialState.PRUNED)


# ---- the database

Storage = RDBStorage  # for the annotations of modules that know nothing of Optuna


def open_storage(url: str) -> RDBStorage:
    """The storage at a URL, with its tables. Raises StorageLost if it does not answer, SettingsError if it never will.

    SQLite is set up for one writer and many readers. Processes that start together make the tables in turn.
    """
    try:
        with _making_tables(url):
            if url.startswith("sqlite"):
                return _open_sqlite(url)
            storage = RDBStorage(url, engine_kwargs={"pool_pre_ping": True, "connect_args": _connect_args()})
    except (SQLAlchemyError, StorageInternalError) as error:
        raise _lost(url, error) from None
    except ImportError:
        raise SettingsError(f"{redact(url)} needs a driver: pip install 'sieve[postgres]'") from None
    except RuntimeError as error:  # tables of another version of Optuna
        raise SettingsError(f"{redact(url)}: {error}; `sieve migrate` brings older tables up to date") from None

    @sqlalchemy.event.listens_for(storage.engine, "handle_error")
    def recognise(context: sqlalchemy.engine.ExceptionContext) -> None:
        """Past Optuna, which would try again at once what may have been done."""
        if (context.is_disconnect and not context.is_pre_ping) or context.connection is None:
            raise _lost(url, context.original_exception) from None

    weakref.finalize(storage, storage.engine.dispose)
    return storage


def _open_sqlite(url: str) -> RDBStorage:
    storage = RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})

    @sqlalchemy.event.listens_for(storage.engine, "connect")
    def write_ahead(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        # A trial that is told has no checkpoint any more: a power cut must not take the telling back.
        connection.execute("PRAGMA synchronous=FULL")

    @sqlalchemy.event.listens_for(storage.engine, "handle_error")
    def recognise(context: sqlalchemy.engine.ExceptionContext) -> None:
        """A full disk and the like, past Optuna, which would blame the values."""
        if isinstance(context.original_exception, sqlite3.OperationalError):
            raise DiskError(url.removeprefix("sqlite:///"), str(context.original_exception)) from None

    storage.engine.dispose()  # connections from before the listener
    return storage


def artifacts(folder: Path) -> FileSystemArtifactStore:
    """What the dashboard takes the pictures of trials from."""
    with suppress(OSError):  # it may only read there, and the publisher makes it as well
        folder.mkdir(parents=True, exist_ok=True)
    return FileSystemArtifactStore(folder)


def migrate(url: str) -> None:
    """Make the tables, or bring those of an older Optuna up to date."""
    if is_empty(url):
        open_storage(url)
        return
    with _making_tables(url):
        arguments = {} if url.startswith("sqlite") else {"connect_args": _connect_args()}
        try:
            RDBStorage(url, engine_kwargs=arguments, skip_compatibility_check=True).upgrade()
        except (SQLAlchemyError, StorageInternalError) as error:
            raise _lost(url, error) from None


def _connect_args() -> dict[str, Any]:
    """Both ends notice within half a minute that the other is gone, so that its locks are free again."""
    return {
        "application_name": f"sieve {socket.gethostname()}:{os.getpid()}"[:63],
        "connect_timeout": 10,
        "tcp_user_timeout": 30_000,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "options": "-c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3",
    }


def _lost(url: str, error: BaseException) -> StorageLost | DiskError:
    cause = error.__cause__ or error
    lines = str(getattr(cause, "orig", cause)).strip().splitlines() or [type(error).__name__]
    if url.startswith("sqlite"):
        return DiskError(url.removeprefix("sqlite:///"), lines[0])
    return StorageLost(f"the storage {redact(url)} does not answer: {redact(lines[0])}")


# ---- who may write


@contextmanager
def owned(storage: str, study: str) -> Iterator[Callable[[], None]]:
    """Be the only runner of a study in the storage of that URL. Raises StudyBusy, or StorageLost.

    Yields a check for before each write: it takes back a lock that was lost with its connection, and raises
    StudyBusy if another runner has it by then.
    """
    if storage.startswith("sqlite"):
        lock = _file_lock(storage, study)
        try:
            with lock.acquire(timeout=LOCK_SECONDS):
                yield lambda: None
        except filelock.Timeout:
            raise _busy(study) from None
    else:
        with closing(_AdvisoryLock(storage, study)) as advisory:
            if not advisory.take(LOCK_SECONDS):
                raise _busy(study)
            yield advisory.check


def is_owned(storage: str, study: str) -> bool:
    """Whether somebody runs a study now."""
    if storage.startswith("sqlite"):
        try:
            with owned(storage, study):
                return False
        except StudyBusy:
            return True
    with closing(_AdvisoryLock(storage, study)) as advisory:
        return advisory.is_held()


@contextmanager
def _making_tables(storage: str) -> Iterator[None]:
    """Wait for the turn to look for tables and to make them."""
    if storage.startswith("sqlite"):
        with _file_lock(storage, SCHEMA):
            yield
    else:
        with closing(_AdvisoryLock(storage, SCHEMA)) as advisory:
            advisory.take(math.inf)
            yield


def _file_lock(storage: str, name: str) -> filelock.FileLock:
    folder = Path(storage.removeprefix("sqlite:///")).parent / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(folder / f"{name}.lock")


class _AdvisoryLock:
    """A lock in PostgreSQL that lives as long as the connection which took it."""

    def __init__(self, url: str, name: str) -> None:
        self.url, self.name = url, name
        self.key = int.from_bytes(hashlib.blake2b(f"sieve {name}".encode(), digest_size=8).digest(), signed=True)
        self.engine = sqlalchemy.create_engine(
            url, isolation_level="AUTOCOMMIT", poolclass=sqlalchemy.NullPool, connect_args=_connect_args()
        )
        self.connection: sqlalchemy.Connection | None = None

    def take(self, timeout: float) -> bool:
        """Whether the lock is ours, after waiting for it so long. Raises StorageLost."""
        attempts = Retrying(
            retry=lambda state: state.outcome is not None and state.outcome.result() is False,
            wait=wait_random_exponential(multiplier=0.05, max=1),
            stop=lambda state: (state.seconds_since_start or 0.0) >= timeout,
            retry_error_callback=lambda state: False,
        )
        try:
            self.connection = self.connection or self.engine.connect()
            return bool(attempts(self._try))
        except SQLAlchemyError as error:
            self.close()
            raise _lost(self.url, error) from None

    def _try(self) -> bool:
        assert self.connection is not None
        return bool(self.connection.execute(sqlalchemy.text(f"SELECT pg_try_advisory_lock({self.key})")).scalar())

    def is_held(self) -> bool:
        """Whether anybody has the lock. Raises StorageLost."""
        holders = (
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1 AND granted AND "
            "database = (SELECT oid FROM pg_database WHERE datname = current_database()) AND "
            f"(classid::bigint << 32) | objid::bigint = {self.key}"
        )
        try:
            self.connection = self.connection or self.engine.connect()
            return bool(self.connection.execute(sqlalchemy.text(holders)).scalar())
        except SQLAlchemyError as error:
            raise _lost(self.url, error) from None

    def check(self) -> None:
        """Raises StudyBusy if another has the lock that was ours, StorageLost if that cannot be told."""
        try:
            if self.connection is not None:
                self.connection.execute(sqlalchemy.text("SELECT 1"))
                return
        except SQLAlchemyError:
            self.close()
        if not self.take(RETAKE_SECONDS):
            raise _busy(self.name)

    def close(self) -> None:
        if self.connection is not None:
            self.connection.invalidate()  # closed for good, whatever its state
            self.connection.close()
            self.connection = None


def _busy(study: str) -> StudyBusy:
    return StudyBusy(
        f"study '{study}' is being run by another process; `sieve status {study}` shows it, "
        f"`sieve stop {study}` stops it"
    )


# ---- one study


def _table(name: str, *columns: str) -> sqlalchemy.TableClause:
    """A table of Optuna's, for what its own calls do in too many transactions."""
    return sqlalchemy.table(name, sqlalchemy.column("trial_id"), *map(sqlalchemy.column, columns))


CURVES = _table("trial_intermediate_values", "step", "intermediate_value", "intermediate_value_type")
USER_ATTRS = _table("trial_user_attributes", "key", "value_json")
SYSTEM_ATTRS = _table("trial_system_attributes", "key", "value_json")
NUMBER = sqlalchemy.text("SELECT number FROM trials WHERE trial_id = :trial_id")


def is_empty(url: str) -> bool:
    """Whether nothing was ever stored there, as far as that can be told without making it."""
    return url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).exists()


def distribution(dimension: Range | Choice) -> BaseDistribution:
    """What Optuna is told of a dimension: always the full space, so that its plots and samplers stay right."""
    if isinstance(dimension, Choice):
        return CategoricalDistribution(dimension.choices)
    if dimension.integer:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def _durable(method: Callable[Concatenate["StudyRecord", P], R]) -> Callable[Concatenate["StudyRecord", P], R]:
    """A call that may be repeated, and is while the database is away and the record's patience lasts."""

    @functools.wraps(method)
    def call(self: "StudyRecord", /, *args: P.args, **kwargs: P.kwargs) -> R:
        def once() -> R:
            self.still_owned()
            return method(self, *args, **kwargs)

        return self.retrying(once)

    return call


class StudyRecord:
    """One study in a storage. Only the runner that owns the study writes through this.

    `patience` is how many seconds a call waits for a database that went away; who owns nothing waits for nothing.
    """

    def __init__(
        self, storage: RDBStorage, name: str, still_owned: Callable[[], None] = lambda: None, patience: float = 0.0
    ) -> None:
        self.storage, self.name = storage, name
        self.still_owned, self.patience = still_owned, patience
        self.warn: Callable[[str], None] = lambda text: None
        self.retrying = Retrying(
            retry=retry_if_exception_type(StorageLost),
            wait=wait_random_exponential(multiplier=0.2, max=5),
            stop=lambda state: (state.seconds_since_start or 0.0) >= self.patience,
            before_sleep=self._say_lost,
            retry_error_callback=self._give_up,
        )
        try:
            self.study_id = storage.get_study_id_from_name(name)
        except KeyError:
            raise UnknownStudy(name, study_names(storage)) from None

    def _say_lost(self, state: RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            self.warn(f"{state.outcome.exception()}; waiting for it")

    def _give_up(self, state: RetryCallState) -> Any:
        self.patience = 0.0  # once is enough
        assert state.outcome is not None
        return state.outcome.result()

    @property
    def attrs(self) -> dict[str, Any]:
        return self._attrs()

    @_durable
    def _attrs(self) -> dict[str, Any]:
        return self.storage.get_study_user_attrs(self.study_id)

    @property
    def spec(self) -> StudySpec:
        return restore(json.loads(self.attrs["spec"]))

    @_durable
    def set_attr(self, key: str, value: Any) -> None:
        self.storage.set_study_user_attr(self.study_id, key, value)

    @_durable
    def attempts(self) -> list[Attempt]:
        """Every trial of the study, in the order of their numbers."""
        return [
            Attempt(
                slot=Slot.parse(trial.user_attrs["slot"]),
                number=trial.number,
                trial_id=trial._trial_id,
                attempt=trial.user_attrs["attempt"],
                params=trial.params,
                state=trial.state,
                value=trial.value,
                attrs=trial.user_attrs,
            )
            for trial in self.storage.get_all_trials(self.study_id, deepcopy=False)
            if "slot" in trial.user_attrs
        ]

    @_durable
    def curve(self, trial_id: int) -> dict[int, float]:
        """The intermediate values of a trial, by step."""
        return self.storage.get_trial(trial_id).intermediate_values

    def begin(self, proposal: Proposal, attempt: int, distributions: Mapping[str, BaseDistribution]) -> tuple[int, int]:
        """Write a proposal down as a RUNNING trial, in one transaction; returns (trial id, number)."""
        slot = proposal.slot
        attrs = {
            "stage": proposal.stage,
            "slot": str(slot),
            "repeat": slot.repeat,
            "attempt": attempt,
            "overrides": proposal.overrides,
        }
        trial = create_trial(
            state=TrialState.RUNNING,
            params=proposal.params,
            distributions={name: distributions[name] for name in proposal.params},
            user_attrs=attrs,
        )
        doubtful = False

        def once() -> tuple[int, int]:
            nonlocal doubtful
            self.still_owned()
            twins = [a for a in self.attempts() if (a.slot, a.attempt) == (slot, attempt)] if doubtful else []
            if twins:  # it was written, and only the reply was lost
                return twins[0].trial_id, twins[0].number
            doubtful = True
            trial_id = self.storage.create_new_trial(self.study_id, template_trial=trial)
            with self.storage.engine.connect() as connection:  # Optuna would load the trial to name its number
                return trial_id, connection.execute(NUMBER, {"trial_id": trial_id}).scalar_one()

        return self.retrying(once)

    @_durable
    def add_curves(self, curves: Mapping[int, Sequence[tuple[int, float]]]) -> None:
        """Intermediate values of trials, {trial id: [(step, value)]}, in one transaction.

        Writing them again is harmless. Optuna's own call takes a transaction for each value, at 19 times the cost.
        """
        rows = [_intermediate_row(trial, step, value) for trial, curve in curves.items() for step, value in curve]
        if not rows:
            return
        with self.storage.engine.begin() as connection:
            for trial, curve in curves.items():
                steps = [step for step, _ in curve]
                connection.execute(CURVES.delete().where(CURVES.c.trial_id == trial, CURVES.c.step.in_(steps)))
            connection.execute(CURVES.insert(), rows)

    @_durable
    def finish(
        self,
        trial_id: int,
        state: TrialState,
        value: float | None,
        attrs: Mapping[str, Any],
        image: str | None = None,
    ) -> None:
        """Tell how an attempt ended; `image` is the id of the picture that the publisher draws of its weights."""
        self._set_attrs(USER_ATTRS, trial_id, attrs)
        if image is not None:
            meta = {"artifact_id": image, "filename": "first-layer.png", "mimetype": "image/png", "encoding": None}
            self._set_attrs(SYSTEM_ATTRS, trial_id, {f"artifacts:{image}": json.dumps(meta)})
        try:
            self.storage.set_trial_state_values(trial_id, state, None if value is None else [value])
        except UpdateFinishedTrialError:
            if self.storage.get_trial(trial_id).state != state:  # else it was told, and only the reply was lost
                raise

    @_durable
    def extend(self, spec: StudySpec) -> None:
        """Store a spec with more points, and its wider space in every trial, in one transaction.

        Optuna has no call for it, refuses a choice whose values differ from those of earlier trials, and leaves
        parameters out of its plots whose distributions do.
        """
        params, trials, attrs = (
            sqlalchemy.table(name, *map(sqlalchemy.column, columns))
            for name, columns in (
                ("trial_params", ("param_id", "trial_id", "param_name", "param_value", "distribution_json")),
                ("trials", ("trial_id", "study_id")),
                ("study_user_attributes", ("study_id", "key", "value_json")),
            )
        )
        own = sqlalchemy.select(trials.c.trial_id).where(trials.c.study_id == self.study_id)
        wider = {name: distribution(d) for name, d in spec.dimensions.items()}
        with self.storage.engine.begin() as connection:
            for row in connection.execute(sqlalchemy.select(params).where(params.c.trial_id.in_(own))).all():
                value = json_to_distribution(row.distribution_json).to_external_repr(row.param_value)
                new = wider[row.param_name]
                stored = {"param_value": new.to_internal_repr(value), "distribution_json": distribution_to_json(new)}
                if (row.param_value, row.distribution_json) != tuple(stored.values()):
                    connection.execute(params.update().where(params.c.param_id == row.param_id).values(stored))
            stored = {"value_json": json.dumps(spec.to_json())}
            mine = (attrs.c.study_id == self.study_id) & (attrs.c.key == "spec")
            connection.execute(attrs.update().where(mine).values(stored))

    def _set_attrs(self, table: sqlalchemy.TableClause, trial_id: int, attrs: Mapping[str, Any]) -> None:
        """Attributes of a trial in one transaction; Optuna's own call takes one for each."""
        rows = [{"trial_id": trial_id, "key": key, "value_json": json.dumps(attr)} for key, attr in attrs.items()]
        with self.storage.engine.begin() as connection:
            connection.execute(table.delete().where(table.c.trial_id == trial_id, table.c.key.in_(list(attrs))))
            connection.execute(table.insert(), rows)

    # The dashboard's own calls read every note of the study to write one; these are the same records.

    @_durable
    def note(self, body: str, trial_id: int | None = None) -> None:
        """Markdown for the dashboard; of a trial's at most 2,000 characters are kept, of the study's 10,000."""
        prefix, parts = ("dashboard:", 5) if trial_id is None else (f"dashboard:{trial_id}:", 1)
        for part in range(parts):
            text = body[2000 * part : 2000 * (part + 1)]
            self.storage.set_study_system_attr(self.study_id, f"{prefix}note_str:{part}", text)
        self.storage.set_study_system_attr(self.study_id, f"{prefix}note_ver", 1)

    @_durable
    def noted(self) -> set[int]:
        """The ids of the trials that have a note."""
        keys = (key.split(":") for key in self.storage.get_study_system_attrs(self.study_id))
        return {int(key[1]) for key in keys if len(key) == 3 and key[2] == "note_ver"}


def _intermediate_row(trial_id: int, step: int, value: float) -> dict[str, Any]:
    kind = "FINITE" if math.isfinite(value) else "NAN" if math.isnan(value) else "INF_POS" if value > 0 else "INF_NEG"
    finite = value if math.isfinite(value) else None
    return {"trial_id": trial_id, "step": step, "intermediate_value": finite, "intermediate_value_type": kind}


def register(
    storage: RDBStorage, spec: StudySpec, still_owned: Callable[[], None] = lambda: None, patience: float = 0.0
) -> StudyRecord:
    """The record of this study: new, or the one to resume, or to extend by more points.

    Raises StudyConflict if another spec has the name.
    """
    if spec.name not in study_names(storage):
        direction = StudyDirection.MAXIMIZE if spec.maximise else StudyDirection.MINIMIZE
        study_id = storage.create_new_study([direction], study_name=spec.name)
        storage.set_study_system_attr(study_id, "study:metric_names", [spec.metric])  # as Study.set_metric_names
        storage.set_study_user_attr(study_id, "spec", spec.to_json())
    record = StudyRecord(storage, spec.name, still_owned, patience)
    if "spec" not in record.attrs:
        if storage.get_all_trials(record.study_id, deepcopy=False):
            raise StudyConflict(spec.name, ["the stored study was not made by Sieve"])
        record.set_attr("spec", spec.to_json())  # its registration was cut short
    if differences := difference(record.spec, spec):
        if not extends(spec, record.spec):
            raise StudyConflict(spec.name, differences)
        record.extend(spec)
    if record.attrs["spec"] != spec.to_json():
        record.set_attr("spec", spec.to_json())  # another description or limit, the same trials
    return record


def study_names(storage: RDBStorage) -> list[str]:
    return [study.study_name for study in storage.get_all_studies()]


def finished_attempts(attempts: Iterable[Attempt]) -> dict[Slot, Attempt]:
    """The one attempt that settled each slot that is done."""
    return {attempt.slot: attempt for attempt in attempts if attempt.done}


def failed_attempts(attempts: Iterable[Attempt], *, left: bool = False) -> dict[Slot, Attempt]:
    """The last attempt at each slot where that failed, for `sieve retry`; or where it was left, for the next runner."""
    last = {attempt.slot: attempt for attempt in attempts}
    return {slot: a for slot, a in last.items() if a.state == TrialState.FAIL and (LEFT in a.attrs) == left}
