"""What many trials and many workers cost beside training: runner and storage, the way through Dask, 1,000 workers.

python tests/bench/bench_scale.py [--quick] [--only trials dask workers]

Nobody trains here: a worker gives back what a slice would, at once or after sleeping as long as training takes.
Runner, storage, outbox and checkpoints are the real ones; nothing is published. Prints Markdown.
"""

import argparse
import asyncio
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from core.data import Dataset
from core.train import Evaluation, Progress, Snapshot, State, TrainConfig, start
from search import plan
from search.datasets import open_dataset
from search.executor import DaskExecutor, Slice
from search.outbox import Outbox
from search.run import open_datasets
from search.runner import Runner, Status
from search.settings import Settings
from search.storage import PATIENCE, registered
from search.study import StudySpec, restore
from tests.stack.conftest import Cluster, Postgres, execute, postgres_programs

EPOCHS = 40
KEYS = [f"{kind}/{part}" for kind in ("cost", "loss", "accuracy") for part in ("train", "val")]
PARTS = ("trials", "dask", "workers")


# ---- workers that do not train


def skip(states: list[State], epochs: int, seconds: float) -> Slice:
    """What a slice of so many epochs gives back, as if it had taken so many seconds."""
    pairs = [_skip(state, epochs, seconds / len(states)) for state in states]
    return [state for state, _ in pairs], [progress for _, progress in pairs], seconds


