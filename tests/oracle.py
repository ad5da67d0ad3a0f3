"""What a disturbed study is held against: each planned slot done once, shown whole, with undisturbed values.

Read from Optuna's storage by Optuna and from MLflow's database by SQL, not by the code that wrote them.
"""

import json
import math
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import psutil

from search.settings import Settings

KEYS = (*(f"{kind}/{part}" for kind in ("cost", "loss", "accuracy") for part in ("train", "val")), "eta")
DONE = ("COMPLETE", "PRUNED")
GOING_SECONDS = 60.0  # a publisher without a runner sends the rest before it ends

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


def trials(settings: Settings, study: str) -> list[optuna.trial.FrozenTrial]:
    storage = optuna.storages.RDBStorage(settings.storage)
    try:
        return optuna.load_study(study_name=study, storage=storage).get_trials(deepcopy=False)
    finally:
        storage.engine.dispose()


def results(settings: Settings, study: str) -> Results:
    """What each slot of a study came to."""
    found = {}
    for trial in trials(settings, study):
        if trial.state.name in DONE:
            attrs = {k: v for k, v in trial.user_attrs.items() if k not in ("seconds", "attempt")}
            whole = [trial.state.name, trial.values, trial.params, attrs, trial.intermediate_values]
            found[trial.user_attrs["slot"]] = json.dumps(whole, sort_keys=True)
    return found


def verdict(settings: Settings, study: str, undisturbed: Results, database: Path | None = None) -> Verdict:
    """How a study stands that nobody runs any more.

    undisturbed: the results of the same study without a fault, which name the planned slots.
    database: MLflow's (SQLite); without one, the outbox stands for what is published.
    """
    stored = trials(settings, study)
    done = Counter(t.user_attrs["slot"] for t in stored if t.state.name in DONE)
    uids = {f"{study}/{t.user_attrs['slot']}/{t.user_attrs['attempt']}": t for t in stored}
    if database is None:
        runs, shown, running = _in_outbox(settings.outbox, study)
    else:
        runs, shown, running = _in_mlflow(database, study)
    expected = {
        (uid, key, step): value if key == "accuracy/val" else None
        for uid, trial in uids.items()
        if trial.state.name in DONE
        for step, value in trial.intermediate_values.items()
        for key in KEYS
    }
    found = results(settings, study)
    return Verdict(
        lost=len(undisturbed.keys() - done.keys()),
        dup=sum(n - 1 for n in done.values()) + len(done.keys() - undisturbed.keys()),
        ghost=sum(n - (uid in uids) for uid, n in runs.items()),
        orphan=sum(t.state.name == "RUNNING" for t in stored) + running + len(left_over(settings)),
        points=_wrong_points(expected, shown),
        values=sum(found.get(slot) != result for slot, result in undisturbed.items()),
    )


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


def _in_mlflow(database: Path, study: str) -> tuple[Counter[str], list[tuple[Point, float]], int]:
    """Runs by uid, curve points, and how many runs are still open."""
    active = (
        "FROM runs r JOIN experiments e USING (experiment_id) JOIN tags t ON t.run_uuid = r.run_uuid "
        "AND t.key = 'sieve.uid' WHERE e.name = ? AND r.lifecycle_stage = 'active' AND t.value != e.name"
    )
    with closing(sqlite3.connect(database, timeout=60)) as db:
        runs = db.execute(f"SELECT t.value, r.status, r.run_uuid {active}", (study,)).fetchall()
        rows = db.execute(
            f"SELECT t.value, m.key, m.step, m.value FROM metrics m JOIN (SELECT t.value, r.run_uuid {active}) t "
            f"ON t.run_uuid = m.run_uuid WHERE m.key IN ({', '.join('?' * len(KEYS))})",
            (study, *KEYS),
        ).fetchall()
        lost = db.execute("SELECT COUNT(*) FROM runs WHERE experiment_id = 0").fetchone()[0]
    shown = [((uid, key, step), value) for uid, key, step, value in rows]
    return (
        Counter(uid for uid, *_ in runs) + Counter({"in experiment 0": lost}),
        shown,
        sum(status == "RUNNING" for _, status, _ in runs),
    )


def _in_outbox(outbox: Path, study: str) -> tuple[Counter[str], list[tuple[Point, float]], int]:
    """The same as it will be once all of it is sent."""
    with closing(sqlite3.connect(outbox, timeout=60)) as db:
        rows = db.execute(
            "SELECT uid, kind, payload FROM records WHERE study = ? AND uid != study", (study,)
        ).fetchall()
    runs = Counter(uid for uid, kind, _ in rows if kind == "trial_begun")
    ended = Counter(uid for uid, kind, _ in rows if kind == "trial_ended")
    shown = [
        ((uid, key, step), value)
        for uid, kind, payload in rows
        if kind == "trial_progress"
        for step, _, metrics in json.loads(payload)["points"]
        for key, value in metrics.items()
    ]
    return runs, shown, len((runs - ended).keys())


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
