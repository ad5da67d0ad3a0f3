import math
import statistics
import zlib
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search import plan
from search.errors import StudyFileError
from search.plan import Finished, Interval, Slot, propose
from search.study import Choice, Range, StudySpec, restore

SPACE = {
    "lambda": {"low": 1e-6, "high": 1e-1, "log": True},
    "momentum": {"low": 0.0, "high": 0.95},
    "batch_size": {"low": 20, "high": 200},
    "hidden_sizes": [[50], [100], [75, 150], []],
}
GRID = {"lambda": [0.1, 0.0, 1.0], "eta": {"low": 1e-3, "high": 1e-1, "log": True}, "batch_size": {"low": 1, "high": 3}}


def study(search: dict[str, Any], space: dict[str, Any] = SPACE, **more: Any) -> StudySpec:
    given = {"name": "t", "dataset": "digits", "space": space, "search": search, **more}
    if search["method"] == "list":
        del given["space"]
    return restore(given)


FINE = {"method": "coarse-to-fine", "stages": 3, "trials_per_stage": 6}
SETTINGS = [{"lambda": 0.0, "eta": 0.1}, {"lambda": 1.0, "eta": 0.001}]
METHODS = {
    "sobol": study({"method": "random", "trials": 11}),
    "uniform": study({"method": "random", "trials": 11, "points": "uniform"}, confirm=True),
    "grid": study({"method": "grid", "points": 3}, GRID, confirm={"top": 4, "repeats": 2}),
    "list": study({"method": "list", "settings": SETTINGS}, repeats=3),
    "coarse-to-fine": study(FINE),
    "repeats": study(FINE, repeats=2, confirm={"top": 2, "repeats": 2, "base": {"epochs": 30}}),
    "dd2424": study(
        {
            "method": "coarse-to-fine",
            "stages": [
                {"name": "coarse", "trials": 8, "box": {"lambda": {"low": 1e-5, "high": 1e-1}}},
                {"name": "fine", "trials": 12, "box": {"lambda": {"low": 1e-4, "high": 1e-2}}},
            ],
        }
    ),
    "tpe": study({"method": "tpe", "trials": 10, "generation": 4}, confirm=True),
}
every_method = pytest.mark.parametrize("spec", METHODS.values(), ids=METHODS)


def score(params: dict[str, Any], salt: int = 0) -> float:
    """Any deterministic score; one in nine fails."""
    h = zlib.crc32(f"{sorted(params.items())} {salt}".encode())
    return -math.inf if h % 9 == 0 else float(h % 101) / 101


def ask(generation: int, n: int, results: Any) -> list[dict[str, Any]]:
    """A stand-in for a sampler: what it names depends on all that it is told."""
    k = generation + sum(len(r.slots) for r in results)
    return [
        {"lambda": 1e-3 * (k + 1), "momentum": 0.1 * i, "batch_size": 20 + i, "hidden_sizes": "[50]"} for i in range(n)
    ]


def run(spec: StudySpec, salt: int = 0) -> list[Finished]:
    """The whole study, each stage at once."""
    finished: list[Finished] = []
    while new := [p for p in propose(spec, finished, ask) if p.slot not in {f.slot for f in finished}]:
        finished += [Finished(p.slot, p.params, score(p.params, salt + p.slot.repeat)) for p in new]
    return finished


def inside(dimension: Range | Choice, value: Any) -> bool:
    if isinstance(dimension, Choice):
        return value in dimension.choices
    return type(value) is (int if dimension.integer else float) and dimension.low <= value <= dimension.high


@every_method
def test_every_proposal_lies_in_the_space(spec: StudySpec) -> None:
    """Every proposal has each parameter of the space, of its type and within its ends."""
    for f in run(spec):
        assert f.params.keys() == spec.dimensions.keys()
        assert all(inside(d, f.params[name]) for name, d in spec.dimensions.items())


