"""What a disturbed study is held against: each planned slot done once, shown whole, with undisturbed values.

Read from Optuna's storage by Optuna and from MLflow's database by SQL, and trained weights evaluated by plain NumPy,
not by the code that wrote them.
"""

import io
import json
import math
import sqlite3
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np
import optuna
import psutil
from numpy.typing import NDArray

from search.datasets import open_dataset
from search.settings import Settings
from search.study import restore
from tests.processes import sieve

KEYS = (*(f"{kind}/{part}" for kind in ("cost", "loss", "accuracy") for part in ("train", "val")), "eta")
DONE = ("COMPLETE", "PRUNED")
GOING_SECONDS = 60.0  # a publisher without a runner sends the rest before it ends
OWN = ("seconds", "attempt")  # attributes of trials that two runs of one study differ in
FLOAT32 = 1e-4  # how far a loss of float32 weights may be from the float64 one
ACTIVATIONS = {"relu": lambda z: np.maximum(z, 0), "tanh": np.tanh, "sigmoid": lambda z: 1 / (1 + np.exp(-z))}

Array = NDArray[Any]
Results = dict[str, str]  # slot -> all that its result is, but for the time it took
Point = tuple[str, str, int]  # uid, metric, step


class Verdict(NamedTuple):
    """What went wrong, counted; nothing did if all are zero."""

    lost: int  # planned slots without a result
    dup: int  # results of a slot beyond its first
    ghost: int  # runs in MLflow without a trial, or beyond the first of an attempt
    orphan: int  # trials, runs and processes that are still running
    points: int  # curve points that MLflow lacks, has twice, has with another value, or has alone
    values: int  # slots whose parameters, curve or results differ from the undisturbed study in any bit
    uids: int  # attempts in the whole storage whose id another one has too
    data: int  # trials on other data than the study wrote down at its registration
    params: int  # sets of parameters of one configuration beyond its first
    weights: int  # weight files that are missing, or are not those of the trial they are shown with
    untold: int  # records that MLflow refused, and `sieve status` does not count


def studies(settings: Settings) -> dict[str, tuple[dict[str, Any], list[optuna.trial.FrozenTrial]]]:
    """All studies of a storage by name: attributes and trials."""
    storage = optuna.storages.RDBStorage(settings.storage)
    try:
        found = [optuna.load_study(study_name=name, storage=storage) for name in optuna.get_all_study_names(storage)]
        return {study.study_name: (study.user_attrs, study.get_trials(deepcopy=False)) for study in found}
    finally:
        storage.engine.dispose()


def trials(settings: Settings, study: str) -> list[optuna.trial.FrozenTrial]:
    return studies(settings)[study][1]


def study_id(settings: Settings, study: str) -> str:
    """What every trace of a study carries; the name where an older version made it and nobody launched it since."""
    return str(studies(settings)[study][0].get("id", study))


def results(settings: Settings, study: str) -> Results:
    """What each slot of a study came to."""
    found = {}
    for trial in trials(settings, study):
        if trial.state.name in DONE:
            attrs = {k: v for k, v in trial.user_attrs.items() if k not in OWN}
            whole = [trial.state.name, trial.values, trial.params, attrs, trial.intermediate_values]
            found[trial.user_attrs["slot"]] = json.dumps(whole, sort_keys=True)
    return found


