"""Update rules and schedules against PyTorch, scikit-learn and arithmetic by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from core import optim
from core.network import initial_layers, load_member, populate, save_member, shape_key
from core.train import TrainConfig, step

STEPS, BATCH, INPUTS, CLASSES = 4, 6, 5, 3

sizes = st.lists(st.integers(1, 5), max_size=3).map(tuple)
rules = st.one_of(
    st.just({}),
    st.sampled_from([{"momentum": 0.9}, {"momentum": 0.5, "nesterov": True}]),
    st.builds(
        lambda beta1, beta2, epsilon: {"optimizer": "adam", "beta1": beta1, "beta2": beta2, "epsilon": epsilon},
        st.sampled_from([0.0, 0.9]),
        st.sampled_from([0.9, 0.999]),
        st.sampled_from([1e-8, 1e-3]),
    ),
)
configs = st.builds(
    lambda rule, **rest: TrainConfig(**rule, **rest),
    rules,
    hidden_sizes=sizes,
    activation=st.sampled_from(["relu", "sigmoid", "tanh"]),
    lam=st.sampled_from([0.0, 0.01, 0.4]),
    l2_scale=st.sampled_from([1.0, 0.5]),
    eta=st.sampled_from([0.01, 0.3]),
)


def draw(seed, config):
    """Float64 weights of one network with biases that are not zero."""
    rng = np.random.default_rng(seed)
    layers = initial_layers(config, INPUTS, CLASSES, rng)
    return [(w.astype(float), rng.normal(size=b.shape)) for w, b in layers]


def batches_of(seed):
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(BATCH, INPUTS)), rng.integers(CLASSES, size=BATCH)) for _ in range(STEPS)]


def trained(found, networks, batches, etas):
    """Our weights after a step per batch; update t has the learning rates etas[t]."""
    order = sorted(range(len(found)), key=lambda k: shape_key(found[k]))
    population = populate([found[k] for k in order], INPUTS, CLASSES, least_columns=0, memory=2, dtype=float)
    nothing = [[(np.zeros_like(w), np.zeros_like(b)) for w, b in layers] for layers in networks]
    for row, k in enumerate(order):
        load_member(population, row, networks[k], 1.0, [nothing[k], nothing[k]])
    own = np.array([[etas[t][k] for k in order] for t in range(len(batches))])
    rates = optim.rates([found[k] for k in order], own, np.arange(len(batches)))
    for (x, y), row in zip(batches, rates, strict=True):
        step(population, x, y, len(y), row)
    result = [[]] * len(found)
    for row, k in enumerate(order):
        ((w, b), *rest), scale, _ = save_member(population, row, 0)
        result[k] = [(w * scale, b), *rest]
    return result


def torch_trained(config, layers, batches, etas):
    """PyTorch's weights after the same steps, by its own autograd and optimisers."""
    torch = pytest.importorskip("torch", reason="the comparison with PyTorch needs torch: pip install -e .[torch]")
    layers = [(torch.tensor(w, requires_grad=True), torch.tensor(b, requires_grad=True)) for w, b in layers]
    groups = [
        {"params": [w for w, _ in layers], "weight_decay": 2 * config.l2_scale * config.lam},
        {"params": [b for _, b in layers], "weight_decay": 0},
    ]
    if config.optimizer == "adam":
        optimiser = torch.optim.Adam(groups, lr=1, betas=(config.beta1, config.beta2), eps=config.epsilon)
    else:
        optimiser = torch.optim.SGD(groups, lr=1, momentum=config.momentum, nesterov=config.nesterov)
    for (x, y), eta in zip(batches, etas, strict=True):
        a = torch.tensor(x)
        for w, b in layers[:-1]:
            a = getattr(torch, config.activation)(a @ w + b)
        w, b = layers[-1]
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(a @ w + b, torch.tensor(y)).backward()
        for group in optimiser.param_groups:
            group["lr"] = eta
        optimiser.step()
    return [(w.detach().numpy(), b.detach().numpy()) for w, b in layers]


