"""A study file as an objective for plain `study.optimize`, with any sampler, pruner and storage of Optuna."""

import optuna

from search import study
from search.objective import objective

SPEC = """
name: from-python
dataset: {name: digits, train: 500, validation: 200}
base: {batch_size: 50, epochs: 5, momentum: 0.9}
space:
  lambda: {low: 1e-6, high: 1e-1, log: true}
  eta: {low: 1e-3, high: 0.5, log: true}
  hidden_sizes: [[20], [50]]
search: {method: random}
"""

optuna.logging.set_verbosity(optuna.logging.WARNING)
found = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=1))
found.optimize(objective(study.loads(SPEC)), n_trials=10)
print(f"validation accuracy {found.best_value:.2f} with {found.best_params}")
