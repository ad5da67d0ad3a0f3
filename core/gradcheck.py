"""Back-propagation against two others that know nothing of it: differences of the cost, and PyTorch.

The analytic gradient is what training really takes off the weights: one step of SGD with eta = 1, in a float64
population of all networks at once. The numeric one is taken network by network, from the cost alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from core import optim
from core.network import (
    ACTIVATIONS,
    Array,
    Layers,
    Population,
    forward,
    initial_layers,
    load_member,
    populate,
    save_member,
    shape_key,
    softmax_loss,
)
from core.train import TrainConfig, penalties, step

EPSILON = 1e-6  # gradients below it are compared absolutely, as in the reports
STEP = 1e-3
INPUTS, CLASSES, EXAMPLES = 6, 4, 5

CONFIGS = [
    TrainConfig.from_params({"hidden_sizes": sizes, "activation": activation, "lambda": lam, "bias_std": 0.1})
    for sizes, activation, lam in product([(), (5,), (5, 4), (5, 4, 3)], ACTIVATIONS, (0.0, 0.1))
]


class GradientCheck(NamedTuple):
    """The largest relative error over all weights and biases of one network."""

    hidden_sizes: tuple[int, ...]
    activation: str
    lam: float
    numeric: float  # against centred differences
    torch: float | None  # against PyTorch's autograd; None where it is not installed


def relative_error(a: Array, b: Array, epsilon: float = EPSILON) -> float:
    """The largest |a - b| / max(epsilon, |a| + |b|) over all elements."""
    return float(np.max(np.abs(a - b) / np.maximum(epsilon, np.abs(a) + np.abs(b))))


def numerical_gradient(cost: Callable[[], float], w: Array, h: float = STEP) -> Array:
    """Centred differences of `cost` by each element of w (float64), which is moved in place and put back.

    (8 (f(h) - f(-h)) - (f(2h) - f(-2h))) / 12h, with an error of order h^4: even a small slope is told from rounding.
    """
    gradient = np.zeros_like(w)
    for i, was in np.ndenumerate(w):
        values = []
        for offset in (h, -h, 2 * h, -2 * h):
            w[i] = was + offset
            values.append(cost())
        w[i] = was
        gradient[i] = (8 * (values[0] - values[1]) - (values[2] - values[3])) / (12 * h)
    return gradient


def check(configs: Sequence[TrainConfig] = CONFIGS, seed: int = 0) -> list[GradientCheck]:
    """Check the gradients of each network on a few random examples, deepest last. Dropout is left out."""
    configs = sorted(configs, key=lambda c: (len(c.hidden_sizes), shape_key(c), c.lam))
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((EXAMPLES, INPUTS)), rng.integers(CLASSES, size=EXAMPLES)
    networks = [_away_from_kinks(config, x, rng) for config in configs]
    analytic = _analytic_gradients(configs, networks, x, y)
    has_torch = importlib.util.find_spec("torch") is not None
    return [
        GradientCheck(
            config.hidden_sizes,
            config.activation,
            config.lam,
            _largest_error(own, _numeric_gradients(config, network, x, y)),
            _largest_error(own, _torch_gradients(config, network, x, y)) if has_torch else None,
        )
        for config, network, own in zip(configs, networks, analytic, strict=True)
    ]


def _population(configs: Sequence[TrainConfig], networks: Sequence[Layers]) -> Population:
    population = populate(configs, INPUTS, CLASSES, least_columns=0, memory=0, dtype=np.float64)
    for k, layers in enumerate(networks):
        load_member(population, k, layers, scale=1.0, memory=())
    return population


def _away_from_kinks(config: TrainConfig, x: Array, rng: np.random.Generator) -> Layers:
    """A random network. With ReLU, one whose units all stay on their side of 0 when a weight moves by 2 STEP."""
    while True:
        network = initial_layers(config, INPUTS, CLASSES, rng)
        network = [(w.astype(np.float64), b.astype(np.float64)) for w, b in network]
        a, nearest = x, np.inf
        for w, b in network[:-1]:
            z = a @ w + b
            nearest, a = min(nearest, np.abs(z).min()), np.maximum(z, 0)
        if config.activation != "relu" or nearest > 10 * STEP:
            return network


def _analytic_gradients(configs: Sequence[TrainConfig], networks: Sequence[Layers], x: Array, y: Array) -> list[Layers]:
    """What one step with eta = 1 takes off, per network."""
    order = sorted(range(len(configs)), key=lambda k: shape_key(configs[k]))
    population = _population([configs[k] for k in order], [networks[k] for k in order])
    (rates,) = optim.rates([configs[k] for k in order], np.ones((1, len(configs))), np.array([0]))
    step(population, x, y, len(y), rates)
    gradients: list[Layers] = [[]] * len(configs)
    for row, k in enumerate(order):
        layers, scale, _ = save_member(population, row, memory=0)
        layers[0] = layers[0][0] * scale, layers[0][1]
        gradients[k] = [(w - w1, b - b1) for (w, b), (w1, b1) in zip(networks[k], layers, strict=True)]
    return gradients


def _numeric_gradients(config: TrainConfig, network: Layers, x: Array, y: Array) -> Layers:
    population = _population([config], [network])

    def cost() -> float:
        loss, *_ = softmax_loss(forward(population, x).logits, y)
        return float(loss.mean() + penalties(population, [config])[0])

    inner = [numerical_gradient(cost, p)[0] for p in population.stacks[0].inner]
    first = numerical_gradient(cost, population.v), numerical_gradient(cost, population.bias)
    return [first, *zip(inner[::2], inner[1::2], strict=True)]


def _torch_gradients(config: TrainConfig, network: Layers, x: Array, y: Array) -> Layers:
    import torch

    layers: list[Any] = [(torch.tensor(w, requires_grad=True), torch.tensor(b, requires_grad=True)) for w, b in network]
    a = torch.tensor(x)
    for w, b in layers[:-1]:
        a = getattr(torch, config.activation)(a @ w + b)
    w, b = layers[-1]
    loss = torch.nn.functional.cross_entropy(a @ w + b, torch.tensor(y))
    penalty = sum((w * w).sum() for w, _ in layers)
    (loss + config.l2_scale * config.lam * penalty).backward()
    return [(w.grad.numpy(), b.grad.numpy()) for w, b in layers]


def _largest_error(a: Layers, b: Layers) -> float:
    pairs = zip(a, b, strict=True)
    return max(max(relative_error(w, v), relative_error(c, d.reshape(c.shape))) for (w, c), (v, d) in pairs)
