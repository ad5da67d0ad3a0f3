"""The gradient check: that it passes, and that it would not if back-propagation were wrong."""

import importlib.util

import numpy as np
import pytest

from core import network
from core.gradcheck import check, numerical_gradient, relative_error
from core.train import TrainConfig


def test_every_activation_depth_and_lambda_passes():
    """All gradients agree within 1e-7 with differences and, where it is installed, within 1e-10 with PyTorch."""
    rows = check()
    cases = {(row.activation, len(row.hidden_sizes), row.lam > 0) for row in rows}
    assert cases == {(a, d, r) for a in ("relu", "sigmoid", "tanh") for d in range(4) for r in (False, True)}
    assert max(row.numeric for row in rows) < 1e-7
    if importlib.util.find_spec("torch") is None:
        pytest.skip("the comparison with PyTorch needs torch: pip install -e .[torch]")
    assert max(row.torch for row in rows) < 1e-10


@pytest.mark.parametrize("name", ["relu", "sigmoid", "tanh"])
def test_a_wrong_derivative_is_found(name, monkeypatch):
    """Each activation with the derivative of another fails the check, if it is used at all."""
    right = network.ACTIVATIONS[name]

    def wrong(g, a):
        right.backward(g, a)
        g *= 1.001

    monkeypatch.setitem(network.ACTIVATIONS, name, right._replace(backward=wrong))
    for row in check([TrainConfig(hidden_sizes=sizes, activation=name) for sizes in [(), (4,), (4, 3)]]):
        assert (row.numeric > 1e-4) == bool(row.hidden_sizes)


def test_the_numeric_gradient_of_a_polynomial_is_exact():
    """Up to fourth order, the differences have no error but rounding, and w is put back."""
    w = np.array([[0.5, -1.0], [2.0, 0.0]])
    was = w.copy()
    gradient = numerical_gradient(lambda: float((w**4).sum() + 3 * w[0, 1]), w)
    np.testing.assert_allclose(gradient, 4 * was**3 + [[0, 3], [0, 0]], rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(w, was)


def test_the_relative_error_is_that_of_the_reports():
    """|a - b| / max(epsilon, |a| + |b|), the largest of all."""
    assert relative_error(np.array([1.0, 3.0]), np.array([1.0, 1.0])) == 0.5
    assert relative_error(np.array([2e-7]), np.array([0.0])) == pytest.approx(0.2)