@every_method
def test_the_study_is_as_long_as_its_stages_say(spec: StudySpec) -> None:
    """A study ends with exactly the trials that `stages` promised, each slot once."""
    finished = run(spec)
    per_stage = [sum(f.slot.stage == k for f in finished) for k in range(len(plan.stages(spec)))]
    assert per_stage == [stage.trials for stage in plan.stages(spec)]
    assert len({f.slot for f in finished}) == len(finished)


@every_method
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_the_list_does_not_depend_on_order_or_timing(spec: StudySpec, data: st.DataObject) -> None:
    """Whatever part of the plan is finished, and in whatever order it is named, the whole plan comes out the same."""
    whole = {f.slot: f for f in run(spec)}
    finished: list[Finished] = []
    while todo := [p for p in propose(spec, finished, ask) if p.slot not in {f.slot for f in finished}]:
        assert all(p.params == whole[p.slot].params for p in todo)
        chosen = data.draw(st.lists(st.sampled_from(todo), min_size=1, unique_by=lambda p: p.slot))
        finished = data.draw(st.permutations([*finished, *(whole[p.slot] for p in chosen)]))
    assert len(finished) == len(whole)


@every_method
def test_another_seed_gives_other_points(spec: StudySpec) -> None:
    """The seed decides the points of random and coarse-to-fine studies, and nothing in a grid or list."""
    other = spec.model_copy(update={"seed": 1})
    same = spec.search.method in ("grid", "list", "tpe")
    first, second = ([p.params for p in propose(s, [], ask)] for s in (spec, other))
    assert (first == second) is same
    assert first == [p.params for p in propose(spec, [], ask)]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(["sobol", "uniform"]), st.integers(0, 2**32 - 1))
def test_more_trials_only_add_points(few: int, many: int, points: str, seed: int) -> None:
    """The first n points of a random search stay the same when more are asked for."""
    lists = [
        [p.params for p in propose(study({"method": "random", "trials": n, "points": points}, seed=seed), [])]
        for n in sorted((few, many))
    ]
    assert lists[1][: len(lists[0])] == lists[0]


def test_grid_is_every_combination_once() -> None:
    """A grid is the product of its lists and points, ends included, the last name varying fastest."""
    found = [tuple(p.params[n] for n in ("batch_size", "eta", "lambda")) for p in propose(METHODS["grid"], [])]
    assert found == list(product((1, 2, 3), (0.001, 0.01, 0.1), (0.1, 0.0, 1.0)))


def test_whole_numbers_of_a_grid_count_once() -> None:
    """A range of three whole numbers gives three values, however many points it is given."""
    spec = study({"method": "grid", "points": 9}, {"batch_size": {"low": 1, "high": 3}})
    assert [p.params["batch_size"] for p in propose(spec, [])] == [1, 2, 3]


def test_too_large_a_grid_is_refused_at_once() -> None:
    """A grid of more than 100,000 points is a mistake in the study file, found without building it."""
    with pytest.raises(StudyFileError, match="100,000"):
        study({"method": "grid", "points": 10**6})


def test_an_extended_grid_keeps_what_is_done() -> None:
    """New values in a grid become new slots; every point that was there keeps its slot."""
    small = study({"method": "grid"}, {"lambda": [0.0, 1.0], "eta": [0.1, 0.01]})
    large = study({"method": "grid"}, {"lambda": [0.5, 0.0, 1.0], "eta": [0.1, 0.01, 0.001]})
    finished = run(small)
    extended = propose(large, finished)
    assert {f.slot: f.params for f in finished}.items() <= {p.slot: p.params for p in extended}.items()
    assert sorted(p.slot.index for p in extended) == list(range(9))
    assert len({str(p.params) for p in extended}) == 9


