import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from hypothesis import given
from hypothesis import strategies as st

from search import prune, run, runner
from search.outcome import open_study, standing
from search.plan import Slot
from search.settings import Settings
from search.study import Halving, Limits, StudySpec, restore
from tests.conftest import QUICK, stop_after_first_slice

Spec = Callable[..., StudySpec]
launch = partial(run.launch, publish=False)
LONG = {"base": {"batch_size": 50, "epochs": 12}, "search": {"method": "random", "trials": 9}, "confirm": False}


def ends(settings: Settings) -> dict[str, tuple[Any, ...]]:
    return {
        str(a.slot): (a.state.name, a.value, a.attrs.get("reason"), a.attrs["epochs"])
        for a in open_study("quick", settings).attempts()
    }


def test_rungs_grow_by_the_reduction() -> None:
    """least 2 and reduction 3 put rungs at 2, 6, 18 evaluations."""
    pruner = Halving(method="successive-halving", least=2, reduction=3)
    assert [prune.next_rung(pruner, n) for n in (0, 1, 2, 5, 6, 17)] == [2, 2, 6, 6, 18, 18]
    assert [prune.next_rung(pruner, n, unit=10) for n in (0, 19, 20, 60)] == [20, 20, 60, 180]


@given(scores=st.lists(st.floats(0, 1), min_size=1, max_size=40), reduction=st.integers(2, 5))
def test_the_best_of_a_stage_go_on(scores: list[float], reduction: int) -> None:
    """Nobody who is cut at a rung has a better score than anyone who goes on; one always does."""
    at_rung = {Slot(0, i, 0): score for i, score in enumerate(scores)}
    on = prune.survivors(at_rung, reduction)
    assert len(on) == max(1, len(scores) // reduction)
    assert min(at_rung[s] for s in on) >= max((v for s, v in at_rung.items() if s not in on), default=0)


def test_rungs_with_a_barrier_cut_the_same_for_any_number_of_workers(
    settings: Settings, quick: Spec, tmp_path: Path
) -> None:
    """A third of nine trials passes the first rung, one the second, whoever trains them."""
    spec = quick(**LONG, pruner={"method": "successive-halving", "barrier": True})
    other = Settings.from_environment({"SIEVE_HOME": str(tmp_path / "other")})
    launch(spec, settings, workers=1)
    launch(spec, other, workers=3)
    assert ends(settings) == ends(other)
    assert sorted(epochs for *_, epochs in ends(settings).values()) == [2] * 6 + [6] * 2 + [12]
    assert "does not depend on timing" in open_study("quick", settings).attrs["pruning"]


def test_a_stop_between_rungs_changes_nothing(settings: Settings, quick: Spec, tmp_path: Path) -> None:
    """A study stopped after every slice and launched again cuts the same trials at the same rungs."""
    spec = quick(**LONG, pruner={"method": "successive-halving", "barrier": True})
    other = Settings.from_environment({"SIEVE_HOME": str(tmp_path / "other")})
    launch(spec, settings, workers=2)
    for _ in range(20):
        try:
            launch(spec, other, workers=2, started=stop_after_first_slice)
            break
        except run.Interrupted:
            continue
    assert ends(settings) == ends(other)


@pytest.mark.parametrize("method", ["successive-halving", "hyperband", "median"])
def test_optunas_pruners_decide_between_slices(settings: Settings, quick: Spec, method: str) -> None:
    """With any of Optuna's pruners every trial is settled, what is cut says by whom, and a best one remains."""
    outcome = launch(quick(**LONG, pruner={"method": method}), settings, workers=1)
    found = ends(settings)
    assert len(found) == 9
    for state, _, reason, epochs in found.values():
        assert state in ("COMPLETE", "PRUNED")
        if state == "PRUNED":
            assert reason.startswith(f"pruned by {method} after")
            assert epochs < 12
    if method == "successive-halving":
        assert sum(state == "PRUNED" for state, *_ in found.values()) >= 3
    assert outcome.chosen.mean > 0.5
    assert "depends on timing" in open_study("quick", settings).attrs["pruning"]


@given(
    st.sampled_from(
        [
            {"method": "median", "startup": 2, "warmup": 1},
            {"method": "median", "startup": 1, "warmup": 3},
            {"method": "successive-halving", "least": 1, "reduction": 2},
            {"method": "successive-halving", "least": 2, "reduction": 3},
        ]
    ),
    st.sampled_from([1, 3]),
    st.lists(st.lists(st.integers(0, 20), min_size=8, max_size=8), min_size=2, max_size=12),
    st.randoms(use_true_random=False),
)
def test_the_rules_are_those_of_optuna(
    pruner: dict[str, Any], every: int, curves: list[list[int]], shuffle: random.Random
) -> None:
    """Trials that come on in any order are cut where Optuna's own pruners cut them, asked at each evaluation."""
    base = {"batch_size": 50, "epochs": 24} | ({"eval_every": every} if every > 1 else {})
    spec = restore(QUICK | {"base": base, "search": {"method": "random"}, "confirm": False, "pruner": pruner})
    rivals = prune.rivals(spec)[0]
    if pruner["method"] == "median":
        theirs: Any = optuna.pruners.MedianPruner(pruner["startup"], pruner["warmup"] * every)
    else:
        theirs = optuna.pruners.SuccessiveHalvingPruner(pruner["least"] * every, pruner["reduction"])
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(0), pruner=theirs)
    trials = [study.ask() for _ in curves]
    running, done = list(range(len(curves))), [0] * len(curves)
    while running:
        k = shuffle.choice(running)
        done[k] += 1
        curve = [(every * (i + 1), float(score)) for i, score in enumerate(curves[k][: done[k]])]
        trials[k].report(curve[-1][1], curve[-1][0])
        complete = done[k] == len(curves[k])
        wanted = trials[k].should_prune()
        assert complete or rivals.is_worse(Slot(0, k, 0), curve) == wanted
        if complete:
            rivals.is_worse(Slot(0, k, 0), curve, complete=True)
            study.tell(trials[k], curve[-1][1])
        if complete or wanted:
            running.remove(k)


