"""Samplers for Optuna: coarse to fine for plain `study.optimize`, and Optuna's own for the runner of Sieve.

optuna.create_study(sampler=CoarseToFineSampler(n_trials=64, seed=1)).optimize(objective, n_trials=64)
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from itertools import accumulate
from pkgutil import resolve_name
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, TPESampler
from optuna.search_space import intersection_search_space
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from search.errors import StudyFileError
from search.plan import (
    ENOUGH,
    Array,
    Ask,
    Cube,
    Interval,
    Params,
    Result,
    Side,
    coordinate_of,
    fill,
    narrow,
    place,
    schedule,
    unit_points,
    value_at,
)

MOST_DIMENSIONS = 64  # parameters of one trial that get a coordinate of their own


class CoarseToFineSampler(BaseSampler):
    """Stages of Sobol points, each in a narrower box around the best points of the trials before that stage.

    A trial's number decides its stage and its point, and finished trials of earlier stages decide the box, so
    equal seeds repeat a study exactly, and threads and processes can share one (a stage that starts before the
    one ahead of it has ended uses what is finished). Without a seed the study's name serves as one. Spaces may
    be conditional or change on the way, and no distribution is ever narrowed.

    Args:
        n_trials: The budget that the stages divide; further trials stay in the last box.
        final_width: Width of the last box, in widths of the space.
        top: The next box is centred on this fraction of the trials, the best (four at the least).
        seed: Of the Sobol points.
    """

    def __init__(
        self, n_trials: int = 32, *, final_width: float = 0.25, top: float = 0.15, seed: int | None = None
    ) -> None:
        if n_trials < 1:
            raise ValueError(f"n_trials: expected 1 or more, got {n_trials}")
        for name, value in (("final_width", final_width), ("top", top)):
            if not 0 < value <= 1:
                raise ValueError(f"{name}: expected a number above 0, 1 at most, got {value}")
        self._starts = [0, *accumulate(schedule(n_trials))][:-1]
        self._shrink = final_width ** (1 / max(1, len(self._starts) - 1))
        self._top, self._seed = top, seed

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The parameters that every trial before this stage has, once there are enough to tell a promising point."""
        self._raise_error_if_multi_objective(study)
        stage, _ = self._place(trial)
        before = [t for t in _complete(study) if t.number < self._starts[stage]]
        space = intersection_search_space(before) if len(before) >= ENOUGH else {}
        return {name: d for name, d in space.items() if not d.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The trial's point in this space."""
        self._raise_error_if_multi_objective(study)
        if not search_space:
            return {}
        stage, index = self._place(trial)
        cube, points, scores = self._box(study, search_space, stage)
        point = fill(cube, index + 1, points, scores, self._seed_of(study), stage)[index]
        return {name: _value(d, float(u)) for (name, d), u in zip(search_space.items(), point, strict=True)}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The coordinate of the trial's point that belongs to the parameter it suggests next."""
        self._raise_error_if_multi_objective(study)
        stage, index = self._place(trial)
        cube, _, _ = self._box(study, {param_name: param_distribution}, stage)
        points = _points(index.bit_length(), self._seed_of(study), stage)
        axis = len(trial.params) % MOST_DIMENSIONS
        return _value(param_distribution, float(place(cube, points[[index]][:, [axis]])[0, 0]))

    def _place(self, trial: FrozenTrial) -> tuple[int, int]:
        """The trial's stage and its index in there."""
        stage = sum(start <= trial.number for start in self._starts) - 1
        return stage, trial.number - self._starts[stage]

    def _seed_of(self, study: Study) -> int:
        return zlib.crc32(study.study_name.encode()) if self._seed is None else self._seed

    def _box(self, study: Study, space: dict[str, BaseDistribution], stage: int) -> tuple[Cube, Array, Array]:
        """The box of a stage in this space, and what is known before that stage: points [n, d], scores [n]."""
        sign = 1.0 if study.direction == StudyDirection.MAXIMIZE else -1.0
        known = [
            t
            for t in _complete(study)
            if all(name in t.params and _comparable(d, t.distributions[name]) for name, d in space.items())
        ]
        numbers = np.array([t.number for t in known], int)
        points = np.array([[_coordinate(d, t.params[name]) for name, d in space.items()] for t in known])
        points = points.reshape(len(known), len(space))
        scores = np.array([sign * value if (value := t.value) is not None else -np.inf for t in known])
        cube: Cube = tuple(_whole(d) for d in space.values())
        for start in self._starts[1 : stage + 1]:
            cube = narrow(cube, points[numbers < start], scores[numbers < start], self._shrink, self._top)
        before = numbers < self._starts[stage]
        return cube, points[before], scores[before]


def _complete(study: Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


@lru_cache(maxsize=64)
def _points(bits: int, seed: int, stage: int) -> Array:
    """2**bits points of a stage, of MOST_DIMENSIONS coordinates each."""
    return unit_points(1 << bits, MOST_DIMENSIONS, seed, stage)


# --- Optuna's distributions on the unit interval -----------------------------------------------------------------


@dataclass(frozen=True)
class _Numbers:
    low: float
    high: float
    log: bool
    integer: bool


def _numbers(distribution: BaseDistribution) -> tuple[_Numbers, float, float]:
    """A range, an offset and a step: the distribution's values are offset + step * those of the range."""
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    low, high, integer = distribution.low, distribution.high, isinstance(distribution, IntDistribution)
    if distribution.log or distribution.step is None:
        return _Numbers(low, high, distribution.log, integer), 0, 1
    return _Numbers(0, round((high - low) / distribution.step), False, True), low, distribution.step


def _whole(distribution: BaseDistribution) -> Side:
    if isinstance(distribution, CategoricalDistribution):
        return tuple(range(len(distribution.choices)))
    return Interval(0.0, 1.0)


def _value(distribution: BaseDistribution, coordinate: float) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return value_at(distribution, coordinate)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    numbers, offset, step = _numbers(distribution)
    value = min(offset + step * float(value_at(numbers, coordinate)), distribution.high)
    return int(value) if isinstance(distribution, IntDistribution) else value


def _coordinate(distribution: BaseDistribution, value: Any) -> float:
    """The coordinate of a value, which may lie outside the distribution: then that of the nearer end."""
    if isinstance(distribution, CategoricalDistribution):
        return coordinate_of(distribution, value)
    numbers, offset, step = _numbers(distribution)
    return min(max(coordinate_of(numbers, max((value - offset) / step, numbers.low)), 0.0), 1.0)


def _comparable(distribution: BaseDistribution, other: BaseDistribution) -> bool:
    """Whether values of the other distribution mean something in this one."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution == other
    return type(distribution) is type(other)


# --- Optuna's own samplers, a generation at a time ---------------------------------------------------------------


def tpe(seed: int) -> BaseSampler:
    return TPESampler(seed=seed)


def gp(seed: int) -> BaseSampler:
    return GPSampler(seed=seed)


def cmaes(seed: int) -> BaseSampler:
    return CmaEsSampler(seed=seed, warn_independent_sampling=False)


def sampler(method: str, seed: int) -> BaseSampler:
    """The sampler that this method of a study file asks."""
    from search.study import SAMPLERS  # here: CoarseToFineSampler needs nothing of study files

    make: Callable[[int], BaseSampler] = resolve_name(SAMPLERS[method])
    return make(seed)


NEEDS = {"gp": "torch", "cmaes": "cmaes"}  # packages that Optuna does not bring along


def check_packages(method: str, source: str) -> None:
    """Raises StudyFileError, in words that begin with `source`, when a package that the method needs is not here."""
    package = NEEDS.get(method)
    try:
        if package:
            import_module(package)
    except (ImportError, OSError) as error:  # OSError: a shared library of it does not load
        needs = f"{method} needs the package {package}, which cannot be imported ({error}); pip install {package}"
        raise StudyFileError([f"{source}: search.method: {needs}"]) from None


def asker(method: str, distributions: Mapping[str, BaseDistribution], seed: int) -> Ask:
    """What `plan.propose` asks for the methods of SAMPLERS: one of Optuna's samplers, a generation at a time.

    The sampler lives in a study of its own, in memory, which is led again through all earlier generations when
    a study resumes: asked for the same number, told the same scores in the order of their slots. A failed
    trial is told as the worst that did not fail, so that the sampler learns to keep away.
    """
    study = optuna.create_study(direction="maximize", sampler=sampler(method, seed))
    asked: list[list[optuna.Trial]] = []

    def ask(generation: int, count: int, results: Sequence[Result]) -> list[Params]:
        while len(asked) <= generation:
            if asked:
                _tell(study, asked, results, distributions)
            earlier = len(results) // generation if generation else count
            size = count if len(asked) == generation else earlier
            asked.append([study.ask(dict(distributions)) for _ in range(size)])
        return [trial.params for trial in asked[generation]]

    return ask


def _tell(
    study: Study,
    asked: Sequence[Sequence[optuna.Trial]],
    results: Sequence[Result],
    distributions: Mapping[str, BaseDistribution],
) -> None:
    """The scores of the last generation that was asked for.

    After a retry the sampler may name other points than those that its generation had kept: then it is told of those.
    """
    end = sum(map(len, asked))
    finite = [result.mean for result in results[:end] if np.isfinite(result.mean)]
    for trial, result in zip(asked[-1], results[end - len(asked[-1]) : end], strict=True):
        score = result.mean if np.isfinite(result.mean) else min(finite, default=0.0)
        if trial.params == result.params:
            study.tell(trial, score)
        else:
            study.tell(trial, state=TrialState.FAIL)
            own = create_trial(params=result.params, distributions=dict(distributions), value=score)
            study.add_trial(own)
