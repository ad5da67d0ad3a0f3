"""A home that is full, read-only, damaged or of another version: one clear line, and nothing torn."""

import itertools
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search.settings import Settings
from tests.faults.conftest import SIX
from tests.oracle import verdict
from tests.processes import AN_EPOCH, finish, send, sieve, study_file

pytestmark = [pytest.mark.fault, pytest.mark.slow]

Calms = Callable[..., Any]
Figures = Callable[..., None]
THREE: dict[str, Any] = {"search": {"method": "random", "trials": 3}, "confirm": False}
QUIETLY = ("--workers", "2", "--no-publish")
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with mounted(folder, "-t", "tmpfs", "-o", "size=64m", "tmpfs"):
        yield folder


@contextmanager
def mounted(folder: Path, *words: str | Path) -> Iterator[None]:
    if subprocess.run(["mount", *words, folder], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.long
def test_a_full_disk_stops_a_study_and_tears_nothing(
    small_disk: Path, tmp_path: Path, calm: Calms, figures: Figures
) -> None:
    """Wherever the disk fills up, one line says so; with room made, the study goes on to undisturbed values."""
    settings, path = Settings.from_environment({"SIEVE_HOME": str(small_disk / "home")}), study_file(tmp_path, **SIX)
    ballast, said = small_disk / "ballast", ""
    rooms = (0, 100, 300, 500)
    for room in rooms:
        free = shutil.disk_usage(small_disk).free
        ballast.write_bytes(b"0" * max(0, free - 1024 * room))
        runner = sieve(settings, "launch", path, *QUIETLY, slices=AN_EPOCH)
        said = finish(runner)
        ballast.unlink()
        assert runner.returncode == 1, said
        assert "Traceback" not in said, said
        assert str(settings.home) in said.splitlines()[-1]
        assert "make room" in said.splitlines()[-1]
    last = sieve(settings, "launch", path, *QUIETLY)
    said = finish(last)
    assert last.returncode == 0, said
    figures("disk full", verdict(settings, "quick", calm(**SIX).results), len(rooms), also="exit 1, one line")


@pytest.mark.long
def test_a_file_size_limit_stops_a_study_and_tears_nothing(
    settings: Settings, tmp_path: Path, calm: Calms, figures: Figures
) -> None:
    """The same without the right to mount: no file may grow beyond some hundred kilobytes."""
    path = study_file(tmp_path, **SIX)
    for kilobytes in (4, 150):
        limited = ["bash", "-c", f'ulimit -f {kilobytes}; exec "$@"', "-"]
        runner = sieve(settings, "launch", path, *QUIETLY, slices=AN_EPOCH, before=limited)
        said = finish(runner)
        assert runner.returncode == 1, said
        assert "Traceback" not in said, said
        assert str(settings.home) in said.splitlines()[-1]
    last = sieve(settings, "launch", path, *QUIETLY)
    said = finish(last)
    assert last.returncode == 0, said
    figures("file size limit", verdict(settings, "quick", calm(**SIX).results), 2, also="exit 1, one line")


def test_what_was_exported_survives_a_full_disk(settings: Settings, tmp_path: Path) -> None:
    """Where there is no room for the new file, the old one stays as it was, weights and report; one line says so."""
    wide = {"base": {"epochs": 1, "hidden_sizes": [2000]}, "space": {"eta": {"low": 0.01, "high": 0.1}}}
    finish(sieve(settings, "launch", study_file(tmp_path, **wide, **THREE), *QUIETLY))
    weights, folder = tmp_path / "w.npz", tmp_path / "report"
    commands = ["export", "quick", "--weights", str(weights)], ["report", "quick", "--out", str(folder)]
    limited = ["bash", "-c", 'ulimit -f 200; exec "$@"', "-"]  # kilobytes; the weights are 600, the report is more
    for words, file in zip(commands, (weights, folder / "report.html"), strict=True):
        finish(sieve(settings, *words))
        before = file.read_bytes()
        assert len(before) > 250_000
        command = sieve(settings, *words, before=limited)
        said = finish(command)
        assert file.read_bytes() == before
        assert command.returncode == 1, said
        assert said.startswith(f"{file}: File too large"), said
        assert len(said.splitlines()) == 1, said
        assert not list(file.parent.glob(".*"))


@pytest.mark.long
def test_a_full_disk_below_the_artifacts_is_tried_again(
    new_home: Callable[[str], Settings], tmp_path: Path, calm: Calms, figures: Figures
) -> None:
    """While weights and pictures find no room, what is unsent is counted; with room made, all of them are whole."""
    settings = new_home("home")
    finish(sieve(settings, "launch", study_file(tmp_path, **THREE), *QUIETLY))
    settings.artifacts.mkdir()
    with mounted(settings.artifacts, "-t", "tmpfs", "-o", "size=40k", "tmpfs"):
        synced = sieve(settings, "sync")
        out, said = synced.communicate(timeout=120)
        assert synced.returncode == 1, said
        assert "Traceback" not in said, said
        assert "records could not be sent" in out
        assert "No space left on device" in said
    send(settings)
    stored = list(settings.artifacts.rglob("weights.npz"))
    assert len(stored) == 3
    for file in stored:
        with np.load(file) as arrays:
            assert all(np.isfinite(arrays[name]).all() for name in arrays.files)
    found = verdict(settings, "quick", calm(**THREE).results, settings.home / "mlflow.db")
    figures("disk full below the artifacts", found, also="exit 1, later sent whole")


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Callable[[Path], None]]:
    """Makes a folder read-only; root needs a file system for that."""
    with ExitStack() as mounts:

        def lock(folder: Path) -> None:
            if os.geteuid():
                for path in (folder, *folder.rglob("*")):
                    path.chmod(0o555 if path.is_dir() else 0o444)
                return
            mounts.enter_context(mounted(folder, "--bind", folder))
            subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)

        yield lock
    for path in (tmp_path, *tmp_path.rglob("*")):
        path.chmod(path.stat().st_mode | 0o200)