def _skip(state: State, epochs: int, seconds: float) -> tuple[State, Progress]:
    begun, last = state.update // state.per_epoch, state.total // state.per_epoch
    until = min(last, begun + epochs)
    score = 1 / (1 + abs(np.log10(state.config.eta) + 2) + abs(np.log10(state.config.lam) + 3))
    points = [
        Evaluation(e, e * state.per_epoch, float(e), 0.0, dict.fromkeys(KEYS, score * e / last) | {"eta": 0.1})
        for e in range(begun + 1, until + 1)
    ]
    pictured = [e for e in (0, last // 2, last) if begun < e <= until or e == begun == 0]
    progress = Progress(points, [Snapshot(e, state.layers[0][0][:, :100]) for e in pictured])
    if until == last:
        progress.test, progress.confusion = {"loss": 1.0, "accuracy": score}, np.zeros((10, 10), int)
    changed = {"update": until * state.per_epoch, "finished": until == last, "seconds": state.seconds + seconds}
    return State(**vars(state) | changed), progress


class AtOnce(Executor):
    """A worker that is done when it is asked."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        states, _, epochs = args
        future: Future[Any] = Future()
        future.set_result(skip(states, epochs, 1.0))
        return future


class Asleep(Executor):
    """Workers that sleep as long as training takes at `speed` floating-point operations per second."""

    def __init__(self, speed: float) -> None:
        self.speed, self.slept = speed, list[float]()  # seconds of each slice
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        states, data, epochs = args
        left = (states[0].total - states[0].update) / states[0].per_epoch
        seconds = sum(work(state.config, data) for state in states) * min(epochs, left) / self.speed
        self.slept.append(seconds)
        future: Future[Any] = Future()
        result = skip(states, epochs, seconds)
        self.loop.call_soon_threadsafe(self.loop.call_later, seconds, future.set_result, result)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


def work(config: TrainConfig, data: Dataset) -> int:
    """Floating-point operations of an epoch."""
    return config.cost(data.train.x.shape[1], len(data.classes)) * len(data.train)


# ---- studies for them


def study(trials: int, method: str) -> StudySpec:
    """Mixed trials on the handwritten digits."""
    stages = min(20, round(trials**0.5))
    coarse_to_fine = {"method": method, "stages": stages, "trials_per_stage": trials // stages}
    space = {
        "lambda": {"low": 1e-5, "high": 1e-1, "log": True},
        "eta": {"low": 1e-3, "high": 1e-1, "log": True},
        "hidden_sizes": [[50], [100], [75, 150]],
    }
    search = coarse_to_fine if method == "coarse-to-fine" else {"method": method, "trials": trials}
    base = {"batch_size": 100, "epochs": EPOCHS}
    given = {"name": method, "dataset": "digits", "base": base, "space": space, "search": search, "confirm": False}
    return restore(given)


@contextmanager
def homes(postgres: Postgres | None) -> Iterator[Callable[[str], Settings]]:
    """Makes homes with an empty storage each, SQLite or PostgreSQL."""
    with tempfile.TemporaryDirectory() as folder:
        names = (f"bench_{os.getpid()}_{time.monotonic_ns()}" for _ in iter(int, 1))

        def make(storage: str) -> Settings:
            name = next(names)
            given = {"SIEVE_HOME": f"{folder}/{name}"}
            if storage == "PostgreSQL":
                assert postgres is not None
                execute(postgres.url, f"CREATE DATABASE {name}")
                given["SIEVE_STORAGE"] = postgres.url.rpartition("/")[0] + f"/{name}"
            return Settings.from_environment(given)

        yield make


@contextmanager
def running(spec: StudySpec, settings: Settings, executor: Executor, workers: int) -> Iterator[Runner]:
    settings.home.mkdir(parents=True, exist_ok=True)
    datasets = open_datasets(spec, settings, lambda note: None)
    digests = {stage: data.digest for stage, data in datasets.items()}
    with registered(settings.storage, spec, digests, PATIENCE) as record, Outbox(settings.outbox) as box:
        yield Runner(spec, settings, record, box, datasets, executor, lambda: workers)


# ---- a trial's cost


def cost_of_a_trial(postgres: Postgres | None, most: int) -> None:
    """One study of `most` trials for each storage, looked at on the way."""
    marks = [mark for mark in (100, 1_000, 10_000) if mark < most] + [most]
    heads = [f"{clock} ms at {mark:,}" for mark in marks for clock in ("CPU", "wall")]
    kinds = [("SQLite", "random"), ("PostgreSQL", "random"), ("SQLite", "coarse-to-fine")]
    kinds = [kind for kind in kinds if postgres or kind[0] == "SQLite"]
    print("\n### A trial's cost beside its training, by how many are done\n")
    print_row("storage", "method", *heads, "the server's CPU ms", "CPU s to take it up again")
    print_row(*["---"] * (4 + len(heads)))
    with homes(postgres) as home:
        for storage, method in kinds:
            spec, settings = study(most, method), home(storage)
            before = postgres.cpu_seconds() if postgres else 0.0
            found = overhead(spec, settings, marks)
            server = postgres.cpu_seconds() - before if postgres else 0.0
            began = time.process_time()
            with running(spec, settings, AtOnce(), 1):
                again = time.process_time() - began
            print_row(storage, method, *(f"{ms:.1f}" for ms in found), f"{1000 * server / most:.1f}", f"{again:.1f}")


def overhead(spec: StudySpec, settings: Settings, marks: list[int]) -> list[float]:
    """CPU and wall milliseconds per trial of the runner, over the last fifth of the trials before each mark."""
    seen = [(0, time.process_time(), time.perf_counter())]

    def look(status: Status) -> None:
        seen.append((status.complete, time.process_time(), time.perf_counter()))

    with running(spec, settings, AtOnce(), 1) as runner:
        runner.run(look)
    done, *clocks = np.array(seen).T
    found = []
    for mark in marks:
        since, until = np.searchsorted(done, [0.8 * mark, mark])
        found += [1000 * float((clock[until] - clock[since]) / (done[until] - done[since])) for clock in clocks]
    return found


# ---- the way through Dask


def through_dask(seconds: float) -> None:
    print("\n### Slices through Dask, scheduler and two workers on loopback\n")
    print_row("group", "MB each way", "there and back, ms", "slices per second", "MB per second, both ways")
    print_row(*["---"] * 5)
    with tempfile.TemporaryDirectory() as folder, closing(Cluster(Path(folder))) as cluster:
        for _ in range(2):
            cluster.add()
        executor = DaskExecutor(cluster.address.replace("dask://", "tcp://"))
        while executor.workers() < 2:
            time.sleep(0.2)
        for inputs, members in ((64, 1), (64, 16), (3072, 1), (3072, 16)):
            states = group(inputs, members)
            size = sum(w.nbytes + b.nbytes for state in states for w, b in state.layers) / 1e6
            wait([executor.submit(skip, states, 1, 0.0) for _ in range(8)])  # both import what they need
            trip, rate = round_trip(executor, states, seconds), throughput(executor, states, seconds)
            about = f"{members} x [50] on {inputs:,} inputs"
            print_row(about, f"{size:.2f}", f"{1000 * trip:.0f}", f"{rate:.1f}", f"{2 * size * rate:.0f}")
        executor.shutdown()


def group(inputs: int, members: int) -> list[State]:
    rng = np.random.default_rng(0)
    split = rng.random((200, inputs), np.float32), np.arange(200) % 10
    data = Dataset.from_arrays(split, split)
    return [start(TrainConfig(hidden_sizes=(50,), epochs=EPOCHS), data, (k,)) for k in range(members)]


def round_trip(executor: Executor, states: list[State], seconds: float) -> float:
    """Median seconds that a slice is on its way while nothing else is."""
    took, until = list[float](), time.monotonic() + seconds
    while not took or time.monotonic() < until:
        began = time.monotonic()
        executor.submit(skip, states, 1, 0.0).result()
        took.append(time.monotonic() - began)
    return statistics.median(took)


def throughput(executor: Executor, states: list[State], seconds: float) -> float:
    """Slices per second while four are on their way all the time."""
    flying = {executor.submit(skip, states, 1, 0.0) for _ in range(4)}
    done, began = 0, time.monotonic()
    while (elapsed := time.monotonic() - began) < seconds:
        came, flying = wait(flying, return_when=FIRST_COMPLETED)
        done += len(came)
        flying |= {executor.submit(skip, states, 1, 0.0) for _ in came}
    wait(flying)
    return done / elapsed


# ---- many workers


def many_workers(postgres: Postgres | None, sizes: list[tuple[int, int, float]]) -> None:
    """Whole studies, given as numbers of workers and of trials, and seconds of a trial alone."""
    print("\n### Studies on workers that sleep\n")
    heads = (
        "storage", "workers", "trials", "s per trial", "s at best", "s", "of the workers' time asleep",
        "of a core's time the runner's", "trials per s", "slices per s", "s of a slice", "s on the way",
    )  # fmt: skip
    print_row(*heads)
    print_row(*["---"] * len(heads))
    with homes(postgres) as home:
        for workers, trials, seconds in sizes:
            for storage in ("SQLite", "PostgreSQL") if postgres else ("SQLite",):
                print_row(storage, *simulated(home(storage), workers, trials, seconds))


def simulated(settings: Settings, workers: int, trials: int, seconds: float) -> list[str]:
    spec = study(trials, "random")
    data, _ = open_dataset(spec.dataset, settings)
    mean = statistics.mean(work(spec.config(p.params), data) for p in plan.propose(spec, [])) * EPOCHS
    with Asleep(mean / seconds) as executor, running(spec, settings, executor, workers) as runner:
        runner.rate = executor.speed  # as if measured: far from that of real arithmetic
        wall, cpu = time.monotonic(), time.process_time()
        runner.run()
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    slept = executor.slept
    return [
        f"{workers:,}", f"{trials:,}", f"{seconds:.1f}", f"{trials * seconds / workers:.0f}", f"{wall:.0f}",
        f"{sum(slept) / wall / workers:.0%}", f"{cpu / wall:.0%}", f"{trials / wall:.1f}",
        f"{len(slept) / wall:.1f}", f"{statistics.mean(slept):.1f}", f"{runner.way:.1f}",
    ]  # fmt: skip


def print_row(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="under two minutes")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seconds", type=float, default=13.8, help="of a trial, as of bench_service.py's")
    options = parser.parse_args()
    programs = postgres_programs()
    postgres = Postgres(programs) if programs else None
    print(f"machine: {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}; Python {platform.python_version()}")
    try:
        if "trials" in options.only:
            cost_of_a_trial(postgres, 500 if options.quick else 10_000)
        if "dask" in options.only:
            through_dask(1.0 if options.quick else 10.0)
        if "workers" in options.only:
            quick = [(10, 40, 2.0), (100, 200, 5.0)]
            full = [(n, 4 * n, options.seconds) for n in (10, 100, 1000)] + [(1000, 2000, 5 * options.seconds)]
            many_workers(postgres, quick if options.quick else full)
    finally:
        if postgres:
            postgres.close()


if __name__ == "__main__":
    main()
