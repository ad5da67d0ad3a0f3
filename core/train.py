"""Training in slices: `advance` takes a group of trials some epochs further, `fit` repeats that until done.

A trial's state is all that its future depends on: what comes back from `advance` is the same, bit for bit,
whatever the company and the length of the slices (where the BLAS allows it, see `blas_is_exact`).
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

from core import optim
from core.data import Dataset, Split
from core.network import (
    ACTIVATIONS,
    INITS,
    LEAST_PRODUCTS,
    Array,
    Layers,
    Population,
    backward,
    forward,
    initial_layers,
    load_member,
    populate,
    save_member,
    shape_key,
    softmax_loss,
)

EVALUATION_ROWS = 512
SNAPSHOT_UNITS = 100  # first-layer units kept for images


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides how one network is trained. Raises ValueError naming the field."""

    hidden_sizes: tuple[int, ...] = (50,)  # units of each hidden layer; [] is softmax regression
    activation: str = "relu"  # of the hidden layers
    init: str = "he"  # how the deviation of initial weights depends on the layer; normal: weight_std
    weight_std: float = 0.01  # of init normal
    bias_std: float = 0.0  # deviation of initial biases
    optimizer: str = "sgd"  # the update rule
    momentum: float = 0.0  # sgd
    nesterov: bool = False  # sgd with momentum
    beta1: float = 0.9  # adam
    beta2: float = 0.999  # adam
    epsilon: float = 1e-8  # adam
    eta: float = 0.01  # learning rate; the highest one of schedules that vary it
    schedule: str = "constant"  # how the learning rate goes on
    decay: float = 1.0  # step: factor per epoch; exponential: k in eta * exp(-k * epoch)
    eta_min: float = 0.0  # cyclical and cosine
    n_s: int = 500  # cyclical: updates from eta_min to eta
    lam: float = 0.0  # `lambda` in files: cost = loss + l2_scale * lambda * sum of squared weights
    l2_scale: float = 1.0  # 0.5 for the weight-decay convention
    dropout: float = 0.0  # probability of dropping a hidden unit, rounded to 1/256
    batch_size: int = 100  # examples per update
    epochs: int | None = 10  # passes over the training data
    updates: int | None = None  # instead of epochs
    patience: int | None = None  # stop after so many evaluations without a lower validation loss
    curves: Literal["running", "full"] = "running"  # training curve: mean over the batches, or the whole split
    eval_every: int | None = None  # updates between evaluations; none: once per epoch

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden_sizes", tuple(self.hidden_sizes))
        for name, table in _WORDS.items():
            words, value = tuple(table()), getattr(self, name)
            if value not in words:
                raise ValueError(f"{name}: expected one of {', '.join(words)}, got {value!r}")
        for name, (holds, expected) in _EXPECTED.items():
            value = getattr(self, name)
            if not holds(value):
                raise ValueError(f"{name}: expected {expected}, got {value!r}")
        if (self.epochs is None) == (self.updates is None):
            raise ValueError(f"epochs: expected either epochs or updates, got {self.epochs} and {self.updates}")
        if self.eta_min > self.eta:
            raise ValueError(f"eta_min: expected at most eta = {self.eta}, got {self.eta_min}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: expected momentum above 0 beside it, got 0")

    @property
    def update_rule(self) -> str:
        if self.optimizer != "sgd":
            return self.optimizer
        return "nesterov" if self.nesterov else "momentum" if self.momentum else "sgd"

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> TrainConfig:
        """From the words of files and UIs: `lambda`; hidden_sizes as a list or as the text "[75, 150]"."""
        own = {"lam" if name == "lambda" else name: value for name, value in params.items()}
        sizes = own.get("hidden_sizes")
        if isinstance(sizes, str):
            own["hidden_sizes"] = json.loads(sizes)
        if own.get("updates") is not None:
            own.setdefault("epochs", None)
        unknown = own.keys() - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"{min(unknown)}: no such setting of a training run")
        return cls(**own)

    def to_params(self) -> dict[str, Any]:
        params = {"lambda" if name == "lam" else name: value for name, value in asdict(self).items()}
        params["hidden_sizes"] = str(list(self.hidden_sizes))
        return params

    def length(self, examples: int) -> tuple[int, int]:
        """Updates in all, and updates of an epoch, on so many training examples."""
        per_epoch = math.ceil(examples / self.batch_size)
        return self.updates or (self.epochs or 0) * per_epoch, per_epoch

    def cost(self, inputs: int, classes: int) -> int:
        """Floating-point operations per training example: 4 D H_1 + 6 * the inner layers'."""
        sizes = (*self.hidden_sizes, classes)
        return 4 * inputs * sizes[0] + 6 * sum(a * b for a, b in pairwise(sizes))


