"""The outbox: everything that is to be published, durable on this machine's disk first.

The runner puts records, a publisher in another process ships them and marks them sent. Sent records stay, so
that the whole of a study can be published again, even into an empty server. A record carries its own
timestamps: publishing it twice never makes new ones.

A study is told from others by its id: records and runs hold that, and the uid of an attempt begins with it
(ID/SLOT/ATTEMPT; the study's own uid is the id alone). Its name is in what it said at its beginning. In the
journal of an older version the name stood for the id, and does so until the study is launched again.
"""

import io
import json
import math
import sqlite3
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.errors import SettingsError
from search.failpoint import failpoint

Point = tuple[int, float, dict[str, float]]  # step, unix seconds, metrics

VERSION = 2  # of the layout
OUR_FAULT = "a fault of Sieve"  # so begins the reason of what was set aside though the server never saw it
LOCKED = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)
SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    study TEXT NOT NULL, uid TEXT NOT NULL, kind TEXT NOT NULL, seq INTEGER NOT NULL,
    time REAL NOT NULL, payload TEXT NOT NULL, blob BLOB,
    last_step INTEGER,                         -- of trial_progress: the last step it holds
    state TEXT NOT NULL DEFAULT 'unsent',      -- unsent, sent, refused
    reason TEXT,                               -- of refused
    UNIQUE (uid, kind, seq)
);
CREATE INDEX IF NOT EXISTS open_records ON records (study, id) WHERE state = 'unsent';
CREATE TABLE IF NOT EXISTS runs (
    uid TEXT PRIMARY KEY, study TEXT NOT NULL, experiment_id TEXT NOT NULL, run_id TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS home (id TEXT NOT NULL);
INSERT INTO home SELECT lower(hex(randomblob(8))) WHERE NOT EXISTS (SELECT * FROM home);
"""
# What each layout adds to the one before it.
SINCE = {
    1: "ALTER TABLE home ADD COLUMN path TEXT;"  # where this journal was last opened
    "CREATE TABLE earlier_homes (id TEXT PRIMARY KEY);"  # of which this one is a copy
}
COLUMNS = "kind, study, uid, seq, time, payload, blob, id"


@dataclass(frozen=True)
class Record:
    """One thing to publish; (uid, kind, seq) names it for ever, so putting it again changes nothing."""

    kind: str
    study: str
    uid: str
    seq: int
    when: float  # unix seconds
    payload: dict[str, Any]  # JSON; NaN and infinities allowed
    blob: bytes | None = None
    id: int = field(default=0, compare=False)  # given by the outbox


@dataclass(frozen=True)
class Counts:
    """What an outbox holds of one study."""

    unsent: int = 0
    sent: int = 0
    refused: int = 0


class Outbox:
    """A queue in one SQLite file, shared by the runner (puts) and the publisher (ships, marks)."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, timeout=30, isolation_level=None)
        self._use_wal()
        self._db.execute("PRAGMA synchronous = FULL")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > VERSION:
            self._db.close()
            raise SettingsError(
                f"{path}: written by a newer Sieve (layout {version}, this one knows {VERSION}): "
                "install that one, or set SIEVE_HOME to another folder"
            )
        if version < VERSION:
            self._bring_up_to_date()
        self.home = self._identity(path.resolve())  # tells this home from others

    def _bring_up_to_date(self) -> None:
        with self._transaction():
            if not self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'home'").fetchone():
                for statement in SCHEMA.split(";\n"):
                    self._db.execute(statement)
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            for before in range(max(version, 1), VERSION):
                for statement in SINCE[before].split(";"):
                    self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {VERSION}")
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _identity(self, path: Path) -> str:
        """The id of this home: a new one if this is a copy of a home that is still at its place."""
        here = str(path)
        home, known = self._db.execute("SELECT id, path FROM home").fetchone()
        if known == here:
            return str(home)
        with self._transaction():
            home, known = self._db.execute("SELECT id, path FROM home").fetchone()  # another may have been here
            if known is not None and known != here and _is_copied(Path(known), path, home):
                self._db.execute("INSERT OR IGNORE INTO earlier_homes VALUES (?)", (home,))
                home = uuid.uuid4().hex[:16]
            self._db.execute("UPDATE home SET id = ?, path = ?", (home, here))
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # a copy of this one reads the file alone
        return str(home)

    def adopt(self, home: str) -> None:
        """Be this home: the journal is a new one, because the home's own was lost."""
        self._update("UPDATE home SET id = ?", [(home,)])
        self.home = home

    def was(self, home: str) -> bool:
        """Whether this home is a copy of that one, at first hand or not."""
        return self._db.execute("SELECT 1 FROM earlier_homes WHERE id = ?", (home,)).fetchone() is not None

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All of it or nothing, on disk at its end."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # a full disk has ended it already
                self._db.execute("ROLLBACK")
            raise

    def _use_wal(self) -> None:
        # When two processes create the file at once, SQLite answers "locked" whatever the timeout.
        deadline = time.monotonic() + 30
        while True:
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF not in LOCKED or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def __enter__(self) -> "Outbox":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    def put(self, records: Iterable[Record]) -> None:
        """Store all of them or none, on disk when this returns; those that are already here are ignored.

        A slice that was trained twice (after a crash) may end at another step than before: steps that
        are already stored for that uid are dropped from the later record. A beginning of a study that says
        something else than the stored one takes its place, and is to be sent again.
        """
        with self._transaction():
            for record in records:
                payload, last_step = record.payload, None
                if record.kind == "study_begun":
                    payload = self._begun_again(record)
                if record.kind == "trial_progress":
                    query = "SELECT MAX(last_step) FROM records WHERE uid = ?"
                    (seen,) = self._db.execute(query, (record.uid,)).fetchone()
                    points = [p for p in payload["points"] if seen is None or p[0] > seen]
                    payload = payload | {"points": points}
                    last_step = max((p[0] for p in points), default=None)
                self._db.execute(
                    "INSERT INTO records (study, uid, kind, seq, time, payload, blob, last_step)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (uid, kind, seq) DO UPDATE"
                    " SET payload = excluded.payload, state = 'unsent', reason = NULL"
                    " WHERE kind = 'study_begun' AND payload != excluded.payload",
                    (record.study, record.uid, record.kind, record.seq, record.when,
                     json.dumps(payload, default=_plain), record.blob, last_step),
                )  # fmt: skip
            failpoint("putting")

    def _begun_again(self, record: Record) -> dict[str, Any]:
        """A study's beginning with the ids under which it was known before: said once, they stay."""
        known = [formerly(stored.payload) for stored in self.records(record.uid, "study_begun")]
        ids = list(dict.fromkeys([*(known[0] if known else []), *formerly(record.payload)]))
        return record.payload | ({"formerly": ids} if ids else {})

    def pending(self, limit: int = 64, study: str | None = None) -> list[Record]:
        """The oldest unsent records, in the order in which they were put."""
        where, values = _where(study)
        return self._select(f"state = 'unsent'{where} ORDER BY id LIMIT ?", *values, limit)

    def records(self, uid: str, kind: str | None = None, *, refused: bool = True) -> list[Record]:
        """All records of a uid, sent or not; on request without those that the server refused."""
        condition = "uid = ? AND kind = ifnull(?, kind)" + ("" if refused else " AND state != 'refused'")
        return self._select(f"{condition} ORDER BY id", uid, kind)

    def _select(self, condition: str, *values: Any) -> list[Record]:
        rows = self._db.execute(f"SELECT {COLUMNS} FROM records WHERE {condition}", values)
        return [
            Record(kind, study, uid, seq, when, json.loads(payload), blob, number)
            for kind, study, uid, seq, when, payload, blob, number in rows
        ]

    def mark_sent(self, ids: Iterable[int]) -> None:
        self._update("UPDATE records SET state = 'sent', reason = NULL WHERE id = ?", [(i,) for i in ids])

    def refuse(self, ids: Iterable[int], reason: str) -> None:
        """Set records aside that the server will never take; they stay here, with the reason."""
        rows = [(reason, i) for i in ids]
        self._update("UPDATE records SET state = 'refused', reason = ? WHERE id = ?", rows)

    def requeue(self, *, study: str | None = None, uid: str | None = None, refused_only: bool = False) -> int:
        """Make records unsent again (all, those of a study, of a uid, or only the refused); says how many."""
        where, values = _where(study, uid)
        state = "state = 'refused'" if refused_only else "state != 'unsent'"
        with self._transaction():
            if not refused_only:
                self._db.execute(f"DELETE FROM runs WHERE 1{where}", values)
            return self._db.execute(
                f"UPDATE records SET state = 'unsent', reason = NULL WHERE {state}{where}", values
            ).rowcount

    def _update(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        with self._transaction():
            self._db.executemany(statement, rows)

    def attempts(self, study: str) -> dict[str, tuple[int | None, bool]]:
        """uid -> the last step of its curves, and whether its end is here, of each attempt at a trial of the study."""
        query = (
            "SELECT uid, MAX(last_step), MAX(kind = 'trial_ended') FROM records WHERE study = ? AND uid != study"
            " GROUP BY uid"
        )
        return {uid: (step, bool(ended)) for uid, step, ended in self._db.execute(query, (study,))}

    def unsent(self, study: str | None = None) -> int:
        """How many records still wait (refused ones do not: see counts)."""
        where, values = _where(study)
        row = self._db.execute(f"SELECT COUNT(*) FROM records WHERE state = 'unsent'{where}", values)
        return int(row.fetchone()[0])

    def counts(self) -> dict[str, Counts]:
        """Study -> its numbers of unsent, sent and refused records."""
        found: dict[str, dict[str, int]] = {}
        for study, state, n in self._db.execute("SELECT study, state, COUNT(*) FROM records GROUP BY 1, 2"):
            found.setdefault(study, {})[state] = n
        return {study: Counts(**states) for study, states in found.items()}

    def refusals(self, study: str | None = None) -> list[tuple[str, str, str]]:
        """(uid, kind, reason) of every record that the server refused."""
        where, values = _where(study)
        return list(
            self._db.execute(
                f"SELECT uid, kind, reason FROM records WHERE state = 'refused'{where} ORDER BY id", values
            )
        )

    def digests(self, study: str) -> dict[str, str]:
        """Stage -> digest of the data that its trials were begun with."""
        begun = self._select("study = ? AND kind = 'trial_begun' ORDER BY id", study)
        return {record.payload["tags"]["stage"]: record.payload["tags"]["dataset_digest"] for record in begun}

    def complaints(self, study: str | None = None) -> list[str]:
        """A line for each record that was set aside, naming its study: for whoever shows them to a person."""
        names = self.names()
        rows = []
        for uid, kind, reason in self.refusals(study):
            known, _, place = uid.partition("/")
            what = f"{kind} of {'/'.join(filter(None, (names.get(known, known), place)))}"
            fault = reason.startswith(OUR_FAULT)
            rows.append(f"{what} could not be sent because of {reason}" if fault else f"{what} was refused: {reason}")
        return rows

    def link(self, study: str, uid: str, experiment_id: str, run_id: str) -> None:
        """The publisher says which run shows a uid."""
        self._update("INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?)", [(uid, study, experiment_id, run_id)])

    def links(self, study: str | None = None, uid: str | None = None) -> dict[str, tuple[str, str]]:
        """uid -> (experiment id, run id) of everything (of a study, or that uid) that has a run by now."""
        where, values = _where(study, uid)
        rows = self._db.execute(f"SELECT uid, experiment_id, run_id FROM runs WHERE 1{where}", values)
        return {uid: (experiment_id, run_id) for uid, experiment_id, run_id in rows}

    def delete(self, study: str) -> None:
        """Forget a study and everything recorded of it."""
        with self._transaction():
            self._delete(study)

    def _delete(self, study: str) -> None:
        for table in ("records", "runs"):
            self._db.execute(f"DELETE FROM {table} WHERE study = ?", (study,))

    # ---- which study is which

    def names(self) -> dict[str, str]:
        """Id -> name of every study here, oldest first; of two studies of one name the newer comes later."""
        rows = self._db.execute(
            "SELECT r.study, (SELECT b.payload FROM records b WHERE b.uid = r.study AND b.kind = 'study_begun')"
            " FROM records r GROUP BY r.study ORDER BY MIN(r.id)"
        )
        return {study: (payload and json.loads(payload)["spec"].get("name")) or study for study, payload in rows}

    def ids(self, name: str) -> list[str]:
        """The ids of all studies of that name, the newest last."""
        return [study for study, named in self.names().items() if named == name]

    def rename(self, old: str, new: str) -> None:
        """Give a study another id, in everything that is recorded of it; again, or without such a study: nothing.

        What is here under the new id already stays; of a record that is here under both, the one with the new id.
        """
        with self._transaction():
            self._rename(old, new)

    def fork(self, old: str, new: str, *, keep_links: bool) -> None:
        """Make a study of this home, which was copied, one of its own, with an id of its own.

        keep_links: its runs were copied too (an embedded MLflow), and only have to learn their new id. Otherwise
        they belong to the home that was copied, and all of it is to be sent again, to runs that are yet to be made.
        """
        with self._transaction():
            if not self._db.execute("SELECT 1 FROM records WHERE study = ?", (old,)).fetchone():
                return  # done before
            self._rename(old, new)
            for begun in self.records(new, "study_begun"):
                payload = begun.payload | {"formerly": [*formerly(begun.payload), old] if keep_links else []}
                self._db.execute(
                    "UPDATE records SET payload = ?, state = 'unsent', reason = NULL WHERE id = ?",
                    (json.dumps(payload), begun.id),
                )
            if not keep_links:
                self._db.execute("DELETE FROM runs WHERE study = ?", (new,))
                self._db.execute("UPDATE records SET state = 'unsent', reason = NULL WHERE study = ?", (new,))

    def _rename(self, old: str, new: str) -> None:
        # uids inside of payloads: those of the trials that a study's end tells of
        for record in self._select("study = ? AND kind = 'study_ended'", old):
            best = [_renamed(uid, old, new) for uid in record.payload["best"]]
            repeated = {_renamed(uid, old, new): v for uid, v in record.payload.get("repeated", {}).items()}
            payload = json.dumps(record.payload | {"best": best, "repeated": repeated})
            self._db.execute("UPDATE records SET payload = ? WHERE id = ?", (payload, record.id))
        for table in ("records", "runs"):
            self._db.execute(
                f"UPDATE OR IGNORE {table} SET study = ?, uid = ? || substr(uid, ?) WHERE study = ?",
                (new, new, len(old) + 1, old),
            )
        self._delete(old)


def formerly(begun: Mapping[str, Any]) -> list[str]:
    """The ids under which a study was known before, oldest first, by what it said at its beginning."""
    ids = begun.get("formerly") or []
    return [ids] if isinstance(ids, str) else list(ids)


def _renamed(uid: str, old: str, new: str) -> str:
    return new + uid[len(old) :] if uid == old or uid.startswith(f"{old}/") else uid


def _is_copied(known: Path, path: Path, home: str) -> bool:
    """Whether the journal of that home is still at its known path too, in another file than this one.

    A folder that cannot be looked into counts as such: to take a copy for the home itself would mix two studies.
    """
    try:
        if not known.exists() or known.samefile(path):
            return False
        known.open("rb").close()
    except OSError:
        return True
    try:
        # immutable: neither a lock nor a file beside it, in a folder that may belong to somebody else
        with closing(sqlite3.connect(f"{known.as_uri()}?immutable=1", uri=True)) as other:
            return bool(other.execute("SELECT id FROM home").fetchone()[0] == home)
    except sqlite3.Error:  # no journal
        return False


def _where(study: str | None, uid: str | None = None) -> tuple[str, list[str]]:
    named = [(column, value) for column, value in (("study", study), ("uid", uid)) if value is not None]
    return "".join(f" AND {column} = ?" for column, _ in named), [value for _, value in named]


def _plain(value: Any) -> Any:
    """NumPy scalars and arrays as JSON values."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"a record holds JSON and NumPy values only, got {type(value).__name__}")


def pack(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Arrays as the bytes of an npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def unpack(blob: bytes) -> dict[str, NDArray[Any]]:
    with np.load(io.BytesIO(blob), allow_pickle=False) as stored:
        return dict(stored)


# ---- builders: what the runner has to say, as records


def study_begun(
    study: str,
    spec: Mapping[str, Any],
    tags: Mapping[str, str],
    when: float,
    *,
    dimensions: Mapping[str, str] | None = None,
    optuna_study_id: int | None = None,
    formerly: str | None = None,
) -> Record:
    """The experiment, its description and its saved view.

    study: its id; its name is spec["name"]. formerly: the id that an older version, or a copied home, gave it,
    for as long as something published may carry it.
    dimensions: what is searched, name -> "log" | "linear" | "choice"; log ones get log10_ companions.
    """
    payload = {
        "spec": dict(spec), "tags": dict(tags), "dimensions": dict(dimensions or {}),
        "optuna_study_id": optuna_study_id,
    } | ({"formerly": [formerly]} if formerly else {})  # fmt: skip
    return Record("study_begun", study, study, 0, when, payload)


def trial_begun(
    study: str,
    uid: str,
    name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    when: float,
    optuna: Mapping[str, int],
) -> Record:
    """A run named by its parameters.

    tags of use: stage, slot, repeat, attempt, dataset, dataset_digest, version.

    optuna: {"study_id": ..., "number": ...}, for the link to the dashboard.
    """
    payload = {"name": name, "params": dict(params), "tags": dict(tags), "optuna": dict(optuna)}
    return Record("trial_begun", study, uid, 0, when, payload)


def trial_progress(study: str, uid: str, seq: int, when: float, points: Sequence[Point]) -> Record:
    """The curve points of one slice; seq = the update count at its end, steps must grow."""
    return Record("trial_progress", study, uid, seq, when, {"points": [list(point) for point in points]})


def recovered(record: Record) -> Record:
    """A record of a trial that is put again from elsewhere, because the journal was lost or is an older copy.

    MLflow may have what it tells of, with the times at which that was first recorded: it is not shown twice.
    """
    return replace(record, payload=record.payload | {"recovered": True})


def trial_weights(
    study: str,
    uid: str,
    seq: int,
    when: float,
    step: int,
    first_layer: NDArray[np.floating[Any]],
    image_shape: Sequence[int] | None,
    mean: NDArray[np.floating[Any]] | None = None,
    scale: NDArray[np.floating[Any]] | None = None,
    classes: Sequence[str] | None = None,
) -> Record:
    """The first layer's weights [d, h], for a picture: at most 100 units, half precision.

    mean, scale [d]: the normalisation of the inputs, (x - mean) * scale. Only a scale that differs from
    input to input is kept: the weights on raw inputs are W * scale, and mean moves nothing but the bias.
    classes: the names of the h units where this layer is the output layer.
    """
    del mean
    arrays = {"w": _half(first_layer[:, :100])}
    if scale is not None and np.ptp(scale) > 0:
        arrays["scale"] = np.asarray(scale, np.float32)
    payload = {
        "step": int(step), "units": int(first_layer.shape[1]),
        "image_shape": None if image_shape is None else [int(n) for n in image_shape],
        "classes": None if classes is None else list(classes),
    }  # fmt: skip
    return Record("trial_weights", study, uid, seq, when, payload, pack(arrays))


def trial_ended(
    study: str,
    uid: str,
    when: float,
    status: str,
    reason: str | None,
    results: Mapping[str, float],
    confusion: NDArray[np.integer[Any]] | None = None,
    weights: Sequence[tuple[NDArray[Any], NDArray[Any]]] | None = None,
    normalisation: tuple[NDArray[Any], NDArray[Any]] | None = None,
    *,
    classes: Sequence[str] | None = None,
    best: bool = False,
    tags: Mapping[str, str] | None = None,
    details: str | None = None,
) -> Record:
    """How an attempt ended: status FINISHED, FAILED or KILLED, why, and its final figures.

    results: e.g. val_accuracy, best_val_accuracy, test_accuracy; shown as result/NAME.
    confusion: [c, c] counts, true class by predicted class. weights: [(W [d_in, d_out], b [d_out]), ...].
    normalisation: mean and scale [d] of the inputs at training, kept beside the weights: data may change later.
    reason: one line; details: the traceback that belongs to it.
    best: draw the curves of this trial as a figure too. Raises ValueError for an unknown status.
    """
    if status not in ("FINISHED", "FAILED", "KILLED"):
        raise ValueError(f"status: expected FINISHED, FAILED or KILLED, got {status}")
    layers: dict[str, NDArray[Any]] = {}
    for n, (w, b) in enumerate(weights or (), start=1):
        layers |= {f"W{n}": w, f"b{n}": b}
    if layers and normalisation:
        layers |= {"mean": normalisation[0], "scale": normalisation[1]}
    payload = {
        "status": status, "reason": reason, "results": {k: float(v) for k, v in results.items()},
        "confusion": None if confusion is None else np.asarray(confusion).tolist(),
        "classes": None if classes is None else list(classes), "best": best, "tags": dict(tags or {}),
        "details": details,
    }  # fmt: skip
    return Record("trial_ended", study, uid, 0, when, payload, pack(layers) if layers else None)


def study_ended(
    study: str,
    when: float,
    summary: Mapping[str, Any],
    report: bytes | None = None,
    *,
    best: Sequence[str] = (),
    repeated: Mapping[str, Mapping[str, float]] | None = None,
) -> Record:
    """The study's summary run; its numbers become metrics, the report (HTML) its artifact.

    summary["params"], if there, are the chosen parameters. best: uids of the trials whose curves are
    drawn as a figure. repeated: uid -> mean and deviation over the runs of its configuration.
    A study may end more than once (resumed, extended): each end updates the same run.
    """
    payload = {"summary": dict(summary), "best": list(best), "repeated": dict(repeated or {})}
    return Record("study_ended", study, study, int(when * 1000), when, payload, report)


def artifact_id(uid: str) -> str:
    """Under which the picture of an attempt's first layer is kept for the Optuna dashboard."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, uid))


def run_name(params: Mapping[str, Any]) -> str:
    """Parameters as a run's name: "lambda=0.00123, eta=0.01, hidden_sizes=[50]"."""
    return ", ".join(f"{name}={_short(value)}" for name, value in readable(params).items())


def spread(mean: float | None, deviation: float | None) -> str:
    """A mean with its deviation, if it has one: "0.9686 ± 0.0092"."""
    return "" if mean is None else f"{mean:.4f}" if deviation is None else f"{mean:.4f} ± {deviation:.4f}"


def readable(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters with layers that were searched one by one as a list, of those that the network has."""
    most = sum(name.startswith("hidden_sizes.units_") for name in params)
    units = [params.get(f"hidden_sizes.units_{k}") for k in range(1, params.get("hidden_sizes.layers", most) + 1)]
    if "hidden_sizes.units_1" not in params or None in units:
        return dict(params)
    return {name.partition(".")[0]: value for name, value in params.items()} | {"hidden_sizes": units}


def markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    """A table, its columns named by the first row's keys; nothing without rows."""
    every = list(rows)
    if not every:
        return ""
    lines = [list(every[0]), ["---"] * len(every[0]), *(list(map(str, row.values())) for row in every)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) and math.isfinite(value) else str(value)


def _half(values: NDArray[np.floating[Any]]) -> NDArray[np.float16]:
    largest = float(np.finfo(np.float16).max)
    return np.asarray(np.clip(values, -largest, largest), dtype=np.float16)


def progress_points(records: Iterable[Record]) -> list[Point]:
    """The curve points of the trial_progress records among these, in order."""
    found = (record.payload["points"] for record in records if record.kind == "trial_progress")
    return [(int(step), float(when), metrics) for points in found for step, when, metrics in points]
