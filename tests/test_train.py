"""Training in slices: settings, bits, curves, endings, and what PyTorch makes of the same trial."""

import copy
import math
import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from core import train
from core.data import Dataset, parse_batch, read_digits
from core.network import blas_is_exact
from core.train import Keep, TrainConfig, advance, fit, may_share, start


def dataset(examples=50, inputs=12, classes=3, seed=0, test=20):
    """Noisy blobs, one per class: learnable, and no two runs alike."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, inputs))

    def split(n):
        y = rng.integers(classes, size=n)
        return (centres[y] + rng.normal(size=(n, inputs))).astype(np.float32), y

    parts = split(examples), split(30), split(test)
    return Dataset.from_arrays(*parts, normalise="standard", classes=[str(c) for c in range(classes)])


DATA = dataset()

# TrainConfig -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({"eta": -1}, "eta: expected a number above 0, got -1"),
        ({"eta": 0}, "eta: expected a number above 0, got 0"),
        ({"eta": math.nan}, "eta: expected a number above 0, got nan"),
        ({"eta": "fast"}, "eta: expected a number above 0, got 'fast'"),
        ({"eta": True}, "eta: expected a number above 0, got True"),
        ({"lam": -0.1}, "lam: expected a number of 0 or more, got -0.1"),
        ({"dropout": 1.0}, "dropout: expected a number from 0 to below 1, got 1.0"),
        ({"momentum": 1}, "momentum: expected a number from 0 to below 1, got 1"),
        ({"batch_size": 0}, "batch_size: expected an integer of 1 or more, got 0"),
        ({"batch_size": 1.5}, "batch_size: expected an integer of 1 or more, got 1.5"),
        ({"hidden_sizes": (50, 0)}, "hidden_sizes: expected a list of layer sizes, each from 1 to 100000, got (50, 0)"),
        ({"activation": "gelu"}, "activation: expected one of relu, sigmoid, tanh, got 'gelu'"),
        ({"optimizer": "lion"}, "optimizer: expected one of sgd, adam, got 'lion'"),
        (
            {"schedule": "warm"},
            "schedule: expected one of constant, exponential, step, cyclical, cosine, got 'warm'",
        ),
        ({"curves": "none"}, "curves: expected one of running, full, got 'none'"),
        ({"epochs": None}, "epochs: expected either epochs or updates, got None and None"),
        ({"updates": 5}, "epochs: expected either epochs or updates, got 10 and 5"),
        ({"eta_min": 0.1}, "eta_min: expected at most eta = 0.01, got 0.1"),
        ({"nesterov": True}, "nesterov: expected momentum above 0 beside it, got 0"),
        ({"patience": 0}, "patience: expected an integer of 1 or more, or none, got 0"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(given_settings, message):
    """The message names the field, what it may be and what was given."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TrainConfig(**given_settings)


def test_settings_are_called_lambda_and_hidden_sizes_in_files():
    """from_params understands the words of files, text for sizes included, and to_params gives them back."""
    config = TrainConfig.from_params({"lambda": 0.25, "hidden_sizes": "[75, 150]", "updates": 300})
    assert config == TrainConfig(lam=0.25, hidden_sizes=(75, 150), epochs=None, updates=300)
    assert config.to_params()["lambda"] == 0.25
    assert config.to_params()["hidden_sizes"] == "[75, 150]"
    assert TrainConfig.from_params(config.to_params()) == config


def test_an_unknown_setting_is_refused_by_name():
    """A typo is named."""
    with pytest.raises(ValueError, match=r"^learning_rate: no such setting"):
        TrainConfig.from_params({"learning_rate": 0.1})


def test_cost_counts_the_products_of_a_network():
    """4 D H_1 + 6 times the inner layers, as in the measurements."""
    assert TrainConfig(hidden_sizes=()).cost(3072, 10) == 4 * 3072 * 10
    assert TrainConfig(hidden_sizes=(75, 150)).cost(3072, 10) == 4 * 3072 * 75 + 6 * (75 * 150 + 150 * 10)