def _number(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) and holds(v)


def _integer(v: Any) -> bool:
    return isinstance(v, int) and not isinstance(v, bool) and v >= 1


_POSITIVE = _number(lambda v: v > 0), "a number above 0"
_NOT_NEGATIVE = _number(lambda v: v >= 0), "a number of 0 or more"
_FRACTION = _number(lambda v: 0 <= v < 1), "a number from 0 to below 1"
_COUNT = _integer, "an integer of 1 or more"
_COUNT_OR_NONE = (lambda v: v is None or _integer(v)), "an integer of 1 or more, or none"
_SIZES = (
    (lambda v: all(_integer(n) and n <= 100_000 for n in v) and len(v) <= 100),
    "a list of layer sizes, each from 1 to 100000",
)
# What a setting may be called, looked up when it is checked: whoever adds to a table need not say so here.
_WORDS: dict[str, Callable[[], Iterable[str]]] = {
    "activation": lambda: ACTIVATIONS,
    "init": lambda: INITS,
    "optimizer": lambda: [name for name in optim.UPDATE_RULES if name not in ("momentum", "nesterov")],  # sgd's
    "schedule": lambda: optim.SCHEDULES,
    "curves": lambda: ("running", "full"),
}
_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "hidden_sizes": _SIZES,
    "weight_std": _NOT_NEGATIVE,
    "bias_std": _NOT_NEGATIVE,
    "momentum": _FRACTION,
    "beta1": _FRACTION,
    "beta2": _FRACTION,
    "epsilon": _POSITIVE,
    "eta": _POSITIVE,
    "decay": _NOT_NEGATIVE,
    "eta_min": _NOT_NEGATIVE,
    "n_s": _COUNT,
    "lam": _NOT_NEGATIVE,
    "l2_scale": _NOT_NEGATIVE,
    "dropout": _FRACTION,
    "batch_size": _COUNT,
    "epochs": _COUNT_OR_NONE,
    "updates": _COUNT_OR_NONE,
    "patience": _COUNT_OR_NONE,
    "eval_every": _COUNT_OR_NONE,
}


@dataclass(frozen=True)
class Evaluation:
    """One point of the curves."""

    step: int  # epochs done; with `eval_every`, updates done
    update: int
    epoch: float
    seconds: float  # training time of this trial so far
    metrics: dict[str, float]  # cost/train, loss/train, accuracy/train, cost/val, ..., eta


class Snapshot(NamedTuple):
    step: int
    weights: Array  # [D, up to SNAPSHOT_UNITS] of the first layer


@dataclass
class Progress:
    """What a slice of a trial brought forth."""

    evaluations: list[Evaluation] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)  # at the start, the middle, and of the final weights
    test: dict[str, float] | None = None  # of the final weights, at the end: loss, accuracy
    confusion: Array | None = None  # like test: [C, C] counts on the test split, rows are the true classes


class Keep(NamedTuple):
    """Which evaluation is the best, for trials whose final weights are those of the best one instead of the last."""

    series: str  # one of Evaluation.metrics
    maximise: bool


class Kept(NamedTuple):
    """A trial's network at the best evaluation so far, the first of equal ones."""

    value: float
    step: int
    layers: Layers
    scale: float


