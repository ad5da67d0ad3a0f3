import json
import math
import os
import pickle
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from core.train import Evaluation, TrainConfig
from search import errors
from search.errors import StudyFileError
from search.study import Choice, Range, StudySpec, difference, load, loads, narrowed, restore

STUDIES = sorted((Path(__file__).parent.parent / "studies").glob("*.yaml"))

# A study that uses most of the language.
WHOLE: dict[str, Any] = {
    "name": "whole",
    "description": "all of it",
    "dataset": {"name": "cifar10", "train": ["data_batch_1"], "validation": "data_batch_2", "test": 1000},
    "base": {"optimizer": "sgd", "momentum": 0.9, "epochs": 20, "nesterov": True},
    "space": {
        "lambda": {"low": 1e-5, "high": 1e-1, "log": True},
        "batch_size": {"low": 20, "high": 200},
        "activation": ["relu", "tanh"],
        "hidden_sizes": {"layers": [0, 3], "units": [20, 150]},
    },
    "search": {
        "method": "coarse-to-fine",
        "stages": [
            {"trials": 8},
            {"trials": 4, "box": {"lambda": {"low": 1e-4, "high": 1e-2}}, "base": {"epochs": 40}},
        ],
    },
    "confirm": {"top": 2, "repeats": 2, "dataset": {"validation": "data_batch_3"}},
    "pruner": {"method": "median"},
    "limits": {"trials": 10, "minutes": 1.5},
    "published": [{"where": {"lambda": 0}, "value": 0.39}],
}


def study(**changes: Any) -> dict[str, Any]:
    """A small study with some keys changed, or taken away by None."""
    given = {
        "name": "x",
        "dataset": "digits",
        "space": {"lambda": {"low": 1e-5, "high": 1e-1, "log": True}},
        "search": {"method": "random", "trials": 4},
    } | changes
    return {key: value for key, value in given.items() if value is not None}


def mistakes(given: dict[str, Any] | str, *overrides: str) -> list[str]:
    """The lines that a study file is answered with, without the file's name."""
    text = given if isinstance(given, str) else json.dumps(given)
    with pytest.raises(StudyFileError) as caught:
        loads(text, "f.yaml", overrides)
    return [line.removeprefix("f.yaml: ") for line in caught.value.mistakes]


# --- what a study file means -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_shipped_study_loads(path: Path) -> None:
    """A shipped study has the name of its file, no mistake, and comes back from storage unchanged."""
    spec = load(path)
    assert spec.name == path.stem
    assert restore(json.loads(spec.to_json())) == spec
    assert spec.published or spec.name == "quickstart"


def test_numbers_and_words_are_those_of_yaml_1_2() -> None:
    """1e-3 is a number, no, on and 12:30 are words, and only true and false are truth values."""
    text = (
        "name: no\ndescription: 12:30\ndataset: digits\nbase: {eta: 1e-3, decay: .5, nesterov: true, momentum: 1E-1}\n"
    )
    spec = loads(text + "space: {n_s: [0x10, 0o10, 010]}\nsearch: {method: grid}")
    assert (spec.name, spec.description) == ("no", "12:30")
    assert spec.base == {"eta": 0.001, "decay": 0.5, "nesterov": True, "momentum": 0.1}
    assert spec.space["n_s"] == Choice(choices=(16, 8, 10))


def test_dimensions_carry_the_names_of_parameters() -> None:
    """Layers become one dimension each, whole numbers are marked, and the file's order does not matter."""
    expected = {
        "activation": Choice(choices=("relu", "tanh")),
        "batch_size": Range(low=20, high=200, integer=True),
        "hidden_sizes.layers": Range(low=0, high=3, integer=True),
        "hidden_sizes.units_1": Range(low=20, high=150, integer=True),
        "hidden_sizes.units_2": Range(low=20, high=150, integer=True),
        "hidden_sizes.units_3": Range(low=20, high=150, integer=True),
        "lambda": Range(low=1e-5, high=1e-1, log=True),
    }
    spec = restore(WHOLE)
    assert spec.dimensions == expected
    assert list(spec.dimensions) == list(expected)
    assert list(restore(WHOLE | {"space": dict(reversed(WHOLE["space"].items()))}).dimensions) == list(expected)


def test_hidden_sizes_are_text_as_a_parameter() -> None:
    """A list of layer sizes becomes a scalar that storage and UIs can hold, in the file's order."""
    spec = restore(study(space={"hidden_sizes": [[100], [75, 150], []]}))
    assert spec.dimensions == {"hidden_sizes": Choice(choices=("[100]", "[75, 150]", "[]"))}
    assert spec.config({"hidden_sizes": "[75, 150]"}).hidden_sizes == (75, 150)


