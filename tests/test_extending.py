"""One of everything that can be added: each is one function and one entry in a table, as CONTRIBUTING.md says."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import optuna
import pytest

from core import data, optim
from core.data import Source
from core.network import Array
from core.optim import Memory, Rates, UpdateRule
from core.train import TrainConfig
from search import run, study
from search.errors import StudyFileError
from search.outcome import Outcome, open_study
from search.settings import Settings
from search.study import StudySpec

Spec = Callable[..., StudySpec]
ONE = {"method": "random", "trials": 3}


def lion(w: Array, g: Array, memory: Memory, r: Rates) -> None:
    """Chen et al. 2023: the sign of a mean of gradients."""
    (m,) = memory
    w -= r.eta * np.sign(r.beta1 * m + (1 - r.beta1) * g)
    m *= r.beta2
    m += (1 - r.beta2) * g


def warmup(c: TrainConfig, t: Array, per_epoch: int, total: int) -> Array:
    return c.eta * np.minimum((t + 1) / per_epoch, 1.0)


def read_csv(path: Path) -> Source:
    """Rows of pixels with the label last, without a header."""
    table = np.loadtxt(path, delimiter=",", dtype=np.float32)
    x, y = np.ascontiguousarray(table[:, :-1]), table[:, -1].astype(np.int64)
    return Source("csv", x, y, data.numbered(int(y.max())), None, {"train": (0, len(x))}, (path,))


def evolution(seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.NSGAIISampler(population_size=3, seed=seed)


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> Callable[[StudySpec], Outcome]:
    """Runs a study with a worker in this process, where the additions of the test are."""
    monkeypatch.setattr(run, "open_executor", lambda address, workers: (ThreadPoolExecutor(1), lambda: 1))
    return lambda spec: run.launch(spec, settings, publish=False)


def test_an_optimiser(monkeypatch: pytest.MonkeyPatch, launch: Callable[[StudySpec], Outcome], quick: Spec) -> None:
    """A new update rule is a word of study files, searched beside the others, and learns the digits."""
    monkeypatch.setitem(optim.UPDATE_RULES, "lion", UpdateRule(lion, 1))
    space = {"optimizer": ["lion", "sgd"]}
    base = {"epochs": 6, "batch_size": 50, "eta": 0.003, "hidden_sizes": [16]}
    outcome = launch(quick(space=space, base=base, search={"method": "grid"}, confirm=False))
    values = {attempt.params["optimizer"]: attempt.value for attempt in outcome.table}
    assert values["lion"] > 0.7  # chance is 0.1
    assert values["lion"] != values["sgd"]


def test_a_schedule(monkeypatch: pytest.MonkeyPatch, launch: Callable[[StudySpec], Outcome], quick: Spec) -> None:
    """A new schedule is a word of study files, and a study that trains by it ends with a choice."""
    monkeypatch.setitem(optim.SCHEDULES, "warmup", warmup)
    base = {"epochs": 2, "batch_size": 50, "momentum": 0.9, "schedule": "warmup"}
    outcome = launch(quick(base=base, search=ONE, confirm=False))
    assert outcome.chosen.mean > 0.2


def test_a_dataset(
    monkeypatch: pytest.MonkeyPatch, launch: Callable[[StudySpec], Outcome], quick: Spec, tmp_path: Path
) -> None:
    """A new reader is a dataset of study files; its images are split, normalised and stored like any other's."""
    monkeypatch.setitem(data.READERS, "csv", read_csv)
    digits = data.read_digits()
    np.savetxt(tmp_path / "digits.csv", np.column_stack([digits.x, digits.y])[:400], fmt="%d", delimiter=",")
    dataset = {"name": "csv", "path": str(tmp_path / "digits.csv"), "validation": 100}
    outcome = launch(quick(dataset=dataset, search=ONE, confirm=False))
    assert outcome.chosen.mean > 0.2
    assert outcome.test_accuracy is None


def test_a_search_method(
    monkeypatch: pytest.MonkeyPatch, launch: Callable[[StudySpec], Outcome], quick: Spec, settings: Settings
) -> None:
    """A function of the seed that makes an Optuna sampler is a method of study files, once it has a name."""
    search = {"method": "evolution", "trials": 6, "generation": 3}
    with pytest.raises(StudyFileError, match="'cmaes', got 'evolution'"):
        quick(search=search)
    monkeypatch.setitem(study.SAMPLERS, "evolution", f"{__name__}:evolution")
    outcome = launch(quick(search=search, confirm=False))
    assert len(outcome.table) == 6
    assert open_study("quick", settings).spec.search.method == "evolution"
