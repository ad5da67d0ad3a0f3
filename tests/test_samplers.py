import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    RelativeSamplerTestCase,
    SingleOnlySamplerTestCase,
)

from search.plan import Finished, Proposal, propose
from search.samplers import NEEDS, CoarseToFineSampler, asker
from search.study import SAMPLERS, restore

SPACE: dict[str, Any] = {
    "x": FloatDistribution(1e-5, 1.0, log=True),
    "n": IntDistribution(1, 9, step=2),
    "q": FloatDistribution(-1.0, 1.0, step=0.25),
    "c": CategoricalDistribution(["a", None, 1, True]),
}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.mark.filterwarnings("default")  # Optuna's own cases
class TestOptunasSuite(BasicSamplerTestCase, RelativeSamplerTestCase, SingleOnlySamplerTestCase):
    """Coarse to fine passes the cases that Optuna's own samplers must pass."""

    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: CoarseToFineSampler(n_trials=12, seed=0)


def suggest(trial: optuna.Trial) -> float:
    """Best at x = 1e-3, n = 7, q = 0.5, c = None."""
    x = math.log10(trial.suggest_float("x", 1e-5, 1.0, log=True))
    n = trial.suggest_int("n", 1, 9, step=2)
    q = trial.suggest_float("q", -1.0, 1.0, step=0.25)
    c = trial.suggest_categorical("c", ["a", None, 1, True])
    return (x + 3) ** 2 + 0.02 * (n - 7) ** 2 + (q - 0.5) ** 2 + (c is not None)


def optimised(seed: int | None = 1, sign: int = 1, n: int = 36, **more: Any) -> optuna.Study:
    study = optuna.create_study(
        direction="minimize" if sign > 0 else "maximize", sampler=CoarseToFineSampler(n, seed=seed), study_name="s"
    )
    study.optimize(lambda trial: sign * suggest(trial), n_trials=n, **more)
    return study


def test_same_seed_same_trials() -> None:
    """Equal seeds repeat every trial, minimised or maximised alike; another seed does not; the name is the default."""
    params = [trial.params for trial in optimised().trials]
    assert params == [trial.params for trial in optimised(sign=-1).trials]
    assert params != [trial.params for trial in optimised(seed=2).trials]
    assert [t.params for t in optimised(seed=None).trials] == [t.params for t in optimised(seed=None).trials]


def test_later_stages_come_nearer() -> None:
    """The last stage lies around the optimum, in a quarter of the range of x, and the full range stays recorded."""
    study = optimised(n=36)  # six stages of six
    first, last = study.trials[:6], study.trials[30:]
    decades = [math.log10(t.params["x"]) for t in last]
    assert max(decades) - min(decades) <= 0.25 * 5
    assert abs(np.mean(decades) + 3) < 0.7
    assert np.mean([t.value for t in last]) < np.mean([t.value for t in first]) / 2
    assert all(t.distributions["x"] == SPACE["x"] for t in study.trials)


def test_first_stage_covers_every_parameter() -> None:
    """The first eight of 64 trials fall into eight different eighths of each parameter."""
    study = optuna.create_study(sampler=CoarseToFineSampler(64, seed=0))
    study.optimize(lambda t: sum(t.suggest_float(name, 0, 1) for name in "abcde"), n_trials=8)
    for name in "abcde":
        assert sorted(int(t.params[name] * 8) for t in study.trials) == list(range(8))


def test_a_study_goes_on_after_its_budget() -> None:
    """Trials beyond the budget are new points of the last box."""
    study = optimised(n=9)
    study.optimize(suggest, n_trials=6)
    assert len({str(t.params) for t in study.trials[6:]}) > 3
    assert len(study.trials) == 15


def test_failed_trials_do_not_block() -> None:
    """Failed and pruned trials are no part of any box, and a study of nothing else still goes on."""

    def fail(trial: optuna.Trial) -> float:
        suggest(trial)
        if trial.number % 2:
            raise optuna.TrialPruned
        return math.nan

    study = optuna.create_study(sampler=CoarseToFineSampler(16, seed=0))
    study.optimize(fail, n_trials=16)
    assert len(study.trials) == 16
    assert min(t.params["x"] for t in study.trials[12:]) < 1e-3 < max(t.params["x"] for t in study.trials[12:])


def test_threads_share_a_study() -> None:
    """With n_jobs each trial is still a point of its own, and a stage's points are those of a single thread."""
    one, two = (optimised(n_jobs=jobs).trials for jobs in (1, 2))
    assert len({str(t.params) for t in two}) == len({str(t.params) for t in one})
    by_number = {t.number: t.params for t in two}
    assert [by_number[k] for k in range(6)] == [t.params for t in one[:6]]


WORKER = """
import sys, optuna
sys.path.insert(0, sys.argv[2])
from test_samplers import suggest
from search.samplers import CoarseToFineSampler
optuna.logging.set_verbosity(optuna.logging.ERROR)
study = optuna.load_study(study_name="shared", storage=sys.argv[1], sampler=CoarseToFineSampler(16, seed=3))
study.optimize(suggest, n_trials=8)
"""


