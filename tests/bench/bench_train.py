"""Speed of the population trainer, as ratios: to sgemm on the same core, to PyTorch eager, to scikit-learn.

    python tests/bench/bench_train.py [--quick] [--out FOLDER] [--rounds N] [--only rivals,share,...]

Data is CIFAR-10 if SIEVE_DATA_DIR names its folder, else random bytes of the same shape. Every measurement runs in
a process like the workers of a study: one BLAS thread; SIEVE_BLAS_KERNEL forces a kernel. What is compared is
measured in turns, within one run: only ratios of neighbours in time mean anything on a machine that others use.
Times are CPU times unless they are called wall. Under load the rivals lose more than we do, so the least times of
each are compared as well as the medians of rounds.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

from core import data as datasets
from core import optim, train
from core.data import Dataset, Source
from core.network import Layers, blas_is_exact, shape_key
from core.train import TrainConfig
from search.executor import set_worker_environment

BATCH = 100
COLUMNS = 1600  # most first-layer columns of a group, as in search/runner.py
TRIALS = 16  # per process: 32 in all

Reference = tuple[Any, ...]  # the arguments of datasets.open_stored
Times = tuple[float, float, int]  # CPU seconds, wall seconds, trials x examples

SPACES: dict[str, list[tuple[int, ...]]] = {
    "[]": [()],
    "[50]": [(50,)],
    "[100]": [(100,)],
    "[75, 150]": [(75, 150)],
    "mixed": [(), (20,), (50,), (50, 30), (75,), (100,), (75, 75), (150,)],
}
GOALS = {  # shared/performance.md: floor and goal beside PyTorch, goal beside scikit-learn
    "[]": (5.5, 6.5, 4.3),
    "[50]": (2.0, 2.3, 1.85),
    "[100]": (1.6, 1.8, 1.55),
    "[75, 150]": (1.9, 2.2, 1.75),
    "mixed": (1.9, 2.1, None),
}


def configs(shapes: Sequence[tuple[int, ...]], n: int, **settings: Any) -> list[TrainConfig]:
    """A random search of n trials over lambda and eta, small enough that none diverges."""
    rng = np.random.default_rng(0)
    return [
        TrainConfig(
            hidden_sizes=shapes[i % len(shapes)],
            lam=float(10 ** rng.uniform(-5, -2)),
            eta=float(10 ** rng.uniform(-4, -2)),
            **{"batch_size": BATCH, "epochs": 1000, **settings},
        )
        for i in range(n)
    ]


# --- the contestants: each trains trials for one epoch and evaluates them ------------------------------------------


def ours(data: Dataset, found: Sequence[TrainConfig]) -> int:
    """The trainer itself, packing and evaluation included. Returns trials x examples."""
    groups: list[list[TrainConfig]] = [[]]
    for config in found:
        if sum((*c.hidden_sizes, 10)[0] for c in [*groups[-1], config]) > COLUMNS:
            groups.append([])
        groups[-1].append(config)
    for group in groups:
        train.advance([train.start(c, data, (0, k)) for k, c in enumerate(group)], data, epochs=1)
    return len(found) * len(data.train)


@cache
def normalised(reference: Reference) -> tuple[Any, Any]:
    """All splits as float32, as a rival's user would prepare them, once."""
    data = datasets.open_stored(*reference)
    parts = []
    for split in (data.train, data.validation):
        x = np.empty(split.x.shape, np.float32)
        train.normalise(split.x, data, out=x)
        parts.append((x, split.y))
    return parts[0], parts[1]


@cache
def tensors(reference: Reference) -> Any:
    import torch

    torch.set_num_threads(1)
    return [(torch.from_numpy(x), torch.from_numpy(np.array(y))) for x, y in normalised(reference)]


