"""Names and paths do not stand for content: a study is its id, its data the digest; nothing is taken for another's."""

import csv
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from search.settings import Settings
from tests.oracle import is_of, left_over, results, studies, study_id, trials, validated_on, verdict
from tests.processes import AN_EPOCH, await_slices, finish, refused, run, send, sieve, study_file
from tests.servers import Server, free_port, until

pytestmark = [pytest.mark.fault, pytest.mark.slow]

Calms = Callable[..., Any]
Figures = Callable[..., None]
Home = Callable[[str], Settings]

# Eight trials in three stages; some seconds with their publisher.
SMALL: dict[str, Any] = {
    "space": {"eta": {"low": 1e-3, "high": 1.0, "log": True}, "hidden_sizes": [[], [16], [16, 8]]},
    "search": {"method": "coarse-to-fine", "stages": 2, "trials_per_stage": 3},
    "confirm": {"top": 1, "repeats": 2},
}
OTHER = SMALL | {"seed": 1, "space": SMALL["space"] | {"hidden_sizes": [[12], [12, 6]]}}
TWO: dict[str, Any] = {"search": {"method": "random", "trials": 2}, "confirm": False}
QUIETLY = ("--workers", "2", "--no-publish")
ALONE = ("--workers", "1", "--no-publish")  # all trials that may share a slice do


def half_way(settings: Settings, file: Path, *words: str, at: str = "saved:2", **given: Any) -> None:
    """Launch a study and kill its runner in the midst of it."""
    said = finish(killed := sieve(settings, "launch", file, *words, slices=AN_EPOCH, SIEVE_FAILPOINT=at, **given))
    assert killed.returncode == -signal.SIGKILL, said


def stores(settings: Settings) -> list[Path]:
    """The files of an SQLite storage."""
    path = Path(settings.storage.removeprefix("sqlite:///"))
    return sorted(path.parent.glob(f"{path.name}*"))


def delete(settings: Settings, study: str = "quick") -> None:
    """As somebody does in the dashboard."""
    storage = optuna.storages.RDBStorage(settings.storage)
    optuna.delete_study(study_name=study, storage=storage)
    storage.engine.dispose()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, new_mlflow: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(new_mlflow, folder / "server.db")
    server = Server(folder, free_port())
    server.start()
    yield server
    server.kill()


# ---- the oracle itself


@pytest.mark.long
def test_the_oracle_sees_what_it_is_for(settings: Settings, tmp_path: Path, calm: Calms) -> None:
    """Each of its counts rises when what it counts is planted: it would not be at zero whatever happened."""
    run(settings, "launch", study_file(tmp_path, **SMALL), *QUIETLY)
    undisturbed = calm(**SMALL).results
    assert not any(verdict(settings, "quick", undisturbed))
    storage, journal = stores(settings)[0], settings.outbox
    identity = study_id(settings, "quick")
    first = f"{identity}/s0.i0.r0/1"
    own = f"kind = 'trial_begun' AND uid = '{first}'"
    again = "UPDATE trial_user_attributes SET value_json = '\"s0.i0.r0\"' WHERE key = 'slot' AND trial_id = 2"
    columns = "study, uid, kind, seq, time, payload"
    plants = {  # count: database, statement
        "lost": (storage, "UPDATE trials SET state = 'FAIL' WHERE number = 0"),
        "dup": (storage, again),
        "ghost": (
            journal,
            f"INSERT INTO records ({columns}) SELECT {columns.replace('uid', 'uid || 1')} FROM records WHERE {own}",
        ),
        "orphan": (storage, "UPDATE trials SET state = 'RUNNING' WHERE number = 0"),
        "points": (journal, f"DELETE FROM records WHERE kind = 'trial_progress' AND uid = '{first}'"),
        "values": (storage, "UPDATE trial_intermediate_values SET intermediate_value = 0 WHERE step = 1"),
        "uids": (storage, again),
        "data": (
            journal,
            f"UPDATE records SET payload = json_set(payload, '$.tags.dataset_digest', 'f00d') WHERE {own}",
        ),
        "params": (storage, "UPDATE trial_params SET param_value = 0.5 WHERE param_name = 'eta' AND trial_id = 8"),
        "weights": (
            journal,
            "UPDATE records SET blob = (SELECT blob FROM records r WHERE r.kind = 'trial_ended' AND r.uid LIKE "
            f"'%/s0.i1.r0/1') WHERE kind = 'trial_ended' AND uid = '{first}'",
        ),
    }
    kept = {path: path.read_bytes() for path in (storage, journal)}
    for count, (database, statement) in plants.items():
        with closing(sqlite3.connect(database)) as db, db:
            assert db.execute(statement).rowcount > 0, count
        assert getattr(verdict(settings, "quick", undisturbed), count), count
        for path, content in kept.items():
            for part in path.parent.glob(f"{path.name}-*"):
                part.unlink()
            path.write_bytes(content)


