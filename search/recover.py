"""Put into the journal again what the storage and the checkpoints still hold of a study.

A journal may be lost, or an older copy of it come back from a backup: then MLflow would never be shown what was
trained meanwhile. What it was shown is sent once all the same: a recovered point is sent only if it is not there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from optuna.trial import TrialState

from search import __version__, checkpoint, outbox
from search.outbox import Outbox, Record
from search.settings import Settings
from search.storage import LEFT, Attempt, StudyRecord
from search.study import METRICS, Choice, StudySpec

STATUS = {TrialState.COMPLETE: "FINISHED", TrialState.PRUNED: "KILLED", TrialState.FAIL: "FAILED"}


def recover(record: StudyRecord, box: Outbox, settings: Settings, clock: Callable[[], float]) -> int:
    """Put what is missing of the attempts that this home trained; says of how many."""
    spec, home = record.spec, record.attr("home") or box.home
    digests = record.attr("datasets") or {}
    journal, series = box.attempts(record.id), METRICS[spec.metric].series
    curves = record.curves()
    recovered = 0
    for attempt in record.attempts():
        uid = record.uid(attempt.slot, attempt.attempt)
        last_step, ended = journal.get(uid, (None, False))
        if ended or (attempt.home or home) != box.home:
            continue
        points = _points(record, attempt, settings, digests) or sorted(  # the storage has the study's metric alone
            (step, {series: value}) for step, value in curves[attempt.trial_id].items()
        )
        new = [(step, clock(), metrics) for step, metrics in points if last_step is None or step > last_step]
        seq = -1 - max((step for step, *_ in new), default=0)  # a number that no slice has
        records = [outbox.trial_progress(record.id, uid, seq, clock(), new)] if new else []
        if attempt.state in STATUS:
            records.append(_ended(record, attempt, clock()))
        if records:
            config = spec.config(attempt.params, **attempt.attrs["overrides"])
            data = spec.dataset_of(attempt.attrs["stage"]).name, digests.get(attempt.attrs["stage"], "")
            begun = trial_begun(record, attempt, config.to_params(), data, clock())
            if not recovered and not box.records(record.id, "study_begun"):
                box.put([study_begun(record, spec, record.attr("versions") or {}, clock())])
            box.put(map(outbox.recovered, [begun, *records]))
            recovered += 1
    return recovered


def study_begun(record: StudyRecord, spec: StudySpec, versions: Mapping[str, str], when: float) -> Record:
    """The beginning of a study in MLflow; `versions`: of what runs it."""
    kinds = {
        name: "choice" if isinstance(d, Choice) else "log" if d.log else "linear" for name, d in spec.dimensions.items()
    }
    return outbox.study_begun(
        record.id,
        json.loads(spec.to_json()),
        {"version": __version__} | {f"version.{name}": version for name, version in versions.items()},
        when,
        dimensions=kinds,
        optuna_study_id=record.study_id,
        formerly=spec.name if record.attr("formerly") else None,
    )


def trial_begun(
    record: StudyRecord, attempt: Attempt, given: Mapping[str, Any], data: tuple[str, str], when: float
) -> Record:
    """The beginning of an attempt's run in MLflow; `given`: all its settings, `data`: the dataset's name and digest."""
    name, digest = data
    tags = {
        "stage": attempt.attrs["stage"],
        "slot": str(attempt.slot),
        "repeat": str(attempt.slot.repeat),
        "attempt": str(attempt.attempt),
        "dataset": name,
        "dataset_digest": digest,
        "version": __version__,
        "configuration": f"{attempt.slot.stage}.{attempt.slot.index}",
    }
    return outbox.trial_begun(
        record.id,
        record.uid(attempt.slot, attempt.attempt),
        outbox.run_name(attempt.params),
        dict(given) | attempt.params,
        tags,
        when,
        {"study_id": record.study_id, "number": attempt.number},
    )


def _points(
    record: StudyRecord, attempt: Attempt, settings: Settings, digests: Mapping[str, str]
) -> list[tuple[int, dict[str, float]]]:
    """All curves as the attempt's checkpoint holds them; nothing without one."""
    path = settings.checkpoints / record.id / f"{attempt.slot}.{attempt.attempt}.npz"
    of = f"{record.uid(attempt.slot, attempt.attempt)} on {digests.get(attempt.attrs['stage'])}"
    with suppress(OSError, ValueError):
        _, progress = checkpoint.load(path, of)
        return [(e.step, e.metrics) for e in progress.evaluations]
    return []


def _ended(record: StudyRecord, attempt: Attempt, when: float) -> Record:
    """How an attempt ended, as far as the storage knows: the figures and the reason, no weights."""
    results = {
        name: value
        for name, value in attempt.attrs.items()
        if isinstance(value, float) and math.isfinite(value) and name not in ("mean", "deviation")
    }
    reason = attempt.attrs.get("reason")
    uid = record.uid(attempt.slot, attempt.attempt)
    status = "KILLED" if LEFT in attempt.attrs else STATUS[attempt.state]
    return outbox.trial_ended(record.id, uid, when, status, reason, results)
