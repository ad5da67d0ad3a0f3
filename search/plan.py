"""What to try next: a pure function of the study, its seed and the results so far. No Optuna, files or network.

Coarse to fine in the unit cube: a stage's points fill a box, and the next box is narrower, around the weighted
mean of the best points so far. Within it, places go to Sobol points near which earlier points did well.
`narrow` and `fill` are that rule, and know of no study file.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, product
from operator import attrgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from search.study import Sampler, StudySpec

Scalar = bool | int | float | str
Params = dict[str, Scalar]
Array = NDArray[np.float64]
Box = dict[str, tuple[Scalar, ...]]  # low and high of each range, the values kept of each choice
Ask = Callable[[int, int, Sequence["Result"]], Sequence[Params]]  # generation, count, results so far -> parameters

WORST = -math.inf
UNTRIED = -sys.float_info.max  # a hope that any score beats, but for a failure
LEAST = 4  # points that the centre of a box is the mean of
ENOUGH = 10  # known points, from which on a stage goes by the nearest of them
CANDIDATES = 8  # Sobol points for each place, a power of two
BORDER = 0.02  # of a range's width: nearer than this, a value lies at the border


@dataclass(frozen=True, order=True)
class Slot:
    """A place in the plan; what is trained there does not depend on who trains it, or when."""

    stage: int
    index: int
    repeat: int

    def __str__(self) -> str:
        return f"s{self.stage}.i{self.index}.r{self.repeat}"

    @classmethod
    def parse(cls, text: str) -> Slot:
        """The slot whose `str` this is. Raises ValueError."""
        found = re.fullmatch(r"s(\d+)\.i(\d+)\.r(\d+)", text)
        if not found:
            raise ValueError(f"expected a slot such as s0.i3.r1, got {text!r}")
        return cls(*map(int, found.groups()))


@dataclass(frozen=True)
class Proposal:
    """A trial to run: its slot, its parameters, its stage's name and what that stage sets over the study's base."""

    slot: Slot
    params: Params
    stage: str
    overrides: dict[str, Any]


@dataclass(frozen=True)
class Finished:
    """A trial that has run; the higher its score the better, -inf if it failed or diverged."""

    slot: Slot
    params: Params
    score: float


@dataclass(frozen=True)
class StageInfo:
    """A stage and how many trials it has, repeats included."""

    name: str
    trials: int
    overrides: dict[str, Any]  # what its trials are trained with instead of the study's base


@dataclass(frozen=True)
class Result:
    """One configuration: the mean and deviation (None for a single run) of the scores in these slots."""

    params: Params
    mean: float
    deviation: float | None
    n: int
    slots: tuple[Slot, ...]


Chosen = Result


# --- the rule, in the unit cube ----------------------------------------------------------------------------------


class Interval(NamedTuple):
    """The part of a range that a box holds, within [0, 1]."""

    low: float
    high: float


Side = Interval | tuple[int, ...]  # of a choice: the positions that are kept
Cube = tuple[Side, ...]


def unit_points(n: int, d: int, *seed: int) -> Array:
    """The first n points [n, d] of a scrambled Sobol sequence in [0, 1); a larger n only adds points."""
    from scipy.stats import qmc

    if not n or not d:
        return np.zeros((n, d))
    sobol = qmc.Sobol(d, scramble=True, seed=np.random.default_rng(seed))
    points: Array = sobol.random_base2((n - 1).bit_length())
    return points[:n]


def place(cube: Cube, points: Array) -> Array:
    """Points [n, d] of [0, 1) moved into the box; the coordinate of a choice is its position."""
    placed = np.empty_like(points)
    for axis, side in enumerate(cube):
        if isinstance(side, Interval):
            placed[:, axis] = side.low + (side.high - side.low) * points[:, axis]
        else:
            placed[:, axis] = np.take(side, (points[:, axis] * len(side)).astype(int))
    return placed


def narrow(cube: Cube, points: Array, scores: Array, width: float, top: float, least: int = LEAST) -> Cube:
    """The next box: `width` times as wide, centred on the weighted mean of the best of the points [n, d].

    The best are the `top` fraction of all points, and at least `least`; the better, the heavier. At a border of
    the space the box is shifted, not clipped. A choice keeps that share of its values, those with the best
    scores first, then those that were not tried. Scores of -inf are never among the best; of equal scores the
    later point wins.
    """
    best = _best_first(scores)[: max(least, math.ceil(top * len(scores)))]
    if not len(best):
        return cube
    weights = math.log(len(best) + 0.5) - np.log(np.arange(1, len(best) + 1))
    centre = weights @ points[best] / weights.sum()
    sides: list[Side] = []
    for axis, side in enumerate(cube):
        if isinstance(side, Interval):
            span = width * (side.high - side.low)
            low = min(max(float(centre[axis]) - span / 2, 0.0), 1.0 - span)
            sides.append(Interval(low, low + span))
        else:
            tried = {k: scores[points[:, axis] == k] for k in side}
            support = {k: own.max() if len(own) else UNTRIED for k, own in tried.items()}
            kept = sorted(side, key=lambda k: -support[k])[: math.ceil(width * len(side))]
            sides.append(tuple(sorted(kept)))
    return tuple(sides)


def fill(cube: Cube, n: int, points: Array, scores: Array, *seed: int, candidates: int = CANDIDATES) -> Array:
    """The n points [n, d] of a stage, in its box, when `points` with these scores are known from before.

    Once ENOUGH are known, each place goes to the most promising of `candidates` Sobol points in a row: the one
    whose nearest known points, about the square root of all, rank best on the mean. Values of a choice are as
    far from each other as the ends of a range.
    """
    if len(points) < ENOUGH or candidates == 1:
        return place(cube, unit_points(n, len(cube), *seed))
    groups = place(cube, unit_points(n * candidates, len(cube), *seed)).reshape(n, candidates, len(cube))
    near = round(math.sqrt(len(points)))
    ordered = np.sort(scores)
    ranks = np.searchsorted(ordered, scores, "left") + np.searchsorted(ordered, scores, "right")  # equal for equals
    choice = np.array([not isinstance(side, Interval) for side in cube])
    chosen = np.empty((n, len(cube)))
    for k, group in enumerate(groups):
        gaps = group[:, None] - points
        distances = np.where(choice, gaps != 0, gaps**2).sum(-1)
        last = np.partition(distances, near - 1, axis=1)[:, [near - 1]]
        nearer, as_near = distances < last, distances == last
        nearest = nearer | (as_near & (as_near.cumsum(1) <= near - nearer.sum(1, keepdims=True)))  # the earlier first
        chosen[k] = group[(nearest * ranks).sum(1).argmax()]
    return chosen


def schedule(trials: int) -> list[int]:
    """A budget split into about as many stages as each of them has points: 12 into 3, 32 into 6, 64 into 8."""
    count = max(1, round(math.sqrt(trials)))
    return [trials * (k + 1) // count - trials * k // count for k in range(count)]


def _best_first(scores: Array) -> NDArray[np.intp]:
    """Positions of the finite scores, the best first, the later first among equals."""
    order = np.lexsort((-np.arange(len(scores)), -scores))
    return order[np.isfinite(scores[order])]


# --- between the unit cube and parameters ------------------------------------------------------------------------


class Numbers(Protocol):
    """A range, as `study.Range` is one."""

    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...
    @property
    def log(self) -> bool: ...
    @property
    def integer(self) -> bool: ...


class Options(Protocol):
    """A list of values, as `study.Choice` is one."""

    @property
    def choices(self) -> Sequence[Any]: ...


Dimension = Numbers | Options


def _ends(dimension: Numbers) -> tuple[float, float]:
    """Where 0 and 1 of the unit interval lie; a whole number owns the interval that rounds to it."""
    half = 0.5 if dimension.integer else 0.0
    low, high = dimension.low - half, dimension.high + half
    return (math.log(low), math.log(high)) if dimension.log else (low, high)


def value_at(dimension: Dimension, coordinate: float) -> Scalar:
    """The value at a coordinate, to six significant digits (of the range's width if it is linear); ends are exact."""
    if hasattr(dimension, "choices"):
        choice: Scalar = dimension.choices[int(coordinate)]
        return choice
    low, high = _ends(dimension)
    value = low + (high - low) * coordinate
    value = math.exp(value) if dimension.log else value
    if dimension.integer:
        return int(min(max(round(value), dimension.low), dimension.high))
    if not 0.0 < coordinate < 1.0:
        return dimension.low if coordinate <= 0.0 else dimension.high
    value = round(value, 5 - math.floor(math.log10(value if dimension.log else high - low)))
    return min(max(value, dimension.low), dimension.high)


def coordinate_of(dimension: Dimension, value: Scalar) -> float:
    """The coordinate of a value: a position among the choices, or a number in [0, 1]."""
    if hasattr(dimension, "choices"):
        return float(next(k for k, choice in enumerate(dimension.choices) if _same(choice, value)))
    low, high = _ends(dimension)
    number = float(value)
    return ((math.log(number) if dimension.log else number) - low) / (high - low)


def _same(a: Scalar, b: Scalar) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _whole(dimensions: Mapping[str, Dimension]) -> Cube:
    return tuple(
        tuple(range(len(d.choices))) if hasattr(d, "choices") else Interval(0.0, 1.0) for d in dimensions.values()
    )


def _in_words(dimensions: Mapping[str, Dimension], cube: Cube) -> Box:
    """The box in the units of the parameters."""
    box: Box = {}
    for (name, dimension), side in zip(dimensions.items(), cube, strict=True):
        ends = (side.low, side.high) if isinstance(side, Interval) else side
        box[name] = tuple(value_at(dimension, end) for end in ends)
    return box


def _params(dimensions: Mapping[str, Dimension], points: Array) -> list[Params]:
    return [
        {name: value_at(d, float(u)) for (name, d), u in zip(dimensions.items(), point, strict=True)}
        for point in points
    ]


# --- a study's plan ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stage:
    """A stage of the plan: which configurations it has, and under which repeats each of them is trained."""

    name: str
    configurations: int
    repeats: range
    overrides: dict[str, Any]
    dataset: Any = None  # its own, None for the study's
    keeps: bool = False  # a configuration keeps its slot when others are added to the stage

    def alike(self, other: _Stage) -> bool:
        """Whether both train a configuration in the same way, so that their scores compare."""
        return (self.overrides, self.dataset) == (other.overrides, other.dataset)


def _stages(spec: StudySpec) -> list[_Stage]:
    search, repeats = spec.search, range(spec.repeats)
    if search.method == "coarse-to-fine":
        found = [_Stage(s.name, s.trials, repeats, s.base, s.dataset) for s in search.stages]
    elif search.method == "grid":
        found = [_Stage("grid", math.prod(map(len, _levels(spec))), repeats, {}, keeps=True)]
    elif search.method == "list":
        found = [_Stage("list", len(search.settings), repeats, {}, keeps=True)]
    else:
        found = [_Stage(search.method, search.trials, repeats, {})]
    if confirm := spec.confirm:
        again = range(spec.repeats, spec.repeats + confirm.repeats)  # other seeds than before
        top = min(confirm.top, sum(stage.configurations for stage in found))
        found.append(_Stage("confirm", top, again, confirm.base, confirm.dataset, keeps=True))
    return found


def stages(spec: StudySpec) -> list[StageInfo]:
    """The stages in order and how many trials each has; confirm may turn out to have fewer."""
    return [
        StageInfo(stage.name, stage.configurations * len(stage.repeats), stage.overrides) for stage in _stages(spec)
    ]


def siblings(spec: StudySpec, slot: Slot) -> list[Slot]:
    """The slots of a slot's configuration, one for each repeat, itself among them."""
    return [Slot(slot.stage, slot.index, repeat) for repeat in _stages(spec)[slot.stage].repeats]


def propose(
    spec: StudySpec,
    finished: Sequence[Finished],
    ask: Ask | None = None,
    started: Mapping[Slot, Params] = MappingProxyType({}),
) -> list[Proposal]:
    """Every trial of each stage whose earlier stages are complete, those that are finished among them.

    The list is the same until a stage (or a generation of an Optuna sampler) is complete, whatever the order
    of `finished`. Methods that ask a sampler of Optuna need `ask`, which gets the number of a generation, how many
    configurations to name and the results of the generations before. Raises ValueError without it.

    `started` holds the trials that have a slot but no score yet. It matters after a study was extended: then
    they keep their slots, as the finished ones do, among the points that were put between them.
    """
    if ask is None and hasattr(spec.search, "generation"):
        raise ValueError(f"method {spec.search.method} needs ask, see samplers.asker")
    return [proposal for proposals, _ in _planned(spec, finished, ask, started) for proposal in proposals]


def extends(new: StudySpec, old: StudySpec) -> bool:
    """Whether `new` is `old` with more points in its grid, list or random search and nothing else changed.

    Then every trial of `old` is one of `new`, and what is done is kept.
    """
    parts = {"space", "search", *new.SECONDARY}
    if new.model_dump(exclude=parts) != old.model_dump(exclude=parts) or new.search.method != old.search.method:
        return False
    if new.search.method not in ("grid", "list", "random"):
        return False
    more, fewer = ([_key(params) for params in _configurations(spec, [], 0, None)] for spec in (new, old))
    if new.search.method == "random":
        return more[: len(fewer)] == fewer
    return set(fewer) <= set(more)


def boxes(spec: StudySpec, finished: Sequence[Finished]) -> list[Box | None]:
    """The box of each stage of `stages`; None for confirm, for a list, and while earlier stages are running."""
    if spec.search.method == "list":
        cubes: list[Cube] = []
    elif spec.search.method == "coarse-to-fine":
        done = {f.slot: f for f in finished}
        complete = [_trained(stage, k, done) is not None for k, stage in enumerate(_stages(spec))]
        cubes = _cubes(spec, finished, [*complete, False].index(False) + 1)
    else:
        cubes = [_whole(spec.dimensions)]
    found: list[Box | None] = [_in_words(spec.dimensions, cube) for cube in cubes]
    return found + [None] * (len(_stages(spec)) - len(found))


def choose(spec: StudySpec, finished: Sequence[Finished]) -> Chosen | None:
    """The configuration to use: the best by its mean over the confirm runs alone, once all of them are finished.

    The score that brought a configuration into confirm does not count: it was chosen for being high. Before
    that, or without confirm: the best so far. None if every trial failed.
    """
    plan = list(_planned(spec, finished))
    proposals, complete = plan[-1]
    best: list[Result] = []
    if complete and spec.confirm:
        slots = {proposal.slot for proposal in proposals}
        best = ranked(results(f for f in _in_order(finished) if f.slot in slots))
    best = best or ranked(_candidates(spec, finished))
    return best[0] if best else None


def border(spec: StudySpec, finished: Sequence[Finished]) -> list[str]:
    """In words, where the chosen value lies at the border of the space, so that better ones may lie beyond."""
    chosen, words = choose(spec, finished), []
    for name, dimension in spec.dimensions.items():
        if chosen is None or spec.search.method == "list" or hasattr(dimension, "choices"):
            continue
        value = chosen.params[name]
        low, high = (coordinate_of(dimension, end) for end in (dimension.low, dimension.high))
        for side, end, away in (
            ("lower", dimension.low, coordinate_of(dimension, value) - low),
            ("upper", dimension.high, high - coordinate_of(dimension, value)),
        ):
            if away < BORDER and (side, end) != ("lower", 0.0):  # nothing lies below 0
                words.append(
                    f"{name}: the best value {value:.4g} lies at the {side} border {end:g} of the space; widen it"
                )
    return words


def _planned(
    spec: StudySpec,
    finished: Sequence[Finished],
    ask: Ask | None = None,
    started: Mapping[Slot, Params] = MappingProxyType({}),
) -> Iterator[tuple[list[Proposal], bool]]:
    """The proposals of each stage as far as the results reach, and whether all of them are finished."""
    done = {f.slot: f for f in finished}
    for number, stage in enumerate(_stages(spec)):
        configurations = _trained(stage, number, done) or _configurations(spec, finished, number, ask)
        placed = {f.slot: f.params for f in finished} | dict(started) if stage.keeps else {}
        own = {slot.index: params for slot, params in placed.items() if slot.stage == number}
        proposals = [
            Proposal(Slot(number, index, repeat), params, stage.name, stage.overrides)
            for index, params in _indexed(configurations, own)
            for repeat in stage.repeats
        ]
        complete = all(proposal.slot in done for proposal in proposals)
        if stage.name != "confirm":
            complete = complete and len(configurations) == stage.configurations
        yield proposals, complete
        if not complete:
            return


def _trained(stage: _Stage, number: int, done: Mapping[Slot, Finished]) -> list[Params] | None:
    """The configurations of a stage that is complete, so that they are not found again; None of any other."""
    first, *others = stage.repeats
    configurations = [done.get(Slot(number, index, first)) for index in range(stage.configurations)]
    found = [f.params for f in configurations if f and all(replace(f.slot, repeat=r) in done for r in others)]
    return found if not stage.keeps and len(found) == stage.configurations else None


def _configurations(spec: StudySpec, finished: Sequence[Finished], number: int, ask: Ask | None) -> Sequence[Params]:
    """The parameters of each configuration of a stage whose earlier stages are complete, in the order of slots."""
    search, dimensions, stage = spec.search, spec.dimensions, _stages(spec)[number]
    if stage.name == "confirm":
        return [result.params for result in ranked(_candidates(spec, finished))[: stage.configurations]]
    if search.method == "list":
        return search.settings
    if search.method == "grid":
        return [dict(zip(dimensions, values, strict=True)) for values in product(*_levels(spec))]
    if search.method == "coarse-to-fine":
        cube = _cubes(spec, finished, number + 1)[-1]
        points, scores = _known(spec, _runs(spec, finished), 0 if search.stages[number].box else number)
        return _params(dimensions, fill(cube, stage.configurations, points, scores, spec.seed, number))
    if search.method == "random":
        whole = _whole(dimensions)
        if search.points == "sobol":
            points = unit_points(search.trials, len(whole), spec.seed, 0)
        else:
            points = _uniform(search.trials, list(dimensions), spec.seed)
        return _params(dimensions, place(whole, points))
    return _generations(spec, search, finished, ask)


def _generations(spec: StudySpec, search: Sampler, finished: Sequence[Finished], ask: Ask | None) -> list[Params]:
    """What an Optuna sampler named in the generations that are complete, and in the next one."""
    done = {f.slot: f for f in _in_order(finished) if f.slot.stage == 0}
    found: list[Params] = []
    for number, first in enumerate(range(0, search.trials, search.generation)):
        indices = range(first, min(first + search.generation, search.trials))
        slots = [Slot(0, index, repeat) for index in indices for repeat in range(spec.repeats)]
        if all(slot in done for slot in slots):
            found += [done[Slot(0, index, 0)].params for index in indices]
            continue
        if ask is not None:
            earlier = [f for slot, f in done.items() if slot.index < first]
            found += ask(number, len(indices), results(earlier, key=lambda f: str(f.slot.index)))
        break
    return found


def _indexed(configurations: Sequence[Params], own: Mapping[int, Params]) -> list[tuple[int, Params]]:
    """Each configuration with its index. Those that have one already keep it, so that a grid which was extended
    keeps what is done; the others take the free numbers in order, which leaves a new grid in its own order."""
    known = {_key(params): index for index, params in own.items()}
    free = (index for index in count() if index not in own)
    return [(known[key] if (key := _key(params)) in known else next(free), params) for params in configurations]


def _levels(spec: StudySpec) -> list[Sequence[Scalar]]:
    """The values of each dimension of a grid; whole numbers that fall together count once."""
    search = spec.search
    assert search.method == "grid"
    levels: list[Sequence[Scalar]] = []
    for name, d in spec.dimensions.items():
        if hasattr(d, "choices"):
            levels.append(d.choices)
        else:
            low, high = (coordinate_of(d, end) for end in (d.low, d.high))
            steps = search.points_of(name) - 1
            levels.append(list(dict.fromkeys(value_at(d, low + (high - low) * k / steps) for k in range(steps + 1))))
    return levels


def _uniform(n: int, names: Sequence[str], seed: int) -> Array:
    """Independent points [n, d] of [0, 1), each coordinate from its own index and name."""
    keys = [zlib.crc32(name.encode()) for name in names]
    points = [[np.random.default_rng((seed, i, key)).random() for key in keys] for i in range(n)]
    return np.array(points).reshape(n, len(names))


def _cubes(spec: StudySpec, finished: Sequence[Finished], number: int) -> list[Cube]:
    """The boxes of the first stages of coarse to fine; all but the last of them must be complete."""
    search, dimensions = spec.search, spec.dimensions
    assert search.method == "coarse-to-fine"
    cube, found, runs = _whole(dimensions), list[Cube](), _runs(spec, finished)
    for k, stage in enumerate(search.stages[:number]):
        if k == 0:
            edge = (1 - stage.width) / 2
            cube = tuple(Interval(edge, 1 - edge) if isinstance(side, Interval) else side for side in cube)
        else:
            cube = narrow(cube, *_known(spec, runs, k), stage.width, search.top)
        cube = tuple(
            _explicit(dimensions[name], *given) if (given := _given(stage.box, name)) else side
            for name, side in zip(dimensions, cube, strict=True)
        )
        found.append(cube)
    return found


class _Run(NamedTuple):
    """A finished trial, for `_known`."""

    stage: int
    key: str
    point: list[float]
    score: float


def _runs(spec: StudySpec, finished: Sequence[Finished]) -> list[_Run]:
    """In the order of their slots."""
    dimensions = spec.dimensions.items()
    return [
        _Run(f.slot.stage, _key(f.params), [coordinate_of(d, f.params[name]) for name, d in dimensions], f.score)
        for f in _in_order(finished)
    ]


def _known(spec: StudySpec, runs: Sequence[_Run], number: int) -> tuple[Array, Array]:
    """Points [n, d] and scores [n] from before a stage, of the stages that were trained like the one before it."""
    plan = _stages(spec)
    alike = {k for k in range(number) if plan[k].alike(plan[number - 1])}
    points, scores = dict[str, list[float]](), dict[str, list[float]]()
    for run in runs:
        if run.stage in alike:
            points[run.key] = run.point
            scores.setdefault(run.key, []).append(run.score)
    known = np.array(list(points.values())).reshape(len(points), len(spec.dimensions))
    return known, np.array([statistics.fmean(of) for of in scores.values()])


def _given(box: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    return (box[name].low, box[name].high) if name in box else None


def _explicit(dimension: Dimension, low: float, high: float) -> Interval:
    half = 0.5 if getattr(dimension, "integer", False) else 0.0
    return Interval(coordinate_of(dimension, low - half), coordinate_of(dimension, high + half))


def _in_order(finished: Sequence[Finished]) -> list[Finished]:
    return sorted(finished, key=attrgetter("slot.stage", "slot.index", "slot.repeat"))


def _candidates(spec: StudySpec, finished: Sequence[Finished]) -> list[Result]:
    """Every configuration tried so far, confirm apart, in the stages trained like the last one that has results."""
    plan = _stages(spec)
    searched = [f for f in _in_order(finished) if plan[f.slot.stage].name != "confirm"]
    return results(f for f in searched if plan[f.slot.stage].alike(plan[searched[-1].slot.stage]))


def results(finished: Iterable[Finished], key: Callable[[Finished], str] = lambda f: _key(f.params)) -> list[Result]:
    """One result for each configuration (or other key), in the order of its first slot."""
    runs: dict[str, list[Finished]] = {}
    for f in finished:
        runs.setdefault(key(f), []).append(f)
    return [
        Result(
            params=of[0].params,
            mean=statistics.fmean(scores := [f.score for f in of]),
            deviation=statistics.stdev(scores) if len(of) > 1 and all(map(math.isfinite, scores)) else None,
            n=len(of),
            slots=tuple(f.slot for f in of),
        )
        for of in runs.values()
    ]


def ranked(configurations: Sequence[Result]) -> list[Result]:
    """Those that did not fail, the best mean first, of equal means the later first."""
    return [configurations[k] for k in _best_first(np.array([r.mean for r in configurations]))]


def _key(params: Params) -> str:
    return json.dumps(params, sort_keys=True)