@dataclass
class State:
    """A trial between two slices."""

    config: TrainConfig
    order: tuple[int, ...]  # seed of the order of the data
    rng: np.random.Generator  # of this trial alone: initial weights, dropout
    layers: Layers  # the first W is to be multiplied by `scale`
    scale: float
    memory: list[Layers]  # what the update rule remembers
    total: int  # updates in all
    per_epoch: int  # updates per epoch
    update: int = 0  # updates done
    running: tuple[float, float, int] = (0.0, 0.0, 0)  # summed loss, summed accuracy, batches since evaluated
    best_loss: float = math.inf
    stale: int = 0  # evaluations since best_loss
    seconds: float = 0.0
    diverged: str | None = None
    finished: bool = False
    keep: Keep | None = None
    kept: Kept | None = None  # with `keep`, from the first evaluation on

    @property
    def final(self) -> State:
        """The state with the layers that the trial's result is of: the kept ones if there are any."""
        return replace(self, layers=self.kept.layers, scale=self.kept.scale, memory=[]) if self.kept else self

    @property
    def weights(self) -> Layers:
        """The layers of `final`, ready to be used."""
        final = self.final
        (w, b), *rest = final.layers
        return [(w * np.float32(final.scale), b), *rest]


@dataclass(frozen=True)
class FitResult:
    config: TrainConfig
    history: list[Evaluation]
    weights: Layers  # [(W [d_in, d_out], b [d_out]), ...] of the last evaluation; with `keep`, of the best one
    test: dict[str, float] | None  # of these weights: loss, accuracy
    confusion: Array | None  # of these weights: [C, C], rows are the true classes
    seconds: float
    diverged: str | None  # the reason, if training stopped at a cost that is not finite


def start(
    config: TrainConfig, data: Dataset, seed: Sequence[int], order: Sequence[int] = (0,), keep: Keep | None = None
) -> State:
    """A trial before its first update; `seed` decides weights and dropout, `order` the order of the data.

    With `keep`, its final weights, and the test figures with them, are those of its best evaluation.
    """
    examples, inputs = data.train.x.shape
    if config.batch_size > examples:
        raise ValueError(f"batch_size: expected at most the {examples} training examples, got {config.batch_size}")
    rng = np.random.default_rng(list(seed))
    layers = initial_layers(config, inputs, len(data.classes), rng)
    total, per_epoch = config.length(examples)
    return State(
        config=config,
        order=tuple(order),
        rng=rng,
        layers=layers,
        scale=1.0,
        memory=[
            [(np.zeros_like(w), np.zeros_like(b)) for w, b in layers]
            for _ in range(optim.UPDATE_RULES[config.update_rule].remembers)
        ],
        total=total,
        per_epoch=per_epoch,
        keep=keep,
    )


def may_share(state: State) -> tuple[Any, ...]:
    """Trials with equal keys read the same batches, and so can be advanced as one group."""
    return state.config.batch_size, state.order, state.update


def advance(
    states: Sequence[State], data: Dataset, epochs: float, clock: Callable[[], float] = time.process_time
) -> tuple[list[State], list[Progress]]:
    """Train a group of trials for up to `epochs` epochs, to a whole update; the given states stay as they are."""
    if len({may_share(s) for s in states}) != 1:
        raise ValueError("advance: expected trials of equal batch size, order and update count")
    states = [replace(s, rng=copy.deepcopy(s.rng)) for s in states]
    progress = [Progress() for _ in states]
    members = sorted(
        ((s, p) for s, p in zip(states, progress, strict=True) if not s.finished),
        key=lambda m: shape_key(m[0].config),
    )
    goal = states[0].update + max(1, round(epochs * states[0].per_epoch))
    with np.errstate(all="ignore"):  # a cost that is not finite is a result, not a warning
        while members and members[0][0].update < goal:
            members = _advance_until_one_leaves(members, data, goal, clock)
    return states, progress