@settings(max_examples=50, deadline=None)
@given(st.lists(configs, min_size=1, max_size=5), st.integers(0, 2**32))
def test_every_rule_moves_weights_as_pytorch_does(found, seed):
    """A mixed population takes the steps that PyTorch takes one network at a time, at changing learning rates."""
    networks = [draw([seed, k], config) for k, config in enumerate(found)]
    batches = batches_of(seed)
    etas = [[c.eta / (1 + t) for c in found] for t in range(STEPS)]
    ours = trained(found, networks, batches, etas)
    for k, config in enumerate(found):
        theirs = torch_trained(config, networks[k], batches, [own[k] for own in etas])
        for (w, b), (w1, b1) in zip(ours[k], theirs, strict=True):
            # Adam divides by the root of a mean square: a gradient of 1e-9 or so has no digits to compare.
            assert_allclose(w, w1, rtol=1e-6, atol=1e-7)
            assert_allclose(b, b1, rtol=1e-6, atol=1e-7)


@settings(max_examples=15, deadline=None)
@given(
    sizes,
    st.sampled_from([("relu", "relu"), ("sigmoid", "logistic"), ("tanh", "tanh")]),
    st.sampled_from([0.0, 0.01, 0.3]),
    st.integers(0, 2**32 - 1),
)
def test_sgd_with_weight_decay_moves_weights_as_scikit_learn_does(hidden, activation, lam, seed):
    """With alpha = 2 * lambda * batch_size, MLPClassifier.partial_fit takes the same steps."""
    neural = pytest.importorskip("sklearn.neural_network")
    ours, theirs = activation
    config = TrainConfig(hidden_sizes=hidden, activation=ours, lam=lam, eta=0.2)
    rival = neural.MLPClassifier(
        hidden_layer_sizes=hidden,
        activation=theirs,
        solver="sgd",
        alpha=2 * lam * BATCH,
        batch_size=BATCH,
        learning_rate_init=0.2,
        momentum=0.0,
        random_state=seed,
    )
    batches = batches_of(seed)
    rival.partial_fit(*batches[0], classes=range(CLASSES))
    layers = [(w.copy(), b.copy()) for w, b in zip(rival.coefs_, rival.intercepts_, strict=True)]
    for x, y in batches[1:]:
        rival.partial_fit(x, y)
    (moved,) = trained([config], [layers], batches[1:], [[0.2]] * STEPS)
    for (w, b), w1, b1 in zip(moved, rival.coefs_, rival.intercepts_, strict=True):
        assert_allclose(w, w1, rtol=1e-8, atol=1e-10)
        assert_allclose(b, b1, rtol=1e-8, atol=1e-10)


def test_two_steps_of_each_rule_by_hand():
    """One weight, gradients 1 and 2, eta 0.1: the numbers of the formulas."""
    moved = {}
    for name, rule in optim.UPDATE_RULES.items():
        config = TrainConfig(
            optimizer="adam" if name == "adam" else "sgd",
            momentum={"momentum": 0.9, "nesterov": 0.9}.get(name, 0.0),
            nesterov=name == "nesterov",
            eta=0.1,
        )
        assert config.update_rule == name
        w, memory = np.array([1.0]), [np.zeros(1) for _ in range(rule.remembers)]
        for t, g in enumerate((1.0, 2.0)):
            (row,) = optim.rates([config], np.array([[0.1]]), np.array([t]))
            rule.apply(w, np.array([g]), memory, optim.Rates(*row))
        moved[name] = w[0]
    assert moved["sgd"] == pytest.approx(1 - 0.1 * 1 - 0.1 * 2)
    assert moved["momentum"] == pytest.approx(1 - 0.1 * 1 - 0.1 * (0.9 * 1 + 2))
    assert moved["nesterov"] == pytest.approx(1 - 0.1 * 1.9 - 0.1 * (2 + 0.9 * 2.9))
    m, v = (0.9 * 0.1 + 0.1 * 2) / (1 - 0.9**2), (0.999 * 0.001 + 0.001 * 4) / (1 - 0.999**2)
    assert moved["adam"] == pytest.approx(1 - 0.1 - 0.1 * m / (math.sqrt(v) + 1e-8), rel=1e-6)


