"""Regret of what a search chooses, after 16, 32 and 64 trials: coarse to fine beside Optuna's own samplers.

    python tests/bench/bench_search.py [--out FOLDER] [--seeds 100] [--methods random,tpe] [--tuning] [--jobs 2]

Problems are four tables of real results of multi-layer perceptrons (HPOBench; the folder that holds them is
../shared/hpobench or SIEVE_HPOBENCH, without it they are left out) and ten functions. A trial draws one noisy
score. Without confirm the best score is chosen. With confirm a quarter of the budget trains the best
configurations again, and the best mean of these is chosen; this is the same for every method. Regret is
(best - true score of the choice) / (best - median of the space): 0 is perfect, 1 what a blind guess gives.

The rule of search/plan.py was tuned on even seeds; without --tuning the odd ones are reported. A hundred of
them, since thirty leave an error of 0.013 on the tables, as large as the differences at 32 and 64 trials.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, QMCSampler, RandomSampler

from search.plan import Finished, Slot, ranked, results, unit_points
from search.samplers import NEEDS, CoarseToFineSampler, cmaes, gp, tpe

CONFIRM = {16: (2, 2), 32: (4, 2), 64: (4, 4)}  # budget: configurations that are trained again, and how often
DRAWS = 20  # of the noise in confirm, for each search: the mean over them says the same with a smaller error
MOST = 3.0  # regret of a choice that diverges
GP_SEEDS = 30  # it takes a hundred times as long as the others
TABLES = ("australian", "car", "phoneme", "vehicle")
FOLDER = Path(os.environ.get("SIEVE_HPOBENCH", Path(__file__).parents[3] / "shared" / "hpobench"))

Params = Mapping[str, Any]
METHODS: dict[str, Callable[[int, int], BaseSampler]] = {  # of the trials to search with, and the seed
    "random": lambda n, seed: RandomSampler(seed=seed),
    "sobol": lambda n, seed: QMCSampler(scramble=True, seed=seed, warn_independent_sampling=False),
    "coarse-to-fine": lambda n, seed: CoarseToFineSampler(n, seed=seed),
    "tpe": lambda n, seed: tpe(seed),
    "cmaes": lambda n, seed: cmaes(seed),
    "gp": lambda n, seed: gp(seed),
}


@dataclass(frozen=True)
class Problem:
    """Something to maximise: its space, its true and its noisy score, and two marks on the scale of regret."""

    space: dict[str, BaseDistribution]
    true: Callable[[Params], float]
    noisy: Callable[[Params, np.random.Generator], float]
    best: float
    median: float

    def regret(self, params: Params) -> float:
        return min((self.best - self.true(params)) / (self.best - self.median), MOST)


def table(name: str) -> Problem:
    """A table of HPOBench; the values of each axis lie evenly on a logarithmic scale, so an index stands for them."""
    with np.load(FOLDER / f"{name}.npz") as file:
        scores = file["score"].astype(float)
    axes = ["l2", "batch_size", "depth", "lr", "width"]
    means = scores.mean(-1)

    def at(params: Params) -> tuple[int, ...]:
        return tuple(params[axis] for axis in axes)

    return Problem(
        space={axis: IntDistribution(0, n - 1) for axis, n in zip(axes, means.shape, strict=True)},
        true=lambda params: float(means[at(params)]),
        noisy=lambda params, rng: float(scores[at(params)][rng.integers(scores.shape[-1])]),
        best=float(means.max()),
        median=float(np.median(means)),
    )


# --- functions of the unit cube, each with its maximum -----------------------------------------------------------

X = np.ndarray
HARTMANN_A = np.array(
    [[10, 3, 17, 3.5, 1.7, 8], [0.05, 10, 17, 0.1, 8, 14], [3, 3.5, 1.7, 10, 17, 8], [17, 8, 0.05, 10, 0.1, 14]]
)
HARTMANN_P = 1e-4 * np.array(
    [
        [1312, 1696, 5569, 124, 8283, 5886],
        [2329, 4135, 8307, 3736, 1004, 9991],
        [2348, 1451, 3522, 2883, 3047, 6650],
        [4047, 8828, 8732, 5743, 1091, 381],
    ]
)
ROTATION = np.linalg.qr(np.random.default_rng(1).standard_normal((5, 5)))[0]


def branin(u: X) -> float:
    """Three equal maxima."""
    x, y = 15 * u[0] - 5, 15 * u[1]
    return float(
        -((y - 5.1 / (4 * np.pi**2) * x**2 + 5 / np.pi * x - 6) ** 2 + 10 * (1 - 1 / (8 * np.pi)) * np.cos(x) + 10)
    )


def border(u: X) -> float:
    """The maximum lies on the upper border of one axis and the lower border of another."""
    return float(-((1 - u[0]) + 2 * (u[1] - 0.3) ** 2 + 0.7 * u[2]))


def hartmann(u: X) -> float:
    """Six axes, four hills."""
    return float(np.array([1, 1.2, 3, 3.2]) @ np.exp(-(HARTMANN_A * (u - HARTMANN_P) ** 2).sum(-1)))


def rosenbrock(u: X) -> float:
    """A curved valley, on a log scale."""
    x = 3 * u - 1.5
    return float(-np.log1p((100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()))


def ackley(u: X) -> float:
    """A funnel under ripples."""
    x = (u - np.array([0.62, 0.35, 0.7, 0.44, 0.55])) * 20
    return float(20 * np.exp(-0.2 * np.sqrt((x**2).mean())) + np.exp(np.cos(2 * np.pi * x).mean()) - 20 - np.e)


def bowl(u: X) -> float:
    """Axes of unequal weight."""
    return float(-((u - np.array([0.2, 0.7, 0.55, 0.4])) ** 2 @ np.array([4, 2, 1, 0.3])))


def cliff(u: X) -> float:
    """Rises with the first axis up to an edge beyond which training diverges, as with a learning rate."""
    eta, lam, width = u
    edge = 0.75 - 0.2 * width
    if eta > edge:
        return -math.inf
    penalty = 2 * max(lam - 0.35, 0) ** 2 + 0.1 * max(0.35 - lam, 0) + 0.15 * (1 - width)
    return float(1 - 0.9 * np.exp(-4 * eta) - penalty - 0.15 * max(0, eta - edge + 0.08) / 0.08)


def rotated(u: X) -> float:
    """A long ellipse that lies across the axes."""
    return float(-((ROTATION @ (u - np.array([0.4, 0.6, 0.3, 0.7, 0.5]))) ** 2 @ np.array([1, 2, 4, 8, 16])))


def levy(u: X) -> float:
    """Ripples along every axis."""
    w = 1 + (20 * u - 10 - 1) / 4
    middle = ((w[:-1] - 1) ** 2 * (1 + 10 * np.sin(np.pi * w[:-1] + 1) ** 2)).sum()
    return float(-(np.sin(np.pi * w[0]) ** 2 + middle + (w[-1] - 1) ** 2 * (1 + np.sin(2 * np.pi * w[-1]) ** 2)))


def mixed(params: Params) -> float:
    """Two ranges along a valley, a third, a whole number, and a choice that moves the valley."""
    shift, centre = {"relu": (0.0, 0.3), "tanh": (0.05, 0.5), "sigmoid": (0.12, 0.6), "none": (0.3, 0.7)}[params["c"]]
    a, b = params["a"], params["b"]
    return -(
        1.5 * (a + b - 2 * centre) ** 2
        + 0.4 * (a - b) ** 2
        + 0.6 * (params["d"] - 0.8) ** 2
        + 0.1 * (params["n"] / 7 - 0.5) ** 2
        + shift
    )


FUNCTIONS: dict[str, tuple[Callable[[X], float], int, X, float]] = {  # function, axes, maximum, noise
    "branin": (branin, 2, np.array([(np.pi + 5) / 15, 2.275 / 15]), 0.0),
    "border": (border, 3, np.array([1, 0.3, 0]), 0.0),
    "hartmann": (hartmann, 6, np.array([0.20169, 0.150011, 0.476874, 0.275332, 0.311652, 0.6573]), 0.0),
    "rosenbrock": (rosenbrock, 4, np.full(4, 2.5 / 3), 0.0),
    "ackley": (ackley, 5, np.array([0.62, 0.35, 0.7, 0.44, 0.55]), 0.0),
    "noisy bowl": (bowl, 4, np.array([0.2, 0.7, 0.55, 0.4]), 0.25),
    "cliff": (cliff, 3, np.array([0.47, 0.35, 1]), 0.1),
    "rotated": (rotated, 5, np.array([0.4, 0.6, 0.3, 0.7, 0.5]), 0.1),
    "levy": (levy, 4, np.full(4, 0.55), 0.0),
}
UNSEEN = ("rotated", "levy")  # added after the rule was settled


def function(name: str) -> Problem:
    """A function by name; its noise is a normal deviation, as a part of best - median."""
    if name == "mixed":
        flat = FloatDistribution(0, 1)
        activations = CategoricalDistribution(["none", "relu", "sigmoid", "tanh"])
        space: dict[str, BaseDistribution] = {"a": flat, "b": flat, "d": flat, "n": IntDistribution(0, 7)}
        space["c"] = activations
        true, noise = mixed, 0.05
        best = mixed({"a": 0.3, "b": 0.3, "d": 0.8, "n": 3, "c": "relu"})
        sample = [
            mixed({"a": u[0], "b": u[1], "d": u[2], "n": int(8 * u[3]), "c": activations.choices[int(4 * u[4])]})
            for u in unit_points(1 << 12, 5, 0)
        ]
    else:
        f, d, maximum, noise = FUNCTIONS[name]
        space = {f"x{k}": FloatDistribution(0, 1) for k in range(d)}

        def true(params: Params) -> float:
            return f(np.array([params[key] for key in space]))

        best = f(maximum)
        sample = [f(u) for u in unit_points(1 << 12, d, 0)]
    median = float(np.median([value for value in sample if math.isfinite(value)]))
    deviation = noise * (best - median)
    return Problem(space, true, lambda p, rng: true(p) + deviation * rng.standard_normal(), best, median)


@cache
def problem(name: str) -> Problem:
    return table(name) if name in TABLES else function(name)


# --- one search --------------------------------------------------------------------------------------------------


def search(sampler: BaseSampler, on: Problem, n: int, rng: np.random.Generator) -> list[Finished]:
    """So many trials, one after the other; one that diverges is told as the worst so far."""
    study = optuna.create_study(direction="maximize", sampler=sampler)
    found: list[Finished] = []
    for index in range(n):
        trial = study.ask(on.space)
        score = on.noisy(trial.params, rng)
        found.append(Finished(Slot(0, index, 0), trial.params, score))
        worst = min((f.score for f in found if math.isfinite(f.score)), default=0.0)
        study.tell(trial, score if math.isfinite(score) else worst)
    return found


def choice(on: Problem, found: list[Finished], top: int, repeats: int, rng: np.random.Generator) -> Params:
    """The configuration that is chosen: of the `top` best, trained again so often, the one with the best mean."""
    best = ranked(results(found))[: max(top, 1)]
    if not best or not top:
        return best[0].params if best else found[0].params
    again = [
        Finished(Slot(1, rank, repeat), result.params, on.noisy(result.params, rng))
        for rank, result in enumerate(best)
        for repeat in range(repeats)
    ]
    return (ranked(results(again)) or best)[0].params


def measure(task: tuple[str, str, int]) -> dict[tuple[int, bool], float]:
    """Regret for each budget, without and with confirm, of one method on one problem with one seed."""
    method, name, seed = task
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    on, key = problem(name), [ord(letter) for letter in name]
    regrets: dict[tuple[int, bool], float] = {}
    longest: list[Finished] = []
    for budget in sorted(CONFIRM, reverse=True):
        for confirm in (False, True):
            top, repeats = CONFIRM[budget] if confirm else (0, 0)
            n = budget - top * repeats
            if method == "coarse-to-fine" or not longest:  # the others do not know the budget: one run serves all
                longest = search(METHODS[method](n, seed), on, n, np.random.default_rng((seed, n, *key)))
            rng = np.random.default_rng((seed, budget, 1, *key))
            again = [on.regret(choice(on, longest[:n], top, repeats, rng)) for _ in range(DRAWS if confirm else 1)]
            regrets[budget, confirm] = float(np.mean(again))
    return regrets


# --- the report --------------------------------------------------------------------------------------------------


def summary(regrets: Mapping[tuple[str, str, int], dict[tuple[int, bool], float]], names: list[str]) -> list[list[Any]]:
    """Rows of method, confirm, and for each budget the mean over the problems and its standard error over seeds."""
    rows: list[list[Any]] = []
    for method in dict.fromkeys(method for method, _, _ in regrets):
        seeds = sorted({seed for m, _, seed in regrets if m == method})
        for confirm in (False, True):
            row: list[Any] = [method, "yes" if confirm else "no"]
            for budget in CONFIRM:
                each = [np.mean([regrets[method, name, seed][budget, confirm] for name in names]) for seed in seeds]
                row += [float(np.mean(each)), float(np.std(each, ddof=1) / math.sqrt(len(each)))]
            rows.append(row)
    return rows


def show(title: str, rows: list[list[Any]]) -> None:
    print(f"\n{title}\n{'method':<16}{'confirm':<9}" + "".join(f"{f'{b} trials':<17}" for b in CONFIRM))
    for method, confirm, *values in rows:
        cells = [f"{m:.3f} ± {e:.3f}" for m, e in zip(values[::2], values[1::2], strict=True)]
        print(f"{method:<16}{confirm:<9}" + "".join(f"{cell:<17}" for cell in cells))


def compare(regrets: Mapping[tuple[str, str, int], dict[tuple[int, bool], float]], names: list[str]) -> None:
    """How much less regret coarse to fine with confirm has than each other method, seed by seed."""
    print("less regret with coarse-to-fine and confirm, paired by seed")
    for method in dict.fromkeys(method for method, _, _ in regrets if method != "coarse-to-fine"):
        for confirm in (False, True):
            cells = []
            for budget in CONFIRM:
                seeds = sorted({seed for m, _, seed in regrets if m == method})
                gain = [
                    np.mean(
                        [
                            regrets[method, name, seed][budget, confirm]
                            - regrets["coarse-to-fine", name, seed][budget, True]
                            for name in names
                        ]
                    )
                    for seed in seeds
                ]
                cells.append(f"{np.mean(gain):+.3f} ± {np.std(gain, ddof=1) / math.sqrt(len(gain)):.3f}")
            print(f"{method:<16}{'yes' if confirm else 'no':<9}" + "".join(f"{cell:<17}" for cell in cells))


def plot(path: Path, groups: Mapping[str, list[list[Any]]]) -> None:
    """Regret over the budget, one panel for each group of problems; dashed without confirm."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(groups), figsize=(6 * len(groups), 4.5), squeeze=False, layout="constrained")
    for ax, (title, rows) in zip(axes[0], groups.items(), strict=True):
        colours = {method: f"C{k}" for k, method in enumerate(dict.fromkeys(row[0] for row in rows))}
        for method, confirm, *values in rows:
            with_confirm = confirm == "yes"
            ax.errorbar(
                list(CONFIRM),
                values[::2],
                yerr=values[1::2],
                color=colours[method],
                linestyle="-" if with_confirm else ":",
                linewidth=2.5 if method == "coarse-to-fine" else 1.2,
                marker="o",
                capsize=3,
                label=method if with_confirm else None,
            )
        ax.set(title=title, xscale="log", xlabel="trials, confirm among them", ylabel="regret of the choice")
        ax.set_xticks(list(CONFIRM), [str(budget) for budget in CONFIRM])
        ax.minorticks_off()
    axes[0][0].legend(title="solid: with confirm; dotted: without")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run, print and draw everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench-search"), help="folder for regret.csv and regret.png")
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--tuning", action="store_true", help="the seeds that the rule was tuned on")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    given = parser.parse_args()
    methods = [m for m in given.methods.split(",") if find_spec(NEEDS.get(m, "optuna"))]
    for method in set(given.methods.split(",")) - set(methods):
        print(f"{method} is left out: it needs the package {NEEDS[method]}")
    tables = [name for name in TABLES if (FOLDER / f"{name}.npz").exists()]
    if not tables:
        print(f"the tables are left out: no {TABLES[0]}.npz in {FOLDER} (set SIEVE_HPOBENCH)")
    functions = [*FUNCTIONS, "mixed"]
    seeds = [2 * k + (not given.tuning) for k in range(given.seeds)]
    tasks = [
        (method, name, seed)
        for method in methods
        for seed in (seeds[:GP_SEEDS] if method == "gp" else seeds)
        for name in [*tables, *functions]
    ]
    began = time.monotonic()
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        regrets = {}
        for task, found in zip(tasks, pool.map(measure, tasks, chunksize=4), strict=True):
            regrets[task] = found
            if len(regrets) % 100 == 0 or len(regrets) == len(tasks):
                print(
                    f"{len(regrets)} of {len(tasks)} searches, {task[0]}, {time.monotonic() - began:.0f} s", flush=True
                )
    groups = {"tables of perceptrons": tables, "functions": functions, "functions not tuned on": list(UNSEEN)}
    summaries = {title: summary(regrets, names) for title, names in groups.items() if names}
    for title, rows in summaries.items():
        show(f"{title}: {', '.join(groups[title])}", rows)
        if "coarse-to-fine" in methods:
            compare(regrets, groups[title])
    given.out.mkdir(parents=True, exist_ok=True)
    with (given.out / "regret.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "problem", "seed", "budget", "confirm", "regret"])
        for (method, name, seed), by in regrets.items():
            for (budget, confirm), regret in by.items():
                writer.writerow([method, name, seed, budget, int(confirm), f"{regret:.6g}"])
    plot(given.out / "regret.png", summaries)
    print(f"\n{len(tasks)} searches in {time.monotonic() - began:.0f} s; figures and rows in {given.out}/")


if __name__ == "__main__":
    main()