@pytest.mark.slow
def test_processes_share_a_study(tmp_path: Path) -> None:
    """Two processes with equal seeds draw no trial twice, and the first stage is the one a single process draws."""
    url = f"sqlite:///{tmp_path}/o.db"
    study = optuna.create_study(study_name="shared", storage=url)
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, url, str(Path(__file__).parent)], cwd=Path.cwd())
        for _ in range(2)
    ]
    assert [worker.wait(120) for worker in workers] == [0, 0]
    alone = optuna.create_study(sampler=CoarseToFineSampler(16, seed=3))
    alone.optimize(suggest, n_trials=4)
    assert [t.params for t in study.trials[:4]] == [t.params for t in alone.trials]
    assert len({str(t.params) for t in study.trials}) == len(study.trials) == 16


def test_conditional_parameters() -> None:
    """A parameter that only some trials have is narrowed by those that have it."""

    def conditional(trial: optuna.Trial) -> float:
        if trial.suggest_categorical("kind", ["sgd", "adam"]) == "adam":
            return abs(trial.suggest_float("beta", 0.0, 1.0) - 0.9)
        return 0.3 + abs(trial.suggest_float("eta", 1e-4, 1.0, log=True) - 0.1)

    study = optuna.create_study(sampler=CoarseToFineSampler(49, seed=0))
    study.optimize(conditional, n_trials=49)
    late = [t.params["beta"] for t in study.trials[42:] if "beta" in t.params]
    assert late
    assert min(late) > 0.6
    assert study.best_trial.params["kind"] == "adam"


def test_parameters_of_a_single_value() -> None:
    """Parameters that have one value only are no obstacle at any stage."""
    study = optuna.create_study(sampler=CoarseToFineSampler(25, seed=0))
    study.optimize(lambda t: suggest(t) + t.suggest_float("f", 1, 1) + t.suggest_int("i", 2, 2), n_trials=25)
    assert {(t.params["f"], t.params["i"]) for t in study.trials} == {(1.0, 2)}


@pytest.mark.parametrize("given", [{"n_trials": 0}, {"final_width": 0.0}, {"final_width": 1.5}, {"top": 0.0}])
def test_wrong_settings(given: dict[str, Any]) -> None:
    """A setting that makes no sense is refused by name."""
    with pytest.raises(ValueError, match=next(iter(given))):
        CoarseToFineSampler(**given)


def test_it_works_without_the_rest() -> None:
    """Importing the sampler loads neither the study files' packages nor MLflow."""
    code = (
        "import search.samplers, sys; print(sorted({'pydantic', 'yaml', 'mlflow', 'search.study'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


SPEC = {
    "name": "t",
    "dataset": "digits",
    "space": {"eta": {"low": 1e-4, "high": 1.0, "log": True}, "batch_size": {"low": 20, "high": 200}},
    "search": {"method": "tpe", "trials": 20, "generation": 4},
    "confirm": {"top": 2, "repeats": 2},
}
DISTRIBUTIONS = {"batch_size": IntDistribution(20, 200), "eta": FloatDistribution(1e-4, 1.0, log=True)}


def score(proposal: Proposal) -> float:
    """Best at eta = 0.1 and batch_size = 100; diverges above 0.5."""
    eta, batch = float(proposal.params["eta"]), float(proposal.params["batch_size"])
    return (
        -math.inf
        if eta > 0.5
        else -((math.log10(eta) + 1) ** 2) - ((batch - 100) / 100) ** 2 - proposal.slot.repeat / 9
    )


def search(method: str, restart: bool = False, trials: int = 20) -> list[Finished]:
    """The whole study, trial by trial; the process starts anew before each one if `restart`."""
    pytest.importorskip(NEEDS.get(method, "optuna"))
    spec = restore({**SPEC, "search": {"method": method, "trials": trials, "generation": 4}})
    ask, finished = asker(method, DISTRIBUTIONS, 7), list[Finished]()
    while todo := [p for p in propose(spec, finished, ask) if p.slot not in {f.slot for f in finished}]:
        finished.append(Finished(todo[-1].slot, todo[-1].params, score(todo[-1])))
        ask = asker(method, DISTRIBUTIONS, 7) if restart else ask
    return sorted(finished, key=lambda f: f.slot)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("method", ["tpe", "cmaes"])
def test_optunas_samplers_repeat_themselves(method: str) -> None:
    """One of Optuna's samplers gives the same study when it is killed and started again after every trial."""
    whole = search(method)
    assert len(whole) == 20 + 4
    assert whole == search(method, restart=True)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("method", SAMPLERS)
def test_optunas_samplers_learn(method: str) -> None:
    """The last third of the trials of one of Optuna's samplers is better than the first third."""
    scores = [f.score for f in search(method, trials=36) if f.slot.stage == 0]
    assert np.median(scores[-12:]) > np.median(scores[:12])
