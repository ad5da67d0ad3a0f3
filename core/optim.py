"""How weights move: update rules and learning-rate schedules.

A schedule is a function of the update count. An update rule changes w in place, given the gradient g of
the loss (which it may overwrite), what it remembers, and `Rates` that broadcast against w. The penalty
l2_scale * lambda * sum(w^2) adds 2 * l2_scale * lambda * w to the gradient; `shrink` is that factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from core.network import LEAST_PRODUCTS, Array, Population

if TYPE_CHECKING:
    from core.train import TrainConfig


class Rates(NamedTuple):
    """The numbers of one update, shaped to broadcast against w: [n, 1, 1], or one per column of V."""

    eta: Array
    shrink: Array  # 2 * l2_scale * lambda; 0 for biases
    momentum: Array
    beta1: Array
    rest1: Array  # 1 - beta1
    beta2: Array
    rest2: Array  # 1 - beta2
    adam_eta: Array  # eta and epsilon with Adam's two bias corrections moved into them
    adam_epsilon: Array


def fixed_rates(configs: Sequence[TrainConfig]) -> Array:
    """What does not change from update to update, [5, K]: shrink, momentum, beta1, beta2, epsilon."""
    rows = [(2 * c.l2_scale * c.lam, c.momentum, c.beta1, c.beta2, c.epsilon) for c in configs]
    return np.array(rows).T


def rates(fixed: Array, eta: Array, t: int) -> Array:
    """The rows of Rates [9, K] in float64, for update t (counted from 0) with learning rates eta [K]."""
    shrink, momentum, beta1, beta2, epsilon = fixed
    first, second = 1 - beta1 ** (t + 1), np.sqrt(1 - beta2 ** (t + 1))
    rest = 1 - beta1, beta2, 1 - beta2, eta * second / first, epsilon * second
    return np.array([eta, shrink, momentum, beta1, *rest])


Memory = Sequence[Array]


def sgd(w: Array, g: Array, memory: Memory, r: Rates) -> None:
    g += r.shrink * w
    g *= r.eta  # w <- w - eta g
    w -= g


def momentum(w: Array, g: Array, memory: Memory, r: Rates) -> None:
    (v,) = memory
    g += r.shrink * w
    v *= r.momentum  # v <- mu v + g
    v += g
    w -= r.eta * v  # w <- w - eta v


def nesterov(w: Array, g: Array, memory: Memory, r: Rates) -> None:
    (v,) = memory
    g += r.shrink * w
    v *= r.momentum  # v <- mu v + g
    v += g
    g += r.momentum * v  # w <- w - eta (g + mu v)    (Sutskever et al. 2013, as PyTorch writes it)
    w -= r.eta * g


def adam(w: Array, g: Array, memory: Memory, r: Rates) -> None:  # Kingma and Ba 2015
    m, v = memory
    g += r.shrink * w
    m *= r.beta1  # m <- b1 m + (1 - b1) g
    m += r.rest1 * g
    v *= r.beta2  # v <- b2 v + (1 - b2) g^2
    g *= g
    g *= r.rest2
    v += g
    np.sqrt(v, out=g)  # w <- w - eta m_hat / (sqrt(v_hat) + epsilon)
    g += r.adam_epsilon
    np.divide(m, g, out=g)
    g *= r.adam_eta
    w -= g


class UpdateRule(NamedTuple):
    apply: Callable[[Array, Array, Memory, Rates], None]
    remembers: int  # arrays kept per parameter


UPDATE_RULES = {
    "sgd": UpdateRule(sgd, 0),
    "momentum": UpdateRule(momentum, 1),
    "nesterov": UpdateRule(nesterov, 1),
    "adam": UpdateRule(adam, 2),
}


# Schedules: eta at each update count t [T] of a config whose epoch has `per_epoch` updates, `total` in all.
def constant(c: TrainConfig, t: Array, per_epoch: int, total: int) -> Array:
    return np.full(t.shape, c.eta)


def exponential(c: TrainConfig, t: Array, per_epoch: int, total: int) -> Array:  # eta exp(-k epoch)
    return c.eta * np.exp(-c.decay * (t // per_epoch))


def step(c: TrainConfig, t: Array, per_epoch: int, total: int) -> Array:  # eta * decay after every epoch
    return c.eta * c.decay ** (t // per_epoch)


def cyclical(c: TrainConfig, t: Array, per_epoch: int, total: int) -> Array:
    """Triangles: up from eta_min to eta in n_s updates, down again in n_s (Smith 2017)."""
    return c.eta_min + (c.eta - c.eta_min) * (1 - np.abs(t % (2 * c.n_s) / c.n_s - 1))


def cosine(c: TrainConfig, t: Array, per_epoch: int, total: int) -> Array:  # Loshchilov and Hutter 2017, no restart
    return c.eta_min + (c.eta - c.eta_min) * (1 + np.cos(np.pi * t / total)) / 2


SCHEDULES: dict[str, Callable[[TrainConfig, Array, int, int], Array]] = {
    "constant": constant,
    "exponential": exponential,
    "step": step,
    "cyclical": cyclical,
    "cosine": cosine,
}

CHUNK = 128 * 1024  # elements of a gradient of V handled at once: they stay in the core's own cache
LEAST_SCALE = 1e-2  # V is multiplied out before the lazy scale gets smaller than this


def update(p: Population, x: Array, g: Array, inner_gradients: Sequence[Sequence[Array]], rates: Array) -> None:
    """One update of all members.

    x [B, D]; g [B, S] and `inner_gradients` as `backward` returns them; rates [9, K].
    """
    rates_of_members = rates.astype(p.v.dtype)
    for stack, gradients in zip(p.stacks, inner_gradients, strict=True):
        rule = UPDATE_RULES[stack.update_rule]
        r = Rates(*rates_of_members[:, stack.members, None, None])  # [n, 1, 1]
        for i, (w, dw) in enumerate(zip(stack.inner, gradients, strict=True)):
            memory = [kept[i] for kept in stack.memory[: rule.remembers]]
            rule.apply(w, dw, memory, r if i % 2 == 0 else r._replace(shrink=np.zeros_like(r.shrink)))
    update_first_layer(p, x, g, rates)


def update_first_layer(p: Population, x: Array, g: Array, rates: Array) -> None:
    """The first layers of all members: dV = x^T g, taken in chunks of rows that stay in cache.

    Plain SGD costs no pass over V beyond adding dV: eta is folded into the few rows of g, and weight decay
    into `scale`, with first-layer weights W = V * scale (Bottou 2012, "Stochastic gradient descent tricks").
    """
    db = np.add.reduce(g, axis=0)  # [S]
    runs = []
    for name, columns, members in _runs(p):
        rule = UPDATE_RULES[name]
        exact = Rates(*np.repeat(rates[:, members], p.widths[members], axis=1))  # one per column
        r = Rates(*np.asarray(exact, p.v.dtype))
        memory = [bias[columns] for _, bias in p.memory[: rule.remembers]]
        rule.apply(p.bias[columns], db[columns], memory, r._replace(shrink=np.zeros_like(r.shrink)))
        if rule.apply is sgd:
            shrink_lazily(p, columns, 1 - exact.eta * exact.shrink)
            g[:, columns] *= (-exact.eta / p.scale[columns]).astype(g.dtype)
        runs.append((rule, columns, r))
    for rows in _chunks(p.v, len(x)):
        dv = x[:, rows].T @ g  # [rows, S]
        for rule, columns, r in runs:
            if rule.apply is sgd:
                p.v[rows, columns] += dv[:, columns]
            else:
                memory = [v[rows, columns] for v, _ in p.memory[: rule.remembers]]
                rule.apply(p.v[rows, columns], dv[:, columns], memory, r)


def shrink_lazily(p: Population, columns: slice, factor: Array) -> None:
    """Multiply first-layer weights by `factor` per column, through `scale` where that stays well above 0."""
    scale = p.scale[columns]
    scale *= factor
    small = scale < LEAST_SCALE
    if small.any():  # member by member, so that company makes no difference
        p.v[:, columns] *= np.where(small, scale, 1).astype(p.v.dtype)
        scale[small] = 1


def _chunks(v: Array, batch: int) -> Iterator[slice]:
    """Rows of V by the chunk, never so few that BLAS takes its kernel for small products (see LEAST_PRODUCTS)."""
    inputs, columns = v.shape
    rows = math.ceil(max(CHUNK, LEAST_PRODUCTS / batch) / columns)
    starts = range(0, max(1, inputs - rows + 1), rows)
    for start in starts:
        yield slice(start, inputs if start == starts[-1] else start + rows)


def _runs(p: Population) -> list[tuple[str, slice, slice]]:
    """Neighbouring stacks with one update rule: (rule, columns, members)."""
    runs = []
    for name, group in groupby(p.stacks, lambda stack: stack.update_rule):
        stacks = list(group)
        columns = slice(stacks[0].columns.start, stacks[-1].columns.stop)
        runs.append((name, columns, slice(stacks[0].members.start, stacks[-1].members.stop)))
    return runs
