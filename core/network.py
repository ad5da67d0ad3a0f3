"""A population of multi-layer perceptrons, trained side by side.

One network maps a batch x [B, D] to class scores:

    a_0 = x,    z_l = a_{l-1} W_l + b_l,    a_l = activation(z_l),    logits = z_L

and back-propagation walks the same chain in reverse, with g_l the gradient of the loss by z_l:

    g_L = (softmax(logits) - onehot(y)) / B
    dW_l = a_{l-1}^T g_l,    db_l = sum over the batch of g_l,    g_{l-1} = (g_l W_l^T) * activation'(z_{l-1})

K networks do this at once. All of them read the same batch, so their first layers lie side by side as
the columns of one matrix V [D, S]: K small products become one large one, which runs at the speed of
the machine. From the second layer on, members of equal shape are stacked along a leading axis.
One network is K = 1, through the same code.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, groupby, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from core.train import TrainConfig

Array = NDArray[Any]
Layers = list[tuple[Array, Array]]  # [(W [d_in, d_out], b [d_out]), ...], first layer first


# BLAS multiplies matrices of fewer than 10^6 products by another kernel, which rounds differently.
LEAST_PRODUCTS = 1_000_000
CHUNK = 128 * 1024  # elements of a gradient of V handled at once


class Activation(NamedTuple):
    """`apply` turns z into a, in place; `backward` turns the gradient by a into that by z, in place."""

    apply: Callable[[Array], None]
    backward: Callable[[Array, Array], None]


def relu(z: Array) -> None:  # a = max(z, 0)
    np.maximum(z, 0, out=z)


def relu_backward(g: Array, a: Array) -> None:  # da/dz = 1 where a > 0, else 0
    g *= a > 0


def sigmoid(z: Array) -> None:  # a = 1 / (1 + exp(-z))
    z *= -1  # np.negative errs on some views of single columns (NumPy 2.4.6)
    np.exp(z, out=z)
    z += 1
    np.reciprocal(z, out=z)


def sigmoid_backward(g: Array, a: Array) -> None:  # da/dz = a (1 - a)
    g *= a
    g *= 1 - a


def tanh(z: Array) -> None:  # a = tanh(z)
    np.tanh(z, out=z)


def tanh_backward(g: Array, a: Array) -> None:  # da/dz = 1 - a^2
    g *= 1 - a * a


ACTIVATIONS = {
    "relu": Activation(relu, relu_backward),
    "sigmoid": Activation(sigmoid, sigmoid_backward),
    "tanh": Activation(tanh, tanh_backward),
}

# Standard deviation of a new weight matrix [d_in, d_out].
INITS: dict[str, Callable[[int, int, float], float]] = {
    "he": lambda d_in, d_out, std: (2 / d_in) ** 0.5,  # He et al. 2015
    "xavier": lambda d_in, d_out, std: (2 / (d_in + d_out)) ** 0.5,  # Glorot and Bengio 2010
    "lecun": lambda d_in, d_out, std: (1 / d_in) ** 0.5,  # LeCun et al. 1998
    "normal": lambda d_in, d_out, std: std,
}


def initial_layers(config: TrainConfig, inputs: int, outputs: int, rng: np.random.Generator) -> Layers:
    """Fresh float32 weights of one network with `inputs` features and `outputs` classes."""
    sizes = (inputs, *config.hidden_sizes, outputs)
    layers: Layers = []
    for d_in, d_out in pairwise(sizes):
        std = INITS[config.init](d_in, d_out, config.weight_std)
        w = rng.standard_normal((d_in, d_out), dtype=np.float32) * np.float32(std)
        b = rng.standard_normal(d_out, dtype=np.float32) * np.float32(config.bias_std)
        layers.append((w, b))
    return layers


def shape_key(config: TrainConfig) -> tuple[str, tuple[int, ...], str, bool]:
    """Members with equal keys are stacked; those of one update rule lie side by side."""
    return config.update_rule, config.hidden_sizes, config.activation, config.dropout > 0


@dataclass
class Stack:
    """n members of one shape. Their arrays from the second layer on carry a leading member axis."""

    members: slice  # rows of the logits [K, B, C]
    columns: slice  # columns of the first layer V [D, S]
    width: int  # columns of one member
    activation: Activation
    update_rule: str
    dropout: bool
    inner: list[Array]  # W_2 [n, d_1, d_2], b_2 [n, 1, d_2], W_3, b_3, ...
    memory: list[list[Array]] = field(default_factory=list)  # what the update rule keeps, like `inner`

    @property
    def n(self) -> int:
        return int(self.members.stop - self.members.start)


@dataclass
class Population:
    """K networks on D inputs and C classes; member k's first layer is V[:, columns of k] * scale[k]."""

    stacks: list[Stack]
    v: Array  # [D, S]
    bias: Array  # [S]
    scale: Array  # [K] float64, weight decay not yet multiplied into V (see optim.update_first_layer)
    widths: list[int]  # [K], first-layer columns per member
    owner: Array  # [S], the member that each column belongs to
    classes: int
    memory: list[list[Array]]  # what the update rules keep for V and bias: [D, S], [S]

    @property
    def size(self) -> int:
        return len(self.widths)

    def columns(self, k: int) -> slice:
        stop = sum(self.widths[: k + 1])
        return slice(stop - self.widths[k], stop)