def verdict(settings: Settings, study: str, undisturbed: Results, database: Path | None = None) -> Verdict:
    """How a study stands that nobody runs any more.

    undisturbed: the results of the same study without a fault, which name the planned slots.
    database: MLflow's (SQLite); without one, the outbox stands for what is published.
    """
    everything = studies(settings)
    attrs, stored = everything[study]
    identity = str(attrs.get("id", study))
    done = Counter(t.user_attrs["slot"] for t in stored if t.state.name in DONE)
    uids = {f"{identity}/{t.user_attrs['slot']}/{t.user_attrs['attempt']}": t for t in stored}
    name = study if "id" not in attrs or attrs.get("formerly") else None
    journal = _in_outbox(settings.outbox, identity)
    shown = _in_mlflow(database, identity, name) if database else journal
    expected = {
        (uid, key, step): value if key == "accuracy/val" else None
        for uid, trial in uids.items()
        if trial.state.name in DONE
        for step, value in trial.intermediate_values.items()
        for key in KEYS
    }
    found, spec = results(settings, study), json.loads(attrs["spec"])
    held = {stage: validated_on(settings, attrs, stage) for stage in {t.user_attrs["stage"] for t in stored}}
    files = [*journal.weights, *(shown.weights if database else ()), *exported(settings, study)]
    complete = {uid for uid, trial in uids.items() if trial.state.name == "COMPLETE"}

    def is_own(uid: str, weights: bytes) -> bool:
        return uid in uids and is_of(held[uids[uid].user_attrs["stage"]], spec, uids[uid], weights)

    return Verdict(
        lost=len(undisturbed.keys() - done.keys()),
        dup=sum(n - 1 for n in done.values()) + len(done.keys() - undisturbed.keys()),
        ghost=sum(n - (uid in uids) for uid, n in shown.runs.items()),
        orphan=sum(t.state.name == "RUNNING" for t in stored) + shown.running + len(left_over(settings)),
        points=_wrong_points(expected, shown.points),
        values=sum(found.get(slot) != result for slot, result in undisturbed.items()),
        uids=_twice(everything),
        data=_other_data(attrs, uids, [*journal.digests, *shown.digests]),
        params=_other_params(stored),
        weights=sum(not is_own(uid, weights) for uid, weights in files)
        + (len(complete & shown.runs.keys() - dict(shown.weights).keys()) if database else 0),
        untold=_untold(settings, study, journal.refused),
    )


class Shown(NamedTuple):
    """What MLflow, or an outbox that is still to be sent, shows of a study."""

    runs: Counter[str]  # by uid
    points: list[tuple[Point, float]]
    running: int  # runs that are still open
    digests: list[tuple[str, str]]  # uid and digest of its dataset
    weights: list[tuple[str, bytes]]  # uid and its file
    refused: int = 0


def _twice(everything: Mapping[str, tuple[dict[str, Any], list[optuna.trial.FrozenTrial]]]) -> int:
    """Attempts beyond the first with one uid, in all studies of a storage."""
    uids = Counter(
        (attrs.get("id", name), trial.user_attrs["slot"], trial.user_attrs["attempt"])
        for name, (attrs, stored) in everything.items()
        for trial in stored
        if "slot" in trial.user_attrs
    )
    ids = Counter(attrs.get("id", name) for name, (attrs, _) in everything.items())
    return sum(n - 1 for n in uids.values()) + sum(n - 1 for n in ids.values())


def _other_data(
    attrs: Mapping[str, Any], uids: Mapping[str, optuna.trial.FrozenTrial], shown: Iterable[tuple[str, str]]
) -> int:
    """Trials whose digest is none of those written down for the study, and digests of a stage beyond its first."""
    written = set(attrs.get("datasets", {}).values())
    of_stages: dict[str, set[str]] = defaultdict(set)
    wrong = set()
    for uid, digest in shown:
        if uid in uids:
            of_stages[uids[uid].user_attrs["stage"]].add(digest)
            if digest not in written:
                wrong.add(uid)
    return len(wrong) + sum(len(digests) - 1 for digests in of_stages.values())


def _other_params(stored: Iterable[optuna.trial.FrozenTrial]) -> int:
    """Sets of parameters of one (stage, index) beyond its first, over all repeats and attempts."""
    found: dict[str, set[str]] = defaultdict(set)
    for trial in stored:
        configuration = trial.user_attrs["slot"].rpartition(".r")[0]
        found[configuration].add(json.dumps([trial.params, trial.user_attrs.get("overrides")], sort_keys=True))
    return sum(len(sets) - 1 for sets in found.values())


def _untold(settings: Settings, study: str, refused: int) -> int:
    if not refused:
        return 0
    out, _ = (asked := sieve(settings, "status", study, "--json")).communicate(timeout=120)
    assert asked.returncode == 0, out
    return abs(refused - sum(row.get("refused", 0) for row in json.loads(out)))


# ---- weights


def exported(settings: Settings, study: str) -> Iterator[tuple[str, bytes]]:
    """What `sieve export` writes, if it does: the uid of the trial it is said to be of, and the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.npz"
        said = (command := sieve(settings, "export", study, "--weights", path)).communicate(timeout=120)[1]
        assert "Traceback" not in said, said
        if command.returncode == 0:
            with np.load(path) as archive:
                slot = json.loads(str(archive["about"]))["slot"]
            found = [t.user_attrs["attempt"] for t in trials(settings, study)
                     if t.user_attrs["slot"] == slot and t.state.name == "COMPLETE"]  # fmt: skip
            yield f"{study_id(settings, study)}/{slot}/{found[0] if found else '?'}", path.read_bytes()


class Held(NamedTuple):
    """What a study's trials were validated on: normalised examples and labels, and the normalisation."""

    x: Array
    y: Array
    mean: Array
    scale: Array