# ---- a name that was used before


@pytest.mark.long
@pytest.mark.parametrize("how", ["deleted", "storage removed", "storage elsewhere"])
def test_a_name_that_was_used_before_is_another_study(
    new_home: Home, tmp_path: Path, calm: Calms, figures: Figures, how: str
) -> None:
    """Best, export, report, MLflow and dashboard tell of the new study alone, to the weight; the old runs stay."""
    settings = new_home("home")
    run(settings, "launch", study_file(tmp_path, **SMALL), "--workers", "2")
    send(settings)
    before = shown_runs(settings)
    if how == "deleted":
        delete(settings)
    elif how == "storage removed":
        for path in stores(settings):
            path.unlink()
    else:
        settings = replace(settings, storage=f"sqlite:///{tmp_path}/elsewhere/sieve.db")
    run(settings, "launch", study_file(tmp_path, **OTHER), "--workers", "2")
    send(settings)
    found = verdict(settings, "quick", calm(**OTHER).results, settings.home / "mlflow.db")
    assert best_is_true(settings)
    assert report_is_true(settings, tmp_path / "report")
    assert dashboard_is_true(settings)
    assert before.items() <= shown_runs(settings).items()
    figures(f"a study's name used again: {how}", found)


def shown_runs(settings: Settings) -> dict[str, tuple[str, int]]:
    """Run -> its uid and how many values it has, of all that MLflow shows."""
    runs = (
        "SELECT r.run_uuid, t.value, (SELECT COUNT(*) FROM metrics m WHERE m.run_uuid = r.run_uuid) FROM runs r JOIN "
        "tags t ON t.run_uuid = r.run_uuid AND t.key = 'sieve.uid' WHERE r.lifecycle_stage = 'active'"
    )
    with closing(sqlite3.connect(settings.home / "mlflow.db", timeout=60)) as db:
        return {run: (uid, values) for run, uid, values in db.execute(runs).fetchall()}


def best_is_true(settings: Settings) -> bool:
    """Whether `sieve best` names trials of the storage, with their parameters and the mean of their values."""
    said = json.loads(run(settings, "best", "quick", "--json"))
    named = [t for t in trials(settings, "quick") if t.user_attrs["slot"] in said["slots"]]
    mean = np.mean([t.value for t in named])
    return len(named) == said["n"] and abs(mean - said["mean"]) < 1e-9 and said["params"] == named[0].params


def report_is_true(settings: Settings, folder: Path) -> bool:
    """Whether the report's table, and the curves in its page, are those of the storage."""
    run(settings, "report", "quick", "--out", folder)
    with (folder / "trials.csv").open(newline="") as file:
        rows = {row["slot"]: row for row in csv.DictReader(file)}
    stored = {t.user_attrs["slot"]: t for t in trials(settings, "quick")}
    page = (folder / "report.html").read_text()
    return rows.keys() == stored.keys() and all(
        float(row["value"]) == stored[slot].value
        and float(row["eta"]) == stored[slot].params["eta"]
        and row["hidden_sizes"] == str(stored[slot].params["hidden_sizes"])
        for slot, row in rows.items()
    ) and "[16" not in page  # fmt: skip


def dashboard_is_true(settings: Settings) -> bool:
    """Whether each trial's note leads to its own run, and its picture is the one that this run shows."""
    identity, storage = study_id(settings, "quick"), stores(settings)[0]
    runs = shown_runs(settings)
    with closing(sqlite3.connect(storage)) as db:
        notes = dict(
            db.execute("SELECT key, value_json FROM study_system_attributes WHERE key LIKE '%note_str:0'").fetchall()
        )
        pictures = dict(
            db.execute("SELECT trial_id, value_json FROM trial_system_attributes WHERE key LIKE 'artifacts:%'")
        )
    for trial in trials(settings, "quick"):
        (run_id,) = re.findall(r"runs/([0-9a-f]{32})", notes[f"dashboard:{trial._trial_id}:note_str:0"])
        uid = f"{identity}/{trial.user_attrs['slot']}/{trial.user_attrs['attempt']}"
        if runs[run_id][0] != uid:
            return False
        picture = settings.trial_artifacts / json.loads(json.loads(pictures[trial._trial_id]))["artifact_id"]
        (final,) = (
            path
            for path in settings.home.glob(f"artifacts/**/{run_id}/**/W1_final*.png")
            if "compressed" not in path.name
        )
        if picture.read_bytes() != final.read_bytes():
            return False
    return True