def test_running_trials_keep_their_slots_in_an_extended_grid() -> None:
    """A trial that was running when its grid was extended is still the one of its slot."""
    small = study({"method": "grid"}, {"lambda": [0.0, 1.0], "eta": [0.1, 0.01]})
    large = study({"method": "grid"}, {"lambda": [0.5, 0.0, 1.0], "eta": [0.1, 0.01]})
    first = propose(small, [])
    finished, started = [Finished(first[0].slot, first[0].params, 0.5)], {p.slot: p.params for p in first[2:]}
    extended = {p.slot: p.params for p in propose(large, finished, started=started)}
    assert {first[0].slot: first[0].params, **started}.items() <= extended.items()
    assert len({str(params) for params in extended.values()}) == 6


def test_what_extends_a_study() -> None:
    """More values, settings or points extend a study; other values, seeds, or another method do not."""
    grid = study({"method": "grid"}, {"lambda": [0.0, 1.0], "eta": [0.1]})
    assert plan.extends(study({"method": "grid"}, {"lambda": [0.5, 0.0, 1.0], "eta": [0.1, 0.2]}), grid)
    assert not plan.extends(study({"method": "grid"}, {"lambda": [0.5, 1.0], "eta": [0.1]}), grid)
    assert not plan.extends(study({"method": "grid"}, {"lambda": [0.0, 1.0], "eta": [0.1]}, seed=1), grid)
    assert plan.extends(study({"method": "random", "trials": 12}), METHODS["sobol"])
    assert not plan.extends(study({"method": "random", "trials": 10}), METHODS["sobol"])
    assert not plan.extends(study({"method": "random", "trials": 12, "points": "uniform"}), METHODS["sobol"])
    assert not plan.extends(study({**FINE, "stages": 4}), METHODS["coarse-to-fine"])
    third = [*SETTINGS, {"lambda": 0.5, "eta": 0.1}]
    assert plan.extends(study({"method": "list", "settings": third[::-1]}, repeats=3), METHODS["list"])


@pytest.mark.parametrize("name", ["coarse-to-fine", "repeats", "dd2424"])
def test_points_lie_in_their_stages_box(name: str) -> None:
    """Every point of coarse to fine lies in the box that is reported for its stage."""
    spec = METHODS[name]
    finished = run(spec)
    boxes = plan.boxes(spec, finished)
    assert boxes[-1] is None
    for f in finished:
        for name, side in (boxes[f.slot.stage] or {}).items():
            if isinstance(spec.dimensions[name], Choice):
                assert f.params[name] in side
            else:
                assert side[0] <= f.params[name] <= side[1]  # type: ignore[operator]


def test_boxes_become_known_stage_by_stage() -> None:
    """A stage has no box before the stages ahead of it are complete."""
    spec = METHODS["coarse-to-fine"]
    known = [sum(box is not None for box in plan.boxes(spec, run(spec)[:n])) for n in (0, 5, 6, 11, 12, 18)]
    assert known == [1, 1, 2, 2, 3, 3]


def test_explicit_boxes_win() -> None:
    """A box given in the study file is the stage's box, and its points fill it from end to end."""
    spec = METHODS["dd2424"]
    fine = [float(f.params["lambda"]) for f in run(spec) if f.slot.stage == 1]
    box = plan.boxes(spec, run(spec))[1]
    assert box is not None
    assert box["lambda"] == (1e-4, 1e-2)
    assert min(fine) < 2e-4
    assert max(fine) > 5e-3


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 30).flatmap(
        lambda n: st.tuples(
            st.lists(st.tuples(*[st.floats(0, 1)] * 2, st.integers(0, 4)), min_size=n, max_size=n),
            st.lists(st.floats(-5, 5) | st.just(-math.inf), min_size=n, max_size=n),
        )
    ),
    st.floats(0.05, 1),
    st.floats(0.05, 1),
)
def test_narrowed_box(results: Any, width: float, top: float) -> None:
    """The next box is as wide as asked for, within the space, and keeps choices that did well."""
    points, scores = (np.array(part, float) for part in results)
    cube = (Interval(0.0, 1.0), Interval(0.2, 0.7), (0, 1, 3, 4))
    a, b, kept = plan.narrow(cube, points, scores, width, top)
    if not np.isfinite(scores).any():
        assert (a, b, kept) == cube
        return
    for side, before in ((a, 1.0), (b, 0.5)):
        assert isinstance(side, Interval)
        assert side.high - side.low == pytest.approx(width * before)
        assert side.low >= 0
        assert side.high <= 1 + 1e-12
    assert len(kept) == math.ceil(width * 4)
    assert set(kept) <= {0, 1, 3, 4}
    did_well = {int(c) for c, s in zip(points[:, 2], scores, strict=True) if s > -math.inf} - {2}
    failed = {int(c) for c in points[:, 2]} - did_well - {2}
    assert set(kept) <= did_well or did_well <= set(kept)
    assert not set(kept) & failed or {0, 1, 3, 4} - failed <= set(kept)


