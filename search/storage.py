"""A study's record in Optuna's storage, the one truth about what is done: one writer, few transactions.

The writer is the study's owner: it holds a file lock on SQLite, an advisory lock on PostgreSQL. A lock can be lost
without a word (a cut connection, a removed file), so every taking of a study leaves a random number there, its
launch, and each transaction asks for it before it commits. A PostgreSQL that goes away (crash, restart, cut
connections) is waited for; what a lost reply leaves in doubt is looked up.
"""

import functools
import hashlib
import json
import math
import os
import secrets
import socket
import sqlite3
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
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
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential

from search.errors import (
    DataError,
    DiskError,
    NameTaken,
    SettingsError,
    SieveError,
    StorageLost,
    StudyBusy,
    StudyConflict,
    StudyFileError,
    StudyGone,
    StudyTaken,
    StudyUnreadable,
    UnknownStudy,
)
from search.plan import Params, Proposal, Slot, extends
from search.settings import redact, sqlite_path
from search.study import Choice, Range, StudySpec, difference, restore

optuna.logging.set_verbosity(optuna.logging.WARNING)

PATIENCE = 600.0  # seconds that the owner of a study waits for a database that went away
LOCK_SECONDS = 0.5  # somebody who only looks whether a study is owned holds its lock for a moment
RETAKE_SECONDS = 30.0  # a lock may be held by our own dead connection until the server notices
DECIDED = "points."  # begins the names of the study's attributes with the points of begun stages
HOME = "sieve:home"  # system attribute of an attempt: not a part of what a trial is, which no home changes
NOT_OURS = "not made by Sieve"
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
    home: str | None = None  # the id of the home that trained it; older versions did not say

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
            raise DiskError(str(sqlite_path(url)), str(context.original_exception)) from None

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
        return DiskError(str(sqlite_path(url)), lines[0])
    return StorageLost(f"the storage {redact(url)} does not answer: {redact(lines[0])}")


# ---- who may write


@contextmanager
def locked(storage: str, name: str, study: str) -> Iterator[Callable[[], None]]:
    """Hold the lock of this name in the storage of that URL. Raises StudyBusy naming the study, or StorageLost.

    Yields a check for before each write: it takes back a lock that was lost with its connection, and raises
    StudyBusy if another has it by then.
    """
    if storage.startswith("sqlite"):
        lock = _file_lock(storage, name)
        try:
            with lock.acquire(timeout=LOCK_SECONDS):
                yield lambda: None
        except filelock.Timeout:
            raise _busy(study) from None
    else:
        with closing(_AdvisoryLock(storage, name, study)) as advisory:
            if not advisory.take(LOCK_SECONDS):
                raise _busy(study)
            yield advisory.check


def _lock_of(study_id: str) -> str:
    """The name of a study's lock. No study has such a name, and while one is registered its name is locked."""
    return f"studies/{study_id}"


@contextmanager
def owned(record: "StudyRecord") -> Iterator["StudyRecord"]:
    """Be the one writer of a study. Raises StudyBusy, StorageLost, StudyGone."""
    with locked(record.url, _lock_of(record.id), record.name) as still_locked:
        record.take(still_locked)
        with _asking_before_each_commit(record.storage.engine, record.must_be_ours):
            yield record


@contextmanager
def registered(
    url: str,
    spec: StudySpec,
    datasets: Mapping[str, str],
    patience: float = 0.0,
    meet: Callable[["StudyRecord"], Mapping[str, str]] = lambda record: {},
) -> Iterator["StudyRecord"]:
    """Register a study, or find it, and be its one writer; `datasets` has the digest of each stage's data.

    meet: called with the record before it is looked at whether the study can go on; gives the digests that an older
    version, which wrote none into the storage, is known to have begun it with.
    Raises StudyConflict, DataError, StudyBusy, StorageLost.
    """
    with ExitStack() as held:
        with locked(url, spec.name, spec.name):
            storage = open_storage(url)
            register(storage, spec, datasets)
            record = held.enter_context(owned(StudyRecord(storage, spec.name, patience)))
            record.resume(spec, datasets, meet(record))
        yield record