def test_a_list_of_settings_is_its_own_space() -> None:
    """The dimensions of method list are the values that occur, in the user's order."""
    settings = [{"lambda": 0, "eta": 0.1}, {"lambda": 1, "eta": 0.1}, {"lambda": 0.1, "eta": 0.001}]
    spec = restore(study(space=None, search={"method": "list", "settings": settings}))
    assert spec.dimensions == {"eta": Choice(choices=(0.1, 0.001)), "lambda": Choice(choices=(0.0, 1.0, 0.1))}


def test_a_trial_is_trained_with_base_parameters_and_stage_in_this_order() -> None:
    """Parameters win over base and a stage over both; updates take the place of epochs."""
    spec = restore(WHOLE)
    params: dict[str, Any] = {"lambda": 0.01, "batch_size": 50, "activation": "tanh", "hidden_sizes.layers": 2}
    params |= {f"hidden_sizes.units_{k}": 10 * k for k in (1, 2, 3)}
    wanted = TrainConfig(
        hidden_sizes=(10, 20), activation="tanh", momentum=0.9, nesterov=True, lam=0.01, batch_size=50, epochs=20
    )
    assert spec.config(params) == wanted
    assert spec.config(params, updates=300).updates == 300
    assert spec.config(params, updates=300).epochs is None
    assert restore(study(base={"updates": 7})).config({"lambda": 0.1}, epochs=3).updates is None


def test_stages_are_filled_in() -> None:
    """A number of stages and explicit ones are the same language; what is left out has its default."""
    spec = restore(study(search={"method": "coarse-to-fine", "stages": 3, "trials_per_stage": 5, "shrink": 0.5}))
    assert spec.search.method == "coarse-to-fine"
    assert [(s.name, s.trials, s.width) for s in spec.search.stages] == [
        ("stage-1", 5, 1.0),
        ("stage-2", 5, 0.5),
        ("stage-3", 5, 0.5),
    ]
    default = restore(study(search={"method": "coarse-to-fine"}))
    assert default.search.method == "coarse-to-fine"
    assert [stage.trials for stage in default.search.stages] == [8, 8, 8, 8]


def test_confirm_is_on_for_coarse_to_fine_alone() -> None:
    """It is off for other methods until asked for, and can be turned off."""
    fine = {"method": "coarse-to-fine"}
    assert restore(study()).confirm is None
    for on in (study(search=fine), study(confirm=True), study(confirm={})):
        confirm = restore(on).confirm
        assert confirm is not None
        assert (confirm.top, confirm.repeats) == (3, 3)
    assert restore(study(search=fine, confirm=False)).confirm is None


def test_a_stage_may_have_another_split() -> None:
    """What a stage's dataset leaves out is the study's; every other stage has the study's dataset."""
    spec = restore(WHOLE)
    assert spec.dataset_of("confirm").validation == "data_batch_3"
    assert spec.dataset_of("confirm").train == ["data_batch_1"]
    assert spec.dataset_of("stage-1") == spec.dataset


@pytest.mark.parametrize(
    ("metric", "value", "score"),
    [
        ("val_accuracy", 0.3, 0.3),
        ("best_val_accuracy", 0.5, 0.5),
        ("val_loss", 2.0, -2.0),
        ("best_val_loss", 1.0, -1.0),
        ("train_cost", math.nan, -math.inf),
        ("train_accuracy", math.nan, -math.inf),
    ],
)
def test_score_is_higher_for_better(metric: str, value: float, score: float) -> None:
    """Accuracy as it is, losses negated; a curve that is not finite, or not there, has the worst score."""
    curves = {"accuracy/val": (0.2, 0.5, 0.3), "loss/val": (3.0, 1.0, 2.0), "cost/train": (1.0, math.inf, 1.0)}
    history = [Evaluation(i, i, i, 0.0, {name: curve[i] for name, curve in curves.items()}) for i in range(3)]
    spec = restore(study(metric=metric))
    assert spec.value(history) == pytest.approx(value, nan_ok=True)
    assert spec.score(history) == score
    assert spec.maximise == metric.endswith("accuracy")


def test_stored_form_is_canonical() -> None:
    """Key order, shorthands and the process do not change the stored text, and storing twice changes nothing."""
    spec = restore(WHOLE)
    assert spec.to_json() == restore(dict(reversed(WHOLE.items()))).to_json()
    assert restore(json.loads(spec.to_json())).to_json() == spec.to_json()
    assert pickle.loads(pickle.dumps(spec)) == spec
    code = "import json, sys; from search.study import restore; print(restore(json.load(sys.stdin)).to_json())"
    env = os.environ | {"PYTHONHASHSEED": "17"}
    other = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(WHOLE), capture_output=True, text=True, env=env, check=True
    )
    assert other.stdout.strip() == spec.to_json()