TWO: dict[str, Any] = {  # the second stage sees so few examples that it is far behind the first
    "base": {"batch_size": 10, "epochs": 12},
    "space": {"eta": {"low": 0.01, "high": 0.2, "log": True}},
    "confirm": False,
}
FEWER: dict[str, Any] = {"dataset": {"train": 20}}


def two_stages(trials: int, **second: Any) -> dict[str, Any]:
    return {"method": "coarse-to-fine", "trials_per_stage": trials, "stages": [{}, second]}


@pytest.mark.parametrize(
    "pruner",
    [{"method": "median", "startup": 5, "warmup": 1}, {"method": "successive-halving", "least": 2, "reduction": 2}],
)
def test_stages_with_other_data_are_not_compared(settings: Settings, quick: Spec, pruner: dict[str, Any]) -> None:
    """A stage on fewer examples loses as many trials as it would alone, though all of them lag behind the other."""
    launch(quick(**TWO, search=two_stages(5, **FEWER), pruner=pruner), settings, workers=1)
    found = open_study("quick", settings).attempts()
    complete = {stage: [a for a in found if a.slot.stage == stage and a.state.name == "COMPLETE"] for stage in (0, 1)}
    first, second = ([a.value for a in complete[stage] if a.value is not None] for stage in (0, 1))
    assert second
    assert max(second) < min(first)  # else they would not have been in danger
    if pruner["method"] == "median":  # it begins when five have ended
        assert len(second) == 5


def test_stages_that_are_trained_alike_are_one_race(settings: Settings, quick: Spec) -> None:
    """Where a second stage differs in its box alone, the first one's trials count."""
    rivals = prune.rivals(quick(**TWO, search=two_stages(4), pruner={"method": "median"}))
    assert rivals[0] is rivals[1]
    apart = prune.rivals(quick(**TWO, search=two_stages(4, base={"epochs": 20}), pruner={"method": "median"}))
    assert apart[0] is not apart[1]


