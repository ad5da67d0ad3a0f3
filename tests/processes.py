"""The `sieve` command and what it starts, as real processes that a test may signal, freeze and kill."""

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

from search.settings import Settings
from tests.conftest import QUICK
from tests.servers import until

# Seconds of a slice, too few for more than one epoch: how many slices a study has depends on no machine's speed.
AN_EPOCH = 1e-6


def study_file(folder: Path, **parts: Any) -> Path:
    """QUICK with some parts replaced, as a file."""
    path = folder / f"{parts.get('name', 'quick')}.yaml"
    path.write_text(yaml.safe_dump(QUICK | parts))
    return path


def sieve(
    settings: Settings,
    *words: str | Path,
    slices: float | None = None,
    patience: float | None = None,
    before: Sequence[str] = (),
    folder: Path | None = None,
    **environment: str,
) -> subprocess.Popen[str]:
    """The command in a session of its own; `slices`: their length in seconds instead of five.

    patience: seconds without getting on that it waits for its publisher. before: a command that starts it.
    folder: where it is typed.
    """
    changes = {
        "runner.SLICE_SECONDS": slices,
        "runner.MOST_SLICE_SECONDS": slices,
        "runner.FIRST_RATE": slices and 1e8,
        "run.PUBLISHER_SECONDS": patience,
    }
    code = "from search import run, runner; from search.cli import app; "
    code += "".join(f"{name} = {value}; " for name, value in changes.items() if value is not None)
    addresses = {
        "SIEVE_HOME": str(settings.home),
        "SIEVE_STORAGE": settings.storage,
        "MLFLOW_TRACKING_URI": settings.tracking_uri,
    }
    return subprocess.Popen(
        [*before, sys.executable, "-c", f"{code}app()", *map(str, words)],
        env=os.environ | addresses | environment,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, cwd=folder,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], timeout: float = 240.0) -> str:
    """What the command said on stderr until it ended."""
    try:
        return process.communicate(timeout=timeout)[1]
    except subprocess.TimeoutExpired:
        for one in family(process.pid):
            one.kill()
        out, said = process.communicate()
        raise AssertionError(f"it did not end in {timeout} s; it said:\n{out}{said}") from None


def run(settings: Settings, *words: str | Path, code: int = 0, **given: Any) -> str:
    """The command to its end, which is to have this exit code and no traceback: what it said, on stderr last."""
    out, said = (command := sieve(settings, *words, **given)).communicate(timeout=240)
    assert command.returncode == code, out + said
    assert "Traceback" not in out + said
    return out + said


def refused(settings: Settings, *words: str | Path, code: int = 2, **given: Any) -> str:
    """The one line with which the command refuses what it was asked."""
    said = run(settings, *words, code=code, **given)
    assert len(said.splitlines()) == 1, said
    return said


def send(settings: Settings, *words: str) -> None:
    """`sieve sync`, which sends everything."""
    synced = sieve(settings, "sync", *words)
    said = finish(synced)
    assert synced.returncode == 0, said


def family(pid: int) -> list[psutil.Process]:
    """A process and all below it that live."""
    with suppress(psutil.NoSuchProcess):
        runner = psutil.Process(pid)
        return [p for p in [runner, *runner.children(recursive=True)] if p.is_running() and not is_zombie(p)]
    return []


def is_zombie(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    return True


def _those(pid: int, word: str) -> list[psutil.Process]:
    found = []
    for process in family(pid)[1:]:
        with suppress(psutil.Error):
            if word in " ".join(process.cmdline()):
                found.append(process)
    return found


def workers(pid: int) -> list[psutil.Process]:
    return _those(pid, "spawn_main")


def publisher(pid: int) -> list[psutil.Process]:
    return _those(pid, "--follow")


def slices(settings: Settings) -> int:
    """How many slices of trials were recorded so far."""
    with (
        suppress(sqlite3.OperationalError),
        closing(sqlite3.connect(f"file:{settings.outbox}?mode=ro", uri=True)) as db,
    ):
        return int(db.execute("SELECT COUNT(*) FROM records WHERE kind = 'trial_progress'").fetchone()[0])
    return 0


def await_slices(settings: Settings, process: subprocess.Popen[str], count: int) -> None:
    """Until so many more slices of trials were recorded; the command runs on."""
    enough = slices(settings) + count
    until(lambda: slices(settings) >= enough or process.poll() is not None, 120)
    assert process.poll() is None, finish(process)


def seconds_to_the_next_slice(settings: Settings, process: subprocess.Popen[str]) -> float:
    """From now until training has got on; the end of the command counts as that."""
    since, before = time.monotonic(), slices(settings)
    until(lambda: slices(settings) > before or process.poll() is not None, 120)
    return time.monotonic() - since
