"""Coarse to fine as a sampler of Optuna, on a function that has nothing to do with networks."""

import math

import optuna

from search.samplers import CoarseToFineSampler


def valley(trial: optuna.Trial) -> float:
    """Least, 0, at rate = 0.01 and angle = 2."""
    rate, angle = trial.suggest_float("rate", 1e-5, 1.0, log=True), trial.suggest_float("angle", 0.0, 10.0)
    return (math.log10(rate) + 2) ** 2 + (angle - 2) ** 2


optuna.logging.set_verbosity(optuna.logging.WARNING)
found = optuna.create_study(sampler=CoarseToFineSampler(n_trials=64, seed=1))
found.optimize(valley, n_trials=64)
print(f"least value {found.best_value:.3f} with {found.best_params}")