def test_difference_names_what_would_change_trials() -> None:
    """One line for each leaf that differs; description, limits and published figures are free to change."""
    changed = deepcopy(WHOLE)
    changed["search"]["stages"][0]["trials"] = 16
    changed["base"]["epochs"] = 10
    del changed["base"]["nesterov"]
    assert difference(restore(WHOLE), restore(changed)) == [
        "base.epochs: 20 as stored, 10 as given",
        "base.nesterov: true as stored, nothing as given",
        "search.stages.0.trials: 8 as stored, 16 as given",
    ]
    free = WHOLE | {"description": "other words", "limits": {"minutes": 9}, "published": []}
    assert difference(restore(WHOLE), restore(free)) == []


OTHER = [
    {"eta": 3e-4, "hidden_sizes": "[60]", "lambda": 0.12, "units": 1},
    {"eta": 2e-3, "hidden_sizes": "[40]", "lambda": 0.2},
]


def wide(**entries: Any) -> StudySpec:
    given = {
        "eta": [0.1, 1e-2, 1e-3, 1e-4, 1e-5],
        "hidden_sizes": [[60], [80]],
        "lambda": {"low": 0.0, "high": 0.15},
        "momentum": [0.0, 0.5],
    } | entries
    return restore(study(space=given, space_from={"study": "other"}, search={"method": "grid", "points": 2}))


def test_a_space_is_narrowed_to_where_anothers_best_lie() -> None:
    """Listed numbers are rounded outward, ranges cut, other lists filtered; what was not searched stays."""
    spec = narrowed(wide(), OTHER)
    assert spec.dimensions == {
        "eta": Choice(choices=(1e-2, 1e-3, 1e-4)),
        "hidden_sizes": Choice(choices=("[60]",)),
        "lambda": Range(low=0.12, high=0.15),
        "momentum": Choice(choices=(0.0, 0.5)),
    }
    assert narrowed(spec, OTHER) == spec
    assert narrowed(wide(eta=[1e-5, 1e-6]), OTHER).dimensions["eta"] == Choice(choices=(1e-5,))


def test_a_space_with_nothing_left_is_refused() -> None:
    """Each entry that shares nothing with the other study's best gets a line."""
    with pytest.raises(StudyFileError) as caught:
        narrowed(wide(**{"lambda": {"low": 1.0, "high": 2.0}, "hidden_sizes": [[7]]}), OTHER)
    assert caught.value.mistakes == [
        "study 'x', narrowed: space.hidden_sizes: none of [7] is among [40], [60]",
        "study 'x', narrowed: space.lambda: 1 to 2 and 0.12 to 0.2 share no range",
    ]


def test_one_value_is_no_space() -> None:
    """Where a single trial of the other study is meant, the line says to take more of them."""
    with pytest.raises(StudyFileError, match=r"have one value, 0\.2; take a larger top") as caught:
        narrowed(wide(), [{"lambda": 0.2}])
    assert len(caught.value.mistakes) == 1


def test_studies_of_older_versions_keep_their_split() -> None:
    """What was stored without a split was split by the last rows, in every stage; new files draw at random."""
    given = study(
        dataset={"name": "digits", "validation": 100},
        search={"method": "coarse-to-fine", "stages": [{}, {"dataset": {"validation": 50}}]},
        confirm={"dataset": {"validation": 20}},
    )
    new = loads(json.dumps(given))
    assert new.dataset.split == "stratified"
    assert restore(json.loads(new.to_json())) == new
    old = json.loads(new.to_json())
    for part in (old, old["search"]["stages"][1], old["confirm"]):
        del part["dataset"]["split"], part["dataset"]["seed"]
    restored = restore(old)
    assert {restored.dataset_of(stage).split for stage in ("s0", "s1", "confirm")} == {"last"}
    assert difference(restored, new) == [
        f"{place}dataset.split: 'last' as stored, 'stratified' as given; write `split: last` there to go on"
        for place in ("confirm.", "", "search.stages.1.")
    ]
    as_it_was = loads(json.dumps(given), overrides=["dataset.split=last"])
    assert difference(restored, as_it_was) == []


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("studies/*.yaml")), ids=lambda path: path.stem)
def test_studies_of_the_reports_keep_their_data(path: Path) -> None:
    """Each study of the repository says that its images are those that the reports had."""
    assert load(path).dataset.split == "last"


def test_a_draw_that_is_none_has_no_seed() -> None:
    """A seed beside the split that draws nothing is a mistake."""
    with pytest.raises(StudyFileError, match=r"dataset.seed: expected none with split: last.*got 3"):
        loads(json.dumps(study(dataset={"name": "digits", "split": "last", "seed": 3})))