def is_owned(record: "StudyRecord") -> bool:
    """Whether somebody runs the study now."""
    if record.url.startswith("sqlite"):
        try:
            with locked(record.url, _lock_of(record.id), record.name):
                return False
        except StudyBusy:
            return True
    with closing(_AdvisoryLock(record.url, _lock_of(record.id), record.name)) as advisory:
        return advisory.is_held()


@contextmanager
def _making_tables(storage: str) -> Iterator[None]:
    """Wait for the turn to look for tables and to make them."""
    if storage.startswith("sqlite"):
        with _file_lock(storage, SCHEMA):
            yield
    else:
        with closing(_AdvisoryLock(storage, SCHEMA, SCHEMA)) as advisory:
            advisory.take(math.inf)
            yield


def _file_lock(storage: str, name: str) -> filelock.FileLock:
    path = sqlite_path(storage).parent / "locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(path)


class _AdvisoryLock:
    """A lock in PostgreSQL that lives as long as the connection which took it."""

    def __init__(self, url: str, name: str, study: str) -> None:
        self.url, self.study = url, study
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
            raise _busy(self.study)

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
    return sqlalchemy.table(name, *map(sqlalchemy.column, columns))


STUDIES = _table("studies", "study_id", "study_name")
DIRECTIONS = _table("study_directions", "study_id", "direction", "objective")
STUDY_ATTRS = _table("study_user_attributes", "study_id", "key", "value_json")
STUDY_SYSTEM_ATTRS = _table("study_system_attributes", "study_id", "key", "value_json")
TRIALS = _table("trials", "trial_id", "study_id")
PARAMS = _table("trial_params", "param_id", "trial_id", "param_name", "param_value", "distribution_json")
CURVES = _table("trial_intermediate_values", "trial_id", "step", "intermediate_value", "intermediate_value_type")
USER_ATTRS = _table("trial_user_attributes", "trial_id", "key", "value_json")
SYSTEM_ATTRS = _table("trial_system_attributes", "trial_id", "key", "value_json")
NUMBER = sqlalchemy.text("SELECT number FROM trials WHERE trial_id = :trial_id")


def is_empty(url: str) -> bool:
    """Whether nothing was ever stored there, as far as that can be told without making it."""
    return url.startswith("sqlite:///") and not sqlite_path(url).exists()


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
        return self.lasting(functools.partial(method, self, *args, **kwargs))

    return call


