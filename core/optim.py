"""How weights move: update rules and learning-rate schedules.

A schedule is a function of the update count. An update rule changes w in place, given the gradient g (which
it overwrites), what it remembers, and `Rates` that broadcast against w. The penalty l2_scale * lambda *
sum(w^2) adds 2 * l2_scale * lambda * w to the gradient by a weight; `shrink` is that factor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from core.network import Array, Population, add_product, chunks

if TYPE_CHECKING:
    from core.train import TrainConfig


class Rates(NamedTuple):
    """The numbers of one update, shaped to broadcast against w: [n, 1, 1], or one per column of V."""

    eta: Array
    shrink: Array  # 2 * l2_scale * lambda; for weights, not for biases
    momentum: Array
    beta1: Array
    beta2: Array
    adam_eta: Array  # eta and epsilon, with what `adam` leaves out moved into them
    adam_epsilon: Array


def rates(configs: Sequence[TrainConfig], etas: Array, t: Array) -> Array:
    """The rows of Rates [T, 7, K] in float64, for updates t [T] (from 0) with learning rates etas [T, K]."""
    rows = [(2 * c.l2_scale * c.lam, c.momentum, c.beta1, c.beta2, c.epsilon) for c in configs]
    shrink, momentum, beta1, beta2, epsilon = (np.broadcast_to(row, etas.shape) for row in np.array(rows).T)
    n = t[:, None] + 1
    scale = np.sqrt((1 - beta2**n) / (1 - beta2))  # sqrt(v_hat) = sqrt(v) / scale
    adam_eta = etas * scale * (1 - beta1) / (1 - beta1**n)
    return np.stack([etas, shrink, momentum, beta1, beta2, adam_eta, epsilon * scale], axis=1)


Memory = Sequence[Array]


def sgd(w: Array, g: Array, memory: Memory, r: Rates) -> None:
    g *= r.eta  # w <- w - eta g
    w -= g


def momentum(w: Array, g: Array, memory: Memory, r: Rates) -> None:
    (v,) = memory
    v *= r.momentum  # v <- mu v + g
    v += g
    np.multiply(v, r.eta, out=g)  # w <- w - eta v
    w -= g


def nesterov(w: Array, g: Array, memory: Memory, r: Rates) -> None:
    (v,) = memory
    v *= r.momentum  # v <- mu v + g
    v += g
    g += r.momentum * v  # w <- w - eta (g + mu v)    (Sutskever et al. 2013, as PyTorch writes it)
    g *= r.eta
    w -= g


def adam(w: Array, g: Array, memory: Memory, r: Rates) -> None:
    """Kingma and Ba 2015. The factors (1 - b1) of m and (1 - b2) of v, and the bias corrections, are in `rates`."""
    m, v = memory
    m *= r.beta1  # m <- b1 m + g
    m += g
    g *= g
    v *= r.beta2  # v <- b2 v + g^2
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

LEAST_SCALE = 1e-2  # V is multiplied out before the lazy scale gets smaller than this


def update(p: Population, x: Array, g: Array, inner_gradients: Sequence[Sequence[Array]], rates: Array) -> None:
    """One update of all members.

    x [B, D]; g [B, S] and `inner_gradients` as `backward` returns them, overwritten; rates [7, K] of this update.
    """
    own_precision = rates.astype(p.v.dtype)
    for stack, gradients in zip(p.stacks, inner_gradients, strict=True):
        rule = UPDATE_RULES[stack.update_rule]
        r = Rates(*own_precision[:, stack.members, None, None])  # [n, 1, 1]
        for i, (w, dw) in enumerate(zip(stack.inner, gradients, strict=True)):
            if i % 2 == 0:
                dw += r.shrink * w
            rule.apply(w, dw, [kept[i] for kept in stack.memory[: rule.remembers]], r)
    update_first_layer(p, x, g, rates)


def update_first_layer(p: Population, x: Array, g: Array, rates: Array) -> None:
    """The first layers of all members, with dV = x^T g.

    Plain SGD costs no pass over V beyond adding dV: eta is folded into the few rows of g, and weight decay
    into `scale`, with first-layer weights W = V * scale (Bottou 2012, "Stochastic gradient descent tricks").
    The other rules take dV in chunks of rows that stay in cache.
    """
    db = np.add.reduce(g, axis=0)  # [S]
    own_precision = rates.astype(p.v.dtype)
    runs = []
    for name, columns, members in _runs(p):
        rule, owner = UPDATE_RULES[name], p.owner[columns]
        r = Rates(*np.take(own_precision, owner, axis=1))
        rule.apply(p.bias[columns], db[columns], [bias[columns] for _, bias in p.memory[: rule.remembers]], r)
        if rule.apply is sgd:
            shrink_lazily(p, members, 1 - rates[0, members] * rates[1, members])
            g[:, columns] *= (-rates[0] / p.scale).astype(g.dtype)[owner]
        runs.append((rule, columns, r if rule.apply is sgd else Rates(*map(_shared, r))))
    if all(rule.apply is sgd for rule, _, _ in runs):
        add_product(p.v, x, g)
        return
    for rows in chunks(p.v, len(x)):
        dv = x[:, rows].T @ g  # [rows, S]
        for rule, columns, r in runs:
            w, dw = p.v[rows, columns], dv[:, columns]
            if rule.apply is sgd:
                w += dw
            else:
                dw += r.shrink * w
                rule.apply(w, dw, [v[rows, columns] for v, _ in p.memory[: rule.remembers]], r)


def shrink_lazily(p: Population, members: slice, factor: Array) -> None:
    """Multiply first-layer weights by a factor per member, through `scale` where that stays well above 0."""
    p.scale[members] *= factor
    for k in np.flatnonzero(p.scale < LEAST_SCALE).tolist():
        p.v[:, p.columns(k)] *= p.v.dtype.type(p.scale[k])
        p.scale[k] = 1


def _shared(row: Array) -> Array:
    """One number instead of a row of equal ones: NumPy multiplies by it faster."""
    return row[0] if (row == row[0]).all() else row


def _runs(p: Population) -> list[tuple[str, slice, slice]]:
    """Neighbouring stacks with one update rule: (rule, columns, members)."""
    runs = []
    for name, group in groupby(p.stacks, lambda stack: stack.update_rule):
        stacks = list(group)
        columns = slice(stacks[0].columns.start, stacks[-1].columns.stop)
        runs.append((name, columns, slice(stacks[0].members.start, stacks[-1].members.stop)))
    return runs