def test_overrides_change_any_part() -> None:
    """--set takes YAML values, makes missing sections, reaches into lists and shorthands, and null removes."""
    text = json.dumps(study(search={"method": "coarse-to-fine", "stages": [{}, {}]}, base={"eta": 0.1}))
    spec = loads(
        text,
        overrides=[
            "search.stages.1.trials=3",
            "dataset.normalise=mean",
            "space.hidden_sizes=[[50], []]",
            "limits.minutes=0.5",
            "space.lambda.high=1e0",
            "base.eta=null",
            "description=a = b",
        ],
    )
    assert spec.search.method == "coarse-to-fine"
    assert spec.search.stages[1].trials == 3
    assert (spec.dataset.name, spec.dataset.normalise) == ("digits", "mean")
    assert spec.space["hidden_sizes"] == Choice(choices=("[50]", "[]"))
    assert (spec.limits.minutes, spec.base, spec.description) == (0.5, {}, "a = b")
    assert spec.space["lambda"] == Range(low=1e-5, high=1.0, log=True)


def test_importing_the_study_file_is_light() -> None:
    """`sieve validate` pays for NumPy, pydantic and PyYAML alone."""
    heavy = ["optuna", "mlflow", "scipy", "sklearn", "matplotlib", "sqlalchemy", "torch"]
    code = f"import sys, search.study; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# --- one line for each mistake -----------------------------------------------------------------------------------


def space(name: str, entry: Any) -> dict[str, Any]:
    return study(space={name: entry})


def search(**fields: Any) -> dict[str, Any]:
    return study(search=fields)


RULE = "expected a name of 1 to 100 letters a-z, digits, . _ - that begins with a letter or digit"
NUMBER = "expected a finite number"