def test_box_is_centred_on_the_best_in_log_space() -> None:
    """Where all but one trial failed, the next box reaches equally far, in decades, to both sides of that one."""
    spec = study(FINE, {"lambda": {"low": 1e-6, "high": 1.0, "log": True}})
    points = propose(spec, [])
    best = min(points, key=lambda p: abs(math.log10(float(p.params["lambda"])) + 3))
    finished = [Finished(p.slot, p.params, 0.5 if p is best else -math.inf) for p in points]
    box = plan.boxes(spec, finished)[1]
    assert box is not None
    low, high = (math.log10(float(end)) for end in box["lambda"])
    assert high - low == pytest.approx(0.6 * 6, rel=1e-4)
    assert (low + high) / 2 == pytest.approx(math.log10(float(best.params["lambda"])), abs=1e-4)


def test_better_points_weigh_more() -> None:
    """The centre is the mean of the best four points, weighted log(4.5) - log(rank)."""
    points = np.array([[0.1], [0.5], [0.6], [0.4], [0.45]])
    ((low, high),) = plan.narrow((Interval(0.0, 1.0),), points, np.array([0.0, 4.0, 3.0, 2.0, 1.0]), 0.5, 0.15)
    weights = [1.504077, 0.810930, 0.405465, 0.117783]
    centre = sum(w * x for w, x in zip(weights, [0.5, 0.6, 0.4, 0.45], strict=True)) / sum(weights)
    assert (low + high) / 2 == pytest.approx(centre, abs=1e-6)


def test_of_equal_scores_the_later_wins() -> None:
    """Where scores saturate, as at an accuracy of 1, the points of the later and narrower box decide."""
    points = np.linspace(0.1, 0.9, 9)[:, None]
    ((low, high),) = plan.narrow((Interval(0.0, 1.0),), points, np.ones(9), 0.2, 0.1)
    assert (low + high) / 2 > 0.8


def test_a_stage_goes_by_its_neighbours() -> None:
    """From ten known points on, places of the box whose neighbourhood did well get most of a stage's points."""
    cube = (Interval(0.0, 1.0), (0, 1))
    known = np.array([[x, c] for x in np.linspace(0.05, 0.95, 10) for c in (0, 1)])
    scores = np.where((known[:, 0] < 0.5) & (known[:, 1] == 1), 1.0, 0.0)
    few = plan.fill(cube, 64, known[:9], scores[:9], 0)
    assert few == pytest.approx(plan.place(cube, plan.unit_points(64, 2, 0)))
    many = plan.fill(cube, 64, known, scores, 0)
    assert np.mean((many[:, 0] < 0.5) & (many[:, 1] == 1)) > 0.9
    assert np.ptp(many[:, 0][many[:, 1] == 1]) > 0.3
    assert plan.fill(cube, 20, known, scores, 0) == pytest.approx(many[:20])


def test_failures_keep_a_stage_away() -> None:
    """Diverged trials count as the worst neighbours."""
    known = np.linspace(0.0, 1.0, 16)[:, None]
    filled = plan.fill((Interval(0.0, 1.0),), 32, known, np.where(known[:, 0] > 0.5, -math.inf, 0.1), 0)
    assert np.mean(filled < 0.55) > 0.9


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 500))
def test_schedule_spends_the_budget(trials: int) -> None:
    """A budget is split completely, into stages of nearly equal size that are about as many as their points."""
    counts = plan.schedule(trials)
    assert sum(counts) == trials
    assert max(counts) - min(counts) <= 1
    assert abs(len(counts) - trials**0.5) <= 0.5


