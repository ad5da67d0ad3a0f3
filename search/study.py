"""The study file: what it may say, and one clear line for each mistake in it. The only place with pydantic.

    name: my-study
    dataset: digits
    base: {optimizer: sgd, epochs: 20}                        # fixed settings of TrainConfig
    space:                                                    # what is searched
      lambda: {low: 1e-5, high: 1e-1, log: true}
      hidden_sizes: [[50], [100], [75, 150]]
    search: {method: coarse-to-fine, stages: 4, trials_per_stage: 8}

`load` reads a file, `loads` a text, `restore` what `StudySpec.to_json` wrote; each raises StudyFileError alone.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self, get_args, get_type_hints

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from core.data import BATCHES, READERS
from core.files import regular
from core.train import Evaluation, Keep, TrainConfig
from search.errors import StudyFileError
from search.strict_yaml import MOST_BYTES, Mistake, Place, parse, short

# Methods that ask a sampler of Optuna, and the function that makes one from a seed.
SAMPLERS = {"tpe": "search.samplers:tpe", "gp": "search.samplers:gp", "cmaes": "search.samplers:cmaes"}

Scalar = bool | int | float | str

MOST_TRIALS = 100_000
_NAME = "[a-z0-9][a-z0-9._-]{0,99}"

# The settings of one training run under the names of files and UIs, with their types.
_HINTS = get_type_hints(TrainConfig)
FIELDS = {"lambda" if f.name == "lam" else f.name: _HINTS[f.name] for f in fields(TrainConfig)}


class _Metric(NamedTuple):
    series: str  # name of the curve
    maximise: bool
    best: bool  # the best point of the curve instead of its last


# val_accuracy, best_val_accuracy, val_loss, ..., train_cost, best_train_cost
METRICS = {
    f"{'best_' if best else ''}{part}_{kind}": _Metric(f"{kind}/{part}", kind == "accuracy", best)
    for part in ("val", "train")
    for kind in ("accuracy", "loss", "cost")
    for best in (False, True)
}


# --- how a mistake is said ---------------------------------------------------------------------------------------


def _wrong(*mistakes: Mistake) -> PydanticCustomError:
    """Mistakes to raise, each with its path below the place where this is raised."""
    return PydanticCustomError("mistakes", "mistakes", {"mistakes": mistakes})


def _each(raw: Mapping[Any, Any], convert: Callable[[Any, Any], Any]) -> dict[Any, Any]:
    """`convert(key, value)` of every entry; all the mistakes in them at once."""
    found, mistakes = {}, list[Mistake]()
    for key, value in raw.items():
        try:
            found[key] = convert(key, value)
        except ValueError as error:  # pydantic's errors are ValueErrors too
            place = key if isinstance(key, tuple) else (key,)
            mistakes += [((*place, *path), text) for path, text in _mistakes(error)]
    if mistakes:
        raise _wrong(*mistakes)
    return found


def _that(holds: Callable[[Any], bool], expected: str) -> BeforeValidator:
    """Accepts what `holds`, for fields of several types: one mistake, not one for each type."""

    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(f"expected {expected}, got {short(value)}")
        return value

    return BeforeValidator(check)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if mistakes := dict.fromkeys(self._misfits()):
            raise _wrong(*mistakes)
        return self

    def _misfits(self) -> Iterator[Mistake]:
        """Values that are right by themselves and do not belong together."""
        yield from ()


# --- values of training settings ---------------------------------------------------------------------------------


def _value(name: str, value: Any) -> Any:
    """The value as TrainConfig has it: 0 becomes 0.0 for a float, hidden_sizes a list. ValueError if it is none."""
    if name not in FIELDS:
        raise ValueError(_unknown(name, FIELDS))
    if name == "hidden_sizes":
        value = _sizes(value)
    elif FIELDS[name] is bool and not isinstance(value, bool):
        raise ValueError(f"expected true or false, got {short(value)}")
    if name == "epochs" and value is None:
        return None
    beside = {"momentum": 0.5, "eta": 1e300}  # whatever else this setting needs; `_clashes` looks at the whole
    try:
        TrainConfig.from_params(beside | {name: value})
    except ValueError as error:
        raise ValueError(str(error).partition(": ")[2]) from None
    return float(value) if FIELDS[name] is float else value


def _sizes(value: Any) -> list[Any]:
    """Layer sizes from a list, or from the text "[75, 150]" that parameters carry."""
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, list):
        raise ValueError(f"expected a list of layer sizes such as [75, 150], got {short(value)}")
    return value


def _scalar(name: str, value: Any) -> Scalar:
    """The value as a parameter of a trial: hidden_sizes as text."""
    if value is None:
        raise ValueError("expected a value, got null")
    value = _value(name, value)
    return str(value) if isinstance(value, list) else value


def _mapping(convert: Callable[[str, Any], Any]) -> BeforeValidator:
    def check(raw: Any) -> dict[str, Any]:
        if not isinstance(raw, Mapping):
            raise ValueError(f"expected a mapping of training settings, got {short(raw)}")
        return _each(raw, convert)

    return BeforeValidator(check)


Count = Annotated[int, Field(ge=1, le=MOST_TRIALS)]
Fields = Annotated[dict[str, Any], _mapping(_value)]
Point = Annotated[dict[str, Scalar], _mapping(_scalar)]


# --- space -------------------------------------------------------------------------------------------------------


class Range(_Model):
    """Numbers from low to high, both included; `integer` is set for settings that are whole numbers."""

    low: float = Field(description="the least value")
    high: float = Field(description="the greatest value")
    log: bool = Field(default=False, description="on a logarithmic scale, low above 0")
    integer: bool = Field(default=False, description="whole numbers only; settings that count are always whole")

    def _misfits(self) -> Iterator[Mistake]:
        if self.log and self.low <= 0:
            yield ("low",), f"a log range needs low > 0, got {self.low}"
        if self.low >= self.high:
            yield ("low",), f"expected low below high, got {self.low} and {self.high}"
        for end, value in (("low", self.low), ("high", self.high)):
            if self.integer and value % 1:
                yield (end,), f"expected a whole number, got {value}"


class Choice(_Model):
    """One of some values, in the file's order; hidden sizes are texts such as "[75, 150]"."""

    choices: tuple[Scalar, ...] = Field(
        strict=False, min_length=1, max_length=1_000, description="the values; a bare list is short for this"
    )

    def _misfits(self) -> Iterator[Mistake]:
        for i, choice in enumerate(self.choices):
            if choice in self.choices[:i]:
                yield ("choices", i), f"{short(choice)} is given twice"