class StudyRecord:
    """One study in a storage. Only its owner, after `take`, writes through this.

    `patience` is how many seconds a call waits for a database that went away.
    """

    def __init__(self, storage: RDBStorage, name: str, patience: float = 0.0) -> None:
        """Raises UnknownStudy."""
        self.storage, self.name, self.patience = storage, name, patience
        self.url = storage.url
        self.still_locked: Callable[[], None] = lambda: None
        self.launch = ""  # of an owner: what the storage must hold as long as it is one, and what requests name
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

    @functools.cached_property
    def id(self) -> str:
        """What tells this study from every other one, whatever their names.

        A study of an older version has its name for it until it is launched again.
        """
        return str(self.attr("id") or self.name)

    def uid(self, slot: Slot, attempt: int) -> str:
        """What tells an attempt from every other one, in the journal and in MLflow."""
        return f"{self.id}/{slot}/{attempt}"

    @_durable
    def become(self, study_id: str, home: str) -> None:
        """Be another study from here on, which this home runs: the one that has the id now was copied."""
        with self.storage.engine.begin() as connection:
            _store(connection, self.study_id, {"id": study_id, "home": home})
        self.__dict__["id"] = study_id

    def take(self, still_locked: Callable[[], None]) -> None:
        """Begin to write: from here on every transaction asks whether nobody has taken the study since."""
        self.still_locked, launch = still_locked, secrets.token_hex(8)

        def once() -> None:
            with self.storage.engine.begin() as connection:
                if self._is_gone(connection):
                    raise StudyGone(self.name)
                _store(connection, self.study_id, {"launch": launch, "request": None})

        self.lasting(once)
        self.launch = launch

    def must_be_ours(self, connection: sqlalchemy.Connection) -> None:
        """Raises StudyTaken if another took the study since, StudyGone if it was deleted."""
        found = _stored(connection, self.study_id, "launch", keep=True)
        # Random words, because counts may be equal: SQLite gives the number of a deleted study to the next one.
        if found != self.launch:
            raise StudyGone(self.name) if self._is_gone(connection) else StudyTaken(self.name)

    def lasting(self, call: Callable[[], R]) -> R:
        """What the call gives, made again while the database is away and the patience lasts.

        Raises StudyBusy or StudyTaken if the study is not ours any more, StudyGone if it was deleted.
        """

        def once() -> R:
            self.still_locked()
            try:
                return call()
            except SieveError:
                raise
            except Exception as error:  # what a database says of rows that are not there any more, or are another's
                with self.storage.engine.connect() as connection:
                    if self.launch:
                        self.must_be_ours(connection)
                    gone = isinstance(error, KeyError) and self._is_gone(connection)
                if gone:
                    raise StudyGone(self.name) from None
                raise

        return self.retrying(once)

    def _is_gone(self, connection: sqlalchemy.Connection) -> bool:
        """Whether the study was deleted, though another may have got its number since."""
        found = connection.execute(sqlalchemy.select(STUDIES).where(STUDIES.c.study_id == self.study_id)).first()
        return found is None or (_stored(connection, self.study_id, "id") or self.name) != self.id

    def still_ours(self) -> None:
        """For before something else than the database is written. Raises as `lasting` does."""

        def ask() -> None:
            with self.storage.engine.connect() as connection:
                self.must_be_ours(connection)

        self.lasting(ask)

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
        with self._reading():
            return self.storage.get_study_user_attrs(self.study_id)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """What Optuna cannot take from its own tables is this study's trouble, and said as such."""
        try:
            yield
        except ValueError as error:
            raise StudyUnreadable(self.name, f"what is stored of it is damaged: {error}") from None

    @_durable
    def attr(self, key: str) -> Any:
        """One attribute of the study, None if it has none of that name."""
        with self._reading(), self.storage.engine.connect() as connection:
            return _stored(connection, self.study_id, key)

    @property
    def spec(self) -> StudySpec:
        """Raises StudyUnreadable if there is none, or none that this version understands."""
        return _understood(self.name, self.attr("spec"))

    @_durable
    def set_attr(self, key: str, value: Any) -> None:
        self.storage.set_study_user_attr(self.study_id, key, value)

    @_durable
    def attempts(self) -> list[Attempt]:
        """Every trial of ours, in the order of their numbers. Raises StudyUnreadable for one that cannot be meant."""
        with self._reading():
            trials = self.storage.get_all_trials(self.study_id, deepcopy=False)
        return [self._attempt(trial) for trial in trials if "slot" in trial.user_attrs]

    def _attempt(self, trial: FrozenTrial) -> Attempt:
        attrs = trial.user_attrs
        try:
            if not isinstance(attrs["stage"], str) or not isinstance(attrs["overrides"], dict):
                raise TypeError("stage and overrides")
            return Attempt(
                slot=Slot.parse(attrs["slot"]),
                number=trial.number,
                trial_id=trial._trial_id,
                attempt=int(attrs["attempt"]),
                params=trial.params,
                state=trial.state,
                value=trial.value,
                attrs=attrs,
                home=trial.system_attrs.get(HOME),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise StudyUnreadable(self.name, f"trial {trial.number} lacks what Sieve writes: {error}") from None

    @_durable
    def curves(self) -> dict[int, dict[int, float]]:
        """The intermediate values of each trial, by its id and by step."""
        trials = self.storage.get_all_trials(self.study_id, deepcopy=False)
        return {trial._trial_id: trial.intermediate_values for trial in trials}

    def begin(
        self, proposal: Proposal, attempt: int, distributions: Mapping[str, BaseDistribution], home: str
    ) -> tuple[int, int]:
        """Write a proposal down as a RUNNING trial, in one transaction; returns (trial id, number).

        home: the id of the home that trains it, which has its checkpoint and its journal.
        """
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
            system_attrs={HOME: home},
        )
        doubtful = False

        def once() -> tuple[int, int]:
            nonlocal doubtful
            twins = [a for a in self.attempts() if (a.slot, a.attempt) == (slot, attempt)] if doubtful else []
            if twins:  # it was written, and only the reply was lost
                return twins[0].trial_id, twins[0].number
            doubtful = True
            trial_id = self.storage.create_new_trial(self.study_id, template_trial=trial)
            with self.storage.engine.connect() as connection:  # Optuna would load the trial to name its number
                return trial_id, connection.execute(NUMBER, {"trial_id": trial_id}).scalar_one()

        return self.lasting(once)

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
    def resume(self, spec: StudySpec, datasets: Mapping[str, str], before: Mapping[str, str]) -> None:
        """Go on with the study by this spec, whose words, limits and paths may be others; or with more points.

        Raises StudyConflict if it has other trials, DataError if it has other data. A study without any trial gives
        way to another one of its name.
        """
        with self.storage.engine.begin() as connection:
            own = sqlalchemy.select(TRIALS.c.trial_id).where(TRIALS.c.study_id == self.study_id)
            if connection.execute(own.limit(1)).first() is None:
                _store_direction(connection, self.study_id, spec)
                self._forget_points(connection)  # decided, and cut short before the first of them began
                _store(connection, self.study_id, {"datasets": dict(datasets)})
            else:
                stored = restore(json.loads(_stored(connection, self.study_id, "spec")))
                if difference(stored, spec):
                    if not extends(spec, stored):
                        raise StudyConflict(spec.name, difference(stored, spec))
                    self._widen(connection, spec)
                known = _stored(connection, self.study_id, "datasets") or before
                for stage, digest in known.items():
                    if datasets[stage] != digest:
                        raise _other_data(stored, spec, stage, digest, datasets[stage])
                _store(connection, self.study_id, {"datasets": dict(datasets)})
            _store(connection, self.study_id, {"spec": spec.to_json()})

    def _widen(self, connection: sqlalchemy.Connection, spec: StudySpec) -> None:
        """The wider space of a spec with more points in every trial; what was decided by fewer points is forgotten.

        Optuna has no call for it, refuses a choice whose values differ from those of earlier trials, and leaves
        parameters out of its plots whose distributions do.
        """
        own = sqlalchemy.select(TRIALS.c.trial_id).where(TRIALS.c.study_id == self.study_id)
        wider = {name: distribution(d) for name, d in spec.dimensions.items()}
        for row in connection.execute(sqlalchemy.select(PARAMS).where(PARAMS.c.trial_id.in_(own))).all():
            value = json_to_distribution(row.distribution_json).to_external_repr(row.param_value)
            new = wider[row.param_name]
            stored = {"param_value": new.to_internal_repr(value), "distribution_json": distribution_to_json(new)}
            if (row.param_value, row.distribution_json) != tuple(stored.values()):
                connection.execute(PARAMS.update().where(PARAMS.c.param_id == row.param_id).values(stored))
        self._forget_points(connection)

    def _forget_points(self, connection: sqlalchemy.Connection) -> None:
        decided = (STUDY_ATTRS.c.study_id == self.study_id) & STUDY_ATTRS.c.key.startswith(DECIDED)
        connection.execute(STUDY_ATTRS.delete().where(decided))

    @_durable
    def decided(self) -> dict[str, list[Params]]:
        """The points of each stage (or generation) that was begun, by the key that the plan gives it."""
        own = (STUDY_ATTRS.c.study_id == self.study_id) & STUDY_ATTRS.c.key.startswith(DECIDED)
        with self.storage.engine.connect() as connection:
            rows = connection.execute(sqlalchemy.select(STUDY_ATTRS).where(own)).all()
        return {row.key.removeprefix(DECIDED): json.loads(row.value_json) for row in rows}

    def decide(self, points: Mapping[str, Sequence[Params]]) -> None:
        """Write the points of a stage down before the first of them runs: they stay, whatever is tried again later."""
        for key, params in points.items():
            self.set_attr(f"{DECIDED}{key}", list(params))

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


