"""A population against single networks written out by hand, in float64."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from core import network
from core.network import (
    ACTIVATIONS,
    add_product,
    backward,
    blas_is_exact,
    forward,
    initial_layers,
    load_member,
    populate,
    save_member,
    shape_key,
    softmax_loss,
)
from core.train import TrainConfig

FUNCTIONS = {  # activation and derivative, both of z
    "relu": (lambda z: np.where(z > 0, z, 0), lambda z: np.where(z > 0, 1.0, 0.0)),
    "sigmoid": (lambda z: 1 / (1 + np.exp(-z)), lambda z: np.exp(-z) / (1 + np.exp(-z)) ** 2),
    "tanh": (np.tanh, lambda z: 1 / np.cosh(z) ** 2),
}


def single(layers, activation, x, y, masks=()):
    """Logits, losses, whether correct, and the gradients of the summed loss, for one network, one example at a time."""
    f, derivative = FUNCTIONS[activation]
    logits, losses, correct = [], [], []
    gradients = [(np.zeros_like(w), np.zeros_like(b)) for w, b in layers]
    for i in range(len(x)):
        a, zs, inputs = x[i], [], []
        for depth, (w, b) in enumerate(layers):
            inputs.append(a)
            zs.append(a @ w + b)
            a = f(zs[-1])
            if depth < len(masks):
                a = a * masks[depth][i]
        p = np.exp(zs[-1]) / np.exp(zs[-1]).sum()
        logits.append(zs[-1])
        losses.append(-np.log(p[y[i]]))
        correct.append(p.argmax() == y[i])
        g = p - np.eye(len(p))[y[i]]
        for depth in reversed(range(len(layers))):
            gradients[depth][0][...] += np.outer(inputs[depth], g)
            gradients[depth][1][...] += g
            if depth:
                g = layers[depth][0] @ g
                if masks:
                    g = g * masks[depth - 1][i]
                g = g * derivative(zs[depth - 1])
    return np.array(logits), np.array(losses), np.array(correct), gradients


configs = st.lists(
    st.builds(
        TrainConfig,
        hidden_sizes=st.lists(st.integers(1, 6), max_size=3).map(tuple),
        activation=st.sampled_from(list(FUNCTIONS)),
        dropout=st.sampled_from([0.0, 0.5]),
    ),
    min_size=1,
    max_size=5,
).map(lambda found: sorted(found, key=shape_key))


def draw_population(found, inputs, classes, rng, dtype=np.float64):
    networks = [[(w.astype(dtype), b.astype(dtype)) for w, b in initial_layers(c, inputs, classes, rng)] for c in found]
    networks = [[(w, rng.normal(size=b.shape).astype(dtype)) for w, b in layers] for layers in networks]
    population = populate(found, inputs, classes, least_columns=3, memory=0, dtype=dtype)
    for k, layers in enumerate(networks):
        load_member(population, k, layers, 1.0, ())
    return population, networks


@settings(max_examples=60, deadline=None)
@given(configs, st.integers(1, 7), st.integers(1, 5), st.integers(2, 5), st.integers(0, 2**32))
def test_every_member_computes_what_it_would_alone(found, batch, inputs, classes, seed):
    """Logits, losses and all gradients of each member are those of its network written out by hand."""
    rng = np.random.default_rng(seed)
    population, networks = draw_population(found, inputs, classes, rng)
    x, y = rng.normal(size=(batch, inputs)), rng.integers(classes, size=batch)
    masks = [
        [rng.integers(2, size=(s.n, batch, w.shape[1])) * 2.0 for w in s.inner[::2]] if s.dropout else []
        for s in population.stacks
    ]
    activity = forward(population, x, masks)
    logits = activity.logits.copy()
    loss, correct, gradient = softmax_loss(activity.logits, y)
    g, inner = backward(population, activity, gradient)
    for i, stack in enumerate(population.stacks):
        for row, k in enumerate(range(stack.members.start, stack.members.stop)):
            own_masks = [mask[row] for mask in masks[i]]
            expected = single(networks[k], found[k].activation, x, y, own_masks)
            assert_allclose(logits[k], expected[0], rtol=1e-9, atol=1e-12)
            assert_allclose(loss[k], expected[1], rtol=1e-9, atol=1e-12)
            assert_array_equal(correct[k], expected[2])
            columns = population.columns(k)
            own = [x.T @ g[:, columns], g[:, columns].sum(axis=0), *(part[row] for part in inner[i])]
            for part, wanted in zip(own, (p for layer in expected[3] for p in layer), strict=True):
                assert_allclose(part.reshape(wanted.shape), wanted, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_activations_are_right_on_a_single_column_of_any_array(name, dtype):
    """In place on a strided view, as in a population, each gives its formula (np.negative does not: NumPy 2.4.6)."""
    f, derivative = FUNCTIONS[name]
    rng = np.random.default_rng(0)
    for columns in range(1, 40):
        z = rng.normal(size=(5, columns)).astype(dtype)
        wanted, slope = f(z[:, 0].astype(float)), derivative(z[:, 0].astype(float))
        view, g = z[:, 0], np.ones(5, dtype)
        ACTIVATIONS[name].apply(view)
        ACTIVATIONS[name].backward(g, view)
        assert_allclose(view, wanted, rtol=1e-5)
        assert_allclose(g, slope, rtol=1e-4, atol=1e-6)


def test_softmax_survives_scores_that_overflow():
    """Scores of +-1000 give the exact loss, no overflow and a zero gradient where the answer is certain."""
    loss, correct, gradient = softmax_loss(np.array([[[1000.0, 0.0, -1000.0], [-1000.0, 0.0, 0.0]]]), np.array([0, 1]))
    assert_allclose(loss, [[0, np.log(2)]], atol=1e-12)
    assert correct[0, 0]
    assert_allclose(gradient, [[[0, 0, 0], [0, -0.5, 0.5]]], atol=1e-12)


@given(
    st.lists(st.lists(st.integers(-2, 2), min_size=4, max_size=4), min_size=1, max_size=12),
    st.sampled_from([np.float32, np.float64]),
    st.sampled_from([None, np.nan, np.inf]),
    st.integers(0, 2**32),
)
def test_of_equal_scores_the_first_is_the_answer(rows, dtype, damage, seed):
    """What counts as right is the first of the highest scores, in a batch with a diverging neighbour too."""
    scores = np.array([rows, rows[::-1]], dtype)
    y = np.random.default_rng(seed).integers(4, size=len(rows))
    wanted = [[row.index(max(row)) == label for row, label in zip(m, y, strict=True)] for m in scores.tolist()]
    if damage is not None:
        scores = np.concatenate([scores, np.full((1, *scores.shape[1:]), damage, dtype)])
    with np.errstate(invalid="ignore"):
        _, correct, _ = softmax_loss(scores, y)
    assert correct[:2].tolist() == wanted


def test_scores_that_are_not_finite_give_a_loss_that_is_not_finite():
    """An overflowed network is seen in its loss, and its neighbours' losses are untouched."""
    logits = np.zeros((3, 2, 4), np.float32)
    logits[1, 0, 2] = np.inf
    with np.errstate(invalid="ignore"):
        loss, correct, _ = softmax_loss(logits, np.array([0, 1]))
    assert np.isfinite(loss).tolist() == [[True, True], [False, True], [True, True]]
    assert not correct[1, 0]


