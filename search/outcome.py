"""What a study says so far, or in the end: the choice, its repeats and stages, where it stands, the chosen weights."""

from __future__ import annotations

import json
import platform
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from optuna.trial import TrialState
from threadpoolctl import threadpool_info

from core.data import write_whole
from search import __version__, outbox, plan, prune
from search.datasets import open_dataset
from search.errors import (
    DataError,
    DiskError,
    SettingsError,
    SieveError,
    StorageLost,
    StudyFailed,
    StudyUnreadable,
    UnknownStudy,
    brief,
)
from search.outbox import Counts, Outbox
from search.plan import WORST, Finished, Params, Slot
from search.settings import Settings
from search.storage import (
    LEFT,
    NOT_OURS,
    Attempt,
    Storage,
    StudyRecord,
    failed_attempts,
    finished_attempts,
    is_empty,
    is_owned,
    open_storage,
    study_names,
)
from search.study import Choice, Range, StudySpec
from search.tracking import links, run_link

COLUMNS = (
    "stage",
    "complete",
    "pruned",
    "diverged",
    "running",
    "failed",
    "waiting",
    "planned",
    "best",
    "unsent",
    "refused",
    "problem",
)
INTERRUPTED = "interrupted"  # state of a study that runs, by what is stored, and has no runner
NOTED = 5  # repeated configurations in the study's note
DIVERGED = ("diverged", "there is no finite value")  # so begins the reason of a trial that did, the second once
MOST_REASONS = 3


def score(spec: StudySpec, attempt: Attempt) -> float:
    """The higher the better; -inf for what diverged or was pruned."""
    if attempt.state != TrialState.COMPLETE or attempt.value is None:
        return WORST
    return attempt.value if spec.maximise else -attempt.value


def fate(attempt: Attempt) -> str:
    """How an attempt stands, in the word that is shown. Optuna has no state for a trial that diverged: it is PRUNED."""
    if LEFT in attempt.attrs:
        return "left"
    if attempt.state == TrialState.PRUNED and why(attempt).startswith(DIVERGED):
        return "diverged"
    return "failed" if attempt.state == TrialState.FAIL else attempt.state.name.lower()


def why(attempt: Attempt) -> str:
    """Why an attempt has no result, in one line; empty if it has, or is not at its end."""
    return brief(attempt.attrs.get("reason"))


def results(spec: StudySpec, settled: Iterable[Attempt], failed: Mapping[Slot, Params]) -> list[Finished]:
    """What the plan needs to know."""
    finished = [Finished(a.slot, a.params, score(spec, a)) for a in settled]
    return finished + [Finished(slot, params, WORST) for slot, params in failed.items()]


def best_first(spec: StudySpec, attempts: Iterable[Attempt]) -> list[Attempt]:
    """Those with a result, the best first."""
    return sorted((a for a in attempts if score(spec, a) > WORST), key=lambda a: (-score(spec, a), a.slot))


@dataclass(frozen=True)
class Outcome:
    """How a study ended."""

    study: str
    metric: str
    chosen: plan.Chosen  # its mean and deviation are in the unit of the metric
    test_accuracy: tuple[float, float | None] | None  # mean and deviation over the chosen configuration's trials
    repeated: list[plan.Result]  # configurations with several runs, best mean first, in the unit of the metric
    border: list[str]  # where the best point lies on the border of the space
    stages: list[dict[str, Any]]  # each with its name, its trials, and in words the side of its box for each parameter
    table: list[Attempt]  # the best trials, best first
    failed: int
    unsent: int  # tracking records that did not reach MLflow yet
    pruned: int = 0
    diverged: int = 0
    reasons: Sequence[str] = ()  # of those that failed, in one line each
    refused: int = 0  # tracking records that MLflow would not take


def study_note(
    spec: StudySpec,
    stages: Iterable[Mapping[str, Any]],
    page: tuple[str, str] | None,
    settings: Settings,
    outcome: Outcome | None = None,
) -> str:
    """Markdown for the study's page in the Optuna dashboard: result, links into MLflow, repeats, stages, the spec.

    page: the experiment and its summary run, if MLflow has them by now. outcome: None while the study runs.
    """

    parts = [spec.description]
    if outcome:
        chosen = outcome.chosen
        runs = "1 run" if chosen.n == 1 else f"{chosen.n} runs"
        figures = f"**{spec.metric} {outbox.spread(chosen.mean, chosen.deviation)}** ({runs})"
        parts.append(f"{figures}: {outbox.run_name(chosen.params)}")
        if outcome.test_accuracy:
            parts.append(f"test_accuracy {outbox.spread(*outcome.test_accuracy)}, not used to choose")
        counts = {"pruned": outcome.pruned, "diverged": outcome.diverged, "failed": outcome.failed}
        parts.append(", ".join(f"{n} {word}" for word, n in counts.items() if n))
        parts += [f"failed: `{reason.replace('`', chr(39))}`" for reason in outcome.reasons]
        parts += outcome.border
    if page:
        experiment, run = page
        address = links(settings, experiment)
        parts.append(
            f"In MLflow: [charts]({address['charts']}) · [table]({address['table']}) · "
            f"[report and summary]({run_link(settings, experiment, run)})"
        )
    if outcome:
        parts.append(
            outbox.markdown(
                {
                    "configuration": outbox.run_name(r.params),
                    "runs": r.n,
                    spec.metric: outbox.spread(r.mean, r.deviation),
                }
                for r in outcome.repeated[:NOTED]
            )
        )
    parts.append(f"{spec.search.method} on {spec.dataset.name}, seed {spec.seed}")
    parts.append(prune.note(spec))
    parts.append(outbox.markdown(stages))
    parts.append(f"```json\n{json.dumps(json.loads(spec.to_json()), indent=1)}\n```")
    return "\n\n".join(part for part in parts if part)