def _stored(connection: sqlalchemy.Connection, study_id: int, key: str, *, keep: bool = False) -> Any:
    """An attribute of a study, None if there is none. keep: nobody changes it until this transaction ends."""
    query = "SELECT value_json FROM study_user_attributes WHERE study_id = :id AND key = :key"
    if keep and connection.dialect.name != "sqlite":  # SQLite lets one connection write at a time
        query += " FOR SHARE"
    found = connection.execute(sqlalchemy.text(query), {"id": study_id, "key": key}).scalar()
    return None if found is None else json.loads(found)


def _store(connection: sqlalchemy.Connection, study_id: int, attrs: Mapping[str, Any]) -> None:
    """Attributes of a study, within a transaction."""
    own = (STUDY_ATTRS.c.study_id == study_id) & STUDY_ATTRS.c.key.in_(list(attrs))
    there = {row.key for row in connection.execute(sqlalchemy.select(STUDY_ATTRS.c.key).where(own))}
    for key, value in attrs.items():
        row = {"study_id": study_id, "key": key, "value_json": json.dumps(value)}
        if key in there:
            same = (STUDY_ATTRS.c.study_id == study_id) & (STUDY_ATTRS.c.key == key)
            connection.execute(STUDY_ATTRS.update().where(same).values(row))
        else:
            connection.execute(STUDY_ATTRS.insert().values(row))


