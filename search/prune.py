"""Which trials stop early: Optuna's pruners between slices, or rungs at which a whole stage waits.

Optuna's pruners compare with whoever is ahead by then, so what they cut depends on timing. At a rung with a
barrier the decision is taken when the whole stage is there; it is the same for any number of workers.
Confirm is never cut: its means need every run.
"""

from collections.abc import Mapping
from statistics import fmean

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, SuccessiveHalvingPruner
from optuna.storages import BaseStorage

from search.plan import Slot
from search.study import Halving, Median, StudySpec

SLICES = 10  # a trial is asked about so often at the least


def note(spec: StudySpec) -> str:
    """For the study's record, what decides which trials are cut; empty without a pruner."""
    if spec.pruner is None:
        return ""
    if isinstance(spec.pruner, Halving) and spec.pruner.barrier:
        return f"{spec.pruner.method}: a stage waits at each rung; which trials are cut does not depend on timing"
    return f"{spec.pruner.method}: running trials are compared; which of them are cut depends on timing"


def optuna_pruner(spec: StudySpec) -> BasePruner | None:
    """Optuna's pruner that the study asks for; None without one, or with a barrier."""
    pruner = spec.pruner
    steps = spec.base.get("eval_every") or 1  # of a curve, from one evaluation to the next
    if isinstance(pruner, Median):
        return MedianPruner(n_startup_trials=pruner.startup, n_warmup_steps=pruner.warmup * steps)
    if not isinstance(pruner, Halving) or pruner.barrier:
        return None
    if pruner.method == "hyperband":
        return HyperbandPruner(min_resource=pruner.least * steps, reduction_factor=pruner.reduction)
    return SuccessiveHalvingPruner(min_resource=pruner.least * steps, reduction_factor=pruner.reduction)


def is_worse(pruner: BasePruner, storage: BaseStorage, study_name: str, trial_id: int) -> bool:
    """Whether Optuna's pruner would stop this running trial now."""
    study = optuna.load_study(study_name=study_name, storage=storage, pruner=pruner)
    return pruner.prune(study, storage.get_trial(trial_id))


def next_rung(pruner: Halving, evaluations: int) -> int:
    """The number of evaluations at the first rung after so many: least, least * reduction, ..."""
    rung = pruner.least
    while rung <= evaluations:
        rung *= pruner.reduction
    return rung


def survivors(scores: Mapping[Slot, float], reduction: int) -> set[Slot]:
    """The best 1 / reduction of a stage at a rung, one configuration at the least, with all its repeats.

    The mean over the repeats decides; of equal means the earlier configuration goes on.
    """
    repeats: dict[int, list[float]] = {}
    for slot, score in scores.items():
        repeats.setdefault(slot.index, []).append(score)
    best_first = sorted(repeats, key=lambda index: (-fmean(repeats[index]), index))
    on = set(best_first[: max(1, len(repeats) // reduction)])
    return {slot for slot in scores if slot.index in on}