@pytest.mark.parametrize(
    "pruner",
    [
        {"method": "median", "startup": 1, "warmup": 6},
        {"method": "successive-halving", "least": 6},
        {"method": "hyperband", "least": 6},
        {"method": "successive-halving", "least": 6, "barrier": True},
    ],
)
def test_a_stage_with_its_own_rhythm_counts_its_own_evaluations(
    settings: Settings, quick: Spec, monkeypatch: pytest.MonkeyPatch, pruner: dict[str, Any]
) -> None:
    """Whatever the updates between evaluations, no trial ends before the evaluations that every trial is given."""
    monkeypatch.setattr(runner, "MOST_COLUMNS", 1)  # one trial at a time, so that some have ended before others begin
    search = two_stages(8, base={"eval_every": 7})  # 30 updates an epoch
    launch(quick(**TWO, search=search, pruner=pruner), settings, workers=1)
    record = open_study("quick", settings)
    curves = record.curves()
    cut = [a for a in record.attempts() if a.state.name == "PRUNED"]
    assert all(len(curves[a.trial_id]) >= 6 for a in cut)
    if pruner.get("barrier"):
        assert sorted(len(curves[a.trial_id]) for a in cut if a.slot.stage == 1) == [6] * 6 + [18]
    else:
        assert {a.slot.stage for a in cut} == {0, 1}


@pytest.mark.parametrize("every", [4, 10, 25])
def test_a_rung_with_a_barrier_may_lie_within_an_epoch(settings: Settings, quick: Spec, every: int) -> None:
    """With any number of updates between evaluations, the trials of a rung stop there and a third of them goes on."""
    base = {"batch_size": 50, "updates": 12 * every, "eval_every": every}  # 6 updates an epoch
    spec = quick(**LONG | {"base": base}, pruner={"method": "successive-halving", "barrier": True})
    launch(spec, settings, workers=2)
    lengths = sorted(len(curve) for curve in open_study("quick", settings).curves().values())
    assert lengths == [2] * 6 + [6] * 2 + [12]


def test_trials_of_several_rhythms_meet_at_the_same_update(settings: Settings, quick: Spec) -> None:
    """Where eval_every is searched, rungs are so many of the longest intervals, for all trials the same updates."""
    spec = quick(
        base={"batch_size": 50, "epochs": 10},
        space={"eval_every": [2, 6], "eta": [0.01, 0.02, 0.05]},
        search={"method": "grid"},
        confirm=False,
        pruner={"method": "successive-halving", "least": 2, "barrier": True},
    )
    launch(spec, settings, workers=2)
    record = open_study("quick", settings)
    curves = record.curves()
    assert sorted(max(curves[a.trial_id]) for a in record.attempts()) == [12] * 4 + [36] + [60]


def test_a_question_reads_no_storage(settings: Settings, quick: Spec) -> None:
    """However many trials there are, asking the pruner takes no statement of the database."""
    statements: list[str] = []
    asked: list[int] = []

    def watch(runner: runner.Runner) -> None:
        compare = runner._compare

        @sqlalchemy.event.listens_for(runner.record.storage.engine, "before_cursor_execute")
        def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
            statements.append(statement)

        def counted(*args: Any) -> bool:
            before = len(statements)
            worse = compare(*args)
            asked.append(len(statements) - before)
            return worse

        runner._compare = counted  # type: ignore[method-assign]

    launch(quick(**LONG, pruner={"method": "median"}), settings, workers=1, started=watch)
    assert statements
    assert set(asked) == {0}


def test_a_pruner_knows_what_earlier_launches_saw(settings: Settings, quick: Spec) -> None:
    """After a stop, the trials that ended before it count: of two good and seven bad settings, the bad ones are cut."""
    few = [{"eta": eta} for eta in (0.05, 0.1, *(1e-6 * k for k in range(1, 8)))]
    spec = quick(
        base={"batch_size": 50, "epochs": 12},
        space={},
        search={"method": "list", "settings": few},
        confirm=False,
        pruner={"method": "median", "startup": 2, "warmup": 1},
    )
    launch(spec.model_copy(update={"limits": Limits(trials=2)}), settings, workers=1)
    launch(spec, settings, workers=1)
    found = ends(settings)
    assert [state for state, *_ in found.values()] == ["COMPLETE"] * 2 + ["PRUNED"] * 7
    assert {epochs for state, _, _, epochs in found.values() if state == "PRUNED"} == {1}