@contextmanager
def _asking_before_each_commit(
    engine: sqlalchemy.Engine, ask: Callable[[sqlalchemy.Connection], None]
) -> Iterator[None]:
    """`ask` within each transaction that has written something, as its last statement; it raises to undo it all."""

    def remember(connection: sqlalchemy.Connection, _: Any, statement: str, *__: Any) -> None:
        if statement.lstrip()[:6].upper() != "SELECT":
            connection.info["wrote"] = True

    def commit(connection: sqlalchemy.Connection) -> None:
        if connection.info.pop("wrote", False):
            ask(connection)

    def rollback(connection: sqlalchemy.Connection) -> None:
        if not connection.invalidated:  # a cut connection has forgotten it
            connection.info.pop("wrote", None)

    listeners: dict[str, Callable[..., None]] = {
        "after_cursor_execute": remember,
        "commit": commit,
        "rollback": rollback,
    }
    for name, listener in listeners.items():
        sqlalchemy.event.listen(engine, name, listener)
    try:
        yield
    finally:
        for name, listener in listeners.items():
            sqlalchemy.event.remove(engine, name, listener)


def _understood(name: str, stored: Any) -> StudySpec:
    """A specification as it is stored. Raises StudyUnreadable if it is none, or none that this version knows."""
    if stored is None:
        raise StudyUnreadable(name, NOT_OURS)
    try:
        return restore(json.loads(stored))
    except (StudyFileError, TypeError, ValueError) as error:
        lines = str(error).splitlines()
        raise StudyUnreadable(name, f"its stored specification: {lines[0] if lines else error!r}") from None


def register(storage: RDBStorage, spec: StudySpec, datasets: Mapping[str, str]) -> None:
    """Write a new study down, whole or not at all; one of an older version gets its id.

    Raises NameTaken if another tool's study has the name, StudyUnreadable if this version cannot know whose it is.
    """
    identity = {"id": secrets.token_hex(8), "launch": ""}
    with storage.engine.begin() as connection:
        named = sqlalchemy.select(STUDIES.c.study_id).where(STUDIES.c.study_name == spec.name)
        study_id = connection.execute(named).scalar()
        if study_id is None:
            connection.execute(STUDIES.insert().values(study_name=spec.name))
            study_id = connection.execute(named).scalar_one()
            _store_direction(connection, study_id, spec)
            _store(connection, study_id, identity | {"spec": spec.to_json(), "datasets": dict(datasets)})
        elif (stored := _stored(connection, study_id, "spec")) is None:
            _may_be_adopted(connection, study_id, spec)
            _store(connection, study_id, identity | {"spec": spec.to_json()})
        elif _understood(spec.name, stored) and _stored(connection, study_id, "id") is None:
            _store(connection, study_id, identity | {"formerly": True})