def test_failed_trials_do_not_block() -> None:
    """A stage whose every trial failed is followed by the next one, in a box of the same size."""
    spec = study(FINE)
    finished = [Finished(p.slot, p.params, -math.inf) for p in propose(spec, [])]
    assert {p.slot.stage for p in propose(spec, finished)} == {0, 1}
    boxes = plan.boxes(spec, finished)
    assert boxes[0] == boxes[1]
    assert plan.choose(spec, finished) is None
    assert plan.border(spec, finished) == []


def test_confirm_runs_the_best_with_other_seeds() -> None:
    """Confirm takes the best configurations of all stages, under repeats that none of them had."""
    spec = METHODS["repeats"]
    finished = run(spec)
    means: dict[str, list[float]] = {}
    for f in finished:
        if f.slot.stage < 3:
            means.setdefault(str(f.params), []).append(f.score)
    best = sorted(means, key=lambda key: -statistics.fmean(means[key]))[:2]
    again = [p for p in propose(spec, finished) if p.stage == "confirm"]
    assert [str(p.params) for p in again] == [best[0], best[0], best[1], best[1]]
    assert [str(p.slot) for p in again] == ["s3.i0.r2", "s3.i0.r3", "s3.i1.r2", "s3.i1.r3"]
    assert all(p.overrides == {"epochs": 30} for p in again)


def test_choice_by_the_mean_of_confirm() -> None:
    """The choice is the best mean over the confirm runs; a lucky first score does not count."""
    spec = study({"method": "random", "trials": 4}, confirm={"top": 2, "repeats": 2})
    first = [Finished(p.slot, p.params, s) for p, s in zip(propose(spec, []), (0.2, 0.9, 0.7, 0.1), strict=True)]
    so_far = plan.choose(spec, first)
    assert so_far is not None
    assert (so_far.params, so_far.mean, so_far.deviation, so_far.n) == (first[1].params, 0.9, None, 1)
    again = [p for p in propose(spec, first) if p.stage == "confirm"]
    confirmed = [Finished(p.slot, p.params, s) for p, s in zip(again, (0.5, 0.6, 0.6, 0.8), strict=True)]
    chosen = plan.choose(spec, first + confirmed)
    assert chosen is not None
    assert chosen.params == first[2].params
    assert (chosen.mean, chosen.deviation) == (pytest.approx(0.7), pytest.approx(0.1 * math.sqrt(2)))
    assert chosen.slots == (Slot(1, 1, 1), Slot(1, 1, 2))


def test_stages_of_another_budget_are_not_compared() -> None:
    """A stage that trains longer is the only one that confirm chooses from."""
    stages = [{"trials": 3, "base": {"epochs": 2}}, {"trials": 3, "base": {"epochs": 5}}]
    spec = study({"method": "coarse-to-fine", "stages": stages}, confirm={"top": 5, "repeats": 1})
    first = [Finished(p.slot, p.params, 0.9) for p in propose(spec, [])]
    second = [Finished(p.slot, p.params, 0.1) for p in propose(spec, first)[3:]]
    again = [p.params for p in propose(spec, first + second)[6:]]
    assert sorted(map(str, again)) == sorted(str(f.params) for f in second)