def validated_on(settings: Settings, attrs: Mapping[str, Any], stage: str) -> Held:
    """The validation examples of a stage; which rows they are is the program's word, what is done to them is ours."""
    dataset = restore(json.loads(attrs["spec"])).dataset_of(stage)
    found, _ = open_dataset(dataset, settings)
    train, x = (np.asarray(part.x, np.float64) for part in (found.train, found.validation))
    mean = train.mean(axis=0) if dataset.normalise != "none" else np.zeros(x.shape[1])
    deviation = train.std(axis=0) if dataset.normalise == "standard" else np.ones(x.shape[1])
    scale = 1 / np.where(deviation > 0, deviation, 1.0)
    return Held((x - mean) * scale, np.asarray(found.validation.y), mean, scale)


def is_of(held: Held, spec: Mapping[str, Any], trial: optuna.trial.FrozenTrial, weights: bytes) -> bool:
    """Whether a weight file has the shape of that trial, and on the validation data the figures stored for it."""
    with np.load(io.BytesIO(weights), allow_pickle=False) as archive:
        arrays = dict(archive)
    layers = [(arrays[f"W{n}"], arrays[f"b{n}"]) for n in range(1, 1 + sum(name[0] == "W" for name in arrays))]
    params = spec["base"] | trial.params | trial.user_attrs["overrides"]
    if [w.shape[1] for w, _ in layers[:-1]] != _sizes(params):
        return False
    if "about" in arrays:
        config = json.loads(str(arrays["about"]))["config"]
        if any(str(config[name]) != str(value) for name, value in trial.params.items() if name in config):
            return False
    if "mean" in arrays and not all(
        np.allclose(arrays[name], wanted, 1e-4, 1e-6) for name, wanted in (("mean", held.mean), ("scale", held.scale))
    ):
        return False
    if not all(np.isfinite(part).all() for layer in layers for part in layer):
        return trial.state.name == "PRUNED"  # it diverged
    loss, accuracy, unsure = evaluate(layers, held.x, held.y, params.get("activation", "relu"))
    best = spec["metric"].removeprefix("best_val_") if trial.state.name == "COMPLETE" else ""
    stored = {kind: trial.user_attrs.get(f"val_{kind}") for kind in ("loss", "accuracy")}
    if spec["metric"].startswith("best_"):  # the weights are those of that evaluation
        stored = {kind: trial.value if kind == best else None for kind in stored}
    return (stored["loss"] is None or math.isclose(loss, stored["loss"], rel_tol=FLOAT32, abs_tol=FLOAT32)) and (
        stored["accuracy"] is None or abs(accuracy - stored["accuracy"]) <= unsure + FLOAT32
    )


def _sizes(params: Mapping[str, Any]) -> list[int]:
    """The hidden layers that these parameters name, whole or one by one."""
    if "hidden_sizes.units_1" in params:
        units = sum(name.startswith("hidden_sizes.units_") for name in params)
        return [params[f"hidden_sizes.units_{n}"] for n in range(1, 1 + params.get("hidden_sizes.layers", units))]
    sizes = params.get("hidden_sizes", [50])
    return list(json.loads(sizes) if isinstance(sizes, str) else sizes)


def evaluate(layers: list[tuple[Array, Array]], a: Array, y: Array, activation: str) -> tuple[float, float, float]:
    """Mean cross-entropy, accuracy, and the share of examples too close to call, in float64."""
    for w, b in layers[:-1]:
        a = ACTIVATIONS[activation](a @ w.astype(float) + b)
    logits = a @ layers[-1][0].astype(float) + layers[-1][1]
    logits -= logits.max(axis=1, keepdims=True)
    loss = float(np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(y)), y]))
    unsure = float(np.mean(np.sort(logits, axis=1)[:, -2] > -FLOAT32))
    return loss, float(np.mean(logits.argmax(axis=1) == y)), unsure


def _wrong_points(expected: dict[Point, float | None], shown: list[tuple[Point, float]]) -> int:
    values: dict[Point, list[float]] = {}
    for point, value in shown:
        values.setdefault(point, []).append(value)
    wrong = len(expected.keys() - values.keys())
    settled = {uid for uid, _, _ in expected}
    for point, found in values.items():
        wanted = expected.get(point)
        wrong += len(found) - 1 + (point not in expected and point[0] in settled)
        wrong += wanted is not None and math.isfinite(wanted) and found[0] != wanted
    return wrong