def populate(
    configs: Sequence[TrainConfig],
    inputs: int,
    classes: int,
    least_columns: int,
    memory: int,
    dtype: Any = np.float32,
) -> Population:
    """An empty population; the configs must be sorted by shape_key. `memory` arrays per parameter are kept.

    V gets at least `least_columns` columns (zeros, never used): below some size BLAS takes another kernel,
    whose rounding would tell a lone member from one in company.
    """
    stacks: list[Stack] = []
    widths: list[int] = []
    start, column = 0, 0
    for (rule, hidden, activation, dropout), group in groupby(configs, shape_key):
        n = len(list(group))
        sizes = (*hidden, classes)
        inner: list[Array] = []
        for d_in, d_out in pairwise(sizes):
            inner += [np.zeros((n, d_in, d_out), dtype), np.zeros((n, 1, d_out), dtype)]
        stack = Stack(
            members=slice(start, start + n),
            columns=slice(column, column + n * sizes[0]),
            width=sizes[0],
            activation=ACTIVATIONS[activation],
            update_rule=rule,
            dropout=dropout,
            inner=inner,
            memory=[[np.zeros_like(p) for p in inner] for _ in range(memory)],
        )
        stacks.append(stack)
        widths += [sizes[0]] * n
        start, column = stack.members.stop, stack.columns.stop
    columns = max(column, least_columns)
    return Population(
        stacks=stacks,
        v=np.zeros((inputs, columns), dtype),
        bias=np.zeros(columns, dtype),
        scale=np.ones(len(widths)),
        widths=widths,
        owner=np.pad(np.repeat(np.arange(len(widths)), widths), (0, columns - column)),
        classes=classes,
        memory=[[np.zeros((inputs, columns), dtype), np.zeros(columns, dtype)] for _ in range(memory)],
    )


@dataclass
class Activity:
    """What a forward pass leaves behind for the backward pass."""

    logits: Array  # [K, B, C]
    first: Array  # [B, S], the first layer's activations
    hidden: list[list[Array]]  # per stack the activations a_1, a_2, ... [n, B, d], before dropout
    masks: Sequence[Sequence[Array]]  # per stack the dropout masks of a_1, a_2, ...; empty without dropout


def member_axis(wide: Array, stack: Stack) -> Array:
    """A stack's columns of a wide array [B, S] as a view [n, B, width]."""
    view: Array = wide[:, stack.columns].reshape(len(wide), stack.n, stack.width).transpose(1, 0, 2)
    return view