def _may_be_adopted(connection: sqlalchemy.Connection, study_id: int, spec: StudySpec) -> None:
    """Raises NameTaken unless a study without a spec is an empty one that goes the same way as this spec."""
    trials = connection.execute(sqlalchemy.select(TRIALS.c.trial_id).where(TRIALS.c.study_id == study_id)).first()
    attrs = connection.execute(sqlalchemy.select(STUDY_ATTRS.c.key).where(STUDY_ATTRS.c.study_id == study_id)).first()
    if trials or attrs:
        raise NameTaken(spec.name, [NOT_OURS])
    query = sqlalchemy.select(DIRECTIONS.c.direction).where(DIRECTIONS.c.study_id == study_id)
    directions = list(connection.execute(query).scalars())
    if directions != [_direction(spec)]:
        found = " and ".join(direction.lower() for direction in directions)
        raise NameTaken(spec.name, [NOT_OURS, f"without trials, and its direction is {found}"])


def _direction(spec: StudySpec) -> str:
    return (StudyDirection.MAXIMIZE if spec.maximise else StudyDirection.MINIMIZE).name


def _store_direction(connection: sqlalchemy.Connection, study_id: int, spec: StudySpec) -> None:
    """One objective, under the metric's name, as Optuna's own calls write it."""
    key = "study:metric_names"
    connection.execute(DIRECTIONS.delete().where(DIRECTIONS.c.study_id == study_id))
    connection.execute(DIRECTIONS.insert().values(study_id=study_id, direction=_direction(spec), objective=0))
    own = (STUDY_SYSTEM_ATTRS.c.study_id == study_id) & (STUDY_SYSTEM_ATTRS.c.key == key)
    connection.execute(STUDY_SYSTEM_ATTRS.delete().where(own))
    row = {"study_id": study_id, "key": key, "value_json": json.dumps([spec.metric])}
    connection.execute(STUDY_SYSTEM_ATTRS.insert().values(row))


def _other_data(stored: StudySpec, given: StudySpec, stage: str, was: str, is_now: str) -> DataError:
    before, after = (spec.dataset_of(stage) for spec in (stored, given))
    return DataError(
        f"study '{given.name}' was begun with other data: {before.path or before.name} had digest {was}, "
        f"{after.path or after.name} has {is_now}; bring the old data back (`sieve data check` looks for damage), "
        "or give this study another name"
    )


def study_names(storage: RDBStorage) -> list[str]:
    """Oldest first. Asked of the table itself: Optuna's call fails for all where one study is damaged."""
    with storage.engine.connect() as connection:
        return list(connection.execute(sqlalchemy.text("SELECT study_name FROM studies ORDER BY study_id")).scalars())


def stored_states(storage: RDBStorage) -> dict[str, str | None]:
    """The studies that have a specification, oldest first, each with its state as its last runner left it."""
    query = sqlalchemy.text(
        "SELECT study_name, state FROM studies JOIN study_user_attributes AS spec USING (study_id) "
        "LEFT JOIN (SELECT study_id, value_json AS state FROM study_user_attributes WHERE key = 'state') AS states "
        "USING (study_id) WHERE spec.key = 'spec' ORDER BY study_id"
    )
    with storage.engine.connect() as connection:
        return {name: state and state.strip('"') for name, state in connection.execute(query)}


def finished_attempts(attempts: Iterable[Attempt]) -> dict[Slot, Attempt]:
    """The one attempt that settled each slot that is done."""
    return {attempt.slot: attempt for attempt in attempts if attempt.done}


def failed_attempts(attempts: Iterable[Attempt], *, left: bool = False) -> dict[Slot, Attempt]:
    """The last attempt at each slot where that failed, for `sieve retry`; or where it was left, for the next runner."""
    last = {attempt.slot: attempt for attempt in attempts}
    return {slot: a for slot, a in last.items() if a.state == TrialState.FAIL and (LEFT in a.attrs) == left}