@settings(max_examples=25, deadline=None)
@given(configs, st.integers(0, 2**32))
def test_saving_is_the_inverse_of_loading(found, seed):
    """What is loaded into a member comes back from it, whatever its neighbours are."""
    rng = np.random.default_rng(seed)
    population = populate(found, 4, 3, least_columns=9, memory=2)
    own = []
    for k, config in enumerate(found):
        layers, m, v = (initial_layers(config, 4, 3, rng) for _ in range(3))
        own.append((layers, 0.25 + k, [m, v]))
        load_member(population, k, *own[-1])
    for k, (layers, scale, memory) in enumerate(own):
        back, back_scale, back_memory = save_member(population, k, 2)
        assert back_scale == scale
        for wanted, got in zip([layers, *memory], [back, *back_memory], strict=True):
            for (w, b), (w1, b1) in zip(wanted, got, strict=True):
                assert_array_equal(w, w1)
                assert_array_equal(b, b1)


@pytest.mark.parametrize(
    ("init", "deviations"),
    [
        ("he", [(2 / 300) ** 0.5, (2 / 200) ** 0.5]),
        ("xavier", [(2 / 500) ** 0.5, (2 / 210) ** 0.5]),
        ("lecun", [(1 / 300) ** 0.5, (1 / 200) ** 0.5]),
        ("normal", [0.02, 0.02]),
    ],
)
def test_initial_weights_have_the_deviation_of_their_scheme(init, deviations):
    """Initial weights are centred with the published deviation; biases with their own."""
    config = TrainConfig(hidden_sizes=(200,), init=init, weight_std=0.02, bias_std=0.5)
    layers = initial_layers(config, 300, 10, np.random.default_rng(0))
    for (w, b), deviation in zip(layers, deviations, strict=True):
        assert w.dtype == b.dtype == np.float32
        assert abs(w.mean()) < 5 * deviation / w.size**0.5
        assert_allclose(w.std(), deviation, rtol=5 / w.size**0.5)
        assert_allclose(b.std(), 0.5, rtol=0.6)