def test_weight_decay_alone_shrinks_exponentially_through_every_renormalisation():
    """Where no gradient flows, weights are multiplied by 1 - 2 eta lambda per update, however small they get."""
    config = TrainConfig(hidden_sizes=(), lam=0.2, eta=0.5)
    w = np.ones((INPUTS, CLASSES))
    steps = 20
    x, y = np.zeros((BATCH, INPUTS)), np.zeros(BATCH, int)
    (((moved, _),),) = trained([config], [[(w, np.zeros(CLASSES))]], [(x, y)] * steps, [[0.5]] * steps)
    assert_allclose(moved, 0.8**steps, rtol=1e-12)
    (((moved, _),),) = trained([config], [[(w, np.zeros(CLASSES))]], [(x, y)], [[2.5]])
    assert_allclose(moved, 0, atol=1e-12)  # eta * 2 lambda = 1: nothing is left, and nothing divided by it


def test_biases_are_not_penalised():
    """Weight decay leaves biases alone, in every rule."""
    for rule in ({}, {"momentum": 0.9}, {"optimizer": "adam"}):
        config = TrainConfig(hidden_sizes=(2,), lam=10.0, eta=0.01, **rule)
        layers = [(np.zeros((INPUTS, 2)), np.ones(2)), (np.zeros((2, CLASSES)), np.full(CLASSES, 7.0))]
        y = np.arange(BATCH) % CLASSES  # every class equally often: no gradient by the biases either
        (moved,) = trained([config], [layers], [(np.ones((BATCH, INPUTS)), y)], [[0.01]])
        assert_allclose(moved[0][1], 1, atol=1e-9)
        assert_allclose(moved[1][1], 7, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "etas"),
    [
        ({"schedule": "constant"}, {0: 0.8, 999: 0.8}),
        (
            {"schedule": "exponential", "decay": 0.5},
            {0: 0.8, 9: 0.8, 10: 0.8 * math.exp(-0.5), 35: 0.8 * math.exp(-1.5)},
        ),
        ({"schedule": "step", "decay": 0.5}, {0: 0.8, 9: 0.8, 10: 0.4, 19: 0.4, 20: 0.2, 30: 0.1}),
        (
            {"schedule": "cyclical", "eta_min": 0.2, "n_s": 4},
            {0: 0.2, 1: 0.35, 2: 0.5, 4: 0.8, 5: 0.65, 7: 0.35, 8: 0.2, 12: 0.8, 15: 0.35},
        ),
        ({"schedule": "cosine", "eta_min": 0.2}, {0: 0.8, 25: 0.5 + 0.3 * math.cos(math.pi / 4), 50: 0.5, 100: 0.2}),
    ],
)
def test_schedules_have_the_values_of_their_formulas(settings, etas):
    """Learning rates at chosen updates, ten updates to the epoch, a hundred in all."""
    config = TrainConfig(eta=0.8, **settings)
    found = optim.SCHEDULES[config.schedule](config, np.array(list(etas)), 10, 100)
    assert_allclose(found, list(etas.values()), rtol=1e-12)


def test_the_published_cycle_starts_low_peaks_after_n_s_and_ends_low():
    """DD2424: from 1e-5 up to 1e-1 in 500 updates and down in 500."""
    config = TrainConfig(eta=1e-1, eta_min=1e-5, schedule="cyclical", n_s=500)
    eta = optim.SCHEDULES["cyclical"](config, np.arange(1001), 100, 1000)
    assert eta[0] == pytest.approx(1e-5)
    assert eta.argmax() == 500
    assert eta[500] == pytest.approx(1e-1)
    assert eta[1000] == pytest.approx(1e-5)
    assert_allclose(np.diff(eta)[:500], (1e-1 - 1e-5) / 500)
    assert_allclose(np.diff(eta)[500:], -(1e-1 - 1e-5) / 500)