MISTAKES: dict[str, tuple[dict[str, Any], list[str]]] = {
    # names and keys
    "no name": (study(name=None), ["name: required, but not given"]),
    "capitals": (study(name="Best MLP"), [f"name: {RULE}, got 'Best MLP'"]),
    "path as name": (study(name="../x"), [f"name: {RULE}, got '../x'"]),
    "long name": (study(name="a" * 101), [f"name: {RULE}, got '{'a' * 76}..."]),
    "newline in name": (study(name="a\n"), [f"name: {RULE}, got 'a\\n'"]),
    "number as name": (study(name=3), ["name: expected text, got 3"]),
    "unknown key": (study(serach={}), ["serach: unknown key; did you mean search?"]),
    "unknown word": (study(limits={"x": 1}), ["limits.x: unknown key; known here: minutes, trials"]),
    "strange key": (study(**{"a\nb": 1}), ["'a\\nb': unknown key; known here: base, confirm, dataset, description, "
                    "limits, metric, name, pruner, published, remarks, repeats, search, seed, space, space_from"]),
    "unknown in base": (study(base={"momentun": 1}), ["base.momentun: unknown key; did you mean momentum?"]),
    "python's lambda": (study(base={"lam": 1}), ["base.lam: unknown key; did you mean lambda?"]),
    "unknown in a stage": (
        search(method="coarse-to-fine", stages=[{}, {"trails": 3}]),
        ["search.stages.1.trails: unknown key; did you mean trials?"],
    ),
    "unknown in a box": (
        search(method="coarse-to-fine", stages=[{"box": {"lambda": {"low": 1e-4, "high": 1e-3, "log": True}}}]),
        ["search.stages.0.box.lambda.log: unknown key; did you mean low?"],
    ),
    "several at once": (
        study(name=None, seed="no", space={"lambda": {"low": 0, "high": 1, "log": True}, "eta": 0.1}),
        [
            "name: required, but not given",
            "space.lambda.low: a log range needs low > 0, got 0.0",
            "space.eta: expected {low: ..., high: ...} or a list of choices, got 0.1; a fixed value belongs under base",
            "seed: expected a whole number, got 'no'",
        ],
    ),
    # space
    "log from zero": (
        space("lambda", {"low": 0.0, "high": 1.0, "log": True}),
        ["space.lambda.low: a log range needs low > 0, got 0.0"],
    ),
    "low above high": (
        space("lambda", {"low": 2, "high": 1}),
        ["space.lambda.low: expected low below high, got 2.0 and 1.0"],
    ),
    "nothing between": (
        space("lambda", {"low": 1, "high": 1}),
        ["space.lambda.low: expected low below high, got 1.0 and 1.0"],
    ),
    "half a range": (space("lambda", {"low": 1}), ["space.lambda.high: required, but not given"]),
    "word as bound": (space("lambda", {"low": "a", "high": 1}), ["space.lambda.low: expected a number, got 'a'"]),
    "fraction of a batch": (
        space("batch_size", {"low": 1.5, "high": 10}),
        ["space.batch_size.low: expected a whole number, got 1.5"],
    ),
    "batch of zero": (
        space("batch_size", {"low": 0, "high": 10}),
        ["space.batch_size.low: expected an integer of 1 or more, got 0"],
    ),
    "dropping all": (
        space("dropout", {"low": 0, "high": 1}),
        ["space.dropout.high: expected a number from 0 to below 1, got 1.0"],
    ),
    "range of words": (
        space("activation", {"low": 0, "high": 1}),
        ["space.activation: activation is not a number: list its choices, as in [a, b]"],
    ),
    "no choices": (space("eta", []), ["space.eta.choices: expected a list of at least 1, got []"]),
    "wrong choice": (
        space("activation", ["relu", "rleu"]),
        ["space.activation.choices.1: expected one of relu, sigmoid, tanh, got 'rleu'"],
    ),
    "nothing as choice": (space("patience", [5, None]), ["space.patience.choices.1: expected a value, got null"]),
    "same choice twice": (space("eta", [1, 1.0]), ["space.eta.choices.1: 1.0 is given twice"]),
    "no layer sizes": (
        space("hidden_sizes", [50]),
        ["space.hidden_sizes.choices.0: expected a list of layer sizes such as [75, 150], got 50"],
    ),
    "layer of none": (
        space("hidden_sizes", [[0], [10**9]]),
        [
            "space.hidden_sizes.choices.0: expected a list of layer sizes, each from 1 to 100000, got (0,)",
            "space.hidden_sizes.choices.1: expected a list of layer sizes, each from 1 to 100000, got (1000000000,)",
        ],
    ),
    "layers the wrong way": (
        space("hidden_sizes", {"layers": [3, 1], "units": [20, 20]}),
        [
            "space.hidden_sizes.layers: expected the fewest and the most layers, from 0 to 20, got [3, 1]",
            "space.hidden_sizes.units: expected the fewest and the most units, from 1 to 100000, got [20, 20]",
        ],
    ),
    "searched and fixed": (
        study(base={"lambda": 1}),
        ["base.lambda: also searched; a setting is either searched or fixed"],
    ),
    "no space": (
        study(space=None),
        ["space: expected at least one setting to search, got none; method random needs it"],
    ),
    # base and what it needs beside it
    "epochs zero": (study(base={"epochs": 0}), ["base.epochs: expected an integer of 1 or more, or none, got 0"]),
    "two clocks": (
        study(base={"epochs": 3, "updates": 3}),
        ["base.epochs: expected either epochs or updates, got 3 and 3"],
    ),
    "both clocks searched": (
        study(space={"epochs": [3], "updates": [3]}),
        ["space: expected either epochs or updates, got both"],
    ),
    "clock twice": (
        study(base={"epochs": 3}, space={"updates": [10]}, confirm={"base": {"epochs": 9}}),
        [
            "base.epochs: expected either epochs or updates; updates are searched",
            "confirm.base.epochs: expected either epochs or updates; updates are searched",
        ],
    ),
    "eta below eta_min": (
        study(base={"eta_min": 0.01}, space={"eta": {"low": 0.001, "high": 0.1}}),
        ["base.eta_min: expected at most eta = 0.001, got 0.01"],
    ),
    "nesterov alone": (
        study(base={"nesterov": True}),
        ["base.nesterov: expected momentum above 0 beside it, got 0"],
    ),
    "stage's base": (
        search(method="coarse-to-fine", stages=[{}, {"base": {"eta_min": 0.5, "eta": 0.1}}]),
        ["search.stages.1.base.eta_min: expected at most eta = 0.1, got 0.5"],
    ),
    "fixed in a stage": (
        search(method="coarse-to-fine", stages=[{}, {"base": {"lambda": 0}}]),
        ["search.stages.1.base.lambda: also searched; a setting is either searched or fixed"],
    ),
    "nesterov searched": (
        space("nesterov", [False, True]),
        ["space.nesterov.choices.1: expected momentum above 0 beside it, got 0"],
    ),
    # dataset
    "no dataset": (study(dataset=None), ["dataset: required, but not given"]),
    "unknown dataset": (
        study(dataset="mnist"),
        ["dataset.name: expected one of digits, cifar10, npz, got 'mnist'"],
    ),
    "npz without file": (study(dataset="npz"), ["dataset.path: required, but not given: the npz file"]),
    "unknown batch": (
        study(dataset={"name": "cifar10", "train": ["test_batch"]}),
        ["dataset.train: expected data_batch_1 to data_batch_5, got 'test_batch'"],
    ),
    "trained and validated": (
        study(dataset={"name": "cifar10", "train": ["data_batch_2"], "validation": "data_batch_2"}),
        ["dataset.validation: data_batch_2 is trained on; choose another batch"],
    ),
    "batches of digits": (
        study(dataset={"name": "digits", "validation": "data_batch_2"}),
        ["dataset.validation: digits has no batches, got 'data_batch_2'"],
    ),
    "validate on nothing": (
        study(dataset={"name": "digits", "validation": 0}),
        ["dataset.validation: expected a batch, a count or a fraction below 1, got 0"],
    ),
    # search
    "no search": (study(search=None), ["search: required, but not given"]),
    "no method": (study(search={}), ["search.method: required, but not given"]),
    "a bare word": (
        study(search="random", pruner="median", confirm=3),
        [
            "search: expected a mapping such as {method: random}, got 'random'",
            "confirm: expected a mapping such as {top: 3, repeats: 3}, got 3",
            "pruner: expected a mapping such as {method: median}, got 'median'",
        ],
    ),
    "unknown method": (
        search(method="bayes"),
        ["search.method: expected 'random', 'grid', 'list', 'coarse-to-fine', 'tpe', 'gp', 'cmaes', got 'bayes'"],
    ),
    "no trials": (search(method="random", trials=0), ["search.trials: expected a number of 1 or more, got 0"]),
    "truth as number": (search(method="random", trials=True), ["search.trials: expected a whole number, got true"]),
    "grid of 10^8": (
        study(space={"lambda": {"low": 0, "high": 1}}, search={"method": "grid", "points": 10**8}),
        ["search.points: 100,001 trials; at most 100,000 are possible: use fewer points, lists or repeats"],
    ),
    "grid's points": (
        search(method="grid", points={"lamda": 3}),
        [
            "search.points.lamda: unknown key; did you mean lambda?",
            "search.points.lambda: required, but not given: how many points of this range",
        ],
    ),
    "grid of one point": (
        search(method="grid", points=1),
        ["search.points: expected a whole number of 2 or more, or one for each range, got 1"],
    ),
    "empty list": (
        study(space=None, search={"method": "list", "settings": []}),
        ["search.settings: expected a list of at least 1, got []"],
    ),
    "settings that differ": (
        study(space=None, search={"method": "list", "settings": [{"eta": 1}, {"lambda": 1}, {"eta": 1}, {"eta": -1}]}),
        ["search.settings.3.eta: expected a number above 0, got -1"],
    ),
    "settings' keys": (
        study(space=None, search={"method": "list", "settings": [{"eta": 1}, {"lambda": 1}, {"eta": 1.0}]}),
        [
            "search.settings.1: expected the keys of the first, eta, got lambda",
            "search.settings.2: the same as one above it; `repeats` trains a setting several times",
        ],
    ),
    "list beside a space": (
        search(method="list", settings=[{"eta": 1}]),
        ["space: expected none beside method list, whose settings are the space"],
    ),
    "box outside": (
        search(method="coarse-to-fine", stages=[{"box": {"lambda": {"low": 1e-9, "high": 1e-3}}}]),
        ["search.stages.0.box.lambda: expected a part of 1e-05 to 0.1, got 1e-09 to 0.001"],
    ),
    "stage twice": (
        search(method="coarse-to-fine", stages=[{"name": "a"}, {"name": "a"}, {"name": "confirm"}]),
        ["search.stages.1.name: 'a' is another stage", "search.stages.2.name: 'confirm' is another stage"],
    ),
    "too wide": (
        search(method="coarse-to-fine", shrink=1.5),
        ["search.shrink: expected a number of at most 1.0, got 1.5"],
    ),
    "too many repeats": (
        study(search={"method": "random", "trials": 1000}, repeats=1000),
        ["search: 1,000,000 trials; at most 100,000 are possible: use fewer points, lists or repeats"],
    ),
    # the rest
    "unknown metric": (
        study(metric="test_accuracy"),
        [
            "metric: expected one of val_accuracy, best_val_accuracy, val_loss, best_val_loss, val_cost, "
            "best_val_cost, train_accuracy, best_train_accuracy, train_loss, best_train_loss, train_cost, "
            "best_train_cost, got 'test_accuracy'"
        ],
    ),
    "unknown pruner": (
        study(pruner={"method": "meridian"}),
        ["pruner.method: expected 'median', 'successive-halving', 'hyperband', got 'meridian'"],
    ),
    "no minutes": (study(limits={"minutes": 0}), ["limits.minutes: expected a number above 0.0, got 0"]),
    "negative seed": (study(seed=-1), ["seed: expected a number of 0 or more, got -1"]),
    "published for nothing": (
        study(published=[{"where": {"etta": 1}, "value": "best"}]),
        ["published.0.where.etta: unknown key; did you mean eta?", "published.0.value: expected a number, got 'best'"],
    ),
    "published twice": (
        study(published=[{"below": {"lambda": 1}, "value": 0.5}, {"tolerance": 0.1}]),
        [
            "published.0.below: expected either value or below, got both",
            "published.0.where: required beside below, but not given",
            "published.1.tolerance: expected none without a value",
        ],
    ),
    "unknown in space_from": (
        study(space_from={"study": "x", "topp": 1}),
        ["space_from.topp: unknown key; did you mean top?"],
    ),
    "space from this study": (
        study(space_from={"study": "x"}),
        ["space_from.study: expected another study, got this one"],
    ),
    "space of a list from another": (
        study(space=None, space_from={"study": "y"}, search={"method": "list", "settings": [{"lambda": 0}]}),
        ["space_from: expected none beside method list, whose settings are the space"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("given", "lines"), MISTAKES.values(), ids=MISTAKES)
def test_each_mistake_has_its_line(given: dict[str, Any], lines: list[str]) -> None:
    """The line gives the place in the file, what was expected and what was found."""
    assert mistakes(given) == lines


TEXTS = {
    "infinite": ("space: {eta: {low: 1, high: .inf}}", ["space.eta.high: expected a finite number, got inf"]),
    "not a number": ("base: {eta: .nan}", ["base.eta: expected a number above 0, got nan"]),
    "endless integer": (f"seed: {'9' * 5000}", ["seed: expected a number below 2^63, got '" + "9" * 76 + "..."]),
    "duplicate": ("seed: 1\nbase: {eta: 1, eta: 2}\nseed: 2", ["base.eta: given twice, again in line 2",
                                                               "seed: given twice, again in line 3"]),
    "alias": ("base: &b {eta: 1}\nspace: *b", ["line 1: aliases (& and *) are not allowed"]),
    "tag": ("base: !!python/object/apply:os.system [ls]", ["line 1: tags (!) are not allowed"]),
    "merge": ("base: {<<: {eta: 1}}", ["base.'<<': unknown key; known here: "]),
    "tab": ("base:\n\teta: 1", ["line 2: a tab; indent with spaces"]),
    "unclosed": ("base: {eta: 1", ["line 1: while parsing a flow mapping: expected ',' or '}'"]),
    "two documents": ("seed: 1\n---\nseed: 2", ["line 2: expected a single document in the stream: "
                                                "but found another document"]),
    "control character": ("name: a\0", ["character 0x0 at 7 is not allowed in YAML"]),
    "list": ("- name: x", ["expected a mapping such as name: my-study, got [{'name': 'x'}]"]),
    "deep": ("base: " + "[" * 50_000, ["line 1: more than 20 levels"]),
    "key of a list": ("? [a]\n: 1", ["line 1: expected a word as key"]),
    "too large": ("# " + "x" * (1 << 20), ["expected a study file of at most 1 MiB"]),
}  # fmt: skip


@pytest.mark.parametrize(("text", "lines"), TEXTS.values(), ids=TEXTS)
def test_yaml_that_is_refused(text: str, lines: list[str]) -> None:
    """Nothing refers, repeats, runs or overflows, and the line in the file is given."""
    found = [line for line in mistakes(text) if not line.endswith("required, but not given")]
    assert len(found) == len(lines)
    assert all(line.startswith(expected) for line, expected in zip(found, lines, strict=True))


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("space.lambda.low=0", "--set: space.lambda.low: a log range needs low > 0, got 0.0"),
        ("search.trails=8", "--set: search.trails: unknown key; did you mean trials?"),
        ("search.trials", "--set: expected path=value such as search.trials=8, got 'search.trials'"),
        ("=8", "--set: expected path=value such as search.trials=8, got '=8'"),
        ("name.x=8", "--set: name.x: name is 'x' and holds no 'x'"),
        ("base={eta", "--set: base: line 1: while parsing a flow mapping: expected ',' or '}', but got '<stream end>'"),
        ("published.0.value=8", "--set: published.0.value: published has 0 entries, from 0; got '0'"),
    ],
)
def test_a_mistake_in_an_override_is_not_the_files(override: str, line: str) -> None:
    """The line begins with --set instead of the file's name."""
    assert mistakes(study(published=[]), override) == [line]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """A missing file, a folder, another encoding and too many bytes are mistakes too; a byte order mark is not."""
    cases = {"none.yaml": None, "latin.yaml": b"name: \xe9", "large.yaml": b"#" * (1 << 20) + b"#"}
    for name, content in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    lines = []
    for name in [*cases, "folder", "nul\0"]:
        with pytest.raises(StudyFileError) as caught:
            load(tmp_path / name)
        lines += caught.value.mistakes
    assert [line.removeprefix(f"{tmp_path}/") for line in lines] == [
        "none.yaml: No such file or directory",
        "latin.yaml: expected UTF-8 text",
        "large.yaml: expected a study file of at most 1 MiB",
        "folder: expected an ordinary file, got a folder",
        "nul\0: embedded null byte",
    ]
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbf" + json.dumps(study()).encode())
    assert load(tmp_path / "bom.yaml").name == "x"