Ends = Annotated[list[int], Field(min_length=2, max_length=2)]


class Layers(_Model):
    """Hidden layers from layers[0] to layers[1], each of units[0] to units[1] units; one dimension for each layer."""

    layers: Ends = Field(description="the fewest and the most hidden layers, from 0 to 20")
    units: Ends = Field(description="the fewest and the most units of a layer, from 1 to 100000")
    log: bool = Field(default=False, description="units on a logarithmic scale")

    def _misfits(self) -> Iterator[Mistake]:
        if not 0 <= self.layers[0] <= self.layers[1] <= 20 or self.layers[1] == 0:
            yield ("layers",), f"expected the fewest and the most layers, from 0 to 20, got {self.layers}"
        if not 1 <= self.units[0] < self.units[1] <= 100_000:
            yield ("units",), f"expected the fewest and the most units, from 1 to 100000, got {self.units}"

    @property
    def dimensions(self) -> dict[str, Range | Choice]:
        """hidden_sizes.layers (unless the depth is fixed), hidden_sizes.units_1 to units_<most layers>."""
        (low, high), (least, most) = self.layers, self.units
        found: dict[str, Range | Choice] = {}
        if low < high:
            found["hidden_sizes.layers"] = Range(low=low, high=high, integer=True)
        for k in range(1, high + 1):
            found[f"hidden_sizes.units_{k}"] = Range(low=least, high=most, log=self.log, integer=True)
        return found

    def sizes(self, params: Mapping[str, Scalar]) -> list[Scalar]:
        """The hidden sizes that a trial's parameters mean; units of layers it does not have are ignored."""
        depth = int(params.get("hidden_sizes.layers", self.layers[1]))
        return [params[f"hidden_sizes.units_{k}"] for k in range(1, depth + 1)]


Entry = Range | Choice | Layers


def _entry(name: str, given: Any) -> Entry:
    """An entry of `space`, checked against the training setting it is for."""
    if name not in FIELDS:
        raise ValueError(_unknown(name, FIELDS))
    if isinstance(given, Entry):
        return given
    if isinstance(given, list):
        given = {"choices": given}
    if not isinstance(given, Mapping):
        expected = "{low: ..., high: ...} or a list of choices"
        raise ValueError(f"expected {expected}, got {short(given)}; a fixed value belongs under base")
    if isinstance(given.get("choices"), list):
        scalars = _each({("choices", i): v for i, v in enumerate(given["choices"])}, lambda _, v: _scalar(name, v))
        return Choice.model_validate({**given, "choices": list(scalars.values())})
    if name == "hidden_sizes":
        return Layers.model_validate(given)
    whole = FIELDS[name] in (int, int | None)
    if not whole and FIELDS[name] is not float:
        raise ValueError(f"{name} is not a number: list its choices, as in [a, b]")
    entry = Range.model_validate({**given, "integer": True} if whole else given)
    ends = {"low": entry.low, "high": entry.high}
    _each(ends, lambda _, value: _value(name, int(value) if whole else value))
    return entry


# --- dataset -----------------------------------------------------------------------------------------------------


def _amount(value: Any) -> bool:
    return (type(value) is int and value > 0) or (type(value) is float and 0 < value < 1)


def _dataset(value: Any) -> Any:
    names = ["digits", *READERS]
    if value not in names:
        raise ValueError(f"expected one of {', '.join(names)}, got {short(value)}")
    return value