# ---- checkpoints


def listed(*settings: tuple[float, list[int]]) -> dict[str, Any]:
    return {"search": {"method": "list", "settings": [{"eta": eta, "hidden_sizes": sizes} for eta, sizes in settings]}}


LISTED = SMALL | {"base": {"batch_size": 50, "epochs": 6}, "space": {}, "confirm": False}
LISTED |= listed((0.1, [8]), (0.05, [8]))
CHANGES: dict[str, dict[str, Any]] = {
    "other hidden_sizes": listed((0.1, [9]), (0.05, [9])),
    "other eta": listed((0.2, [8]), (0.3, [8])),
    "other seed": {"seed": 1},
    "other batch size": {"base": {"batch_size": 25, "epochs": 6}},
    "other data": {"dataset": {"name": "digits", "train": 200, "validation": 100, "test": 100}},
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("change", ["other hidden_sizes", "other eta", "other seed"])
def test_checkpoints_of_a_study_that_was_deleted_are_not_taken(
    settings: Settings, tmp_path: Path, calm: Calms, figures: Figures, change: str
) -> None:
    """A study stopped half-way is deleted, and one of its name stopped where it has none yet: it begins by itself."""
    half_way(settings, study_file(tmp_path, **LISTED), *QUIETLY)
    delete(settings)
    parts = LISTED | CHANGES[change]
    file = study_file(tmp_path, **parts)
    half_way(settings, file, *QUIETLY, at="begun:2")
    run(settings, "launch", file, *QUIETLY)
    figures(f"old checkpoints, {change}", verdict(settings, "quick", calm(**parts).results))


@pytest.mark.long
@pytest.mark.parametrize("change", [*CHANGES, "another trial"])
def test_a_checkpoint_of_another_trial_is_not_taken(
    settings: Settings, tmp_path: Path, calm: Calms, figures: Figures, change: str
) -> None:
    """A checkpoint that lies where another trial's should be is not that trial's: it begins anew."""
    file = study_file(tmp_path, **LISTED)
    half_way(settings, file, *ALONE)
    own = sorted(settings.checkpoints.rglob("*.npz"))
    assert len(own) == 2
    if change == "another trial":
        foreign = [path.read_bytes() for path in reversed(own)]
    else:
        there = replace(settings, home=tmp_path / "there", storage=f"sqlite:///{tmp_path}/there/sieve.db")
        (folder := tmp_path / "changed").mkdir()
        half_way(there, study_file(folder, **LISTED | CHANGES[change]), *ALONE, at="saved:3")
        foreign = [path.read_bytes() for path in sorted(there.checkpoints.rglob("*.npz"))]
    for path, content in zip(own, foreign, strict=True):
        path.write_bytes(content)
    run(settings, "launch", file, *QUIETLY)
    figures(f"checkpoint of {change}", verdict(settings, "quick", calm(**LISTED).results))


# ---- homes


@pytest.mark.long
@pytest.mark.parametrize("other", [OTHER, SMALL], ids=["another study", "the same file"])
def test_two_homes_may_use_one_name_on_one_mlflow(
    settings: Settings, tmp_path: Path, server: Server, calm: Calms, figures: Figures, other: dict[str, Any]
) -> None:
    """Two people with a storage each launch studies of one name at once: one MLflow shows two sets of runs."""
    one = replace(settings, tracking_uri=server.uri)
    two = replace(one, home=tmp_path / "two", storage=f"sqlite:///{tmp_path}/two/sieve.db")
    (folder := tmp_path / "studies of two").mkdir()
    files = {one: study_file(tmp_path, **SMALL), two: study_file(folder, **other)}
    begun = {home: sieve(home, "launch", file, "--workers", "1") for home, file in files.items()}
    for launched in begun.values():
        said = finish(launched)
        assert launched.returncode == 0, said
    for home, parts in ((one, SMALL), (two, other)):
        send(home)
        found = verdict(home, "quick", calm(**parts).results, server.database)
        figures("two homes, one name, one MLflow", found, 2)


@pytest.mark.long
def test_a_home_may_be_moved(new_home: Home, tmp_path: Path, calm: Calms, figures: Figures) -> None:
    """Stopped half-way, moved and launched again: all is shown, MLflow finds its files, the old place stays empty."""
    before, file = new_home("before"), study_file(tmp_path, **SMALL)
    half_way(before, file, "--workers", "2", at="told:4")
    send(before)
    assert not left_over(before)
    before.home.rename(tmp_path / "after")
    after = Settings.from_environment({"SIEVE_HOME": str(tmp_path / "after")})
    run(after, "launch", file, "--workers", "2")
    run(after, "sync", "--redo")
    assert not before.home.exists()
    weights = downloads(after)
    assert len(weights) == len(calm(**SMALL).results)
    attrs, stored = studies(after)["quick"]
    for uid, content in weights.items():
        (trial,) = (t for t in stored if uid.endswith(f"/{t.user_attrs['slot']}/{t.user_attrs['attempt']}"))
        held = validated_on(after, attrs, trial.user_attrs["stage"])
        assert is_of(held, json.loads(attrs["spec"]), trial, content)
    figures("a home moved", verdict(after, "quick", calm(**SMALL).results, after.home / "mlflow.db"))


def downloads(settings: Settings) -> dict[str, bytes]:
    """uid -> weights.npz of each trial, as MLflow's own client finds it."""
    code = """
import sys, logging
from mlflow import MlflowClient
client = MlflowClient(sys.argv[1])
for experiment in client.search_experiments():
    for run in client.search_runs([experiment.experiment_id]):
        if run.data.tags.get("kind") == "trial":
            print(run.data.tags["sieve.uid"], client.download_artifacts(run.info.run_id, "weights.npz"), sep="\\t")
"""
    command = [sys.executable, "-W", "ignore", "-c", code, settings.tracking_uri]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {uid: Path(path).read_bytes() for uid, path in (line.split("\t") for line in out.splitlines())}


@pytest.mark.long
def test_a_home_may_be_copied(
    settings: Settings, tmp_path: Path, server: Server, calm: Calms, figures: Figures
) -> None:
    """A home is copied half-way, and both go on and publish to one MLflow: it shows no point twice."""
    one, parts = replace(settings, tracking_uri=server.uri), SMALL | {"name": "copied"}
    file = study_file(tmp_path, **parts)
    half_way(one, file, "--workers", "2", at="told:4")
    send(one)
    shutil.copytree(one.home, tmp_path / "two")
    two = replace(one, home=tmp_path / "two", storage=f"sqlite:///{tmp_path}/two/sieve.db")
    for home in (one, two):
        run(home, "launch", file, "--workers", "2")
    for home in (two, one):
        send(home)
    for home in (one, two):
        figures("a home copied", verdict(home, "copied", calm(**SMALL).results, server.database), 2)


@pytest.mark.long
@pytest.mark.parametrize("sent", ["nothing sent", "all sent"])
@pytest.mark.parametrize("how", ["lost", "restored from an older copy"])
def test_the_journal_may_be_lost(
    new_home: Home, tmp_path: Path, calm: Calms, figures: Figures, how: str, sent: str
) -> None:
    """What checkpoints and MLflow still hold is not lost with the journal: in the end each point is shown once."""
    settings, file = new_home("home"), study_file(tmp_path, **SMALL)
    half_way(settings, file, *QUIETLY, at="saved:1")
    shutil.copytree(settings.outbox.parent, tmp_path / "older")
    half_way(settings, file, *QUIETLY, at="saved:2")
    if sent == "all sent":
        send(settings)
    shutil.rmtree(settings.outbox.parent)
    if how != "lost":
        shutil.copytree(tmp_path / "older", settings.outbox.parent)
    run(settings, "launch", file, "--workers", "2")
    send(settings)
    found = verdict(settings, "quick", calm(**SMALL).results, settings.home / "mlflow.db")
    figures(f"journal {how}, {sent}", found)


OLD_HOME = Path(__file__).parents[1] / "data" / "home-of-layout-1.tar.xz"  # as commit f3bd17b left it, half-way


@pytest.mark.long
def test_a_home_of_the_version_before_goes_on(tmp_path: Path, figures: Figures) -> None:
    """Stopped half-way under layout 1, taken up by this version: nothing lost, nothing shown twice, the same values."""
    settings, undisturbed = old_home(tmp_path)
    assert "0.92" in run(settings, "best", "digits")
    file = settings.home / "digits.yaml"
    said = finish(launched := sieve(settings, "launch", file, "--workers", "2"))
    if launched.returncode:  # its split is not what a file that names none means today
        assert (launched.returncode, "write `split: last` there to go on" in said) == (2, True), said
        run(settings, "launch", file, "--set", "dataset.split=last", "--workers", "2")
    send(settings)
    assert re.fullmatch(r"[0-9a-f]{16}", study_id(settings, "digits"))
    assert studies(settings)["digits"][0]["formerly"] is True
    figures("a home of layout 1", verdict(settings, "digits", undisturbed, settings.home / "mlflow.db"))
    runs = shown_runs(settings)
    run(settings, "sync", "--redo")
    assert shown_runs(settings) == runs


def old_home(folder: Path) -> tuple[Settings, dict[str, str]]:
    """The home, and the results of its study as the old version itself ended it."""
    with tarfile.open(OLD_HOME) as archive:
        archive.extractall(folder, filter="data")
    settings = Settings.from_environment({"SIEVE_HOME": str(folder / "mlruns")})
    return settings, json.loads((settings.home / "undisturbed.json").read_text())


def test_a_home_of_the_version_before_can_be_looked_at(tmp_path: Path) -> None:
    """Status, best, export and report of a study that this version never launched say what is stored."""
    settings, undisturbed = old_home(tmp_path)
    (row,) = json.loads(run(settings, "status", "--json"))
    assert (row["complete"], row["running"]) == (3, 3)
    assert run(settings, "best", "digits", "--json")
    run(settings, "export", "digits", "--weights", tmp_path / "weights.npz")
    attrs, stored = studies(settings)["digits"]
    chosen = next(t for t in stored if t.user_attrs["slot"] == "s0.i1.r0")
    content = (tmp_path / "weights.npz").read_bytes()
    assert is_of(validated_on(settings, attrs, "stage-1"), json.loads(attrs["spec"]), chosen, content)
    run(settings, "report", "digits", "--out", tmp_path / "report")
    assert results(settings, "digits").items() <= undisturbed.items()
    with closing(sqlite3.connect(stores(settings)[0])) as db, db:
        db.execute("UPDATE study_user_attributes SET value_json = '\"queued\"' WHERE key = 'state'")
    assert "does not wait" in run(settings, "stop", "digits")


def test_the_data_of_the_version_before_is_asked_for(tmp_path: Path) -> None:
    """That version kept digests in the journal alone: what they do not agree with is not trained on, nor exported."""
    settings, _ = old_home(tmp_path)
    other = "UPDATE records SET payload = json_set(payload, '$.tags.dataset_digest', ?) WHERE kind = 'trial_begun'"
    with closing(sqlite3.connect(settings.outbox)) as db, db:
        db.execute(other, ["f00d" + 60 * "5"])
    file = settings.home / "digits.yaml"
    commands = [("launch", file, "--set", "dataset.split=last", "--no-publish"), ("retry", "digits")]
    commands += [("launch", file, "--set", "dataset.split=last", "--detach")]
    commands += [("export", "digits", "--weights", tmp_path / "weights.npz")]
    for command in commands:
        said = run(settings, *command, code=2).splitlines()[-1]
        assert "f00d5555" in said
        assert "d95ca726" in said
    assert len(trials(settings, "digits")) == 6


# ---- data


def npz(path: Path, seed: int) -> Path:
    """A small problem of four classes."""
    rng = np.random.default_rng(seed)
    y = np.arange(400) % 4
    x = (rng.normal(size=(4, 12))[y] + rng.normal(size=(400, 12))).astype(np.float32)
    order = rng.permutation(400)
    np.savez(path, x=x[order], y=y[order])
    return path


def on(path: Path | str, **parts: Any) -> dict[str, Any]:
    return SMALL | {"dataset": {"name": "npz", "path": str(path), "validation": 100, "test": 60}} | parts


@pytest.mark.long
@pytest.mark.parametrize("stamps", ["new times", "the same times"])
def test_a_data_file_that_was_replaced_is_refused(
    settings: Settings, tmp_path: Path, calm: Calms, figures: Figures, stamps: str
) -> None:
    """Half-way the file becomes another: one line names both digests; put back, the study ends as ever."""
    data = npz(tmp_path / "data.npz", 1)
    kept, stat, parts = data.read_bytes(), data.stat(), on(data)
    undisturbed = calm(**parts).results
    file = study_file(tmp_path, **parts)
    half_way(settings, file, *QUIETLY)
    before = len(trials(settings, "quick"))
    assert npz(data, 2).stat().st_size == stat.st_size
    if stamps == "the same times":
        shutil.rmtree(settings.data_cache)
        os.utime(data, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    for command in (("launch", file, "--no-publish"), ("retry", "quick")):
        line = refused(settings, *command)
        (written,) = set(studies(settings)["quick"][0]["datasets"].values())
        named = [word for word in re.findall(r"[0-9a-f]{8,64}", line) if len(set(word)) > 4]
        assert any(written.startswith(word) for word in named), line
        assert any(not written.startswith(word) for word in named), line
    assert len(trials(settings, "quick")) == before
    data.write_bytes(kept)
    run(settings, "launch", file, *QUIETLY)
    figures("data file replaced", verdict(settings, "quick", undisturbed))


@pytest.mark.long
def test_a_relative_path_means_one_file(settings: Settings, tmp_path: Path, calm: Calms, figures: Figures) -> None:
    """Resumed from a folder where the path names another file: the same data, or no data. Retry, too."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    for seed, folder in enumerate((here, elsewhere)):
        folder.mkdir()
        npz(folder / "data.npz", seed)
    undisturbed = calm(**on(here / "data.npz")).results
    file = study_file(tmp_path, **on("data.npz"))
    half_way(settings, file, *QUIETLY, folder=here)
    launched = sieve(settings, "launch", file, *QUIETLY, folder=elsewhere)
    said = finish(launched)
    assert launched.returncode in (0, 2), said
    assert len(said.splitlines()) == 1 or launched.returncode == 0, said
    run(settings, "launch", file, *QUIETLY, folder=here)
    figures("a relative path, two folders", verdict(settings, "quick", undisturbed))


def test_commands_work_from_any_folder(settings: Settings, tmp_path: Path) -> None:
    """A study of a relative path, launched here: export, report, best and retry elsewhere know its data."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    npz(here / "data.npz", 1)
    file = study_file(tmp_path, **on("data.npz"))
    run(settings, "launch", file, *QUIETLY, folder=here)
    run(settings, "export", "quick", "--weights", tmp_path / "weights.npz", folder=elsewhere)
    run(settings, "report", "quick", "--out", tmp_path / "report", folder=elsewhere)
    run(settings, "best", "quick", folder=elsewhere)
    assert not any(verdict(settings, "quick", results(settings, "quick")))
    assert not any(elsewhere.iterdir())


@pytest.mark.long
def test_the_service_works_from_any_folder(settings: Settings, tmp_path: Path, calm: Calms, figures: Figures) -> None:
    """A study of a relative path that was left to `sieve serve`, which was started elsewhere, is run on its data."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    for seed, folder in enumerate((here, elsewhere)):
        folder.mkdir()
        npz(folder / "data.npz", seed)
    run(settings, "launch", study_file(tmp_path, **on("data.npz")), "--detach", folder=here)
    service = sieve(settings, "serve", "--workers", "2", folder=elsewhere)
    try:
        until(lambda: studies(settings)["quick"][0].get("state") in ("done", "failed"), 60)
    finally:
        service.terminate()
        finish(service)
    send(settings)
    found = verdict(settings, "quick", calm(**on(here / "data.npz")).results, settings.home / "mlflow.db")
    figures("a relative path, `sieve serve` elsewhere", found)


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_export_takes_the_normalisation_of_the_time_of_training(settings: Settings, tmp_path: Path, how: str) -> None:
    """Weights, mean and scale are those of the training, whatever became of the file since."""
    data = npz(tmp_path / "data.npz", 1)
    run(settings, "launch", study_file(tmp_path, **on(data)), *QUIETLY)
    attrs, stored = studies(settings)["quick"]
    held = {stage: validated_on(settings, attrs, stage) for stage in {t.user_attrs["stage"] for t in stored}}
    data.unlink()
    if how == "replaced":
        npz(data, 2)
    shutil.rmtree(settings.data_cache)
    run(settings, "export", "quick", "--weights", tmp_path / "weights.npz")
    with np.load(tmp_path / "weights.npz") as archive:
        about = json.loads(str(archive["about"]))
    (trial,) = (t for t in stored if t.user_attrs["slot"] == about["slot"])
    content = (tmp_path / "weights.npz").read_bytes()
    assert is_of(held[trial.user_attrs["stage"]], json.loads(attrs["spec"]), trial, content)
    assert about["dataset"]["digest"] in attrs["datasets"].values()


# ---- requests


@pytest.mark.long
@pytest.mark.parametrize("what", ["stop", "cancel"])
def test_a_request_dies_with_the_launch_that_it_met(
    settings: Settings, tmp_path: Path, calm: Calms, figures: Figures, what: str
) -> None:
    """Asked to stop, the runner is killed before it reads that: the next launch runs to the study's end."""
    parts = SMALL | {"base": {"batch_size": 5, "epochs": 30}}
    file = study_file(tmp_path, **parts)
    runner = sieve(settings, "launch", file, *QUIETLY, slices=AN_EPOCH)
    await_slices(settings, runner, 2)
    runner.send_signal(signal.SIGSTOP)
    assert "asked the runner" in run(settings, what, "quick")
    runner.kill()
    runner.communicate()
    run(settings, "launch", file, *QUIETLY)
    assert not any(t.user_attrs.get("reason") == "cancelled by the user" for t in trials(settings, "quick"))
    figures(f"asked to {what}, then killed", verdict(settings, "quick", calm(**parts).results))


@pytest.mark.long
@pytest.mark.parametrize("what", ["stop", "cancel"])
def test_a_request_that_comes_too_late_stops_nothing(
    settings: Settings, tmp_path: Path, calm: Calms, what: str
) -> None:
    """Asked to stop when all is done and only MLflow is waited for: the study, given more points, runs to its end."""
    away = replace(settings, tracking_uri=f"http://127.0.0.1:{free_port()}")
    runner = sieve(away, "launch", study_file(tmp_path, **TWO), "--workers", "2", patience=10)
    until(lambda: runner.poll() is not None or is_done(settings), 120)
    assert re.search("asked the runner|not running", run(settings, what, "quick"))
    said = finish(runner)
    assert runner.returncode == 0, said
    more = TWO | {"search": TWO["search"] | {"trials": 4}}
    run(settings, "launch", study_file(tmp_path, **more), *QUIETLY)
    assert not any(verdict(settings, "quick", calm(**more).results))


def is_done(settings: Settings) -> bool:
    """Whether the storage says so; before there is one, it does not."""
    with suppress(sqlite3.Error), closing(sqlite3.connect(f"file:{settings.home}/sieve.db?mode=ro", uri=True)) as db:
        return bool(db.execute("SELECT 1 FROM study_user_attributes WHERE value_json = '\"done\"'").fetchone())
    return False


@pytest.mark.parametrize("what", ["stop", "cancel"])
def test_a_request_to_nobody_stops_nobody(settings: Settings, tmp_path: Path, calm: Calms, what: str) -> None:
    """For a study that nobody runs the answer says so, and the next launch runs to the end."""
    file = study_file(tmp_path, **SMALL)
    half_way(settings, file, *QUIETLY)
    assert "not running" in run(settings, what, "quick")
    run(settings, "launch", file, *QUIETLY)
    assert not any(verdict(settings, "quick", calm(**SMALL).results))


# ---- names


@pytest.mark.long
@pytest.mark.parametrize("name", ["publisher", "schema", "con", "0"])
def test_any_name_is_a_study_and_nothing_else(
    new_home: Home, tmp_path: Path, calm: Calms, figures: Figures, name: str
) -> None:
    """A study with the name of something of ours runs, and is published while it does."""
    settings, parts = new_home("home"), SMALL | {"base": {"batch_size": 5, "epochs": 40}}
    launched = sieve(settings, "launch", study_file(tmp_path, **parts, name=name), "--workers", "2")
    said = finish(launched)
    assert launched.returncode == 0, said
    assert "not sent" not in said
    found = verdict(settings, name, calm(**parts).results, settings.home / "mlflow.db")
    figures("a study named as something of ours", found, 4)


def test_a_mistyped_path_does_not_use_up_the_name(settings: Settings, tmp_path: Path, calm: Calms) -> None:
    """Data that is not there is said before anything is registered: the mended file is the study."""
    parts = on(npz(tmp_path / "data.npz", 1))
    for wrong in (tmp_path / "dta.npz", tmp_path):
        assert str(wrong) in refused(settings, "launch", study_file(tmp_path, **on(wrong)), *QUIETLY)
        assert json.loads(run(settings, "status", "--json")) == []
    run(settings, "launch", study_file(tmp_path, **parts), *QUIETLY)
    assert not any(verdict(settings, "quick", calm(**parts).results))


def test_a_study_without_a_trial_may_be_replaced(settings: Settings, tmp_path: Path, calm: Calms) -> None:
    """Left to `sieve serve` and never begun, then launched from a changed file: it is the changed one."""
    run(settings, "launch", study_file(tmp_path, **SMALL), "--detach")
    run(settings, "launch", study_file(tmp_path, **OTHER), *QUIETLY)
    assert not any(verdict(settings, "quick", calm(**OTHER).results))


@pytest.mark.parametrize("directions", [["minimize"], ["maximize", "minimize"]], ids=["minimise", "two"])
def test_an_empty_study_of_that_name_does_not_turn_it_round(
    settings: Settings, tmp_path: Path, calm: Calms, directions: list[str]
) -> None:
    """Somebody made an Optuna study of that name: it is refused with one line, or made to be what the file says."""
    settings.home.mkdir()
    storage = optuna.storages.RDBStorage(settings.storage)
    optuna.create_study(study_name="quick", storage=storage, directions=directions)
    storage.engine.dispose()
    launched = sieve(settings, "launch", study_file(tmp_path, **SMALL), *QUIETLY)
    said = finish(launched)
    with closing(sqlite3.connect(stores(settings)[0])) as db:
        stored = [row[0] for row in db.execute("SELECT direction FROM study_directions ORDER BY objective")]
    if launched.returncode:
        assert (launched.returncode, len(said.splitlines())) == (2, 1), said
        assert stored == [direction.upper() for direction in directions]
    else:
        assert stored == ["MAXIMIZE"]
        assert not any(verdict(settings, "quick", calm(**SMALL).results))


COMMANDS = (("launch", "{file}", "--no-publish"), ("launch", "{file}", "--detach"), ("retry", "quick"),
            ("best", "quick"), ("export", "quick", "--weights", "{file}.npz"), ("report", "quick", "--out", "{file}.d"),
            ("stop", "quick"), ("cancel", "quick"))  # fmt: skip


@pytest.mark.parametrize(
    "attrs", [{}, {"spec": "mine", "id": 7, "state": "queued"}], ids=["plain", "with words of ours"]
)
def test_a_study_of_another_tool_is_left_alone(settings: Settings, tmp_path: Path, attrs: dict[str, Any]) -> None:
    """Every command refuses it with one line; nothing of it is changed."""
    settings.home.mkdir()
    storage = optuna.storages.RDBStorage(settings.storage)
    study = optuna.create_study(study_name="quick", storage=storage)
    for key, value in attrs.items():
        study.set_user_attr(key, value)
    study.add_trial(optuna.trial.create_trial(value=1.0))
    storage.engine.dispose()
    before = dump(settings)
    file = study_file(tmp_path, **SMALL)
    for words in COMMANDS:
        line = refused(settings, *(word.format(file=file) for word in words))
        assert "quick" in line, words
    assert "quick" in run(settings, "status")
    assert dump(settings) == before


def dump(settings: Settings) -> list[str]:
    with closing(sqlite3.connect(stores(settings)[0])) as db:
        return [line for line in db.iterdump() if "alembic" not in line and "version_info" not in line]


# ---- a stage that was begun


@pytest.mark.long
def test_a_begun_stage_keeps_its_points(settings: Settings, tmp_path: Path, calm: Calms, figures: Figures) -> None:
    """A failed slot of an earlier stage is tried again: the configurations of the begun one keep their parameters."""
    wide = {  # so wide that each trial is a slice of its own
        "base": {"batch_size": 50, "epochs": 1, "hidden_sizes": [1600]},
        "space": {"eta": {"low": 1e-4, "high": 1.0, "log": True}},
        "search": {"method": "coarse-to-fine", "stages": 2, "trials_per_stage": 3},
        "repeats": 2,
        "confirm": False,
    }
    planned = calm(**wide).results.keys()
    first = [t for t in map(json.loads, calm(**wide).results.values()) if t[3]["slot"].startswith("s0.")]
    best = max(first, key=lambda t: t[1][0])[2]["eta"]
    limited = study_file(tmp_path, **wide, limits={"trials": 7})
    run(settings, "launch", limited, "--workers", "1", "--no-publish", SIEVE_FAILPOINT=f"eta={best:g}")
    assert sum(t.state.name == "FAIL" for t in trials(settings, "quick")) == 2
    run(settings, "retry", "quick", "--workers", "1")
    run(settings, "launch", study_file(tmp_path, **wide), "--workers", "1", "--no-publish")
    assert results(settings, "quick").keys() == planned
    figures("a slot tried again when the next stage is begun", verdict(settings, "quick", results(settings, "quick")))