@pytest.mark.parametrize("ended", [1, 3])
def test_a_stage_without_any_result_takes_no_earlier_one_away(ended: int) -> None:
    """Where a stage of another budget has brought nothing so far, or in all, the choice is among those before it."""
    stages = [{"trials": 3, "base": {"epochs": 2}}, {"trials": 3, "base": {"epochs": 5}}]
    spec = study({"method": "coarse-to-fine", "stages": stages}, confirm={"top": 2, "repeats": 1})
    first = [Finished(p.slot, p.params, s) for p, s in zip(propose(spec, []), (0.2, 0.9, 0.7), strict=True)]
    second = [Finished(p.slot, p.params, -math.inf) for p in propose(spec, first)[3:]][:ended]
    chosen = plan.choose(spec, first + second)
    assert chosen is not None
    assert (chosen.params, chosen.mean) == (first[1].params, 0.9)
    if ended == 3:
        again = [p.params for p in propose(spec, first + second) if p.stage == "confirm"]
        assert again == [first[1].params, first[2].params]


def test_border_in_words() -> None:
    """A best value next to an end of the space is reported in words, one in the middle is not."""
    spec = study({"method": "random", "trials": 1}, {"lambda": {"low": 1e-5, "high": 1e-1, "log": True}})
    assert plan.border(spec, [Finished(Slot(0, 0, 0), {"lambda": 0.096}, 0.5)]) == [
        "lambda: the best value 0.096 lies at the upper border 0.1 of the space; widen it"
    ]
    assert plan.border(spec, [Finished(Slot(0, 0, 0), {"lambda": 1e-3}, 0.5)]) == []


def test_sampler_methods_are_asked_generation_by_generation() -> None:
    """Each generation is asked for once the ones before it are complete, and told their results only."""
    spec, asked = METHODS["tpe"], []

    def spy(generation: int, n: int, results: Any) -> list[dict[str, Any]]:
        asked.append((generation, n, [slot.index for r in results for slot in r.slots]))
        return ask(generation, n, results)

    first = [Finished(p.slot, p.params, 0.5) for p in propose(spec, [], spy)]
    propose(spec, first[1:], spy)
    second = [Finished(p.slot, p.params, 0.5) for p in propose(spec, first, spy)]
    propose(spec, second, spy)
    assert asked == [(0, 4, []), (0, 4, []), (1, 4, [0, 1, 2, 3]), (2, 2, [0, 1, 2, 3, 4, 5, 6, 7])]
    with pytest.raises(ValueError, match="needs ask"):
        propose(spec, [])


@settings(max_examples=50, deadline=None)
@given(st.builds(Slot, *[st.integers(0, 10**6)] * 3))
def test_slot_as_text(slot: Slot) -> None:
    """A slot is read back from its text."""
    assert Slot.parse(str(slot)) == slot


def test_text_that_is_no_slot() -> None:
    """Text of another form is refused."""
    with pytest.raises(ValueError, match="expected a slot"):
        Slot.parse("s1.i2")


@settings(max_examples=50, deadline=None)
@given(
    st.tuples(st.floats(1e-8, 1e3), st.floats(1.0001, 1e6)).map(lambda t: (t[0], t[0] * t[1])),
    st.booleans(),
    st.floats(0, 1),
)
def test_values_keep_to_their_ends_and_come_back(ends: tuple[float, float], log: bool, u: float) -> None:
    """A value is within its range and back at its coordinate; the ends are exact."""
    d = Range(low=ends[0], high=ends[1], log=log)
    value = plan.value_at(d, u)
    assert ends[0] <= float(value) <= ends[1]
    assert (plan.value_at(d, 0.0), plan.value_at(d, 1.0)) == ends
    slack = 1e-5 / math.log(ends[1] / ends[0]) if log else 1e-5
    assert plan.coordinate_of(d, value) == pytest.approx(u, abs=slack)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 50), st.integers(1, 50), st.booleans())
def test_whole_numbers_share_the_cube(low: int, more: int, log: bool) -> None:
    """A linear range of whole numbers gives each an equal part; any range reaches both of its ends."""
    d = Range(low=low, high=low + more, log=log, integer=True)
    values = [plan.value_at(d, (k + 0.5) / (4 * (more + 1))) for k in range(4 * (more + 1))]
    assert all(type(v) is int for v in values)
    assert min(values) == low
    assert max(values) == low + more
    if not log:
        assert values == [low + k // 4 for k in range(4 * (more + 1))]