def _names(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(isinstance(name, str) for name in value)


class DatasetSpec(_Model):
    """Which images to train on, to choose by and to test with."""

    name: Annotated[str, BeforeValidator(_dataset)] = Field(description="digits, cifar10, or npz for your own")
    path: str | None = Field(default=None, description="the npz file; cifar10: a folder other than SIEVE_DATA_DIR")
    train: Annotated[
        list[str] | Literal["all"] | int | float,
        _that(lambda v: v == "all" or _amount(v) or _names(v), "all, a list of batches, a count or a fraction below 1"),
    ] = Field(default="all", description="all: what validation leaves")
    validation: Annotated[
        str | int | float | None,
        _that(lambda v: v is None or isinstance(v, str) or _amount(v), "a batch, a count or a fraction below 1"),
    ] = Field(
        default=None,
        description="a batch of cifar10, or a count or fraction of the images that are no test images; "
        "by default 5,000 of cifar10, a fifth of the digits, x_val and y_val of an npz",
    )
    test: Annotated[
        bool | int, _that(lambda v: isinstance(v, bool) or (_amount(v) and v >= 1), "true, false or a count")
    ] = Field(default=True, description="true: the test images, if the data has any; a count: so many of them")
    subset: Count | None = Field(default=None, description="train on so many of them only")
    split: Literal["stratified", "last"] = Field(
        default="stratified",
        description="which images a count or a fraction takes: stratified draws them at random, of each class in "
        "proportion; last takes the end for validation and test, the beginning for train and subset. Batches and "
        "parts that an npz has stay as they are",
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="of that draw")
    normalise: Literal["none", "mean", "standard"] = Field(
        default="standard",
        description="by the training split: mean subtracts the mean image, standard divides by the deviation too",
    )

    @model_validator(mode="before")
    @classmethod
    def _written_out(cls, raw: Any) -> Any:
        if isinstance(raw, str):
            raw = {"name": raw}
        if isinstance(raw, dict) and raw.get("validation") is None:
            raw = {**raw, "validation": {"cifar10": 5_000, "digits": 0.2}.get(str(raw.get("name")))}
        return raw

    def _misfits(self) -> Iterator[Mistake]:
        if self.name not in ("digits", "cifar10") and self.path is None:
            yield ("path",), f"required, but not given: the {self.name} file"
        if self.split == "last" and self.seed:
            yield ("seed",), f"expected none with split: last, which draws nothing; got {self.seed}"
        if self.name == "digits" and self.path is not None:
            yield ("path",), f"expected none, the digits come with Sieve; got {short(self.path)}"
        train = self.train if isinstance(self.train, list) else []
        held = [self.validation] if isinstance(self.validation, str) else []
        for part, batches in (("train", train), ("validation", held)):
            for batch in batches:
                if self.name != "cifar10":
                    yield (part,), f"{self.name} has no batches, got {short(batch)}"
                elif batch not in BATCHES[:5]:
                    yield (part,), f"expected data_batch_1 to data_batch_5, got {short(batch)}"
        if len(set(train)) < len(train):
            yield ("train",), f"expected each batch once, got {short(train)}"
        if set(held) & set(train):
            yield ("validation",), f"{self.validation} is trained on; choose another batch"


# --- search ------------------------------------------------------------------------------------------------------


class Random(_Model):
    """Independent points of the whole space."""

    method: Literal["random"]
    trials: Count = Field(default=32, description="one of 32 lies in the best tenth of a space 97 times in 100")
    points: Literal["sobol", "uniform"] = Field(default="sobol", description="sobol covers the space more evenly")


def _points(value: Any) -> bool:
    return type(value) is int and value >= 2


class Grid(_Model):
    """Every combination: the choices of each list, and so many points of each range, exactly once."""

    method: Literal["grid"]
    points: Annotated[
        int | dict[str, int],
        _that(
            lambda v: _points(v) or (isinstance(v, dict) and all(map(_points, v.values()))),
            "a whole number of 2 or more, or one for each range",
        ),
    ] = Field(default=5, description="points per range, both ends included; a mapping gives each range its own")

    def points_of(self, dimension: str) -> int:
        """How many points this range gets (an integer range may have fewer values)."""
        return self.points if isinstance(self.points, int) else self.points[dimension]


class Listed(_Model):
    """Exactly these settings, in this order: for pairs that are no product of lists."""

    method: Literal["list"]
    settings: list[Point] = Field(
        min_length=1, max_length=MOST_TRIALS, description="one mapping of training settings for each trial"
    )

    def _misfits(self) -> Iterator[Mistake]:
        names, seen = self.settings[0].keys(), set[str]()
        for i, setting in enumerate(self.settings):
            text = json.dumps(setting, sort_keys=True)
            if not setting:
                yield ("settings", i), "expected at least one training setting, got none"
            elif setting.keys() != names:
                expected = f"the keys of the first, {_listed(names)}"
                yield ("settings", i), f"expected {expected}, got {_listed(setting)}"
            elif text in seen:
                yield ("settings", i), "the same as one above it; `repeats` trains a setting several times"
            seen.add(text)


class Box(_Model):
    """A part of a range."""

    low: float = Field(description="within the range")
    high: float = Field(description="within the range")

    def _misfits(self) -> Iterator[Mistake]:
        if self.low >= self.high:
            yield ("low",), f"expected low below high, got {self.low} and {self.high}"


class Stage(_Model):
    """One stage of coarse to fine. What it leaves out is filled in by CoarseToFine."""

    name: str = Field(default="", pattern=rf"^{_NAME}$", description="by default: stage-1, stage-2, ...")
    trials: Count = Field(default=0, description="by default trials_per_stage")
    width: float = Field(
        default=0.0, gt=0, le=1, description="of the box, in widths of the stage before; by default shrink, 1 at first"
    )
    box: dict[str, Box] = Field(
        default_factory=dict, description="explicit parts of ranges; they are not centred on the best"
    )
    base: Fields = Field(default_factory=dict, description="over the study's base: more epochs, for example")
    dataset: DatasetSpec | None = Field(default=None, description="over the study's dataset: another split")


def _some_stages(value: Any) -> Any:
    return [{}] * value if type(value) is int and 1 <= value <= 20 else value


class CoarseToFine(_Model):
    """Stages, each in a smaller box around the best of the stages before it."""

    method: Literal["coarse-to-fine"]
    trials_per_stage: Count = Field(default=8, description="enough to see a trend in 3 or 4 dimensions")
    shrink: float = Field(
        default=0.6, gt=0, le=1, description="width of the next box; at 0.3 it was far worse than random search"
    )
    top: float = Field(default=0.15, gt=0, le=1, description="the mean of this fraction is the next centre")
    stages: Annotated[list[Stage], BeforeValidator(_some_stages)] = Field(
        default=4, min_length=1, max_length=20, validate_default=True, description="how many, or each by itself"
    )

    @field_validator("stages")
    @classmethod
    def _filled_in(cls, stages: list[Stage], info: ValidationInfo) -> list[Stage]:
        trials, shrink = info.data.get("trials_per_stage", 1), info.data.get("shrink", 1.0)
        return [
            stage.model_copy(
                update={
                    "name": stage.name or f"stage-{k}",
                    "trials": stage.trials or trials,
                    "width": stage.width or (shrink if k > 1 else 1.0),
                }
            )
            for k, stage in enumerate(stages, 1)
        ]

    def _misfits(self) -> Iterator[Mistake]:
        names = ["confirm", *(stage.name for stage in self.stages)]
        for k, name in enumerate(names[1:]):
            if name in names[: k + 1]:
                yield ("stages", k, "name"), f"{name!r} is another stage"


class Sampler(_Model):
    """One of Optuna's own samplers: TPE, Gaussian process (needs the extra `gp`), CMA-ES."""

    if TYPE_CHECKING:
        method: Literal["tpe", "gp", "cmaes"]  # so that a comparison with "grid" tells the models apart
    else:
        method: Annotated[str, _that(lambda v: v in SAMPLERS, "a method of Optuna")]
    trials: Count = Field(default=32, description="as many as four stages of coarse to fine")
    generation: Count = Field(
        default=8, description="trials asked at once, before any of them is told: what makes it repeatable"
    )


def _kind(search: Any) -> Any:
    """Which of the models below a search section is for."""
    method = search.get("method") if isinstance(search, Mapping) else getattr(search, "method", None)
    return "sampler" if isinstance(method, str) and method in SAMPLERS else method


Search = Annotated[
    Annotated[Random, Tag("random")]
    | Annotated[Grid, Tag("grid")]
    | Annotated[Listed, Tag("list")]
    | Annotated[CoarseToFine, Tag("coarse-to-fine")]
    | Annotated[Sampler, Tag("sampler")],
    Discriminator(_kind),
]


class Confirm(_Model):
    """The last stage: the best few again, with other seeds; the choice is made on their means."""

    top: Count = Field(default=3, description="configurations; choosing among noisy scores is half of the loss")
    repeats: Count = Field(default=3, description="further trainings of each, with other seeds")
    base: Fields = Field(default_factory=dict, description="over the study's base: more epochs, for example")
    dataset: DatasetSpec | None = Field(default=None, description="over the study's dataset: nearly all the data")


class Median(_Model):
    """Stops a trial that is worse than the median of the finished ones after as many evaluations.

    Only trials of stages with the same settings and data are compared; confirm is never cut.
    """

    method: Literal["median"]
    startup: Count = Field(default=5, description="trials that end before any is stopped")
    warmup: int = Field(default=3, ge=0, description="evaluations every trial is given")


class Halving(_Model):
    """After `least` evaluations, and each time they have grown by the factor `reduction`, the best 1/reduction go on.

    Hyperband does so in several brackets, which start with different numbers of evaluations. Only trials of stages with
    the same settings and data are compared; confirm is never cut. Where `eval_every` is searched, an evaluation is the
    longest of the intervals, so that all trials are compared after as many updates.
    """

    method: Literal["successive-halving", "hyperband"]
    least: Count = Field(default=2, description="evaluations every trial is given")
    reduction: int = Field(default=3, ge=2, le=100, description="one in so many goes on")
    barrier: bool = Field(
        default=False, description="successive-halving: a stage waits at each rung, so that timing decides nothing"
    )

    @model_validator(mode="after")
    def _barrier_has_one_bracket(self) -> Halving:
        if self.barrier and self.method == "hyperband":
            raise _wrong((("barrier",), "only successive-halving waits at its rungs"))
        return self


Pruner = Annotated[Median | Halving, Field(discriminator="method")]


class Limits(_Model):
    """When to stop early: they change how many trials are run, not which."""

    trials: Count | None = Field(default=None, description="no more than so many, repeats and confirm among them")
    minutes: float | None = Field(default=None, gt=0, description="of a launch, after which no trial begins")


def _metric(*more: str) -> BeforeValidator:
    known = [*METRICS, *more]
    return _that(lambda v: v in known, f"one of {', '.join(known)}")


class Published(_Model):
    """A figure to set beside ours, or an order of two settings."""

    where: Point = Field(default_factory=dict, description="the setting it belongs to; none: the study's choice")
    label: str = Field(default="", max_length=200, description="what the source calls it")
    metric: Annotated[str, _metric("test_accuracy", "test_loss")] = Field(
        default="test_accuracy", description="a metric as below, test_accuracy or test_loss"
    )
    value: float | None = Field(default=None, description="none: the source says it in words only, see note")
    deviation: float | None = Field(default=None, ge=0, description="of the value over runs, if the source gives it")
    tolerance: float | None = Field(default=None, ge=0, description="ours counts as equal within this distance")
    below: Point = Field(default_factory=dict, description="instead of a value: a setting with a higher figure")
    note: str = Field(default="", max_length=1_000, description="where the figure stands, or the source's words")
    why: str = Field(default="", max_length=2_000, description="why ours differs, if it does")

    def _misfits(self) -> Iterator[Mistake]:
        if self.below and self.value is not None:
            yield ("below",), "expected either value or below, got both"
        if self.below and not self.where:
            yield ("where",), "required beside below, but not given"
        if self.tolerance is not None and self.value is None:
            yield ("tolerance",), "expected none without a value"


class SpaceFrom(_Model):
    """Another study, which must be finished: where its best trials lay narrows the space."""

    study: str = Field(pattern=rf"^{_NAME}$", description="its name")
    top: float = Field(default=0.25, gt=0, le=1, description="the best fraction of its trials")


# --- study -------------------------------------------------------------------------------------------------------


class StudySpec(_Model):
    """A study: everything that decides which trials it has, in the form that is stored and compared."""

    SECONDARY: ClassVar = ("description", "remarks", "published", "limits")  # what may differ when a study is resumed

    name: str = Field(
        pattern=rf"^{_NAME}$", description="letters a-z, digits, . _ and -; the study of this name is resumed"
    )
    description: str = Field(default="", max_length=5_000, description="Markdown, shown in both web pages")
    remarks: str = Field(default="", max_length=20_000, description="Markdown: what is seen in the results")
    dataset: DatasetSpec = Field(description="what to train on; a name alone is short for {name: ...}")
    base: Fields = Field(default_factory=dict, description="training settings that every trial shares")
    space: Annotated[dict[str, Entry], _mapping(_entry)] = Field(
        default_factory=dict, description="what is searched: for each training setting a range, a list or layers"
    )
    space_from: SpaceFrom | None = Field(default=None, description="narrows the space to where another study did best")
    search: Search = Field(description="how to search")
    confirm: Confirm | None = Field(
        default=None, description="the last stage; true or false also; by default true for coarse-to-fine"
    )
    repeats: int = Field(default=1, ge=1, le=1_000, description="trainings of each configuration, with other seeds")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of weights, of the data's order and of the search")
    metric: Annotated[str, _metric()] = Field(
        default="val_accuracy", description="what is maximised (accuracy) or minimised (loss, cost)"
    )
    limits: Limits = Field(default=Limits(), description="when to stop early")
    pruner: Pruner | None = Field(default=None, description="which trials end early")
    published: list[Published] = Field(default_factory=list, max_length=1_000, description="figures to compare with")

    @model_validator(mode="before")
    @classmethod
    def _written_out(cls, raw: Any) -> Any:
        """Shorthands in full: confirm by true or false or by default, a stage's dataset on top of the study's."""
        if not isinstance(raw, dict):
            return raw
        search = raw["search"] if isinstance(raw.get("search"), dict) else {}
        confirm = raw.get("confirm", search.get("method") == "coarse-to-fine")
        confirm = {} if confirm is True else None if confirm is False else confirm
        dataset = {"name": raw["dataset"]} if isinstance(raw.get("dataset"), str) else raw.get("dataset")

        def complete(part: Any) -> Any:
            if isinstance(part, dict) and isinstance(dataset, dict) and isinstance(part.get("dataset"), dict):
                return {**part, "dataset": {**dataset, **part["dataset"]}}
            return part

        if isinstance(search.get("stages"), list):
            search = {**search, "stages": [complete(stage) for stage in search["stages"]]}
        return {**raw, "confirm": complete(confirm)} | ({"search": search} if search else {})

    def _misfits(self) -> Iterator[Mistake]:
        found = list(_misfits(self))
        yield from found or _clashes(self)

    @cached_property
    def dimensions(self) -> dict[str, Range | Choice]:
        """The search space under the names of parameters, sorted, so that it does not depend on the file's order."""
        if isinstance(self.search, Listed):
            settings = self.search.settings
            values = {name: tuple(dict.fromkeys(s[name] for s in settings)) for name in sorted(settings[0])}
            return {name: Choice.model_construct(choices=choices) for name, choices in values.items()}
        found: dict[str, Range | Choice] = {}
        for name, entry in sorted(self.space.items()):
            found |= entry.dimensions if isinstance(entry, Layers) else {name: entry}
        return found

    def config(self, params: Mapping[str, Scalar], **overrides: Any) -> TrainConfig:
        """How a trial with these parameters is trained; `overrides` are its stage's. Raises ValueError."""
        given: dict[str, Any] = {name: value for name, value in params.items() if "." not in name}
        if isinstance(layers := self.space.get("hidden_sizes"), Layers):
            given["hidden_sizes"] = layers.sizes(params)
        return TrainConfig.from_params(_over(_over(self.base, given), overrides))

    def dataset_of(self, stage: str) -> DatasetSpec:
        """The dataset of the stage of this name ("confirm" is the last): its own, or else the study's."""
        own = {s.name: s.dataset for s in self.search.stages} if isinstance(self.search, CoarseToFine) else {}
        if self.confirm is not None:
            own["confirm"] = self.confirm.dataset
        return own.get(stage) or self.dataset

    @property
    def maximise(self) -> bool:
        """Whether a higher value of the metric is better."""
        return METRICS[self.metric].maximise

    @property
    def keep(self) -> Keep | None:
        """Which evaluation a trial's result is of: with a metric `best_...` the best one, else (None) the last."""
        series, maximise, best = METRICS[self.metric]
        return Keep(series, maximise) if best else None

    def reported(self, history: Sequence[Evaluation]) -> Evaluation | None:
        """That evaluation, of equally good ones the first; None when the metric is not finite all along."""
        series, maximise, best = METRICS[self.metric]
        found = [e for e in history if series in e.metrics]
        if not found or not all(math.isfinite(e.metrics[series]) for e in found):
            return None
        return (max if maximise else min)(found, key=lambda e: e.metrics[series]) if best else found[-1]

    def value(self, history: Sequence[Evaluation]) -> float:
        """The metric of a trial with these curves, NaN when there is no finite one."""
        reported = self.reported(history)
        return reported.metrics[METRICS[self.metric].series] if reported else math.nan

    def score(self, history: Sequence[Evaluation]) -> float:
        """The metric such that higher is better; -inf when there is no finite one."""
        value = self.value(history)
        return -math.inf if math.isnan(value) else value if self.maximise else -value

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides which trials it has, as plain values. Not where data lie: their digests tell them apart."""
        whole = self.model_dump(mode="json", exclude=set(self.SECONDARY))
        stages = whole["search"]["stages"] if isinstance(self.search, CoarseToFine) else []
        for part in (whole, *stages, whole["confirm"] or {}):
            if part.get("dataset"):
                del part["dataset"]["path"]
        return whole

    def located(self) -> Self:
        """The same study with absolute paths, which mean the same files wherever it is resumed."""

        def absolute(dataset: Any) -> Any:
            if not dataset or dataset["path"] is None:
                return dataset
            return dataset | {"path": str(Path(os.path.expanduser(dataset["path"])).absolute())}

        whole = self.model_dump(mode="json")
        stages = whole["search"]["stages"] if isinstance(self.search, CoarseToFine) else []
        for part in (whole, *stages, whole["confirm"] or {}):
            part |= {"dataset": absolute(part.get("dataset"))} if "dataset" in part else {}
        return type(self).model_validate(whole)

    def to_json(self) -> str:
        """The study as stored: sorted keys, every default written out, equal for equal studies."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` wins; epochs replace updates and the other way round."""
    other = {"epochs": "updates", "updates": "epochs"}
    gone = {other[name] for name in other.keys() & above.keys() if above[name] is not None}
    return {**{name: value for name, value in below.items() if name not in gone}, **above}


def _misfits(spec: StudySpec) -> Iterator[Mistake]:
    """Parts of a study that are right by themselves and do not belong together."""
    search, ranges = spec.search, {n: d for n, d in spec.dimensions.items() if isinstance(d, Range)}
    if isinstance(search, Listed) and spec.space:
        yield ("space",), "expected none beside method list, whose settings are the space"
    if not isinstance(search, Listed) and not spec.space:
        yield ("space",), f"expected at least one setting to search, got none; method {search.method} needs it"
    if spec.space_from and isinstance(search, Listed):
        yield ("space_from",), "expected none beside method list, whose settings are the space"
    if spec.space_from and spec.space_from.study == spec.name:
        yield ("space_from", "study"), "expected another study, got this one"
    searched = {name.partition(".")[0] for name in spec.dimensions}
    for path, base in _bases(spec):
        for name in sorted(searched & base.keys()):
            yield (*path, name), "also searched; a setting is either searched or fixed"
    for clock, other in (("epochs", "updates"), ("updates", "epochs")):
        clashing = [path for path, base in _bases(spec) if base.get(other) is not None] if clock in searched else []
        yield from (((*path, other), f"expected either epochs or updates; {clock} are searched") for path in clashing)
    if {"epochs", "updates"} <= searched:
        yield ("space",), "expected either epochs or updates, got both"
    if isinstance(search, Grid) and isinstance(search.points, dict):
        for name in sorted(search.points.keys() - ranges.keys()):
            yield ("search", "points", name), _unknown(name, ranges)
        for name in sorted(ranges.keys() - search.points.keys()):
            yield ("search", "points", name), "required, but not given: how many points of this range"
        if search.points.keys() != ranges.keys():
            return
    if isinstance(search, CoarseToFine):
        for k, stage in enumerate(search.stages):
            for name, box in stage.box.items():
                place = ("search", "stages", k, "box", name)
                if name not in ranges:
                    yield place, _unknown(name, ranges)
                elif not ranges[name].low <= box.low < box.high <= ranges[name].high:
                    whole = f"{ranges[name].low} to {ranges[name].high}"
                    yield place, f"expected a part of {whole}, got {box.low} to {box.high}"
    trials = _planned(spec)
    if trials > MOST_TRIALS:
        text = f"{trials:,} trials; at most {MOST_TRIALS:,} are possible: use fewer points, lists or repeats"
        yield ("search", "points") if isinstance(search, Grid) else ("search",), text


def _planned(spec: StudySpec) -> int:
    """How many trials the study has; for a grid, at most."""
    search = spec.search
    if isinstance(search, Grid):
        trials = math.prod(
            len(d.choices)
            if isinstance(d, Choice)
            else min(search.points_of(n), int(d.high - d.low + 1) if d.integer else MOST_TRIALS + 1)
            for n, d in spec.dimensions.items()
        )
    elif isinstance(search, Listed):
        trials = len(search.settings)
    elif isinstance(search, CoarseToFine):
        trials = sum(stage.trials for stage in search.stages)
    else:
        trials = search.trials
    return trials * spec.repeats + (spec.confirm.top * spec.confirm.repeats if spec.confirm else 0)


def _bases(spec: StudySpec) -> list[tuple[Place, dict[str, Any]]]:
    """The fixed settings of the study and of each stage that has some of its own, and where they stand."""
    found: list[tuple[Place, dict[str, Any]]] = [(("base",), spec.base)]
    if isinstance(spec.search, CoarseToFine):
        found += [(("search", "stages", k, "base"), stage.base) for k, stage in enumerate(spec.search.stages)]
    if spec.confirm:
        found.append((("confirm", "base"), spec.confirm.base))
    return [(path, base) for path, base in found if base or path == ("base",)]


def _clashes(spec: StudySpec) -> Iterator[Mistake]:
    """Ends and choices of the space that, with base and each stage's base, are no way to train."""
    for params, origin in _corners(spec):
        for path, base in _bases(spec):
            try:
                spec.config(params, **base)
            except ValueError as error:
                name, _, text = str(error).partition(": ")
                if name in base:
                    yield (*path, name), text
                elif name in spec.base:
                    yield ("base", name), text
                else:
                    yield origin, text if name in origin else str(error)


def _corners(spec: StudySpec) -> Iterator[tuple[dict[str, Scalar], Place]]:
    """Parameters with one dimension at a time at each of its ends or choices, and where in the file that stands."""
    if isinstance(spec.search, Listed):
        for i, setting in enumerate(spec.search.settings):
            yield setting, ("search", "settings", i)
        return
    ends: dict[str, list[tuple[Place, Scalar]]] = {}
    for name, d in spec.dimensions.items():
        if isinstance(d, Choice):
            ends[name] = [(("choices", i), value) for i, value in enumerate(d.choices)]
        else:
            ends[name] = [((end,), int(v) if d.integer else v) for end, v in (("low", d.low), ("high", d.high))]
    first = {name: values[0][1] for name, values in ends.items()}
    for name, values in ends.items():
        for place, value in values:
            yield first | {name: value}, ("space", *name.split("."), *(() if "." in name else place))


# --- a space taken from another study ----------------------------------------------------------------------------


def narrowed(spec: StudySpec, best: Sequence[Mapping[str, Scalar]]) -> StudySpec:
    """The study with each entry of its space narrowed to where these parameters of another study lie.

    A range becomes its part from the least to the greatest of them. A list of numbers keeps what lies between
    them, rounded outward to listed ones; any other list keeps what occurs. Layers, and entries that the other study
    did not search, stay as they are. Narrowing again changes nothing. Raises StudyFileError where nothing is left.
    """
    entries = spec.model_dump(mode="json")["space"]
    mistakes = list[Mistake]()
    for name, entry in spec.space.items():
        values = [params[name] for params in best if name in params]
        if values and not isinstance(entry, Layers):
            try:
                entries[name] |= _part(entry, values)
            except ValueError as error:
                mistakes.append((("space", name), str(error)))
    source = f"study '{spec.name}', narrowed"
    if mistakes:
        raise StudyFileError([_line(source, path, text) for path, text in mistakes])
    return restore(spec.model_dump(mode="json") | {"space": entries}, source)


def _part(entry: Range | Choice, values: Sequence[Scalar]) -> dict[str, Any]:
    """What is left of an entry where these values lie, as fields of its model."""
    numbers = _numbers(values)
    if isinstance(entry, Range):
        low, high = max(entry.low, min(numbers)), min(entry.high, max(numbers))
        if min(numbers) == max(numbers):
            raise ValueError(f"the best of the other study have one value, {min(numbers):g}; take a larger top of them")
        if low >= high:
            raise ValueError(f"{entry.low:g} to {entry.high:g} and {min(numbers):g} to {max(numbers):g} share no range")
        return {"low": low, "high": high}
    if numbers and (listed := _numbers(entry.choices)):
        least = max((c for c in listed if c <= min(numbers)), default=min(listed))
        greatest = min((c for c in listed if c >= max(numbers)), default=max(listed))
        return {"choices": [c for c in listed if least <= c <= greatest]}
    if not (kept := [choice for choice in entry.choices if choice in values]):
        raise ValueError(f"none of {_listed(map(str, entry.choices))} is among {_listed(set(map(str, values)))}")
    return {"choices": kept}


def _numbers(values: Sequence[Scalar]) -> list[float]:
    """The values if all of them are numbers, or none."""
    numbers = [value for value in values if not isinstance(value, str | bool)]
    return numbers if len(numbers) == len(values) else []


def difference(stored: StudySpec, given: StudySpec) -> list[str]:
    """Where two studies of one name differ in what their trials are, one line each; empty: one resumes the other."""
    leaves = [dict(_leaves((), s.identity)) for s in (stored, given)]

    def said(path: Place) -> str:
        a, b = (short(own[path]) if path in own else "nothing" for own in leaves)
        go_on = f"; write `split: {leaves[0][path]}` there to go on" if path[-2:] == ("dataset", "split") else ""
        return f"{_dotted(path)}: {a} as stored, {b} as given{go_on}"

    paths = sorted(leaves[0].keys() | leaves[1].keys(), key=lambda path: [str(part) for part in path])
    return [said(path) for path in paths if leaves[0].get(path, ...) != leaves[1].get(path, ...)]


def _leaves(path: Place, value: Any) -> Iterator[tuple[Place, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not items or value in ({}, []):
        yield path, value
    for key, below in items:
        yield from _leaves((*path, key), below)


# --- loading -----------------------------------------------------------------------------------------------------


def load(path: Path | str, overrides: Sequence[str] = ()) -> StudySpec:
    """The study in a YAML file; `overrides` are texts such as "search.trials=8". Raises StudyFileError."""
    try:
        regular(Path(path))
        with Path(path).open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
        if len(raw) > MOST_BYTES:
            raise ValueError("expected a study file of at most 1 MiB")
        text = raw.decode()
    except UnicodeDecodeError:
        raise StudyFileError([f"{path}: expected UTF-8 text"]) from None
    except (OSError, ValueError) as error:
        said = str(getattr(error, "strerror", None) or error)
        raise StudyFileError([f"{path}: {said.removeprefix(f'{path}: ')}"]) from None
    return loads(text, str(path), overrides)


def loads(text: str, source: str = "study", overrides: Sequence[str] = ()) -> StudySpec:
    """The study in a YAML text; `source` begins each line of a mistake. Raises StudyFileError."""
    data, mistakes = parse(text.removeprefix("\ufeff"))
    lines = [_line(source, path, text) for path, text in mistakes]
    if data is not None and not isinstance(data, dict):
        lines.append(_line(source, (), f"expected a mapping such as name: my-study, got {short(data)}"))
    if lines:
        raise StudyFileError(lines)
    data, changed = data or {}, list[Place]()
    for override in overrides:
        try:
            changed.append(_set(data, override))
        except ValueError as error:
            lines.append(_line("--set", (), str(error)))
    if lines:
        raise StudyFileError(lines)
    try:
        return StudySpec.model_validate(data)
    except ValidationError as error:
        for path, text in _mistakes(error):
            ours = any(path[: len(p)] == p for p in changed)
            lines.append(_line("--set" if ours else source, path, text))
    raise StudyFileError(lines)


def restore(stored: Mapping[str, Any], source: str | None = None) -> StudySpec:
    """The study whose `to_json` was stored. Raises StudyFileError when another version of Sieve wrote it.

    What was stored before there was a choice of splits was split as `last` says.
    """
    if not isinstance(stored, Mapping):
        raise StudyFileError([_line(source or "stored study", (), f"expected a mapping, got {short(stored)}")])
    if isinstance(stored.get("dataset"), dict):
        stored = {**stored, "dataset": {"split": "last", **stored["dataset"]}}
    try:
        return StudySpec.model_validate(dict(stored))
    except ValidationError as error:
        source = source or f"stored study {short(stored.get('name'))}"
        raise StudyFileError([_line(source, path, text) for path, text in _mistakes(error)]) from None


def _set(data: dict[str, Any], override: str) -> Place:
    """Change the parsed file by one "path=value" and give the path; null takes a key away."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ValueError(f"expected path=value such as search.trials=8, got {short(override)}")
    value, mistakes = parse(text)
    if mistakes:
        raise ValueError(f"{dotted}: {mistakes[0][1]}")
    if keys[0] == "dataset" and isinstance(data.get("dataset"), str):
        data["dataset"] = {"name": data["dataset"]}
    place: Any = data
    path: Place = ()
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(place, list):
            if not key.isdecimal() or int(key) >= len(place):
                raise ValueError(f"{dotted}: {_dotted(path)} has {len(place)} entries, from 0; got {key!r}")
            step: str | int = int(key)
        elif isinstance(place, dict):
            step = key
            if not last and place.get(key) is None:
                place[key] = {}
        else:
            raise ValueError(f"{dotted}: {_dotted(path)} is {short(place)} and holds no {key!r}")
        path = (*path, step)
        if not last:
            place = place[step]
        elif value is None and isinstance(place, dict):
            place.pop(step, None)
        else:
            place[step] = value
    return path


# --- mistakes in words -------------------------------------------------------------------------------------------


def _mistakes(error: ValueError) -> list[Mistake]:
    """What is wrong, as paths in the file and words."""
    if isinstance(error, PydanticCustomError):
        return list((error.context or {})["mistakes"])
    if not isinstance(error, ValidationError):
        return [((), str(error))]
    found: list[Mistake] = []
    for e in error.errors(include_url=False):
        loc = e["loc"]
        path = (*loc[:1], *loc[2:]) if loc[:1] in (("search",), ("pruner",)) else loc  # [1] is the method
        ctx = e.get("ctx", {})
        if e["type"] == "value_error":
            found.append((path, str(ctx["error"])))
        elif e["type"] == "mistakes":
            found += [((*path, *below), text) for below, text in ctx["mistakes"]]
        elif e["type"] == "extra_forbidden":
            found.append((path, _unknown(str(path[-1]), _section(loc[:-1], error.title).model_fields)))
        elif e["type"] in _NO_MAPPING and loc in _EXAMPLES and not isinstance(e["input"], Mapping):
            found.append((path, f"expected a mapping such as {_EXAMPLES[loc]}, got {short(e['input'])}"))
        elif e["type"] == "union_tag_not_found":
            found.append(((*path, "method"), "required, but not given"))
        elif e["type"] == "union_tag_invalid":
            expected = ctx["expected_tags"].replace("'sampler'", ", ".join(map(repr, SAMPLERS)))
            found.append(((*path, "method"), f"expected {expected}, got {short(ctx['tag'])}"))
        elif e["type"] == "missing":
            found.append((path, "required, but not given"))
        elif e["type"] in _EXPECTED:
            found.append((path, f"expected {_EXPECTED[e['type']].format(**ctx)}, got {short(e['input'])}"))
        else:
            found.append((path, e["msg"]))
    return found


_NO_MAPPING = ("union_tag_not_found", "model_type", "model_attributes_type")
_EXAMPLES = {("search",): "{method: random}", ("pruner",): "{method: median}", ("confirm",): "{top: 3, repeats: 3}"}
_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of {ge} or more",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of at most {le}",
    "literal_error": "{expected}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "string_too_long": "at most {max_length} characters",
    "string_pattern_mismatch": "a name of 1 to 100 letters a-z, digits, . _ - that begins with a letter or digit",
}


_METHODS: tuple[type[BaseModel], ...] = (Random, Grid, Listed, CoarseToFine, Median, Halving)
_SECTIONS: dict[str, type[BaseModel]] = {
    "dataset": DatasetSpec,
    "stages": Stage,
    "confirm": Confirm,
    "limits": Limits,
    "published": Published,
    "space_from": SpaceFrom,
    **{model.__name__: model for model in (StudySpec, Range, Choice, Layers)},
    **{method: model for model in _METHODS for method in get_args(model.model_fields["method"].annotation)},
    "sampler": Sampler,
}


def _section(loc: Sequence[str | int], title: str) -> type[BaseModel]:
    """The model that stands at this place below the model called `title`; within a box, keys are dimensions."""
    words = [title, *(part for part in loc if isinstance(part, str))]
    return _SECTIONS.get(words[-1], Box)


def _unknown(name: str, known: Mapping[str, Any]) -> str:
    near = get_close_matches(str(name).lower(), known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known here: {_listed(known)}" if known else "none is known here"
    return f"unknown key; {hint}"


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"


def _dotted(path: Place) -> str:
    return ".".join(str(part) if re.fullmatch(r"[\w. -]+", str(part)) else short(part) for part in path)


def _line(source: str, path: Place, text: str) -> str:
    where = f"{source}: {_dotted(path)}: " if path else f"{source}: "
    line = where + (text if len(text) <= 500 else f"{text[:497]}...")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
