from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search import prune, run
from search.outcome import open_study, standing
from search.plan import Slot
from search.settings import Settings
from search.study import Halving, Limits, StudySpec
from tests.conftest import stop_after_first_slice

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