@given(
    scores=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=20), reduction=st.integers(2, 5)
)
def test_repeats_go_on_together(scores: list[tuple[float, float]], reduction: int) -> None:
    """Who goes on is decided by the mean over a configuration's repeats, for all of them alike."""
    at_rung = {Slot(0, i, r): score for i, pair in enumerate(scores) for r, score in enumerate(pair)}
    on = {slot.index for slot in prune.survivors(at_rung, reduction)}
    assert len(prune.survivors(at_rung, reduction)) == 2 * len(on)
    assert min(sum(scores[i]) for i in on) >= max((sum(p) for i, p in enumerate(scores) if i not in on), default=0)


@pytest.mark.parametrize(
    "pruner",
    [{"method": "successive-halving", "barrier": True}, {"method": "successive-halving"}, {"method": "median"}],
)
def test_confirm_is_never_cut(settings: Settings, quick: Spec, pruner: dict[str, Any]) -> None:
    """Whatever the pruner, each run of the confirm stage is trained to its end, and the choice rests on all of them."""
    parts = LONG | {"confirm": {"top": 1, "repeats": 4}}
    outcome = launch(quick(**parts, pruner=pruner), settings, workers=1)
    confirmed = [end for slot, end in ends(settings).items() if slot.startswith("s1")]
    assert [(state, epochs) for state, _, _, epochs in confirmed] == [("COMPLETE", 12)] * 4
    assert outcome.chosen.n == 4


def test_the_end_of_a_stage_at_a_rung_begins_the_next(settings: Settings, quick: Spec) -> None:
    """Where a stage ends because all who waited are cut, the study goes on to confirm."""
    spec = quick(
        **LONG | {"confirm": {"top": 1, "repeats": 2}}, pruner={"method": "successive-halving", "barrier": True}
    )
    launch(spec.model_copy(update={"limits": Limits(trials=3)}), settings, workers=1)
    launch(spec.model_copy(update={"limits": Limits(trials=9)}), settings, workers=1)
    launch(spec, settings, workers=1)
    assert sum(slot.startswith("s1") for slot in ends(settings)) == 2
    assert standing(settings, "quick")[0]["state"] == "done"


def test_rungs_are_counted_in_evaluations(settings: Settings, quick: Spec) -> None:
    """A study that is evaluated every few updates has its rungs after as many evaluations as one that is each epoch."""
    base = {"batch_size": 50, "epochs": 4, "eval_every": 3}  # 6 updates an epoch
    launch(quick(**LONG | {"base": base}, pruner={"method": "successive-halving", "least": 4}), settings, workers=1)
    storage = open_study("quick", settings).storage
    curves = [storage.get_trial(a.trial_id).intermediate_values for a in open_study("quick", settings).attempts()]
    assert {len(curve) for curve in curves} == {4, 8}


@pytest.mark.parametrize("method", ["tpe", "cmaes"])
def test_optunas_samplers_repeat_themselves(settings: Settings, quick: Spec, tmp_path: Path, method: str) -> None:
    """Asked a generation at a time, a sampler names the same trials for one worker, for three, and after a stop."""
    spec = quick(search={"method": method, "trials": 8, "generation": 4}, confirm=False)
    other = Settings.from_environment({"SIEVE_HOME": str(tmp_path / "other")})
    launch(spec, settings, workers=1)
    with pytest.raises(run.Interrupted):
        launch(spec, other, workers=3, started=stop_after_first_slice)
    launch(spec, other, workers=3)
    first, second = ({a.slot: a.params for a in open_study("quick", s).attempts()} for s in (settings, other))
    assert first == second
    assert len(first) == 8
