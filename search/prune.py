"""Which trials stop early: those that lag behind others between slices, or at rungs where a whole stage waits.

Only trials that are trained alike are compared, and at the same step: a stage with other epochs or data is a race of
its own. Between slices, a trial is compared with whoever is that far by then, so what is cut depends on timing. At a
rung with a barrier the decision is taken when the whole stage is there; it is the same for any number of workers.
Confirm is never cut: its means need every run.

The rules are those of Optuna's MedianPruner, SuccessiveHalvingPruner and HyperbandPruner. These would read every
trial of the study for each question, and know nothing of stages.
"""

from __future__ import annotations

import math
from bisect import bisect, insort
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import fmean
from zlib import crc32

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


@dataclass
class Rivals:
    """The trials of stages that are trained alike, as far as the pruner compares them."""

    pruner: Median | Halving
    unit: int
    scores: dict[tuple[int, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    """The worst first: by (0, step), of complete trials, for the median; by (bracket, rung) for halving."""
    complete: int = 0
    judged: dict[Slot, int] = field(default_factory=dict)  # the last rung that a trial was compared at


def rivals(spec: StudySpec) -> dict[int, Rivals]:
    """By the number of the stage; nothing for confirm, and none at all without a pruner or with a barrier."""
    if spec.pruner is None or (isinstance(spec.pruner, Halving) and spec.pruner.barrier):
        return {}
    found: dict[int, Rivals] = {}
    for number, (stage, unit) in enumerate(zip(plan.stages(spec), units(spec), strict=True)):
        if stage.name != "confirm":
            found[number] = found.get(stage.like) or Rivals(spec.pruner, unit)
    return found


def is_worse(rivals: Rivals, slot: Slot, curve: Curve, steps: int, complete: bool = False) -> bool:
    """Enter how far a trial has come, and say whether it is to stop there.

    `steps` are those of the whole training; `complete` says that it came to their end.
    """
    if not curve:
        return False
    if isinstance(rivals.pruner, Halving):
        return _is_left_behind(rivals, rivals.pruner, slot, curve, steps)
    if complete:
        rivals.complete += 1
        for step, score in curve:
            insort(rivals.scores[0, step], score)
    return _is_below_median(rivals, rivals.pruner, curve)


def _is_below_median(rivals: Rivals, pruner: Median, curve: Curve) -> bool:
    step, _ = curve[-1]
    others = rivals.scores.get((0, step), [])
    if rivals.complete < pruner.startup or step < pruner.warmup * rivals.unit or not others:
        return False
    median = (others[(len(others) - 1) // 2] + others[len(others) // 2]) / 2
    return max(score for _, score in curve) < median


def _is_left_behind(rivals: Rivals, pruner: Halving, slot: Slot, curve: Curve, steps: int) -> bool:
    """Whether it is not among the best 1/reduction that came to some rung so far; it is compared at each one once."""
    worse, bracket = False, _bracket(pruner, rivals.unit, slot, steps)
    for rung, score in at_rungs(pruner, rivals.unit, curve)[bracket:]:
        if rung > rivals.judged.get(slot, 0):
            others = rivals.scores[bracket, rung]
            insort(others, score)
            worse |= score < others[-max(1, len(others) // pruner.reduction)]
            rivals.judged[slot] = rung
    return worse


def _bracket(pruner: Halving, unit: int, slot: Slot, steps: int) -> int:
    """The rungs that a trial passes without being compared: of Hyperband's brackets the one that is this slot's.

    Brackets get trials in the proportions of Li et al. 2018, each the same slots for any timing.
    """
    if pruner.method != "hyperband":
        return 0
    brackets = max(1, len(at_rungs(pruner, unit, [(steps, 0.0)])))
    shares = [math.ceil(brackets * pruner.reduction**s / (s + 1)) for s in reversed(range(brackets))]
    return bisect(list(accumulate(shares)), crc32(str(slot).encode()) % sum(shares))