def test_a_batch_larger_than_the_data_is_refused():
    """Fewer examples than one batch cannot be trained on."""
    with pytest.raises(ValueError, match=r"^batch_size: expected at most the 50 training examples, got 51"):
        start(TrainConfig(batch_size=51), DATA, (0,))


# Against PyTorch ---------------------------------------------------------------------------------------------

small = st.builds(
    lambda rule, **rest: TrainConfig(batch_size=16, epochs=None, updates=6, **rule, **rest),
    st.sampled_from(
        [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"optimizer": "adam", "epsilon": 1e-3}]
    ),
    hidden_sizes=st.lists(st.integers(1, 9), max_size=3).map(tuple),
    activation=st.sampled_from(["relu", "sigmoid", "tanh"]),
    lam=st.sampled_from([0.0, 0.05]),
    eta=st.sampled_from([0.01, 0.05]),
    schedule=st.sampled_from(["constant", "step"]),
    decay=st.just(0.5),
)


@settings(max_examples=20, deadline=None)
@given(st.lists(small, min_size=1, max_size=4), st.integers(0, 2**32))
def test_a_trial_ends_where_pytorch_takes_it(configs, seed):
    """Six updates over an epoch and a half, last partial batch included, match PyTorch's autograd and optimisers."""
    torch = pytest.importorskip("torch", reason="the comparison with PyTorch needs torch: pip install -e .[torch]")
    first = [start(c, DATA, (seed, k), (seed,)) for k, c in enumerate(configs)]
    states, progress = advance(first, DATA, epochs=2)
    x = torch.tensor((DATA.train.x.astype(float) - DATA.mean) * DATA.scale)
    y = torch.tensor(DATA.train.y)
    for config, begun, state, brought in zip(configs, first, states, progress, strict=True):
        layers = [torch.tensor(p.astype(float), requires_grad=True) for layer in begun.weights for p in layer]
        groups = [
            {"params": layers[::2], "weight_decay": 2 * config.lam},
            {"params": layers[1::2], "weight_decay": 0},
        ]
        if config.optimizer == "adam":
            optimiser = torch.optim.Adam(groups, lr=config.eta, eps=config.epsilon)
        else:
            optimiser = torch.optim.SGD(groups, lr=config.eta, momentum=config.momentum, nesterov=config.nesterov)
        losses = []
        for t in range(6):
            epoch, i = divmod(t, 4)  # 50 examples: batches of 16, 16, 16 and 2
            rows = np.random.default_rng([seed, epoch]).permutation(50)[16 * i : 16 * (i + 1)]
            for group in optimiser.param_groups:
                group["lr"] = config.eta * (0.5**epoch if config.schedule == "step" else 1)
            a = x[rows]
            for w, b in zip(layers[:-2:2], layers[1:-2:2], strict=True):
                a = getattr(torch, config.activation)(a @ w + b)
            loss = torch.nn.functional.cross_entropy(a @ layers[-2] + layers[-1], y[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        for ours, theirs in zip((p for layer in state.weights for p in layer), layers, strict=True):
            assert_allclose(ours, theirs.detach().numpy(), rtol=2e-3, atol=2e-4)
        epoch, end = brought.evaluations
        assert_allclose(epoch.metrics["loss/train"], np.mean(losses[:4]), rtol=1e-4)
        assert_allclose(end.metrics["loss/train"], np.mean(losses[4:]), rtol=1e-3)
        penalty = config.lam * sum((w**2).sum().item() for w in layers[::2])
        assert_allclose(end.metrics["cost/val"] - end.metrics["loss/val"], penalty, rtol=1e-3, atol=1e-6)


def reference_evaluation(weights, activation, split):
    """Loss, accuracy and confusion counts of one network in float64, example by example."""
    f = {"relu": lambda z: np.maximum(z, 0), "sigmoid": lambda z: 1 / (1 + np.exp(-z)), "tanh": np.tanh}[activation]
    loss, confusion = 0.0, np.zeros((3, 3), int)
    for x, y in zip((split.x - DATA.mean) * DATA.scale, split.y, strict=True):
        a = x.astype(float)
        for w, b in weights[:-1]:
            a = f(a @ w + b)
        w, b = weights[-1]
        p = np.exp(a @ w + b)
        loss -= math.log(p[y] / p.sum()) / len(split)
        confusion[y, p.argmax()] += 1
    return loss, confusion.trace() / len(split), confusion


@pytest.mark.parametrize("hidden", [(), (7,), (7, 4)])
def test_the_last_point_of_the_curves_is_that_of_the_final_weights(hidden):
    """Costs, losses, accuracies and confusion follow from the returned weights, in float64 by hand."""
    config = TrainConfig(
        hidden_sizes=hidden, activation="tanh", lam=0.02, l2_scale=0.5, eta=0.1, epochs=3, batch_size=9
    )
    (result,) = fit([replace(config, curves="full")], DATA)
    penalty = 0.5 * 0.02 * sum((w.astype(float) ** 2).sum() for w, _ in result.weights)
    metrics = result.history[-1].metrics
    for name, split in (("train", DATA.train), ("val", DATA.validation)):
        loss, accuracy, _ = reference_evaluation(result.weights, "tanh", split)
        assert metrics[f"loss/{name}"] == pytest.approx(loss, rel=1e-5)
        assert metrics[f"cost/{name}"] == pytest.approx(loss + penalty, rel=1e-5)
        assert metrics[f"accuracy/{name}"] == pytest.approx(accuracy)
    loss, accuracy, confusion = reference_evaluation(result.weights, "tanh", DATA.test)
    assert result.test == pytest.approx({"loss": loss, "accuracy": accuracy}, rel=1e-5)
    assert_array_equal(result.confusion, confusion)


# Bits --------------------------------------------------------------------------------------------------------

any_config = st.builds(
    lambda rule, length, **rest: TrainConfig(**rule, **length, **rest),
    st.sampled_from([{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"optimizer": "adam"}]),
    st.sampled_from([{"epochs": 1}, {"epochs": 3}, {"epochs": None, "updates": 6}]),
    hidden_sizes=st.lists(st.sampled_from([1, 2, 7, 16, 33]), max_size=3).map(tuple),
    activation=st.sampled_from(["relu", "sigmoid", "tanh"]),
    lam=st.sampled_from([0.0, 0.01, 3.0]),
    eta=st.sampled_from([1e-3, 0.05]),
    schedule=st.sampled_from(["constant", "cosine"]),
    dropout=st.sampled_from([0.0, 0.3]),
    curves=st.sampled_from(["running", "full"]),
    eval_every=st.sampled_from([None, 3]),
    patience=st.sampled_from([None, 1]),
)


DATASETS = {"narrow": DATA, "wide": dataset(inputs=300, examples=33, classes=2)}


KEEPS = (
    None,
    Keep("loss/val", maximise=False),
    Keep("accuracy/val", maximise=True),
    Keep("cost/train", maximise=False),
)


def alone(config, k, data):
    state = start(config, data, (7, k), (7,), KEEPS[k % len(KEEPS)])
    (state,), (progress,) = advance([state], data, epochs=9)
    assert state.finished
    return state, progress.evaluations, progress.test


def in_company(configs, data, slices, shuffle):
    """All trials together, re-packed in a new order before every slice."""
    states = [start(c, data, (7, k), (7,), KEEPS[k % len(KEEPS)]) for k, c in enumerate(configs)]
    evaluations, tests = [[] for _ in states], [None for _ in states]
    while running := [k for k, s in enumerate(states) if not s.finished]:
        shuffle.shuffle(running)
        running = [k for k in running if may_share(states[k]) == may_share(states[running[0]])]
        moved, progress = advance([states[k] for k in running], data, epochs=shuffle.choice(slices))
        for k, state, part in zip(running, moved, progress, strict=True):
            states[k] = pickle.loads(pickle.dumps(state))  # as on its way to another process
            evaluations[k] += part.evaluations
            tests[k] = part.test or tests[k]
    return states, evaluations, tests


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(any_config, min_size=2, max_size=6),
    st.sampled_from([4, 16, 33]),
    st.sampled_from(sorted(DATASETS)),
    st.sampled_from([(1,), (2, 1), (3,)]),
    st.randoms(use_true_random=False),
)
def test_a_trial_does_not_depend_on_its_company_or_slices(configs, batch_size, data, slices, shuffle):
    """Weights, curves and test results alone and in company are equal: bit for bit where BLAS is exact."""
    configs, data = [replace(c, batch_size=batch_size) for c in configs], DATASETS[data]
    states, evaluations, tests = in_company(configs, data, slices, shuffle)
    for k, config in enumerate(configs):
        state, curve, test = alone(config, k, data)
        if blas_is_exact():
            assert state.update == states[k].update
            assert state.diverged == states[k].diverged
            assert [replace(e, seconds=0) for e in curve] == [replace(e, seconds=0) for e in evaluations[k]]
            assert test == tests[k]
            for ours, theirs in zip(state.weights, states[k].weights, strict=True):
                assert_array_equal(ours[0], theirs[0])
                assert_array_equal(ours[1], theirs[1])
        elif curve and evaluations[k]:  # the paths drift apart with time: compare their beginnings
            for name, value in curve[0].metrics.items():
                if not name.startswith("accuracy"):
                    assert value == pytest.approx(evaluations[k][0].metrics[name], rel=1e-3, abs=1e-4)


CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""


@pytest.mark.skipif("avx2" not in CPU, reason="the kernels are those of x86-64 on Linux")
@pytest.mark.parametrize("kernel", ["HASWELL", "SKYLAKEX"])
def test_company_makes_no_difference_on_either_kernel(kernel):
    """The test above holds in new processes with the kernel that is exact and the one that is not."""
    if kernel == "SKYLAKEX" and "avx512vl" not in CPU:
        pytest.skip("this CPU has no AVX-512")
    test = f"{__file__}::{test_a_trial_does_not_depend_on_its_company_or_slices.__name__}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", test]
    environment = os.environ | {"OPENBLAS_CORETYPE": kernel, "OPENBLAS_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stdout[-3000:]


def test_advance_leaves_the_given_states_alone():
    """The same states advance twice to the same result, dropout included."""
    states = [
        start(TrainConfig(hidden_sizes=(8,), dropout=0.5, momentum=0.9, batch_size=10), DATA, (0, k)) for k in (0, 1)
    ]
    before = pickle.dumps(states)
    once, _ = advance(states, DATA, 1)
    twice, _ = advance(states, DATA, 1)
    assert pickle.dumps(states) == before
    for a, b in zip(once, twice, strict=True):
        assert_array_equal(a.weights[0][0], b.weights[0][0])
        assert not np.array_equal(a.weights[0][0], states[0].weights[0][0])


def test_trials_that_read_other_batches_are_refused():
    """One group has one batch size, one order and one update count."""
    states = [start(TrainConfig(batch_size=b), DATA, (0,)) for b in (10, 20)]
    with pytest.raises(ValueError, match="equal batch size"):
        advance(states, DATA, 1)


def test_fit_trains_trials_of_several_batch_sizes():
    """Trials that cannot share a group are trained all the same, each as it would be alone."""
    configs = [TrainConfig(hidden_sizes=(4,), batch_size=b, epochs=2, eta=0.1) for b in (10, 25, 10)]
    results = fit(configs, DATA, seed=3)
    assert [r.history[-1].update for r in results] == [10, 4, 10]
    assert [r.config for r in results] == configs
    state = start(configs[1], DATA, (3, 1))
    (state,), _ = advance([state], DATA, 2)
    assert_allclose(results[1].weights[0][0], state.weights[0][0], rtol=1e-3, atol=1e-5)


# Batches, dropout --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_each_epoch_reads_every_example_once_in_a_new_order(kind):
    """The batches of an epoch hold every normalised example once, the last one filled up with repetitions."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (25, 6)).astype(kind), np.arange(25) % 4
    data = Dataset.from_arrays((x, y), (x[:5], y[:5]), normalise="standard")
    wanted = (x - x.mean(axis=0, dtype=float)) / x.std(axis=0, dtype=float)
    orders = []
    for epoch in range(2):
        seen = []
        for batch, labels, n in train.batches(data, (1, 2), 10, 3 * epoch, 3 * epoch + 3):
            assert batch.shape == (10, 6)
            assert batch.dtype == np.float32
            for row, label in zip(batch[:n], labels[:n], strict=True):
                i = int(np.abs(wanted - row).sum(axis=1).argmin())
                assert_allclose(row, wanted[i], atol=1e-5)
                assert label == y[i]
                seen.append(i)
        assert sorted(seen) == list(range(25))
        orders.append(seen)
    assert orders[0] != orders[1]


def test_a_slice_may_begin_within_an_epoch():
    """Batches from the middle are those that a reader from the start would have got there."""
    whole = [(x.copy(), y, n) for x, y, n in train.batches(DATA, (5,), 16, 0, 8)]
    parts = [(x.copy(), y, n) for a, b in ((0, 3), (3, 6), (6, 8)) for x, y, n in train.batches(DATA, (5,), 16, a, b)]
    for (x, y, n), (x1, y1, n1) in zip(whole, parts, strict=True):
        assert_array_equal(x, x1)
        assert_array_equal(y, y1)
        assert n == n1


def test_dropout_keeps_the_expected_activation():
    """The mean over many masked passes through one linear-ish layer is the pass without dropout."""
    config = TrainConfig(hidden_sizes=(40,), dropout=0.25, eta=1e-12, epochs=None, updates=1, batch_size=50)
    masked = [fit([config], DATA, seed=0)[0].history[0].metrics["loss/train"]]
    plain = fit([replace(config, dropout=0.0)], DATA, seed=0)[0].history[0].metrics["loss/train"]
    state = start(config, DATA, (0, 0))
    population = train.pack([state], DATA)
    (((mask,),)) = train.dropout_masks(population, [state], 50_000)
    values, counts = np.unique(mask, return_counts=True)
    assert_allclose(values, [0, 1 / 0.75], rtol=1e-6)
    assert_allclose(counts / mask.size, [0.25, 0.75], atol=0.002)
    assert mask.mean() == pytest.approx(1, abs=0.002)
    assert masked[0] != plain


@pytest.mark.parametrize("hidden", [(), (5,)])
def test_the_training_accuracy_of_a_network_without_weights_is_the_share_of_the_first_class(hidden):
    """Where all scores are equal the answer is the first class, in running curves as in full ones."""
    still = TrainConfig(hidden_sizes=hidden, init="normal", weight_std=0.0, eta=1e-300, epochs=1, batch_size=10)
    share = float((DATA.train.y == 0).mean())
    assert 0 < share < 1
    for result in fit([still, replace(still, curves="full")], DATA):
        assert result.history[0].metrics["accuracy/train"] == pytest.approx(share)


def test_dropout_is_off_in_evaluation():
    """Validation figures are those of the whole network."""
    config = TrainConfig(hidden_sizes=(8,), dropout=0.5, eta=0.05, epochs=2, batch_size=10)
    (result,) = fit([config], DATA)
    loss, accuracy, _ = reference_evaluation(result.weights, "relu", DATA.validation)
    assert result.history[-1].metrics["loss/val"] == pytest.approx(loss, rel=1e-5)
    assert result.history[-1].metrics["accuracy/val"] == pytest.approx(accuracy)


# The best evaluation -----------------------------------------------------------------------------------------

RISING = [  # best somewhere on the way; the middle one with dropout, memory of momentum and a scale of the first layer
    TrainConfig(hidden_sizes=(16,), eta=0.5, batch_size=10, epochs=12),
    TrainConfig(hidden_sizes=(16, 5), eta=0.3, lam=0.01, dropout=0.3, momentum=0.9, batch_size=10, epochs=12),
    TrainConfig(hidden_sizes=(), eta=2.0, batch_size=10, epochs=8, eval_every=3, curves="full"),
]


@pytest.mark.parametrize("keep", KEEPS[1:], ids=[keep.series for keep in KEEPS if keep])
@pytest.mark.parametrize("config", RISING, ids=["plain", "regularised", "every-3"])
def test_weights_of_the_best_evaluation_are_those_of_a_training_that_ends_there(config, keep):
    """Asked to keep the best, a trial has the weights and test figures of one that was stopped at that point."""
    (kept,) = fit([config], DATA, seed=2, keep=keep)
    (whole,) = fit([config], DATA, seed=2)
    values = [e.metrics[keep.series] for e in whole.history]
    best = whole.history[values.index(max(values) if keep.maximise else min(values))]
    (short,) = fit([replace(config, epochs=None, updates=best.update)], DATA, seed=2)
    assert [e.metrics for e in kept.history] == [e.metrics for e in whole.history]
    assert kept.test == short.test
    assert_array_equal(kept.confusion, short.confusion)
    for ours, theirs in zip(kept.weights, short.weights, strict=True):
        assert_array_equal(ours[0], theirs[0])
        assert_array_equal(ours[1], theirs[1])


def test_the_best_evaluation_of_these_trials_is_not_the_last():
    """Otherwise the test above would say nothing."""
    for config in RISING:
        losses = [e.metrics["loss/val"] for e in fit([config], DATA, seed=2)[0].history]
        assert min(losses) < losses[-1]


def test_the_first_of_equally_good_evaluations_is_kept():
    """With an accuracy that never changes, the network of the first evaluation is the trial's."""
    config = TrainConfig(hidden_sizes=(4,), eta=1e-6, batch_size=10, epochs=4)
    (kept,) = fit([config], DATA, keep=Keep("accuracy/val", maximise=True))
    (short,) = fit([replace(config, epochs=1)], DATA)
    assert len({e.metrics["accuracy/val"] for e in kept.history}) == 1
    assert_array_equal(kept.weights[0][0], short.weights[0][0])


def test_the_last_picture_is_of_the_weights_that_are_kept():
    """The pictures are of the start, the middle and the best evaluation, under its step."""
    config = replace(RISING[0], hidden_sizes=(130,))
    (state,), (progress,) = advance([start(config, DATA, (2, 0), keep=KEEPS[2])], DATA, 12)
    accuracies = [e.metrics["accuracy/val"] for e in progress.evaluations]
    best = 1 + accuracies.index(max(accuracies))
    assert best not in (6, 12)
    assert [s.step for s in progress.snapshots] == [0, 6, best]
    assert_array_equal(progress.snapshots[-1].weights, state.weights[0][0][:, :100])


def test_patience_and_the_best_evaluation_agree():
    """With patience, the weights are those from before the evaluations that brought nothing."""
    config = replace(RISING[0], epochs=40, patience=3, eval_every=2)
    (kept,) = fit([config], DATA, seed=2, keep=KEEPS[1])
    best = kept.history[-4]
    assert min(e.metrics["loss/val"] for e in kept.history) == best.metrics["loss/val"]
    assert best.update < config.epochs * 5 - 6
    loss, accuracy, _ = reference_evaluation(kept.weights, "relu", DATA.validation)
    assert (loss, accuracy) == pytest.approx((best.metrics["loss/val"], best.metrics["accuracy/val"]), rel=1e-5)


def test_a_trial_that_diverges_after_its_best_has_no_test_figures():
    """What diverged is no result, however good it was before."""
    config = TrainConfig(
        hidden_sizes=(9,), eta=1e30, eta_min=1e-3, schedule="cyclical", n_s=10**6, batch_size=10, epochs=4
    )
    (result,) = fit([config], DATA, keep=KEEPS[1])
    assert result.diverged is not None
    assert result.test is None


def test_a_slice_may_end_at_any_update():
    """A fraction of an epoch is so many updates, and the parts are together the whole."""
    config = TrainConfig(hidden_sizes=(6,), eta=0.1, batch_size=10, epochs=2, eval_every=3)
    (whole,) = fit([config], DATA)
    state, seen = start(config, DATA, (0, 0), (0,)), []
    for updates in (3, 1, 5, 1):
        (state,), (progress,) = advance([state], DATA, updates / 5)
        seen += [(state.update, e.step) for e in progress.evaluations]
    assert seen == [(3, 3), (9, 6), (9, 9), (10, 10)]
    assert_array_equal(state.weights[0][0], whole.weights[0][0])


# Endings and curves ------------------------------------------------------------------------------------------


def test_epochs_and_updates_end_where_they_say():
    """50 examples in batches of 16 are 4 updates an epoch; 6 updates end at epoch 1.5, with a point at each."""
    by_epochs, by_updates = fit(
        [TrainConfig(batch_size=16, epochs=2), TrainConfig(batch_size=16, epochs=None, updates=6)], DATA
    )
    assert [(e.step, e.update, e.epoch) for e in by_epochs.history] == [(1, 4, 1.0), (2, 8, 2.0)]
    assert [(e.step, e.update, e.epoch) for e in by_updates.history] == [(1, 4, 1.0), (2, 6, 1.5)]


def test_eval_every_counts_updates_and_always_sees_the_end():
    """A point every three updates and one at the last; trials beside it keep their own rhythm."""
    often, rarely = fit(
        [TrainConfig(batch_size=16, epochs=2, eval_every=3), TrainConfig(batch_size=16, epochs=2)], DATA
    )
    assert [(e.step, e.update) for e in often.history] == [(3, 3), (6, 6), (8, 8)]
    assert [(e.step, e.update) for e in rarely.history] == [(1, 4), (2, 8)]


def test_the_curves_show_the_learning_rate_that_was_used():
    """eta is that of the last update before the point."""
    (result,) = fit([TrainConfig(batch_size=16, epochs=2, eta=0.4, schedule="step", decay=0.5)], DATA)
    assert [e.metrics["eta"] for e in result.history] == pytest.approx([0.4, 0.2])


@pytest.mark.parametrize("company", [0, 3])
def test_a_diverging_trial_stops_alone_with_its_reason(company):
    """A loss that is not finite ends the trial within the slice, says so, and leaves its neighbours their bits."""
    wild = TrainConfig(hidden_sizes=(9,), eta=1e30, epochs=4, batch_size=10)
    tame = [TrainConfig(hidden_sizes=(5 + k,), eta=0.01, epochs=4, batch_size=10) for k in range(company)]
    first = [start(c, DATA, (0, k)) for k, c in enumerate([wild, *tame])]
    states, progress = advance(first, DATA, 4)
    assert states[0].finished
    assert states[0].diverged is not None
    assert states[0].diverged.startswith("diverged: the ")
    assert states[0].update < 20
    assert progress[0].test is None
    for k, state in enumerate(states[1:], 1):
        assert state.diverged is None
        assert state.update == 20
        (lonely,), _ = advance([first[k]], DATA, 4)
        if blas_is_exact():
            assert_array_equal(lonely.weights[0][0], state.weights[0][0])
        else:
            assert_allclose(lonely.weights[0][0], state.weights[0][0], rtol=1e-3, atol=1e-5)


def test_patience_stops_after_evaluations_without_a_lower_validation_loss():
    """With the loss bound to rise from the start, patience 2 ends the trial after three evaluations."""
    data = dataset(examples=20)
    y = (data.validation.y + 1) % 3  # what is learnt is wrong here
    data = replace(data, validation=replace(data.validation, y=y))
    patient, stubborn = fit(
        [TrainConfig(hidden_sizes=(), eta=0.5, batch_size=10, epochs=20, patience=p) for p in (2, None)], data
    )
    losses = [e.metrics["loss/val"] for e in stubborn.history]
    assert losses == sorted(losses)
    assert len(patient.history) == 3
    assert len(stubborn.history) == 20
    assert patient.test is not None


def test_pictures_of_the_first_layer_are_taken_at_start_middle_and_end():
    """Three snapshots of at most 100 units, whatever the rhythm of the evaluations."""
    for rhythm, steps in (({}, [0, 2, 4]), ({"eval_every": 2}, [0, 8, 16]), ({"epochs": 1}, [0, 1])):
        config = TrainConfig(hidden_sizes=(130,), batch_size=16, **{"epochs": 4, **rhythm})
        (state,), (progress,) = advance([start(config, DATA, (0,))], DATA, 4)
        assert [s.step for s in progress.snapshots] == steps
        assert_allclose(progress.snapshots[-1].weights, state.weights[0][0][:, :100], rtol=1e-6)


def test_time_is_shared_out_by_cost():
    """Seconds of a group add up to the clock's, the larger network taking the larger part."""
    ticks = iter(range(10_000))
    configs = [TrainConfig(hidden_sizes=(h,), batch_size=10, epochs=2) for h in (10, 30)]
    states, _ = advance([start(c, DATA, (0,)) for c in configs], DATA, 2, clock=lambda: float(next(ticks)))
    small, large = (s.seconds for s in states)
    assert small + large == pytest.approx(2)  # one tick per epoch
    assert large / small == pytest.approx(configs[1].cost(12, 3) / configs[0].cost(12, 3))


# Learning ----------------------------------------------------------------------------------------------------


def overfits(x, y, classes, **settings):
    """Training accuracy after as many epochs as it takes to know 100 examples by heart."""
    data = Dataset.from_arrays((x, y), (x[:10], y[:10]), classes=[str(c) for c in range(classes)], normalise="standard")
    config = TrainConfig(hidden_sizes=(50,), batch_size=10, epochs=60, curves="full", **settings)
    return fit([config], data)[0].history[-1].metrics["accuracy/train"]


def test_a_hundred_digits_are_learnt_by_heart():
    """Experiment B1 on the handwritten digits: without regularisation, 100 % training accuracy."""
    digits = read_digits()
    assert overfits(digits.x[:100], digits.y[:100], 10, eta=0.1) == 1.0


def test_a_hundred_photographs_are_learnt_by_heart():
    """Experiment B1 on CIFAR-10: without regularisation, 100 % training accuracy."""
    folder = Path(os.environ.get("SIEVE_DATA_DIR", Path(__file__).resolve().parents[2] / "shared" / "cifar10"))
    path = next((p for p in folder.glob("**/data_batch_1*") if p.is_file()), None)
    if path is None:
        pytest.skip(f"no CIFAR-10 in {folder}; set SIEVE_DATA_DIR")
    x, y = parse_batch(path, path.read_bytes())
    assert overfits(x[:100], np.array(y[:100]), 10, eta=0.01) == 1.0


def test_states_can_be_copied_deeply():
    """A copied state goes the same way as its original."""
    state = start(TrainConfig(hidden_sizes=(6,), dropout=0.2, batch_size=10), DATA, (1,))
    (a,), _ = advance([copy.deepcopy(state)], DATA, 1)
    (b,), _ = advance([state], DATA, 1)
    assert_array_equal(a.weights[0][0], b.weights[0][0])