def versions() -> dict[str, str]:
    """Exactly what is at work here: Sieve, Python, the libraries, and NumPy's BLAS with its kernel."""
    blas = [library for library in threadpool_info() if library["user_api"] == "blas"]
    found = {"sieve": __version__, "python": platform.python_version()}
    found |= {name: metadata.version(name) for name in ("numpy", "optuna", "mlflow")}
    found["BLAS"] = " and ".join(
        f"{b['internal_api']} {b['version']} with kernel {b.get('architecture', '?')}" for b in blas
    )
    return found


def conclude(record: StudyRecord) -> Outcome:
    """What the study says so far. Raises StudyFailed if no trial has a result."""
    spec, attempts = record.spec, record.attempts()
    settled = finished_attempts(attempts)
    fates = Counter(map(fate, settled.values()))
    failed = {slot: a.params for slot, a in failed_attempts(attempts).items()}
    finished = results(spec, settled.values(), failed)
    chosen = plan.choose(spec, finished)
    if chosen is None:
        reasons = "; ".join(_reasons(attempts))
        raise StudyFailed(f"study '{spec.name}': none of {len(attempts)} trials has a result: {reasons}")
    tests = [settled[slot].attrs["test_accuracy"] for slot in chosen.slots if "test_accuracy" in settled[slot].attrs]
    sign = 1 if spec.maximise else -1
    by_slot = sorted(finished, key=lambda f: f.slot)
    configurations = plan.ranked(plan.results(by_slot, lambda f: f"{f.slot.stage}.{f.slot.index}"))
    return Outcome(
        study=spec.name,
        metric=spec.metric,
        chosen=replace(chosen, mean=sign * chosen.mean),
        repeated=[replace(result, mean=sign * result.mean) for result in configurations if result.n > 1],
        test_accuracy=(statistics.mean(tests), statistics.stdev(tests) if len(tests) > 1 else None) if tests else None,
        border=plan.border(spec, finished),
        stages=stages_in_words(spec, finished),
        table=best_first(spec, settled.values()),
        pruned=fates["pruned"],
        diverged=fates["diverged"],
        failed=len(failed),
        reasons=_reasons(failed_attempts(attempts).values()),
        unsent=0,
    )


def _reasons(attempts: Iterable[Attempt]) -> list[str]:
    """Why attempts have no result, the most frequent reasons first."""
    return [reason for reason, _ in Counter(filter(None, map(why, attempts))).most_common(MOST_REASONS)]


def stages_in_words(spec: StudySpec, finished: list[Finished]) -> list[dict[str, Any]]:
    """Each stage with its trials, and for each parameter the side of its box; none before the box is known."""

    def sides(box: plan.Box | None) -> dict[str, str]:
        return {name: side(d, box[name]) if box else "" for name, d in spec.dimensions.items()}

    every = zip(plan.stages(spec), plan.boxes(spec, finished), strict=True)
    return [{"stage": stage.name, "trials": stage.trials} | sides(box) for stage, box in every]


def side(dimension: Range | Choice, ends: Sequence[Any]) -> str:
    """One side of a box in words."""
    if isinstance(dimension, Choice):
        return ", ".join(f"{end:g}" if isinstance(end, float) else str(end) for end in ends)
    return f"{ends[0]:.3g} to {ends[1]:.3g}"


def summary(outcome: Outcome) -> dict[str, Any]:
    """An outcome as plain values, for MLflow and for --json."""
    chosen = outcome.chosen
    mean, deviation = outcome.test_accuracy or (None, None)
    return {
        "study": outcome.study,
        "params": chosen.params,
        "metric": outcome.metric,
        "mean": chosen.mean,
        "deviation": chosen.deviation,
        "n": chosen.n,
        "slots": [str(slot) for slot in chosen.slots],
        "test_accuracy": mean,
        "test_deviation": deviation,
        "border": outcome.border,
        "stages": outcome.stages,
        "pruned": outcome.pruned,
        "diverged": outcome.diverged,
        "failed": outcome.failed,
        "unsent": outcome.unsent,
        "refused": outcome.refused,
    }