def _in_mlflow(database: Path, identity: str, name: str | None) -> Shown:
    """What is in the experiments of a study; name: of the experiment that an older version made of it."""
    experiments = (
        "SELECT experiment_id FROM experiments e WHERE EXISTS (SELECT * FROM experiment_tags t WHERE "
        "t.experiment_id = e.experiment_id AND t.key = 'sieve.id' AND t.value = :id) OR (e.name = :name AND NOT EXISTS "
        "(SELECT * FROM experiment_tags t WHERE t.experiment_id = e.experiment_id AND t.key = 'sieve.id'))"
    )
    runs = (
        "SELECT r.run_uuid, coalesce(u.value, 'without sieve.uid') AS uid, r.status, r.artifact_uri, d.value AS digest "
        "FROM runs r LEFT JOIN tags u ON u.run_uuid = r.run_uuid AND u.key = 'sieve.uid' "
        "LEFT JOIN tags d ON d.run_uuid = r.run_uuid AND d.key = 'dataset_digest' "
        f"WHERE r.lifecycle_stage = 'active' AND r.experiment_id IN ({experiments})"
    )
    metrics = f"WITH own AS ({runs}) SELECT own.uid, key, step, value, is_nan FROM metrics JOIN own USING (run_uuid)"
    named = {"id": identity, "name": name}

    def of_today(uid: str) -> str:
        """A uid of an older version held the study's name."""
        first, slash, rest = uid.partition("/")
        return identity + slash + rest if first == name else uid

    with closing(sqlite3.connect(database, timeout=60)) as db:
        found = [row for row in db.execute(runs, named).fetchall() if of_today(row[1]) != identity]  # but its summary
        points = [row for row in db.execute(metrics, named).fetchall() if row[1] in KEYS]
        lost = db.execute("SELECT COUNT(*) FROM runs WHERE experiment_id = 0").fetchone()[0]
    files = [(of_today(uid), _artifacts(database, uri) / "weights.npz") for _, uid, _, uri, _ in found]
    return Shown(
        Counter(of_today(uid) for _, uid, *_ in found) + Counter({"in experiment 0": lost}),
        [((of_today(uid), key, step), math.nan if is_nan else value) for uid, key, step, value, is_nan in points],
        sum(status == "RUNNING" for _, _, status, *_ in found),
        [(of_today(uid), digest) for _, uid, _, _, digest in found if digest],
        [(uid, file.read_bytes()) for uid, file in files if file.is_file()],
    )


def _artifacts(database: Path, uri: str) -> Path:
    """The folder of a run's artifacts: beside the database, where a server keeps them."""
    parts = urlsplit(uri)
    path = Path(unquote(parts.path))
    return database.parent / "artifacts" / str(path).lstrip("/") if parts.scheme == "mlflow-artifacts" else path


def _in_outbox(outbox: Path, identity: str) -> Shown:
    """The same as it will be once all of it is sent."""
    with closing(sqlite3.connect(outbox, timeout=60)) as db:
        stored = db.execute(
            "SELECT uid, kind, payload, blob, state FROM records WHERE study = ?", (identity,)
        ).fetchall()
    rows = [(uid, kind, json.loads(payload), blob) for uid, kind, payload, blob, _ in stored if uid != identity]
    runs = Counter(uid for uid, kind, *_ in rows if kind == "trial_begun")
    ended = Counter(uid for uid, kind, *_ in rows if kind == "trial_ended")
    return Shown(
        runs,
        [
            ((uid, key, step), value)
            for uid, kind, payload, *_ in rows
            if kind == "trial_progress"
            for step, _, metrics in payload["points"]
            for key, value in metrics.items()
        ],
        len((runs - ended).keys()),
        [(uid, payload["tags"]["dataset_digest"]) for uid, kind, payload, *_ in rows if kind == "trial_begun"],
        [(uid, blob) for uid, kind, _, blob in rows if kind == "trial_ended" and blob],
        sum(state == "refused" for *_, state in stored),
    )


def left_over(settings: Settings) -> list[psutil.Process]:
    """The processes of this home that are still there, after the time that its publisher may take to end."""

    def of_this_home(process: psutil.Process) -> bool:
        try:
            return process.environ().get("SIEVE_HOME") == str(settings.home)
        except psutil.Error:  # gone, a zombie, or somebody else's
            return False

    found = [process for process in psutil.process_iter() if of_this_home(process)]
    alive: list[Any] = psutil.wait_procs(found, timeout=GOING_SECONDS)[1]
    return alive
