"""A study file as an objective for plain `study.optimize`, in a notebook or beside code of one's own.

spec = study.load(Path("studies/quickstart.yaml"))
optuna.create_study(direction="maximize").optimize(objective(spec), n_trials=20)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import optuna

from core.data import Dataset
from core.train import TrainConfig, advance, start
from search.datasets import open_dataset
from search.settings import Settings
from search.study import Choice, StudySpec


def suggest(trial: optuna.Trial, spec: StudySpec) -> TrainConfig:
    """Let the study's sampler choose a point of the space of `spec`; its parameters have the names of files and UIs."""
    params: dict[str, Any] = {}
    for name, d in spec.dimensions.items():
        if isinstance(d, Choice):
            params[name] = trial.suggest_categorical(name, d.choices)
        elif d.integer:
            params[name] = trial.suggest_int(name, int(d.low), int(d.high), log=d.log)
        else:
            params[name] = trial.suggest_float(name, d.low, d.high, log=d.log)
    return spec.config(params)


def objective(spec: StudySpec, data: Dataset | None = None) -> Callable[[optuna.Trial], float]:
    """Train one trial epoch by epoch and return the metric of `spec`; reports to the study's pruner on the way.

    Raises optuna.TrialPruned when the pruner says so, or when training diverged. The trial's test figures are
    user attributes, of the evaluation that the value is of; they are never part of the value.
    """
    dataset, notes = (data, []) if data else open_dataset(spec.dataset, Settings.from_environment())
    for note in notes:
        warnings.warn(note, stacklevel=2)

    def train(trial: optuna.Trial) -> float:
        state = start(suggest(trial, spec), dataset, (spec.seed, trial.number), (spec.seed, 0), spec.keep)
        history, test = [], None
        while not state.finished:
            (state,), (progress,) = advance([state], dataset, 1)
            history += progress.evaluations
            test = progress.test
            for evaluation in progress.evaluations:
                trial.report(spec.value([evaluation]), evaluation.step)
            if not state.finished and trial.should_prune():
                raise optuna.TrialPruned
        if state.diverged:
            trial.set_user_attr("reason", state.diverged)
            raise optuna.TrialPruned(state.diverged)
        for kind, value in (test or {}).items():
            trial.set_user_attr(f"test_{kind}", value)
        return spec.value(history)

    return train