def forward(population: Population, x: Array, masks: Sequence[Sequence[Array]] = ()) -> Activity:
    """Logits of all members for a batch x [B, D]; `masks` per stack and hidden layer, for training with dropout."""
    p = population
    z = x @ p.v  # [B, S]: the first layers of all members in one product
    z *= p.scale.astype(z.dtype)[p.owner]
    z += p.bias
    logits = np.empty((p.size, len(x), p.classes), z.dtype)  # [K, B, C]
    hidden: list[list[Array]] = []
    for stack, stack_masks in zip(p.stacks, masks or [()] * len(p.stacks), strict=True):
        a = member_axis(z, stack)  # [n, B, d_1]
        outputs: list[Array] = []
        for layer in range(0, len(stack.inner), 2):
            w, b = stack.inner[layer], stack.inner[layer + 1]
            stack.activation.apply(a)
            outputs.append(a)
            if stack_masks:
                a = a * stack_masks[layer // 2]
            a = a @ w  # [n, B, d_l]
            a += b
        logits[stack.members] = a
        hidden.append(outputs)
    return Activity(logits, z, hidden, masks)


def softmax_loss(logits: Array, y: Array) -> tuple[Array, Array, Array]:
    """Cross-entropy of each example and its gradient.

    Returns (loss [K, B], correct [K, B] bool, gradient [K, B, C] of the summed loss by the logits):
    loss = log(sum(exp(logits))) - logits[y],    correct = argmax(logits) == y, of equals the first,
    gradient = softmax(logits) - onehot(y)
    """
    k, b, c = logits.shape
    z = np.array(logits.reshape(k * b, c).T, order="C")  # [C, K * B]: class by class, so that sums vectorise
    flat, right = z.reshape(-1), (y * (k * b) + _numbered(k, b)).reshape(-1)
    z -= np.maximum.reduce(z, axis=0)
    chosen = flat[right]
    correct = (chosen == 0).reshape(k, b)
    highest = np.count_nonzero(z == 0)
    np.exp(z, out=z)
    total = np.add.reduce(z, axis=0)
    if highest != np.count_nonzero(total >= 1):  # ties: too rare to look for the first of the highest in every row
        correct = logits.argmax(axis=2) == y
    loss = np.log(total) - chosen
    z /= total
    flat[right] -= 1
    gradient = np.ascontiguousarray(z.T).reshape(k, b, c)
    return loss.reshape(k, b), correct, gradient


@lru_cache(maxsize=8)
def _numbered(k: int, b: int) -> Array:
    """0 to k * b - 1 as [k, b]."""
    return np.arange(k * b).reshape(k, b)


def backward(population: Population, activity: Activity, gradient: Array) -> tuple[Array, list[list[Array]]]:
    """Back-propagate the gradient by the logits [K, B, C] to the first layer's pre-activation.

    Returns (g [B, S], per stack the gradients of `inner`); the first layer's own gradients are x^T g and
    the sum of g over the batch, which the optimiser takes chunk by chunk.
    """
    wide = np.zeros_like(activity.first)  # [B, S]
    inner_gradients: list[list[Array]] = []
    for i, stack in enumerate(population.stacks):
        g = gradient[stack.members]  # [n, B, C]
        gradients: list[Array] = []
        for layer in reversed(range(0, len(stack.inner), 2)):
            a, w = activity.hidden[i][layer // 2], stack.inner[layer]
            mask = activity.masks[i][layer // 2] if stack.dropout and activity.masks else None
            dropped = a if mask is None else a * mask
            gradients[:0] = [dropped.transpose(0, 2, 1) @ g, np.add.reduce(g, axis=1, keepdims=True)]
            g = g @ w.transpose(0, 2, 1)  # [n, B, d_{l-1}]
            if mask is not None:
                g *= mask
            stack.activation.backward(g, a)
        member_axis(wide, stack)[...] = g
        inner_gradients.append(gradients)
    return wide, inner_gradients


def load_member(population: Population, k: int, layers: Layers, scale: float, memory: Sequence[Layers]) -> None:
    """Write one network, and what its update rule remembers, into row k of the population."""
    columns, stack, i = population.columns(k), *_place(population, k)
    population.scale[k] = scale
    for (v, bias, inner), (first, *rest) in zip(_arrays(population, stack), (layers, *memory), strict=False):
        v[:, columns], bias[columns] = first
        for layer, (w, b) in enumerate(rest):
            inner[2 * layer][i], inner[2 * layer + 1][i] = w, b


def save_member(population: Population, k: int, memory: int) -> tuple[Layers, float, list[Layers]]:
    """The inverse of load_member: copies of (layers, scale, `memory` remembered arrays) of member k."""
    columns, stack, i = population.columns(k), *_place(population, k)
    copies: list[Layers] = []
    for v, bias, inner in _arrays(population, stack)[: 1 + memory]:
        rest = zip(inner[::2], inner[1::2], strict=True)
        copies.append([(v[:, columns].copy(), bias[columns].copy()), *((w[i].copy(), b[i, 0].copy()) for w, b in rest)])
    return copies[0], float(population.scale[k]), copies[1:]


def _place(population: Population, k: int) -> tuple[Stack, int]:
    stack = next(s for s in population.stacks if k < s.members.stop)
    return stack, k - stack.members.start


def _arrays(p: Population, stack: Stack) -> list[tuple[Array, Array, list[Array]]]:
    """(V, bias, inner), of the parameters first and then of each thing remembered."""
    kept = zip(p.memory, stack.memory, strict=True)
    return [(p.v, p.bias, stack.inner), *((v, bias, inner) for (v, bias), inner in kept)]


# The library that multiplies matrices ------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _sgemm() -> Any:
    """cblas_sgemm with 64-bit sizes, as in NumPy's wheels, if it is there and adds as it should; else None."""
    try:  # NumPy's own BLAS, found through NumPy's module
        library = ctypes.CDLL(np._core._multiarray_umath.__file__)  # type: ignore[attr-defined]
    except (OSError, AttributeError):
        return None
    sgemm = getattr(library, "scipy_cblas_sgemm64_", None)
    if sgemm is not None:
        size, pointer, real, flag = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float, ctypes.c_int
        matrix = [pointer, size]
        sgemm.argtypes = [flag] * 3 + [size] * 3 + [real, *matrix, *matrix, real, *matrix]
        sgemm.restype = None
        x, g = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(8, dtype=np.float32).reshape(2, 4)
        v = np.ones((3, 4), np.float32)
        _call(sgemm, v, x, g)
        if not np.array_equal(v, 1 + x.T @ g):
            return None
    return sgemm


def _call(sgemm: Any, v: Array, x: Array, g: Array) -> None:
    row_major, transposed, as_it_is = 101, 112, 111
    (b, d), s = x.shape, g.shape[1]
    data = [array.ctypes.data for array in (x, g, v)]
    sgemm(row_major, transposed, as_it_is, d, s, b, 1, data[0], d, data[1], s, 1, data[2], s)


def add_product(v: Array, x: Array, g: Array) -> None:
    """V += x^T g with V [D, S], x [B, D], g [B, S].

    NumPy would first make the product, then add it. BLAS itself adds as it multiplies, without a pass over V.
    Up to 256 rows each sum is complete before it is added to V, so that both ways give the same bits.
    """
    plain = all(a.dtype == np.float32 and a.flags.c_contiguous for a in (v, x, g))
    if plain and len(x) <= 256 and (sgemm := _sgemm()) is not None:
        _call(sgemm, v, x, g)
    else:
        for rows in chunks(v, len(x)):
            v[rows] += x[:, rows].T @ g


def chunks(v: Array, batch: int) -> Iterator[slice]:
    """Rows of V by the chunk: few enough for the core's own cache, and so many that x^T g is no small product."""
    inputs, columns = v.shape
    rows = math.ceil(max(CHUNK, LEAST_PRODUCTS / batch) / columns)
    starts = range(0, max(1, inputs - rows + 1), rows)
    for start in starts:
        yield slice(start, inputs if start == starts[-1] else start + rows)


@lru_cache(maxsize=1)
def blas_is_exact() -> bool:
    """Whether columns of a wide product have the same bits as the product of these columns alone.

    If so, a trial's result does not depend on its company; else it does, by float32 rounding.
    """
    rng = np.random.default_rng(0)
    widths = (50, 7, 100, 33, 150, 10)  # each makes a product well above LEAST_PRODUCTS
    x = rng.standard_normal((100, 3072), dtype=np.float32)
    v = rng.standard_normal((3072, sum(widths)), dtype=np.float32)
    z = x @ v
    moved = v + x.T @ z
    for stop, width in zip(accumulate(widths), widths, strict=True):
        own = slice(stop - width, stop)
        v_own, z_own = v[:, own].copy(), z[:, own].copy()
        same = x @ v_own == z_own
        add_product(v_own, x, z_own)
        if not (same.all() and np.array_equal(v_own, moved[:, own])):
            return False
    return True