def test_biases_start_at_zero_unless_told_otherwise():
    """Without bias_std all biases are zero."""
    assert not any(b.any() for _, b in initial_layers(TrainConfig(), 5, 3, np.random.default_rng(0)))


@pytest.mark.parametrize("rows", [1, 7, 100, 256, 300])
@pytest.mark.parametrize("shape", [(64, 7), (300, 90)])
def test_adding_a_product_is_the_same_with_and_without_the_direct_call(rows, shape, monkeypatch):
    """The direct call into BLAS and the chunked way agree with float64, and bit for bit up to 256 rows."""
    rng = np.random.default_rng(0)
    x, g, v = (rng.standard_normal(s, dtype=np.float32) for s in [(rows, shape[0]), (rows, shape[1]), shape])
    wanted, direct, chunked = v + x.T.astype(float) @ g, v.copy(), v.copy()
    add_product(direct, x, g)
    monkeypatch.setattr(network, "_sgemm", lambda: None)
    add_product(chunked, x, g)
    assert_allclose(direct, wanted, atol=1e-5 * rows**0.5)
    assert_allclose(chunked, wanted, atol=1e-5 * rows**0.5)
    if rows * shape[0] * shape[1] >= network.LEAST_PRODUCTS and rows <= 256:
        assert_array_equal(direct, chunked)


def test_adding_a_product_takes_any_layout_and_precision():
    """Views and float64 are added correctly too: nothing but plain float32 matrices reaches the direct call."""
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((40, 60), dtype=np.float32), rng.standard_normal((20, 40), dtype=np.float32)
    for dtype in (np.float32, np.float64):
        v = np.zeros((60, 40), dtype)
        add_product(v[::2, 1::2], x[::2, ::2], g[:, ::2])
        assert_allclose(v[::2, 1::2], x[::2, ::2].T.astype(float) @ g[:, ::2], rtol=1e-4, atol=1e-4)
        assert not v[1::2].any()
        assert not v[:, ::2].any()


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 400), st.integers(1, 200_000), st.integers(1, 600))
def test_chunks_cover_the_rows_and_are_never_small_products(inputs, columns, batch):
    """The chunks follow one another from the first row to the last; there is one, or each is large enough."""
    v = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), (inputs, columns), (0, 0))
    found = list(network.chunks(v, batch))
    assert [rows.start for rows in found] == [0, *(rows.stop for rows in found[:-1])]
    assert found[-1].stop == inputs
    sizes = [(rows.stop - rows.start) * columns * batch for rows in found]
    assert len(found) == 1 or min(sizes) >= network.LEAST_PRODUCTS


CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""


@pytest.mark.skipif("avx2" not in CPU, reason="the kernels are those of x86-64 on Linux")
@pytest.mark.parametrize("kernel", ["HASWELL", "SKYLAKEX"])
def test_the_kernel_is_known_and_probed_in_a_new_process(kernel):
    """OPENBLAS_CORETYPE decides the kernel, and that of AVX-512 is exact."""
    if kernel == "SKYLAKEX" and "avx512vl" not in CPU:
        pytest.skip("this CPU has no AVX-512")
    code = "from core.network import blas_is_exact; from threadpoolctl import threadpool_info; "
    code += "print(*[blas.get('architecture') for blas in threadpool_info()][:1], blas_is_exact())"
    environment = os.environ | {"OPENBLAS_CORETYPE": kernel, "OPENBLAS_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    *names, exact = run.stdout.split()
    if names in ([], ["None"]):
        pytest.skip("NumPy is not linked to OpenBLAS here")
    assert names[0].upper() == kernel
    assert kernel == "HASWELL" or exact == "True"


def test_the_probe_is_asked_once():
    """The probe gives one answer per process."""
    assert blas_is_exact() is blas_is_exact()
    assert blas_is_exact.cache_info().misses == 1