@pytest.mark.long
def test_a_file_that_may_not_be_opened_is_named(settings: Settings, tmp_path: Path) -> None:
    """Whichever file or folder of a home is somebody else's, one line names it; with its rights back, all goes on."""
    path, other = study_file(tmp_path, **THREE), study_file(tmp_path, name="other", **THREE)
    finish(sieve(settings, "launch", path, *QUIETLY))
    rights = "-dac_override,-dac_read_search"  # by which root opens everything
    plain = ["setpriv", f"--inh-caps={rights}", f"--bounding-set={rights}"] if os.geteuid() == 0 else []
    if plain and not shutil.which("setpriv"):
        pytest.skip("root needs setpriv to do without its rights")
    for name in ("sieve.db", "outbox/outbox.db", "outbox", "locks", "checkpoints"):
        closed = settings.home / name
        mode = closed.stat().st_mode
        closed.chmod(0)
        command = sieve(settings, "launch", other, *QUIETLY, before=plain)
        said = finish(command)
        closed.chmod(mode)
        assert command.returncode in (1, 2), (name, said)
        assert "Traceback" not in said, said
        assert str(closed) in said.splitlines()[-1], (name, said)
    last = sieve(settings, "launch", other, *QUIETLY, before=plain)
    said = finish(last)
    assert last.returncode == 0, said


@pytest.mark.long
def test_nobody_needs_to_be_at_home(
    new_home: Callable[[str], Settings], tmp_path: Path, calm: Calms, figures: Figures
) -> None:
    """With a HOME that does not exist, as in many containers, a study is done and shown whole."""
    settings = new_home("home")
    runner = sieve(settings, "launch", study_file(tmp_path, **THREE), "--workers", "2", HOME="/proc/none")
    said = finish(runner)
    assert runner.returncode == 0, said
    assert "not sent" not in said
    found = verdict(settings, "quick", calm(**THREE).results, settings.home / "mlflow.db")
    figures("no home directory", found)


def test_a_home_that_may_not_be_written_is_named(
    settings: Settings, tmp_path: Path, locked: Callable[[Path], None]
) -> None:
    """On a read-only home each command ends soon, with its result or with one line that names a path there."""
    path = study_file(tmp_path, **THREE)
    assert finish(sieve(settings, "launch", path, *QUIETLY)) != ""
    locked(settings.home)
    writing, reading = (["launch", path, "--no-publish"], ["sync"]), (["status"], ["best", "quick"])
    for words in (*writing, *reading):
        command = sieve(settings, *words)
        said = finish(command, timeout=20)
        assert "Traceback" not in said, said
        assert command.returncode in ((1, 2) if words in writing else (0, 1, 2)), said
        if command.returncode:
            assert str(settings.home) in said
            assert len(said.splitlines()) == 1


def test_databases_of_another_version_are_left_alone(settings: Settings, tmp_path: Path) -> None:
    """A storage or an outbox of a newer or older version is refused with what to do, and not a byte of it changes."""
    path = study_file(tmp_path, **THREE)
    finish(sieve(settings, "launch", path, *QUIETLY))
    storage = Path(settings.storage.removeprefix("sqlite:///"))
    for file, change, mend in (
        (storage, "UPDATE alembic_version SET version_num = 'v2.6.0.a'", "`sieve migrate`"),
        (storage, "UPDATE alembic_version SET version_num = 'v99.0.0'", "`sieve migrate`"),
        (settings.outbox, "PRAGMA user_version = 99", "written by a newer Sieve"),
    ):
        kept = tmp_path / "kept"
        shutil.copy(file, kept)
        with closing(sqlite3.connect(file)) as db:
            db.execute(change)
            db.commit()
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        before = file.read_bytes()
        command = sieve(settings, "launch", path, *QUIETLY)
        said = finish(command)
        assert command.returncode == 2, said
        assert str(file) in said
        assert mend in said
        assert len(said.splitlines()) == 1
        assert file.read_bytes() == before
        shutil.copy(kept, file)
    last = sieve(settings, "launch", path, *QUIETLY)
    said = finish(last)
    assert last.returncode == 0, said


