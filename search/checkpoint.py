"""A trial between two slices as a file: plain arrays and a JSON header, nothing that runs when it is read."""

import json
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from core.data import write_atomically
from core.network import Array, Layers
from core.train import Evaluation, Keep, Kept, Progress, State, TrainConfig
from search.failpoint import failpoint

ARRAYS = ("config", "rng", "layers", "memory", "kept")  # the fields of State that JSON does not hold as they are


def save(path: Path, state: State, progress: Progress, of: str) -> None:
    """Write the state and what the trial brought forth so far, but for snapshots; all of it or nothing.

    `of` says whose state it is: which attempt, on which data.
    """
    kept = state.kept
    plain = {name: value for name, value in vars(state).items() if name not in ARRAYS}
    header = {
        "of": of,
        "config": state.config.to_params(),
        "rng": state.rng.bit_generator.state,
        "remembers": len(state.memory),
        "kept": kept and {"value": kept.value, "step": kept.step, "scale": kept.scale},
        "state": plain,
        "evaluations": [asdict(evaluation) for evaluation in progress.evaluations],
        "test": progress.test,
        "confusion": None if progress.confusion is None else progress.confusion.tolist(),
    }
    arrays = {"header": np.array(json.dumps(header))}
    for i, layers in enumerate([state.layers, *state.memory, *([kept.layers] if kept else [])]):
        for j, (w, b) in enumerate(layers):
            arrays |= {f"{i}.{j}.w": w, f"{i}.{j}.b": b}

    def write(file: BinaryIO) -> None:
        np.savez(file, **arrays)  # type: ignore[arg-type]
        failpoint("saving")

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write)


def load(path: Path, of: str, fresh: State | None = None) -> tuple[State, Progress]:
    """What `save` wrote of this attempt, if it is a later state of the training that begins as `fresh`.

    Raises OSError if it is not there, ValueError if it is not whole, of another version, or of another trial.
    """
    try:
        state, progress = _load(path, of)
    except OSError:
        raise
    except Exception as error:  # damage shows itself in many ways
        raise ValueError(f"{path}: {error}") from None
    if fresh and _fit(state) != _fit(fresh):
        raise ValueError(f"{path}: the state of another training")
    return state, progress


def _fit(state: State) -> tuple[Any, ...]:
    """What no training changes."""
    shapes = [(w.shape, b.shape) for w, b in state.layers]
    return state.config, state.order, state.total, state.per_epoch, state.keep, shapes, len(state.memory)


def _load(path: Path, of: str) -> tuple[State, Progress]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        header: dict[str, Any] = json.loads(str(archive["header"]))
        if header.get("of", of) != of:  # older versions did not say
            raise ValueError(f"expected the state of {of}, got that of {header['of']}")
        config = TrainConfig.from_params(header["config"])
        depth = len(config.hidden_sizes) + 1

        def layers(i: int) -> Layers:
            read: list[tuple[Array, Array]] = [(archive[f"{i}.{j}.w"], archive[f"{i}.{j}.b"]) for j in range(depth)]
            return read

        rng = np.random.default_rng()
        rng.bit_generator.state = header["rng"]
        remembers, kept = header["remembers"], header.get("kept")  # older checkpoints have none
        state = State(
            config=config,
            rng=rng,
            layers=layers(0),
            memory=[layers(1 + i) for i in range(remembers)],
            kept=Kept(**kept, layers=layers(1 + remembers)) if kept else None,
            **header["state"],
        )
    loss, accuracy, batches = state.running
    keep = Keep(*state.keep) if state.keep else None
    state = replace(state, order=tuple(state.order), running=(loss, accuracy, batches), keep=keep)
    evaluations = [Evaluation(**evaluation) for evaluation in header["evaluations"]]
    confusion = None if header["confusion"] is None else np.array(header["confusion"])
    return state, Progress(evaluations, [], header["test"], confusion)


def remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    with suppress(OSError):  # the study's other checkpoints
        path.parent.rmdir()