def open_study(study: str, settings: Settings) -> StudyRecord:
    """The record of a study of ours. Raises UnknownStudy, StudyUnreadable; makes nothing."""
    if is_empty(settings.storage):
        raise UnknownStudy(study)
    record = StudyRecord(open_storage(settings.storage), study)
    if "spec" not in record.attrs:
        raise StudyUnreadable(study, NOT_OURS)
    return record


def standing(settings: Settings, study: str | None = None) -> list[dict[str, Any]]:
    """How each study (or this one) stands, as rows of plain values. Raises UnknownStudy.

    One that cannot be read is a row that says so.
    """
    if is_empty(settings.storage):
        if study is not None:
            raise UnknownStudy(study)
        return []
    storage = open_storage(settings.storage)
    if study is not None:
        StudyRecord(storage, study)
    names = study_names(storage) if study is None else [study]
    if not names:
        return []
    with Outbox(settings.outbox) as box:
        counts = box.counts()
        rows = [_standing(storage, name, counts) for name in names]
    return [row for row in rows if row is not None]


def _standing(storage: Storage, name: str, counts: Mapping[str, Counts]) -> dict[str, Any] | None:
    """A study's row; None if it was deleted meanwhile."""
    blank: dict[str, Any] = {"study": name, "state": "-", **dict.fromkeys(COLUMNS)}
    try:
        record = StudyRecord(storage, name)
        return blank | _row(record, counts.get(record.id, Counts()))
    except (StorageLost, DiskError):
        raise
    except StudyUnreadable as error:
        return blank | {"state": NOT_OURS if error.problem == NOT_OURS else f"unreadable: {error.problem}"}
    except Exception as error:  # whatever is wrong with one study, the others are shown
        if name not in study_names(storage):
            return None
        return blank | {"state": f"unreadable: {type(error).__name__}: {error}"}


def _row(record: StudyRecord, counts: Counts) -> dict[str, Any]:
    attrs, spec, attempts = record.attrs, record.spec, record.attempts()
    state, problem = attrs.get("state", "-"), attrs.get("problem")
    if is_owned(record):
        state = "running"
    elif state == "running":
        state, problem = INTERRUPTED, "its runner is gone; `sieve launch` with its file, or `sieve serve`, goes on"
    settled, failed = finished_attempts(attempts), failed_attempts(attempts)
    fates = Counter(map(fate, settled.values()))
    best = next(iter(best_first(spec, settled.values())), None)
    planned = sum(stage.trials for stage in plan.stages(spec))
    running = sum(a.state == TrialState.RUNNING for a in attempts)
    return {
        "state": state,
        "stage": max(attempts, key=lambda a: a.slot).attrs["stage"] if attempts else None,
        "complete": fates["complete"],
        "pruned": fates["pruned"],
        "diverged": fates["diverged"],
        "running": running,
        "failed": len(failed),
        "waiting": max(0, planned - len(settled) - len(failed) - running),
        "planned": planned,
        "best": best and round(best.value or 0.0, 6),
        "unsent": counts.unsent,
        "refused": counts.refused,
        "problem": problem if state in (INTERRUPTED, "failed") else None,
    }


def export(study: str, path: Path, settings: Settings) -> str:
    """Write the chosen configuration's best weights and what prediction needs; says what was written."""
    if path.is_dir() or not path.parent.is_dir():
        raise SettingsError(f"--weights {path}: expected a file, new or old, in a folder that exists")
    record = open_study(study, settings)
    outcome, spec = conclude(record), record.spec
    slots = set(outcome.chosen.slots)
    attempt = next(a for a in outcome.table if a.slot in slots)
    with Outbox(settings.outbox) as box:
        ended = box.records(record.uid(attempt.slot, attempt.attempt), "trial_ended")
        digests = record.attr("datasets") or box.digests(record.id)  # an older version kept them there alone
    if not ended or ended[0].blob is None:
        raise SieveError(f"study '{study}': this machine has no weights of trial {attempt.slot}; export where it ran")
    stage = attempt.attrs["stage"]
    dataset, digest = spec.dataset_of(stage), digests.get(stage)
    arrays = outbox.unpack(ended[0].blob)
    if "mean" not in arrays:  # an older version kept them with the data alone
        data, _ = open_dataset(dataset, settings)
        arrays |= {"mean": data.mean, "scale": data.scale}
        if digest not in (None, data.digest):
            raise DataError(
                f"study '{study}': {dataset.path or dataset.name} is not what it was trained on: "
                f"expected digest {digest}, got {data.digest}; bring the old data back"
            )
    config = spec.config(attempt.params, **attempt.attrs["overrides"])
    about = {
        "study": study,
        "slot": str(attempt.slot),
        "config": config.to_params(),
        "classes": ended[0].payload["classes"],
        "dataset": {"name": dataset.name, "digest": digest},
        "predict": "a = (x - mean) * scale; then a = activation(a W1 + b1), ...; classes[argmax(a W_L + b_L)]",
    }
    write_whole(path, outbox.pack(arrays | {"about": np.array(json.dumps(about))}))
    return f"wrote {path}: {', '.join(sorted(arrays))} and about (JSON) of trial {attempt.slot}"