def _advance_until_one_leaves(
    members: list[tuple[State, Progress]], data: Dataset, goal: int, clock: Callable[[], float]
) -> list[tuple[State, Progress]]:
    states = [s for s, _ in members]
    costs = [s.config.cost(data.train.x.shape[1], len(data.classes)) for s in states]
    population = pack(states, data)
    for state, progress in members:
        if state.update == 0:
            progress.snapshots.append(_snapshot_of_member(population, states.index(state), state))
    while states[0].update < goal and not any(s.finished for s in states):
        began = clock()
        _train(population, states, data, min(goal, *(_next_stop(s) for s in states)))
        due = [s.diverged is None and (_next_evaluation(s, s.update - 1) == s.update) for s in states]
        evaluations = _evaluations(population, states, data, any(due))
        elapsed = clock() - began
        for state, cost in zip(states, costs, strict=True):
            state.seconds += elapsed * cost / sum(costs)
        for k, (state, progress) in enumerate(members):
            if due[k]:
                _record(state, progress, evaluations[k])
                _keep(state, progress.evaluations[-1], population, k)
                every = state.config.eval_every or state.per_epoch
                if state.finished and state.kept:
                    progress.snapshots.append(_snapshot(state.kept.step, state.kept.layers[0][0], state.kept.scale))
                elif state.finished or state.update - every < state.total / 2 <= state.update:
                    progress.snapshots.append(_snapshot_of_member(population, k, state))
    for k, state in enumerate(states):
        state.layers, state.scale, state.memory = save_member(population, k, len(state.memory))
    leavers = [k for k, s in enumerate(states) if s.finished and s.diverged is None]
    if leavers and data.test is not None:
        loss, accuracy, confusion = evaluate(pack([states[k].final for k in leavers], data), data, data.test)
        for i, k in enumerate(leavers):
            members[k][1].test = {"loss": float(loss[i]), "accuracy": float(accuracy[i])}
            members[k][1].confusion = confusion[i]
    return [m for m in members if not m[0].finished]


def pack(states: Sequence[State], data: Dataset) -> Population:
    inputs = data.train.x.shape[1]
    population = populate(
        [s.config for s in states],
        inputs,
        len(data.classes),
        least_columns=1 + math.ceil(LEAST_PRODUCTS / (inputs * min(states[0].config.batch_size, EVALUATION_ROWS))),
        memory=max(len(s.memory) for s in states),
    )
    for k, state in enumerate(states):
        load_member(population, k, state.layers, state.scale, state.memory)
    return population


def _train(population: Population, states: Sequence[State], data: Dataset, until: int) -> None:
    """Update all members up to `until`, or to the update at which the loss of one is not finite."""
    first = states[0]
    updates = np.arange(first.update, until)
    etas = [optim.SCHEDULES[s.config.schedule](s.config, updates, s.per_epoch, s.total) for s in states]
    rates = optim.rates([s.config for s in states], np.transpose(etas), updates)
    loss_sum, accuracy_sum = np.array([s.running[:2] for s in states]).T
    done = 0
    for x, y, n in batches(data, first.order, first.config.batch_size, first.update, until):
        masks = dropout_masks(population, states, len(x))
        loss, correct = step(population, x, y, n, rates[done], masks)
        done += 1
        mean_loss = np.add.reduce(loss, axis=1) / n  # [K]
        loss_sum += mean_loss
        accuracy_sum += np.add.reduce(correct, axis=1) / n
        if not np.isfinite(mean_loss).all():
            break
    for k, state in enumerate(states):
        state.update += done
        state.running = float(loss_sum[k]), float(accuracy_sum[k]), state.running[2] + done
        if not math.isfinite(mean_loss[k]):
            state.finished = True
            state.diverged = f"diverged: the loss was {mean_loss[k]} at update {state.update}"


def step(
    population: Population, x: Array, y: Array, n: int, rates: Array, masks: Sequence[Sequence[Array]] = ()
) -> tuple[Array, Array]:
    """One update of all members by a batch x [B, D], y [B] of which n rows count; rates [7, K].

    Returns loss and correctness [K, n] of the members as they were before it.
    """
    activity = forward(population, x, masks)
    loss, correct, gradient = softmax_loss(activity.logits, y)
    gradient[:, n:] = 0  # rows that only fill up the last batch of an epoch
    gradient /= n
    g, inner = backward(population, activity, gradient)
    optim.update(population, x, g, inner, rates)
    return loss[:, :n], correct[:, :n]


