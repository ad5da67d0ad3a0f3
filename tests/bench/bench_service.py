"""Where the CPU time of a whole study goes: 32 mixed trials on CIFAR-10, runner, workers and publisher together.

python tests/bench/bench_service.py [--trials 32] [--epochs 40]
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import psutil

from search import run
from search.outcome import open_study
from search.runner import Status
from search.settings import Settings
from search.study import StudySpec, restore

ROLES = {"spawn_main": "workers", "sync": "publisher"}


def study(trials: int, epochs: int) -> StudySpec:
    space = {
        "lambda": {"low": 1e-5, "high": 1e-1, "log": True},
        "eta": {"low": 1e-3, "high": 1e-1, "log": True},
        "hidden_sizes": [[], [50], [100], [75, 150], [20], [120], [90, 60], [50, 50]],
    }
    base = {"batch_size": 100, "epochs": epochs}
    search = {"method": "random", "trials": trials}
    return restore({"name": "mixed", "dataset": "cifar10", "base": base, "space": space, "search": search})


class Meter:
    """The latest CPU seconds seen of each process that this one started."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, int], float] = {}

    def look(self, _: Status) -> None:
        for child in psutil.Process().children(recursive=True):
            try:
                words = " ".join(child.cmdline())
                role = next((name for word, name in ROLES.items() if word in words), "others")
                times = child.cpu_times()
            except psutil.Error:
                continue
            self.seen[role, child.pid] = times.user + times.system

    def total(self, role: str) -> float:
        return sum(seconds for (name, _), seconds in self.seen.items() if name == role)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=40)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        inherited = Settings.from_environment()
        settings = Settings.from_environment(
            {"SIEVE_HOME": folder, "SIEVE_DATA_DIR": str(inherited.data_dir or inherited.data_cache)}
        )
        spec, meter = study(options.trials, options.epochs), Meter()
        before, began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
        run.launch(spec, settings, show=meter.look)
        wall = time.monotonic() - began
        after = resource.getrusage(resource.RUSAGE_SELF)
        attempts = open_study("mixed", settings).attempts()
        on_disk = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    training = sum(a.attrs["seconds"] for a in attempts)
    runner = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    workers, publisher = meter.total("workers"), meter.total("publisher")
    total = runner + workers + publisher
    print(f"{options.trials} mixed trials x {options.epochs} epochs on CIFAR-10: {wall:.0f} s wall")
    print("| part | CPU s | share |\n|---|---|---|")
    rows = {
        "training steps and evaluation": training,
        "rest of the workers (start-up, data, packing, transport)": workers - training,
        "runner (plan, packing, storage, outbox, checkpoints)": runner,
        "publisher (MLflow)": publisher,
    }
    for part, seconds in rows.items():
        print(f"| {part} | {seconds:.1f} | {seconds / total:.1%} |")
    print(f"{3600 * options.trials / wall:.0f} trials per hour; {on_disk / 1e6:.0f} MB written")


if __name__ == "__main__":
    main()