def pytorch(reference: Reference, found: Sequence[TrainConfig]) -> int:
    """PyTorch in eager mode, trial after trial, batches taken by an index tensor."""
    import torch

    (x, y), val = tensors(reference)
    for config in found:
        sizes = (x.shape[1], *config.hidden_sizes, 10)
        layers: list[Any] = []
        for d_in, d_out in pairwise(sizes):
            layers += [torch.nn.Linear(d_in, d_out), torch.nn.ReLU()]
        model = torch.nn.Sequential(*layers[:-1])
        optimiser = torch.optim.SGD(model.parameters(), lr=config.eta, weight_decay=2 * config.lam)
        order = torch.from_numpy(np.random.default_rng([0, 0]).permutation(len(x)))
        loss_sum = torch.zeros(())
        for rows in order.split(config.batch_size):
            optimiser.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            optimiser.step()
            loss_sum += loss.detach()
        with torch.no_grad():
            for images, labels in [val, (x, y)] if config.curves == "full" else [val]:
                for part, right in zip(images.split(1000), labels.split(1000), strict=True):
                    logits = model(part)
                    torch.nn.functional.cross_entropy(logits, right).item()
                    (logits.argmax(1) == right).sum().item()
    return len(found) * len(x)


def scikit_learn(reference: Reference, found: Sequence[TrainConfig]) -> int:
    """MLPClassifier.fit on float32, trial after trial. It shuffles for itself."""
    from sklearn.neural_network import MLPClassifier

    (x, y), val = normalised(reference)
    for config in found:
        model = MLPClassifier(
            hidden_layer_sizes=config.hidden_sizes,
            solver="sgd",
            momentum=0.0,
            alpha=2 * config.lam * config.batch_size,
            batch_size=config.batch_size,
            learning_rate_init=config.eta,
            max_iter=1,
            random_state=0,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one epoch does not converge
            model.fit(x, y)
        for images, labels in [val, (x, y)] if config.curves == "full" else [val]:
            p = model.predict_proba(images)
            np.log(p[np.arange(len(p)), labels]).mean()
            (p.argmax(1) == labels).mean()
    return len(found) * len(x)


def race(method: str, reference: Reference, space: str, curves: str) -> Times:
    """One contestant on one process's share of the trials; rivals, whose cost per trial is even, run fewer."""
    shapes = SPACES[space]
    found = configs(shapes, TRIALS, curves=curves)
    runners = {
        "ours": lambda: ours(datasets.open_stored(*reference), found),
        "PyTorch": lambda: pytorch(reference, found[: max(2, len(shapes))]),
        "scikit-learn": lambda: scikit_learn(reference, found[: max(2, len(shapes))]),
    }
    wall, cpu = time.perf_counter(), time.process_time()
    examples = runners[method]()
    return time.process_time() - cpu, time.perf_counter() - wall, examples


# --- single steps --------------------------------------------------------------------------------------------------


def least(f: Callable[[], object], n: int) -> float:
    """The least CPU seconds of n calls."""
    times = []
    for _ in range(n):
        began = time.process_time()
        f()
        times.append(time.process_time() - began)
    return min(times)


@cache
def square() -> tuple[Any, Any]:
    a = np.random.default_rng(0).standard_normal((1024, 1024), dtype=np.float32)
    return a, np.empty_like(a)


def peak() -> float:
    """Floating-point operations per second of a 1024 x 1024 sgemm."""
    a, out = square()
    return 2 * 1024**3 / least(lambda: np.matmul(a, a, out=out), 5)


def stepper(data: Dataset, found: Sequence[TrainConfig], steps: int) -> Callable[[], None]:
    """A function that takes a group some updates further, reading and normalising its batches."""
    found = sorted(found, key=shape_key)
    states = [train.start(c, data, (0, k)) for k, c in enumerate(found)]
    population = train.pack(states, data)
    t = np.arange(steps)
    rates = optim.rates(found, np.transpose([np.full(steps, c.eta) for c in found]), t)

    def run() -> None:
        for row, (x, y, n) in zip(rates, train.batches(data, (0,), found[0].batch_size, 0, steps), strict=True):
            train.step(population, x, y, n, row, train.dropout_masks(population, states, len(x)))

    return run


def flops(found: Sequence[TrainConfig], inputs: int) -> int:
    return sum(c.cost(inputs, 10) * c.batch_size for c in found)


def share(reference: Reference, found: Sequence[TrainConfig], rounds: int) -> tuple[float, float, float]:
    """Share of the sgemm rate (best and median of rounds), and the least seconds per step."""
    data = datasets.open_stored(*reference)
    work, inputs = flops(found, data.train.x.shape[1]), data.train.x.shape[1]
    steps = int(np.clip(2e10 / work, 10, min(400, len(data.train) // found[0].batch_size)))
    run, shares, seconds = stepper(data, found, steps), [], []
    for _ in range(rounds):
        before, took, after = peak(), least(run, 2) / steps, peak()
        shares.append(flops(found, inputs) / took / max(before, after))
        seconds.append(took)
    return max(shares), statistics.median(shares), min(seconds)


def tuned_single(data: Dataset, config: TrainConfig, steps: int) -> Callable[[], None]:
    """One network, SGD with L2, every buffer allocated once: how an expert would write a single training run."""
    layers: Layers = train.start(config, data, (0,)).layers
    b, n = config.batch_size, len(data.train)
    images = np.empty((b, data.train.x.shape[1]), np.uint8)
    x = np.empty(images.shape, np.float32)
    outputs = [np.empty((b, w.shape[1]), np.float32) for w, _ in layers]
    moves = [np.empty_like(w) for w, _ in layers]
    rows, decay = np.arange(b), np.float32(1 - 2 * config.eta * config.lam)

    def run() -> None:
        order = np.random.default_rng([0, 0]).permutation(n)
        for i in range(steps):
            batch = order[i * b : (i + 1) * b]
            y = data.train.y[batch]
            np.take(data.train.x, batch, axis=0, out=images, mode="clip")
            train.normalise(images, data, out=x)
            a = x
            for (w, bias), z in zip(layers, outputs, strict=True):
                np.matmul(a, w, out=z)
                z += bias
                if z is not outputs[-1]:
                    np.maximum(z, 0, out=z)
                a = z
            p = outputs[-1]
            p -= p.max(axis=1, keepdims=True)
            chosen = p[rows, y]
            np.exp(p, out=p)
            total = p.sum(axis=1, keepdims=True)
            (np.log(total[:, 0]) - chosen).mean(), (chosen == 0).mean()
            p /= total
            p[rows, y] -= 1
            p *= -config.eta / b
            g = p
            for depth in reversed(range(len(layers))):
                w, bias = layers[depth]
                np.matmul((outputs[depth - 1] if depth else x).T, g, out=moves[depth])
                db = g.sum(axis=0)
                if depth:
                    g = (g @ w.T) * (outputs[depth - 1] > 0)
                w *= decay
                w += moves[depth]
                bias += db

    return run


def in_turns(runs: Sequence[Callable[[], None]], rounds: int) -> list[float]:
    """The least CPU seconds of each, all measured in every round."""
    times = [[least(run, 1) for run in runs] for _ in range(rounds)]
    return [min(column) for column in zip(*times, strict=True)]


def singles(reference: Reference, shapes: Sequence[tuple[int, ...]], rounds: int) -> list[float]:
    """Time of K = 1 over that of the tuned single network, per shape."""
    data = datasets.open_stored(*reference)
    steps, ratios = min(200, len(data.train) // BATCH), []
    for shape in shapes:
        (config,) = configs([shape], 1)
        alone, tuned = in_turns([stepper(data, [config], steps), tuned_single(data, config, steps)], rounds)
        ratios.append(alone / tuned)
    return ratios


def rules(reference: Reference, rounds: int) -> dict[str, float]:
    """Time of a step of 16 x [50] by each update rule over that by plain SGD."""
    data = datasets.open_stored(*reference)
    settings: dict[str, dict[str, Any]] = {
        "sgd": {},
        "momentum": {"momentum": 0.9},
        "nesterov": {"momentum": 0.9, "nesterov": True},
        "adam": {"optimizer": "adam"},
        "sgd, dropout": {"dropout": 0.2},
    }
    times = in_turns([stepper(data, configs([(50,)], 16, **s), 20) for s in settings.values()], rounds)
    return {name: took / times[0] for name, took in zip(settings, times, strict=True)}


def evaluation(reference: Reference, shapes: Sequence[tuple[int, ...]], rounds: int) -> tuple[float, float]:
    """Time of evaluating a group on the validation and on the training split, over that of training an epoch."""
    data = datasets.open_stored(*reference)
    found = sorted(configs(shapes, TRIALS), key=shape_key)
    population = train.pack([train.start(c, data, (0, k)) for k, c in enumerate(found)], data)
    steps = 20
    step, validation, full = in_turns(
        [
            stepper(data, found, steps),
            lambda: void(train.evaluate(population, data, data.validation)),
            lambda: void(train.evaluate(population, data, data.train)),
        ],
        rounds,
    )
    epoch = step / steps * len(data.train) / BATCH
    return validation / epoch, full / epoch


def void(_: object) -> None:
    """For functions that are called for the time they take."""


def memory(reference: Reference) -> dict[str, float]:
    """Megabytes of this process, by smaps: proportional share of files, and what is its own; while it trains."""
    data = datasets.open_stored(*reference)
    ours(data, configs([(50,)], TRIALS, curves="full"))
    time.sleep(2)  # the other worker is still there
    rollup = Path("/proc/self/smaps_rollup").read_text()
    sizes = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in rollup.splitlines()[1:]}
    return {"total": sizes["Pss"], "files": sizes["Pss_File"] + sizes["Pss_Shmem"], "own": sizes["Pss_Anon"]}


def machine() -> dict[str, str]:
    """What the figures depend on, as seen by a measuring process."""
    cpu = Path("/proc/cpuinfo")
    names = [x.split(":")[1].strip() for x in cpu.read_text().splitlines() if "model name" in x] if cpu.exists() else []
    packages = [p for p in ("numpy", "torch", "scikit-learn") if find_spec(p.replace("scikit-learn", "sklearn"))]
    kernel = next((one.get("architecture", "?") for one in threadpool_info() if one["user_api"] == "blas"), "unknown")
    asked = [f"{key}={value}" for key, value in os.environ.items() if key.startswith(("OPENBLAS_", "MKL_"))]
    return {
        "machine": f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores",
        "versions": ", ".join([f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in packages)]),
        "BLAS kernel": f"{kernel}, {'exact' if blas_is_exact() else 'not exact'}; {' '.join(asked)}",
        "sgemm": f"{max(peak() for _ in range(5)) / 1e9:.0f} GFLOP/s",
    }


# --- the report ----------------------------------------------------------------------------------------------------


class Report:
    """Lines of Markdown, printed as they come and kept for a file."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, *lines: str) -> None:
        self.lines += lines
        print(*lines, sep="\n", flush=True)

    def table(self, title: str, header: Sequence[str], rows: Iterator[Sequence[str]]) -> None:
        self.add("", f"## {title}", "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header))
        for row in rows:
            self.add("| " + " | ".join(row) + " |")


def prepare(folder: Path, examples: int) -> tuple[Reference, str]:
    """Store the data; a reference to its split into training examples and 1,000 for validation."""
    named = os.environ.get("SIEVE_DATA_DIR")
    if named:
        found = [p for p in (Path(named), *Path(named).glob("*")) if (p / "data_batch_1").exists()]
        source = datasets.read_cifar10(found[0] if found else Path(named))
        words = "CIFAR-10"
    else:
        rng = np.random.default_rng(0)
        x, y = rng.integers(0, 256, (50_000, 3072), dtype=np.uint8), rng.integers(0, 10, 50_000)
        source = Source("synthetic", x, y, datasets.numbered(9), None, {"train": (0, 50_000)})
        words = "random bytes in the shape of CIFAR-10 (SIEVE_DATA_DIR is not set)"
    datasets.store(source, folder)
    reference = (folder, (0, examples), (examples, examples + 1000), None, "standard")
    datasets.open_stored(*reference)
    return reference, f"{words}: {examples:,} training and 1,000 validation examples"


def rivals(
    workers: Sequence[ProcessPoolExecutor], reference: Reference, rounds: int, curves: str
) -> Iterator[list[str]]:
    """Rows: per space the ratio of each rival's CPU and wall time per trial and example to ours."""
    methods = ["ours", *(["PyTorch"] if find_spec("torch") else []), "scikit-learn"]
    for space in SPACES:
        cpu: dict[str, list[float]] = {m: [] for m in methods}
        wall: dict[str, list[float]] = {m: [] for m in methods}
        for i in range(rounds + 1):
            for method in methods:
                both = [w.submit(race, method, reference, space, curves) for w in workers]
                results = [future.result() for future in both]
                if i:  # the first round warms up
                    cpu[method].append(sum(r[0] for r in results) / sum(r[2] for r in results))
                    wall[method].append(max(r[1] for r in results) / sum(r[2] for r in results))
        row = [space, f"{1e-3 / min(cpu['ours']):.0f}k"]
        for method in ("PyTorch", "scikit-learn"):
            if method not in methods:
                row += ["not installed", "", ""]
                continue
            medians = [
                statistics.median(theirs / own for theirs, own in zip(t[method], t["ours"], strict=True))
                for t in (cpu, wall)
            ]
            row += [f"{ratio:.2f}" for ratio in (min(cpu[method]) / min(cpu["ours"]), *medians)]
        floor, goal, sklearn_goal = GOALS[space]
        yield [*row, f"{floor} / {goal} / {sklearn_goal or '-'}"]


def plot(path: Path, points: dict[int, list[tuple[int, float]]]) -> None:
    """Share of the sgemm rate over K, a line per width."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for width, line in points.items():
        axes.plot(*zip(*line, strict=True), marker="o", label=f"[{width}]" if width else "[]")
    axes.set(xscale="log", xlabel="trials side by side, K", ylabel="share of sgemm", ylim=(0, 1))
    axes.set_xticks(ks := [k for k, _ in next(iter(points.values()))], [str(k) for k in ks])
    axes.axhline(0.88, color="grey", linewidth=0.8, linestyle=":")
    axes.legend(title="hidden_sizes", frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer examples, rounds and sizes: some two minutes")
    parser.add_argument("--out", type=Path, help="folder for bench.md and share.png")
    parser.add_argument("--rounds", type=int, help="rounds of each comparison (5; quick: 2)")
    parser.add_argument("--only", default="rivals,share,single,rules,evaluation,scaling,memory", help="some parts")
    args = parser.parse_args()
    rounds, parts, report = args.rounds or (2 if args.quick else 5), args.only.split(","), Report()
    set_worker_environment()  # one BLAS thread and OpenBLAS's own kernel, as the workers of a study have
    pool = partial(ProcessPoolExecutor, 1, get_context("spawn"))
    with tempfile.TemporaryDirectory() as folder, pool() as first, pool() as second:
        reference, words = prepare(Path(folder), 5_000 if args.quick else 49_000)
        ask: Callable[..., Any] = lambda f, *args: first.submit(f, *args).result()  # noqa: E731
        for key, value in ask(machine).items():
            report.add(f"- {key}: {value}")
        report.add(f"- data: {words}", f"- load average at the start: {os.getloadavg()[0]:.1f}")
        if "rivals" in parts:
            kinds = ("least CPU", "median CPU", "median wall")
            header = ["hidden_sizes", "ours: trial-examples per CPU s"]
            header += [f"{name} / ours: {kind}" for name in ("PyTorch", "scikit-learn") for kind in kinds]
            for curves in ("running", "full"):
                title = f"Beside the rivals: 32 trials, two processes, curves {curves}"
                report.table(
                    title, [*header, "floor / goal / goal"], rivals((first, second), reference, rounds, curves)
                )
        if "share" in parts:
            groups: dict[str, tuple[list[tuple[int, ...]], int]] = {
                "32 x []": ([()], 32),
                "8 x [50]": ([(50,)], 8),
                "16 x [50]": ([(50,)], 16),
            }
            groups |= {
                "8 x [100]": ([(100,)], 8),
                "10 x [75, 150]": ([(75, 150)], 10),
                "mixed x 12": (SPACES["mixed"], 12),
            }

            def shares() -> Iterator[list[str]]:
                for name, (shapes, n) in groups.items():
                    best, median, seconds = ask(share, reference, configs(shapes, n), 3 * rounds)
                    yield [
                        name,
                        f"{best:.2f}",
                        f"{median:.2f}",
                        f"{seconds * 1e6:.0f}",
                        "0.80" if shapes == [()] else "0.88",
                    ]

            report.table(
                f"A step of batch {BATCH}, reading its batch included, as a share of sgemm",
                ["group", "best", "median", "µs", "goal"],
                shares(),
            )
        if "single" in parts:
            shapes = [(), (50,), (100,), (75, 150)]
            rows = zip(shapes, ask(singles, reference, shapes, 3 * rounds), strict=True)
            report.table(
                "K = 1 beside a tuned single network (goal: 1.10 at most)",
                ["hidden_sizes", "time / tuned"],
                ([str(list(shape)), f"{ratio:.2f}"] for shape, ratio in rows),
            )
        if "rules" in parts:
            times = ask(rules, reference, 3 * rounds).items()
            report.table(
                "Update rules on 16 x [50]", ["rule", "step / SGD step"], ([name, f"{t:.2f}"] for name, t in times)
            )
        if "evaluation" in parts:
            spaces = ((space, ask(evaluation, reference, SPACES[space], rounds)) for space in SPACES)
            report.table(
                "Evaluation once per epoch, as a share of training",
                ["hidden_sizes", "curves running (validation)", "curves full (and training split)"],
                ([space, f"{val:.3f}", f"{val + full:.2f}"] for space, (val, full) in spaces),
            )
        if "scaling" in parts:
            scaling(report, ask, reference, rounds, args.quick, args.out)
        if "memory" in parts and Path("/proc/self/smaps_rollup").exists():
            with pool() as third, pool() as fourth:  # which have seen nothing else
                both = [w.submit(memory, reference) for w in (third, fourth)]
            report.table(
                "Memory of two workers on the same data, MB (proportional set size)",
                ["worker", "total", "shared files, its part", "its own"],
                ([str(i), *(f"{v:.0f}" for v in f.result().values())] for i, f in enumerate(both, 1)),
            )
        report.add("", f"Load average at the end: {os.getloadavg()[0]:.1f}")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "bench.md").write_text("\n".join(report.lines) + "\n")


def scaling(
    report: Report, ask: Callable[..., Any], reference: Reference, rounds: int, quick: bool, out: Path | None
) -> None:
    """How the time of a trial and example goes with K, width, batch size and the number of examples."""
    ks = (1, 4, 16) if quick else (1, 2, 4, 8, 16, 32)
    points: dict[int, list[tuple[int, float]]] = {}

    def by_k() -> Iterator[list[str]]:
        for width in (0, 20, 50, 100, 200):
            shapes = [(width,) if width else ()]
            points[width] = [(k, ask(share, reference, configs(shapes, k), rounds)[0]) for k in ks]
            yield [str(list(shapes[0])), *(f"{s:.2f}" for _, s in points[width])]

    def by_batch() -> Iterator[list[str]]:
        for batch in (20, 50, 100, 200, 500):
            found = configs([(50,)], 16, batch_size=batch)
            best, _, seconds = ask(share, reference, found, rounds)
            yield [str(batch), f"{best:.2f}", f"{seconds / batch / len(found) * 1e6:.2f}"]

    def by_examples() -> Iterator[list[str]]:
        folder, (_, most), *rest = reference
        for part in (8, 4, 2, 1):
            n = most // part
            own = (folder, (0, n), (most, most + 1000), *rest[1:])
            cpu, _, examples = min(ask(race, "ours", own, "[50]", "running") for _ in range(rounds))
            yield [f"{n:,}", f"{cpu:.2f}", f"{cpu / examples * 1e6:.2f}"]

    report.table("Share of sgemm by K and width", ["hidden_sizes", *(f"K = {k}" for k in ks)], by_k())
    report.table("Batch size, 16 x [50]", ["batch size", "share of sgemm", "µs per trial and example"], by_batch())
    report.table("Examples, 16 x [50], an epoch", ["examples", "CPU s", "µs per trial and example"], by_examples())
    if out:
        out.mkdir(parents=True, exist_ok=True)
        plot(out / "share.png", points)


if __name__ == "__main__":
    main()