def batches(
    data: Dataset, order: Sequence[int], batch_size: int, start: int, stop: int
) -> Iterator[tuple[Array, Array, int]]:
    """The batches of updates start to stop: (x [B, D] float32, reused; y [B]; how many of the B rows count)."""
    split, examples = data.train, len(data.train)
    per_epoch = math.ceil(examples / batch_size)
    permutation, permuted_epoch = np.empty(0, np.int64), -1
    images = np.empty((batch_size, split.x.shape[1]), split.x.dtype)
    x = np.empty(images.shape, np.float32)
    for t in range(start, stop):
        epoch, i = divmod(t, per_epoch)
        if epoch != permuted_epoch:
            permutation = np.random.default_rng([*order, epoch]).permutation(examples)
            permuted_epoch = epoch
        rows = permutation[i * batch_size : (i + 1) * batch_size]
        n = len(rows)
        if n < batch_size:
            rows = np.resize(rows, batch_size)
        np.take(split.x, rows, axis=0, out=images, mode="clip")  # other modes take a copy first
        normalise(images, data, out=x)
        yield x, split.y[rows], n


def normalise(images: Array, data: Dataset, out: Array) -> None:
    """(x - shift) * scale of images [B, D] into float32 `out` [B, D]."""
    np.copyto(out, images)  # converting first is faster than subtracting from bytes
    out -= data.shift
    out *= data.scale


def dropout_masks(population: Population, states: Sequence[State], rows: int) -> list[list[Array]]:
    """Inverted dropout (Srivastava et al. 2014): 0 for a dropped unit, else 1 / (1 - probability)."""
    masks: list[list[Array]] = []
    for stack in population.stacks:
        own: list[Array] = []
        if stack.dropout:
            for w in stack.inner[::2]:
                mask = np.empty((stack.n, rows, w.shape[1]), np.float32)
                for i, state in enumerate(states[stack.members]):
                    dropped = round(state.config.dropout * 256)
                    draws = np.frombuffer(state.rng.bytes(mask[i].size), np.uint8).reshape(mask[i].shape)
                    np.multiply(draws >= dropped, np.float32(256 / (256 - dropped)), out=mask[i])
                own.append(mask)
        masks.append(own)
    return masks


def evaluate(population: Population, data: Dataset, split: Split) -> tuple[Array, Array, Array]:
    """Loss [K], accuracy [K] and confusion counts [K, C, C] of all members on a split."""
    k, c, examples = population.size, population.classes, len(split.y)
    loss_sum, confusion = np.zeros(k), np.zeros((k, c, c), np.int64)
    x = np.zeros((EVALUATION_ROWS, split.x.shape[1]), np.float32)  # products of one size, the last ones too
    for begin in range(0, examples, EVALUATION_ROWS):
        images, y = split.x[begin : begin + EVALUATION_ROWS], split.y[begin : begin + EVALUATION_ROWS]
        n = len(y)
        normalise(images, data, out=x[:n])
        logits = forward(population, x).logits[:, :n]
        cells = y * c + logits.argmax(axis=2)
        for i in range(k):
            confusion[i] += np.bincount(cells[i], minlength=c * c).reshape(c, c)
        loss, *_ = softmax_loss(logits, y)
        loss_sum += loss.sum(axis=1, dtype=np.float64)
    return loss_sum / examples, confusion.trace(axis1=1, axis2=2) / examples, confusion


def penalties(population: Population, configs: Sequence[TrainConfig]) -> Array:
    """l2_scale * lambda * sum of squared weights of each member [K]."""
    squares = np.zeros(population.size)
    for k in range(population.size):
        columns = population.columns(k)
        v = population.v[:, columns]
        squares[k] = np.einsum("ij,ij->", v, v, dtype=np.float64) * population.scale[k] ** 2
    for stack in population.stacks:
        for w in stack.inner[::2]:
            squares[stack.members] += np.einsum("nij,nij->n", w, w, dtype=np.float64)
    squares *= [c.l2_scale * c.lam for c in configs]
    return squares


