"""What publishing costs per trial, and how many trials a minute it ships: embedded, and over HTTP to a real server.

A trial here: 15 parameters, 7 curves of 40 points in four slices, three pictures of a layer of 50 units on 32x32x3
inputs, a confusion matrix, 600 KB of weights. Everything is in the outbox when the clock starts.
"""

import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from search import figures, outbox, tracking
from search.outbox import Outbox, Record
from search.settings import Settings
from tests.servers import Server, free_port

TRIALS = 40
T0 = 1_790_000_000.0
KEYS = ("cost/train", "cost/val", "loss/train", "loss/val", "accuracy/train", "accuracy/val", "eta")


def trial(index: int) -> list[Record]:
    """The records of one trial, as the runner puts them."""
    rng = np.random.default_rng(index)
    uid, at = f"bench/s0.i{index}.r0/1", T0 + 100 * index
    w = rng.normal(size=(3072, 50)).astype(np.float32)
    params = {f"p{n}": float(rng.random()) for n in range(15)}
    tags = {"stage": "coarse", "slot": f"s0.i{index}.r0", "repeat": "0", "attempt": "1"}
    tags |= {"dataset": "bench", "dataset_digest": "ab" * 32}
    curve = [(e, at + e, {key: float(rng.random()) for key in KEYS}) for e in range(1, 41)]
    records = [outbox.trial_begun("bench", uid, "p=1", params, tags, at, {"study_id": 1, "number": index})]
    for end in (10, 20, 30, 40):
        records.append(outbox.trial_progress("bench", uid, end, at + end, curve[end - 10 : end]))
        if end != 30:
            records.append(outbox.trial_weights("bench", uid, end, at + end, end, w, (32, 32, 3)))
    layers = [(w, np.zeros(50, np.float32)), (rng.normal(size=(50, 10)).astype(np.float32), np.zeros(10, np.float32))]
    results, counts = {"val_accuracy": 0.5}, rng.integers(0, 99, (10, 10))
    return [*records, outbox.trial_ended("bench", uid, at + 41, "FINISHED", None, results, counts, layers)]


def fill(settings: Settings) -> None:
    with Outbox(settings.outbox) as box:
        box.put([outbox.study_begun("bench", {"name": "bench"}, {}, T0)])
        for index in range(TRIALS):
            box.put(trial(index))


def rendering() -> float:
    """CPU seconds to draw one trial's pictures with their thumbnails; the best of ten."""
    w, counts = np.random.default_rng(0).normal(size=(3072, 50)).astype(np.float32), np.eye(10, dtype=int)
    spent = []
    for _ in range(10):
        begun = time.process_time()
        for image in [*(figures.weight_tiles(w, (32, 32, 3)) for _ in range(3)), figures.confusion_matrix(counts)]:
            figures.png(image), figures.thumbnail(image)
        spent.append(time.process_time() - begun)
    return min(spent)


def publishing(settings: Settings) -> tuple[float, float]:
    """Wall and CPU seconds per trial."""
    fill(settings)
    wall, cpu = time.perf_counter(), time.process_time()
    assert tracking.publish(settings) == 0
    return (time.perf_counter() - wall) / TRIALS, (time.process_time() - cpu) / TRIALS


def main() -> None:
    print(f"drawing a trial's pictures: {1000 * rendering():.0f} ms CPU")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ready = Settings.from_environment({"SIEVE_HOME": str(folder / "ready")})
        with Outbox(ready.outbox) as box:
            box.put([outbox.study_begun("other", {"name": "other"}, {}, T0)])
        tracking.publish(ready)  # makes the tables, which takes seconds, and imports mlflow
        server = Server(folder, free_port())
        shutil.copy(ready.home / "mlflow.db", folder / "server.db")
        server.start()
        try:
            embedded = Settings.from_environment({"SIEVE_HOME": str(folder / "embedded")})
            embedded.home.mkdir()
            shutil.copy(ready.home / "mlflow.db", embedded.home / "mlflow.db")
            addresses = {"SIEVE_HOME": str(folder / "http"), "MLFLOW_TRACKING_URI": server.uri}
            for how, settings in (("embedded", embedded), ("over HTTP", Settings.from_environment(addresses))):
                wall, cpu = publishing(settings)
                print(
                    f"{how}: {1000 * wall:.0f} ms per trial ({1000 * cpu:.0f} ms CPU here), {60 / wall:.0f} trials/min"
                )
        finally:
            server.kill()


if __name__ == "__main__":
    main()