def test_a_stored_study_of_another_version_is_refused_with_reasons() -> None:
    """What storage holds is checked like a file."""
    with pytest.raises(StudyFileError, match=r"^stored study 'x': colour: unknown key; known here: base, "):
        restore(study() | {"colour": "red"})


# --- whatever the file holds, StudyFileError at most ---------------------------------------------------------------

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
words = st.sampled_from(
    ["digits", "npz", "grid", "list", "tpe", "coarse-to-fine", "median", "[50]", "data_batch_2", "eta", "epochs"]
)
values = st.recursive(
    scalars | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, below in items for place in places(below, (*path, key)))]


def survives(text: str, *overrides: str) -> None:
    try:
        spec, lines = loads(text, "f.yaml", overrides), []
    except StudyFileError as error:
        spec, lines = None, error.mistakes
    assert spec is not None or lines
    for line in lines:
        assert line.startswith(("f.yaml: ", "--set: "))
        assert len(line.splitlines()) == 1
        assert len(line) < 1_000
    if spec is not None:
        assert restore(json.loads(spec.to_json())) == spec
        assert spec.dimensions


@given(st.text(max_size=60))
def test_any_text_is_survived(text: str) -> None:
    """No text makes the loader raise anything but StudyFileError, one short line for each mistake."""
    survives(text)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_change_of_a_study_is_survived(data: st.DataObject) -> None:
    """A valid study with parts replaced, removed or added is either another study or refused in lines."""
    base = data.draw(st.sampled_from([WHOLE, study(), *(yaml.safe_load(p.read_text()) for p in STUDIES[:3])]))
    given = deepcopy(base)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(given)[1:] or [("name",)]))
        place: Any = given
        for key in path[:-1]:
            place = place[key]
        match data.draw(st.sampled_from(["replace", "replace", "remove", "add"])):
            case "replace":
                place[path[-1]] = data.draw(values)
            case "remove":
                del place[path[-1]]
            case "add" if isinstance(place, dict):
                place[data.draw(words | st.text(max_size=4))] = data.draw(values)
    survives(yaml.safe_dump(given, allow_unicode=True))