def _evaluations(population: Population, states: Sequence[State], data: Dataset, due: bool) -> list[dict[str, float]]:
    if not due:
        return []
    loss, accuracy, _ = evaluate(population, data, data.validation)
    penalty = penalties(population, [s.config for s in states])
    if any(s.config.curves == "full" for s in states):
        full_loss, full_accuracy, _ = evaluate(population, data, data.train)
    metrics = []
    for k, state in enumerate(states):
        if state.config.curves == "full":
            train_loss, train_accuracy = float(full_loss[k]), float(full_accuracy[k])
        else:
            train_loss, train_accuracy = (part / max(1, state.running[2]) for part in state.running[:2])
        metrics.append(
            {
                "cost/train": train_loss + float(penalty[k]),
                "loss/train": train_loss,
                "accuracy/train": train_accuracy,
                "cost/val": float(loss[k] + penalty[k]),
                "loss/val": float(loss[k]),
                "accuracy/val": float(accuracy[k]),
                "eta": float(_eta(state, state.update - 1)),
            }
        )
    return metrics


def _record(state: State, progress: Progress, metrics: dict[str, float]) -> None:
    """Add a point to the curves, and decide whether the trial is over."""
    config = state.config
    epoch = state.update / state.per_epoch
    step = state.update if config.eval_every else math.ceil(epoch)
    progress.evaluations.append(Evaluation(step, state.update, epoch, state.seconds, metrics))
    state.running = (0.0, 0.0, 0)
    if not all(math.isfinite(v) for v in metrics.values()):
        state.finished, state.diverged = True, f"diverged: the cost was not finite at update {state.update}"
    if metrics["loss/val"] < state.best_loss:
        state.best_loss, state.stale = metrics["loss/val"], 0
    else:
        state.stale += 1
    if state.update >= state.total or (config.patience is not None and state.stale >= config.patience):
        state.finished = True


def _keep(state: State, point: Evaluation, population: Population, k: int) -> None:
    """Set the network aside if this trial asks for it and the point is its best so far."""
    if state.keep is None or state.diverged:
        return
    value, sign = point.metrics[state.keep.series], 1 if state.keep.maximise else -1
    if state.kept is None or sign * value > sign * state.kept.value:
        layers, scale, _ = save_member(population, k, 0)
        state.kept = Kept(value, point.step, layers, scale)


def _eta(state: State, t: int) -> float:
    c = state.config
    return float(optim.SCHEDULES[c.schedule](c, np.array([t]), state.per_epoch, state.total)[0])


def _next_evaluation(state: State, update: int) -> int:
    """The first update count after `update` at which this trial is evaluated."""
    every = state.config.eval_every or state.per_epoch
    return min((update // every + 1) * every, state.total)


def _next_stop(state: State) -> int:
    return _next_evaluation(state, state.update)


def _snapshot_of_member(population: Population, k: int, state: State) -> Snapshot:
    step = state.update if state.config.eval_every else math.ceil(state.update / state.per_epoch)
    return _snapshot(step, population.v[:, population.columns(k)], float(population.scale[k]))


def _snapshot(step: int, v: Array, scale: float) -> Snapshot:
    return Snapshot(step, v[:, :SNAPSHOT_UNITS] * v.dtype.type(scale))


def fit(
    configs: Sequence[TrainConfig], data: Dataset, seed: int = 0, order: int = 0, keep: Keep | None = None
) -> list[FitResult]:
    """Train each config to its end. Config i starts from seed (seed, i); all see the data in one order.

    The results are of the last evaluation, or with `keep`, of the best one.
    """
    states = [start(c, data, (seed, i), (order,), keep) for i, c in enumerate(configs)]
    history: list[Progress] = [Progress() for _ in states]
    while unfinished := [i for i, s in enumerate(states) if not s.finished]:
        share = may_share(states[unfinished[0]])
        group = [i for i in unfinished if may_share(states[i]) == share]
        for i, state, part in zip(group, *advance([states[i] for i in group], data, 1), strict=True):
            states[i] = state
            history[i].evaluations += part.evaluations
            history[i].test, history[i].confusion = part.test, part.confusion
    return [
        FitResult(s.config, p.evaluations, s.weights, p.test, p.confusion, s.seconds, s.diverged)
        for s, p in zip(states, history, strict=True)
    ]