@pytest.mark.long
def test_an_mlflow_database_of_another_version_gets_nothing(
    new_home: Callable[[str], Settings], tmp_path: Path, calm: Calms, figures: Figures
) -> None:
    """A newer or an older one is refused with what to do, everything stays in the outbox, and is sent later."""
    settings = new_home("home")
    file = settings.home / "mlflow.db"
    finish(sieve(settings, "launch", study_file(tmp_path, **THREE), *QUIETLY))
    with closing(sqlite3.connect(file)) as db:
        # It holds something of somebody's: else it would be made anew.
        db.execute("INSERT INTO experiments (name, lifecycle_stage) VALUES ('another', 'active')")
        (version,) = db.execute("SELECT version_num FROM alembic_version").fetchone()
        for other in ("451aebb31d03", "ffffffffffff"):
            db.execute("UPDATE alembic_version SET version_num = ?", (other,))
            db.commit()
            synced = sieve(settings, "sync")
            said = finish(synced)
            assert (synced.returncode, "cannot be brought up to date" in said) == (1, True), said
            assert "Traceback" not in said, said
            assert db.execute("SELECT COUNT(*) FROM runs").fetchone() == (0,)
        db.execute("UPDATE alembic_version SET version_num = ?", (version,))
        db.commit()
    send(settings)
    found = verdict(settings, "quick", calm(**THREE).results, file)
    figures("MLflow database of another version", found, 2, also="exit 1, later sent whole")


@pytest.mark.long
def test_a_damaged_checkpoint_costs_its_slices_alone(
    settings: Settings, tmp_path: Path, calm: Calms, figures: Figures
) -> None:
    """Cut short, turned into rubbish, or emptied while nobody ran: the trial begins again and ends as it would have."""
    path = study_file(tmp_path, **SIX)
    damages = (lambda raw: raw[: len(raw) // 2], lambda raw: b"x" * len(raw), lambda raw: b"")
    for damage in damages:
        runner = sieve(settings, "launch", path, *QUIETLY, slices=AN_EPOCH, SIEVE_FAILPOINT="curves:2")
        assert (finish(runner), runner.returncode)[1] == -signal.SIGKILL
        found = sorted(settings.checkpoints.rglob("*.npz"))
        assert found
        for checkpoint in found:
            checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    last = sieve(settings, "launch", path, *QUIETLY)
    said = finish(last)
    assert last.returncode == 0, said
    figures("checkpoints damaged", verdict(settings, "quick", calm(**SIX).results), len(damages))


@pytest.mark.skipif(FAKETIME is None, reason="libfaketime is not installed (Debian: faketime)")
def test_the_clock_may_jump(settings: Settings, tmp_path: Path, calm: Calms, figures: Figures) -> None:
    """With the clock of every process an hour off now and then, nothing is late, and times of a run only grow."""
    shift = tmp_path / "shift"
    shift.write_text("+1h")
    jumping = {
        "LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(shift), "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1",
    }  # fmt: skip
    shown = subprocess.run(["date", "+%s"], env=os.environ | jumping, capture_output=True, check=True)
    assert abs(int(shown.stdout) - time.time() - 3600) < 60
    runner = sieve(settings, "launch", study_file(tmp_path, **SIX), *QUIETLY, slices=AN_EPOCH, **jumping)
    jumps = itertools.cycle(("+1h", "-1h", "+0"))
    while runner.poll() is None:
        (tmp_path / "next").write_text(next(jumps))
        os.replace(tmp_path / "next", shift)
        time.sleep(0.5)
    said = finish(runner)
    assert runner.returncode == 0, said
    with closing(sqlite3.connect(settings.outbox)) as db:
        rows = db.execute("SELECT uid, time FROM records WHERE kind != 'trial_begun' ORDER BY id").fetchall()
    times: dict[str, list[float]] = {}
    for uid, when in rows:
        times.setdefault(uid, []).append(when)
    assert len(rows) > 6
    assert all(found == sorted(found) for found in times.values())
    found = verdict(settings, "quick", calm(**SIX).results)
    figures("clock jumps by an hour", found, also="twice a second, back and forth, in every process")