@settings(deadline=None)
@given(st.lists(st.text(max_size=12) | st.tuples(st.sampled_from(places(WHOLE)), values), max_size=3))
@example(['0\r="'])
def test_any_override_is_survived(overrides: list[Any]) -> None:
    """No --set makes the loader raise anything but StudyFileError."""
    texts = [
        o if isinstance(o, str) else f"{'.'.join(map(str, o[0]))}={yaml.safe_dump(o[1], default_flow_style=True)}"
        for o in overrides
    ]
    survives(json.dumps(WHOLE), *texts)


# --- the family of errors ----------------------------------------------------------------------------------------


def test_errors_survive_pickling_and_know_their_exit_code() -> None:
    """Every error says what a shell needs to know, and crosses processes whole."""
    family = {
        errors.StudyFileError(["f.yaml: a", "f.yaml: b"]): (2, "f.yaml: a\nf.yaml: b"),
        errors.UnknownStudy("demo2", ["demo", "other"]): (2, "no study is called 'demo2'; did you mean demo?"),
        errors.StudyConflict("demo", ["seed: 1 as stored, 2 as given"]): (2, "study 'demo' exists with another"),
        errors.NameTaken("demo", ["not made by Sieve"]): (2, "study 'demo' is there already, not made by Sieve;"),
        errors.StudyBusy("x"): (2, "x"),
        errors.DataError("x"): (2, "x"),
        errors.SettingsError("x"): (2, "x"),
        errors.DiskError("f.db", "disk full"): (1, "f.db: disk full; nothing that was stored is lost"),
        errors.StudyFailed("x"): (1, "x"),
        errors.StudyUnreadable("x", "not made by Sieve"): (2, "study 'x'"),
        errors.StudyTaken("x"): (1, "study 'x' was taken over by another runner"),
        errors.StudyGone("x"): (1, "study 'x' was deleted while it ran"),
        errors.StorageLost("x"): (1, "x"),
        errors.WorkersLost("x"): (1, "x"),
        errors.Interrupted("x"): (130, "x"),
    }
    assert {type(error) for error in family} == {*errors.SieveError.__subclasses__(), errors.NameTaken}
    for error, (code, text) in family.items():
        assert error.exit_code == code
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
        assert str(error).startswith(text)


def test_the_spec_is_frozen() -> None:
    """A study cannot be changed after it was checked."""
    with pytest.raises(ValueError, match="frozen"):
        setattr(restore(study()), "seed", 3)  # noqa: B010 (mypy would refuse the plain assignment)
    assert isinstance(restore(study()), StudySpec)
