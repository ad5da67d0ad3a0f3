"""Which trials stop early: by Optuna's pruners between slices, or at rungs where a whole stage waits.

Only trials that are trained alike are compared, and at the same step: a stage with other epochs or data is a race of
its own. Between slices, a trial is compared with whoever is that far by then, so what is cut depends on timing. At a
rung with a barrier the decision is taken when the whole stage is there; it is the same for any number of workers.
Confirm is never cut: its means need every run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, SuccessiveHalvingPruner

from search import plan
from search.plan import Slot
from search.study import Choice, Halving, Median, StudySpec

SLICES = 10  # a trial is asked about so often at the least

Curve = Sequence[tuple[int, float]]  # steps (epochs, or updates with eval_every) and scores, the higher the better


def note(spec: StudySpec) -> str:
    """For the study's record, what decides which trials are cut; empty without a pruner."""
    if spec.pruner is None:
        return ""
    if isinstance(spec.pruner, Halving) and spec.pruner.barrier:
        return f"{spec.pruner.method}: a stage waits at each rung; which trials are cut does not depend on timing"
    return f"{spec.pruner.method}: running trials are compared; which of them are cut depends on timing"


def units(spec: StudySpec) -> list[int]:
    """For each stage, the steps from one evaluation to the next; where eval_every is searched, the most."""
    searched = spec.dimensions.get("eval_every")
    if searched is not None:
        ends = searched.choices if isinstance(searched, Choice) else (searched.high,)
        return [max(int(end) for end in ends)] * len(plan.stages(spec))
    return [(spec.base | stage.overrides).get("eval_every") or 1 for stage in plan.stages(spec)]


# ---- rungs


def next_rung(pruner: Halving, step: int, unit: int = 1) -> int:
    """The first rung after a step: `least`, least * reduction, ... evaluations of so many steps each."""
    rung = pruner.least * unit
    while rung <= step:
        rung *= pruner.reduction
    return rung


def at_rungs(pruner: Halving, unit: int, curve: Curve) -> list[tuple[int, float]]:
    """The rungs that a trial has reached, in steps, and its score at the first evaluation there."""
    found, rung = list[tuple[int, float]](), next_rung(pruner, 0, unit)
    for step, score in curve:
        while rung <= step:
            found.append((rung, score))
            rung = next_rung(pruner, rung, unit)
    return found


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


# ---- between slices


class Rivals:
    """The trials of stages that are trained alike, as one of Optuna's pruners sees them: a study of its own, in memory.

    The study in the storage would be read as a whole for each question, and mixes what no pruner should compare.
    """

    def __init__(self, pruner: BasePruner, name: str) -> None:
        sampler = optuna.samplers.RandomSampler(0)  # nothing is sampled
        self.study = optuna.create_study(study_name=name, direction="maximize", sampler=sampler, pruner=pruner)
        self.trials: dict[Slot, optuna.Trial] = {}
        self.seen: Counter[Slot] = Counter()  # evaluations of each

    def is_worse(self, slot: Slot, curve: Curve, complete: bool = False) -> bool:
        """Enter how far a trial has come, and say whether it is to stop there. complete: it came to its end."""
        if slot not in self.trials:
            self.trials[slot] = self.study.ask()
        trial, new, worse = self.trials[slot], curve[self.seen[slot] :], False
        for step, score in new:  # asked at each: a rung that is passed on the way counts too
            trial.report(score, step)
            worse |= trial.should_prune()
        self.seen[slot] = len(curve)
        if complete and new:
            self.study.tell(trial, curve[-1][1])
        return worse


def rivals(spec: StudySpec) -> dict[int, Rivals]:
    """By the number of the stage; nothing for confirm, and none at all without a pruner or with a barrier."""
    if spec.pruner is None or (isinstance(spec.pruner, Halving) and spec.pruner.barrier):
        return {}
    found: dict[int, Rivals] = {}
    for number, (stage, unit) in enumerate(zip(plan.stages(spec), units(spec), strict=True)):
        if stage.name != "confirm":
            found[number] = found.get(stage.like) or Rivals(_of_optuna(spec.pruner, unit), spec.name)
    return found


def _of_optuna(pruner: Median | Halving, unit: int) -> BasePruner:
    """Optuna's pruner for stages whose evaluations are so many steps apart."""
    if isinstance(pruner, Median):
        return MedianPruner(n_startup_trials=pruner.startup, n_warmup_steps=pruner.warmup * unit)
    make = HyperbandPruner if pruner.method == "hyperband" else SuccessiveHalvingPruner
    return make(min_resource=pruner.least * unit, reduction_factor=pruner.reduction)
