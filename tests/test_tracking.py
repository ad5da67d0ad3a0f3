"""Publishing to real MLflow stores: embedded SQLite and a server on loopback, with and without faults."""

import base64
import hashlib
import json
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search import outbox, tracking
from search.outbox import Counts, Outbox, Record
from search.settings import Settings
from tests.servers import Server, free_port, proxy, rule, until

T0 = 1_790_000_000.0
DIGITS = hashlib.sha256(b"digits").hexdigest()[:16]  # the id of the study of that name
KEYS = ("cost/train", "cost/val", "loss/train", "loss/val", "accuracy/train", "accuracy/val", "eta")
DELETED_ONLY = 2  # mlflow.entities.ViewType
CLASSES = [str(i) for i in range(10)]
OLD_LOADER = "ignore:The ``noload`` loader strategy is deprecated"  # MLflow 3.17 with SQLAlchemy 2.1

pytestmark = pytest.mark.filterwarnings(f"{OLD_LOADER}:sqlalchemy.exc.SADeprecationWarning")


# ---- what is published


def ident(name: str) -> str:
    """An id for the study of that name."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def begun(name: str = "digits", study: str | None = None, formerly: str | None = None) -> Record:
    """A study that searches lambda on a log scale and hidden_sizes by choice."""
    spec = {"name": name, "metric": "val_accuracy", "description": "Is less more?", "base": {"epochs": 4}}
    dimensions = {"lambda": "log", "hidden_sizes": "choice"}
    more: dict[str, Any] = {"dimensions": dimensions, "optuna_study_id": 3}
    more |= {"formerly": formerly} if formerly else {}
    return outbox.study_begun(study or ident(name), spec, {"version": "0"}, T0, **more)


def trial(
    index: int = 0,
    name: str = "digits",
    attempt: int = 1,
    *,
    points: int = 4,
    end: bool = True,
    study: str = "",
    **ending: Any,
) -> list[Record]:
    """The records of one attempt, in the order in which the runner puts them: two slices, pictures, the end."""
    study = study or ident(name)
    uid = f"{study}/s0.i{index}.r0/{attempt}"
    at = T0 + 100 * index
    rng = np.random.default_rng(index)
    w = rng.normal(size=(64, 10)).astype(np.float32)
    params = {"lambda": 10.0 ** -(index + 1), "hidden_sizes": "[]", "epochs": points}
    tags = {"stage": "coarse", "slot": f"s0.i{index}.r0", "repeat": "0", "attempt": str(attempt)}
    tags |= {"dataset": "digits", "dataset_digest": "ab" * 32, "version": "0"}
    curve = [(e, at + e, {key: float(rng.random()) for key in KEYS}) for e in range(1, points + 1)]
    half = points // 2
    records = [
        outbox.trial_begun(study, uid, outbox.run_name(params), params, tags, at, {"study_id": 3, "number": index}),
        outbox.trial_weights(study, uid, 0, at, 0, w, (8, 8), None, np.linspace(1, 2, 64), CLASSES),
        outbox.trial_progress(study, uid, half, at + half, curve[:half]),
        outbox.trial_progress(study, uid, points, at + points, curve[half:]),
        outbox.trial_weights(study, uid, points, at, points, w, (8, 8), None, np.linspace(1, 2, 64), CLASSES),
    ]
    if end:
        given: dict[str, Any] = {"status": "FINISHED", "reason": None, "confusion": np.eye(10, dtype=int)}
        given |= {"results": {"val_accuracy": 0.1 * index, "test_accuracy": 0.5}, "weights": [(w, np.zeros(10))]}
        given |= {"classes": CLASSES} | ending
        records.append(outbox.trial_ended(study, uid, at + points, **given))
    return records


def put(settings: Settings, *records: Record) -> None:
    with Outbox(settings.outbox) as box:
        box.put(records)


# ---- what MLflow holds


def mlflow_client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def runs(uri: str, study: str = "digits", kind: str = "trial") -> list[Any]:
    """The active runs of a study, by their uid."""
    client = mlflow_client(uri)
    experiment = client.get_experiment_by_name(study)
    assert experiment.experiment_id != "0"
    found = client.search_runs([experiment.experiment_id], f"tags.kind = '{kind}'")
    return sorted(found, key=lambda run: run.data.tags["sieve.uid"])


def points(uri: str, run_id: str, key: str) -> list[tuple[int, int, float]]:
    """(step, timestamp, value) of a metric, sorted."""
    history = mlflow_client(uri).get_metric_history(run_id, key)
    return sorted((m.step, m.timestamp, m.value) for m in history)


def files(uri: str, run_id: str, folder: str | None = None) -> list[str]:
    """The paths of all artifacts of a run."""
    found = []
    for item in mlflow_client(uri).list_artifacts(run_id, folder):
        found += files(uri, run_id, item.path) if item.is_dir else [item.path]
    return sorted(found)


def everything(uri: str, study: str = "digits") -> list[Any]:
    """All that a study shows in MLflow but for the ids that MLflow gives, to compare two states."""
    shown = []
    for run in runs(uri, study):
        tags = {k: v for k, v in run.data.tags.items() if k != "mlflow.note.content"}
        curves = {key: points(uri, run.info.run_id, key) for key in run.data.metrics}
        times = run.info.start_time, run.info.end_time
        shown.append((run.info.status, times, run.data.params, tags, curves, files(uri, run.info.run_id)))
    return shown


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables and nothing in them: making one takes seconds, copying it does not."""
    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    mlflow_client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def home(settings: Settings, empty_store: Path) -> Settings:
    """An embedded home whose MLflow database is ready and empty."""
    settings.home.mkdir(parents=True)
    shutil.copy(empty_store, settings.home / "mlflow.db")
    return settings


# ---- embedded


def saved_state(tag: str) -> dict[str, Any]:
    """The UI state within the tag that holds the saved view."""
    packed = json.loads(tag)["state"].removeprefix("deflate;")
    state: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(packed)))
    return state


def test_a_trial_is_shown_whole(home: Settings) -> None:
    """Its run has the status, times, values, tags, files and description that a person looks for."""
    put(home, begun(), *trial(1))
    assert tracking.publish(home) == 0
    (run,) = runs(home.tracking_uri)
    tags = run.data.tags
    assert run.info.run_name == "lambda=0.01, hidden_sizes=[], epochs=4"
    assert (run.info.status, run.info.start_time, run.info.end_time) == ("FINISHED", 1790000100000, 1790000104000)
    assert run.data.params == {"lambda": "0.01", "log10_lambda": "-2", "hidden_sizes": "[]", "epochs": "4"}
    assert (tags["study"], tags["kind"], tags["stage"], tags["repeat"]) == ("digits", "trial", "coarse", "0")
    assert tags["optuna.url"] == "http://127.0.0.1:8080/dashboard/studies/3/trials?numbers=1"
    assert [(step, when) for step, when, _ in points(home.tracking_uri, run.info.run_id, "loss/val")] == [
        (n, 1790000100000 + 1000 * n) for n in (1, 2, 3, 4)
    ]
    assert set(run.data.metrics) == {*KEYS, "result/val_accuracy", "result/test_accuracy"}
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.name == "digits"
    names = files(home.tracking_uri, run.info.run_id)
    pictures = {tuple(name.removeprefix("images/").split("+")[:3]) for name in names if name.startswith("images/")}
    expected = {("W1", 0), ("W1", 4), ("W1_final", 0), ("W1_pixels", 0), ("confusion", 0)}
    assert pictures == {(key, "step", str(step)) for key, step in expected}
    assert "weights.npz" in names
    assert tags["mlflow.loggedImages"] == "True"
    note = tags["mlflow.note.content"]
    assert note.startswith("![first layer](/get-artifact?path=images%2FW1%2Bstep%2B4")
    assert tags["optuna.url"] in note
    assert (home.trial_artifacts / outbox.artifact_id(f"{DIGITS}/s0.i1.r0/1")).read_bytes().startswith(b"\x89PNG")
    with Outbox(home.outbox) as box:
        assert box.links(DIGITS) == {f"{DIGITS}/s0.i1.r0/1": (run.info.experiment_id, run.info.run_id)}


def test_curves_appear_while_a_trial_trains(home: Settings) -> None:
    """After its first slice the run is RUNNING and holds the first points."""
    put(home, begun(), *trial(0)[:3])
    assert tracking.publish(home) == 0
    (run,) = runs(home.tracking_uri)
    assert run.info.status == "RUNNING"
    assert [step for step, _, _ in points(home.tracking_uri, run.info.run_id, "cost/train")] == [1, 2]


def test_publishing_three_times_changes_nothing(home: Settings) -> None:
    """Points, times, files and the number of runs stay the same whatever is sent again."""
    put(home, begun(), *trial(0), *trial(1))
    assert tracking.publish(home) == 0
    once = everything(home.tracking_uri)
    for _ in range(2):
        assert tracking.redo(home) == 13
        assert tracking.publish(home) == 0
    assert everything(home.tracking_uri) == once
    assert len(once) == 2


@pytest.mark.parametrize("how", ["redo", "repair"])
def test_an_empty_mlflow_gets_everything_again(home: Settings, empty_store: Path, how: str) -> None:
    """When its database is lost, `sync --redo`, and also a plain `sync`, bring all of it back."""
    put(home, begun(), *trial(0), outbox.study_ended(DIGITS, T0, {"params": {"lambda": 0.1}, "mean": 0.9}))
    assert tracking.publish(home) == 0
    once = everything(home.tracking_uri)
    other = replace(home, tracking_uri=f"sqlite:///{home.home}/other.db")
    shutil.copy(empty_store, home.home / "other.db")
    if how == "redo":
        tracking.redo(other, DIGITS)
    assert tracking.publish(other) == 0
    assert everything(other.tracking_uri) == once
    assert len(runs(other.tracking_uri, kind="summary")) == 1


def test_a_store_that_was_emptied_under_a_running_study_fills_again(home: Settings, empty_store: Path) -> None:
    """A publisher that goes on and finds its runs gone sends what it had already sent."""
    put(home, begun(), *trial(0)[:3])
    with Outbox(home.outbox) as box:
        publisher = tracking._Publisher(home, box)
        tracking._drain(publisher, lambda: False, None, 5.0, lambda left: None, repair=False)
        with closing(sqlite3.connect(home.home / "mlflow.db")) as database, database:
            database.execute("DELETE FROM runs")
            database.execute("DELETE FROM metrics")
            database.execute("DELETE FROM params")
            database.execute("DELETE FROM tags")
            database.execute("DELETE FROM latest_metrics")
        box.put(trial(0)[3:])
        tracking._drain(publisher, lambda: False, None, 20.0, lambda left: None, repair=False)
        assert box.unsent() == 0
    (run,) = runs(home.tracking_uri)
    assert run.info.status == "FINISHED"
    assert run.data.params["lambda"] == "0.1"
    assert [step for step, _, _ in points(home.tracking_uri, run.info.run_id, "eta")] == [1, 2, 3, 4]


def test_values_that_are_not_finite_are_stored_once(home: Settings) -> None:
    """A diverged trial's NaN and infinity are there, as often as they were recorded, after a replay too."""
    values = [(1, T0 + 1, {"loss/val": math.nan}), (2, T0 + 2, {"loss/val": math.inf}), (3, T0, {"loss/val": 1.0})]
    start, *_ = trial(0)
    ended = outbox.trial_ended(DIGITS, start.uid, T0 + 9, "KILLED", "the cost is not finite", {})
    put(home, begun(), start, outbox.trial_progress(DIGITS, start.uid, 3, T0, values), ended)
    for _ in range(2):
        assert tracking.publish(home) == 0
        tracking.redo(home)
    (run,) = runs(home.tracking_uri)
    first, second, third = (value for _, _, value in points(home.tracking_uri, run.info.run_id, "loss/val"))
    assert math.isnan(first)
    assert second > 1e308
    assert third == 1.0
    assert (run.info.status, run.data.tags["reason"]) == ("KILLED", "the cost is not finite")


def test_a_refused_record_does_not_block_the_others(home: Settings) -> None:
    """A parameter name that MLflow does not take: that record alone is set aside, with the reason, and counted."""
    start, *rest = trial(0)
    broken = replace(start, payload=start.payload | {"params": {"what?": 1}})
    put(home, begun(), broken, *rest, *trial(1))
    assert tracking.publish(home) == 1
    assert [run.info.status for run in runs(home.tracking_uri)] == ["FINISHED", "FINISHED"]
    with Outbox(home.outbox) as box:
        ((uid, kind, reason),) = box.refusals()
    assert (uid, kind) == (f"{DIGITS}/s0.i0.r0/1", "trial_begun")
    assert "what?" in reason


def test_files_that_cannot_be_stored_hold_up_nobody_for_ever(home: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where MLflow's artifacts cannot be written, a trial is set aside after some tries; later all of it is sent."""
    monkeypatch.setattr(tracking, "MOST_FAILURES", 2)
    put(home, begun(), *trial(0), begun("other"))
    home.artifacts.mkdir()
    in_the_way = home.artifacts / DIGITS
    in_the_way.write_text("a file where a folder should be")
    assert tracking.publish(home) == 6
    with Outbox(home.outbox) as box:
        assert box.counts() == {DIGITS: Counts(sent=1, refused=6), ident("other"): Counts(sent=1)}
    assert [run.info.status for run in runs(home.tracking_uri)] == ["RUNNING"]
    in_the_way.unlink()
    assert tracking.publish(home) == 0
    assert [run.info.status for run in runs(home.tracking_uri)] == ["FINISHED"]


def test_a_long_parameter_is_a_file_and_not_cut(home: Settings) -> None:
    """MLflow would cut it at 6,000 characters without a word; it is stored whole, and not as a parameter."""
    start, *rest = trial(0)
    params = start.payload["params"] | {"story": "x" * 6001, "short": "y" * 6000}
    put(home, begun(), replace(start, payload=start.payload | {"params": params}), *rest)
    assert tracking.publish(home) == 0
    (run,) = runs(home.tracking_uri)
    assert "story" not in run.data.params
    assert len(run.data.params["short"]) == 6000
    stored = mlflow_client(home.tracking_uri).download_artifacts(run.info.run_id, "params/story.txt", str(home.home))
    assert Path(stored).read_text() == "x" * 6001


def test_whoever_waits_is_told_how_much_is_left(home: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each batch the count of unsent records is shown, down to that of the last batch."""
    monkeypatch.setattr(tracking, "BATCH", 4)
    records = [begun(), *trial(0)]
    put(home, *records)
    left: list[int] = []
    assert tracking.publish(home, show=left.append) == 0
    assert left == list(range(len(records), 0, -4))


def test_more_than_one_batch_holds_arrives(home: Settings) -> None:
    """2,800 metric values and 150 parameters in one go: MLflow takes 1,000 and 100 at a time."""
    start, *rest = trial(0, points=400)
    params = {f"p{n}": n for n in range(150)}
    put(home, begun(), replace(start, payload=start.payload | {"params": params}), *rest)
    assert tracking.publish(home) == 0
    (run,) = runs(home.tracking_uri)
    assert len(run.data.params) == 150
    assert [len(points(home.tracking_uri, run.info.run_id, key)) for key in KEYS] == [400] * 7


def test_a_run_closes_only_with_all_its_points(home: Settings) -> None:
    """A point that the store lost after it had taken it is there again when the run closes."""
    put(home, begun(), *trial(0)[:-1])
    assert tracking.publish(home) == 0
    with closing(sqlite3.connect(home.home / "mlflow.db")) as database, database:
        assert database.execute("DELETE FROM metrics WHERE key = 'eta' AND step = 2").rowcount == 1
    put(home, trial(0)[-1])
    assert tracking.publish(home) == 0
    (run,) = runs(home.tracking_uri)
    assert [step for step, _, _ in points(home.tracking_uri, run.info.run_id, "eta")] == [1, 2, 3, 4]


def test_a_failed_attempt_and_its_retry_point_to_each_other(home: Settings) -> None:
    """The first is FAILED with the error's last line as its reason and the traceback as a file."""
    error = "Traceback (most recent call last):\n  File ...\nMemoryError: no room\n"
    failed = trial(0, status="FAILED", reason=error, results={}, confusion=None, weights=None)
    put(home, begun(), *failed, *trial(0, attempt=2))
    assert tracking.publish(home) == 0
    first, second = runs(home.tracking_uri)
    assert (first.info.status, second.info.status) == ("FAILED", "FINISHED")
    assert first.data.tags["reason"] == "MemoryError: no room"
    assert "reason.txt" in files(home.tracking_uri, first.info.run_id)
    assert first.data.tags["retried_as"] == second.info.run_id
    assert second.data.tags["retry_of"] == first.info.run_id
    assert second.info.run_id in first.data.tags["mlflow.note.content"]


def test_a_study_ends_with_a_summary_and_curves_of_its_best(home: Settings) -> None:
    """Numbers as metrics, the choice as tags, stages with their boxes in the note and the experiment's description,
    the report as a file; the best trials alone get a figure, repeats their mean, by which the view orders from now on.
    """
    summary = {"params": {"lambda": 0.1}, "mean": 0.9, "deviation": 0.01, "n": 3, "metric": "val_accuracy"}
    summary["stages"] = [{"stage": "coarse", "trials": 8, "lambda": "1e-06 to 0.1"}]
    records, best = [begun(), *trial(0), *trial(1)], f"{DIGITS}/s0.i1.r0/1"
    repeated = {best: {"mean": 0.9, "deviation": 0.01}}
    end = outbox.study_ended(DIGITS, T0 + 500, summary, b"<html>report</html>", best=[best], repeated=repeated)
    put(home, *records, end)
    assert tracking.publish(home) == 0
    (run,) = runs(home.tracking_uri, kind="summary")
    assert run.data.metrics == {"summary/mean": 0.9, "summary/deviation": 0.01, "summary/n": 3.0}
    assert run.data.tags["chosen.lambda"] == "0.1"
    assert run.info.status == "FINISHED"
    assert files(home.tracking_uri, run.info.run_id) == ["report.html", "summary.json"]
    drawn = ["figures/curves.png" in files(home.tracking_uri, r.info.run_id) for r in runs(home.tracking_uri)]
    assert drawn == [False, True]
    told = [
        (r.data.metrics.get("repeats/mean"), r.data.metrics.get("repeats/deviation")) for r in runs(home.tracking_uri)
    ]
    assert told == [(None, None), (0.9, 0.01)]
    experiment = mlflow_client(home.tracking_uri).get_experiment_by_name("digits")
    for text in (run.data.tags["mlflow.note.content"], experiment.tags["mlflow.note.content"]):
        assert "| coarse | 8 | 1e-06 to 0.1 |" in text
    assert saved_state(experiment.tags["mlflow.sharedViewState.sieve"])["orderByKey"] == "metrics.`repeats/mean`"


def test_the_saved_view_answers_which_setting_won(home: Settings) -> None:
    """The experiment carries a view: ordered by the metric, overlays, a scatter per parameter, image grids."""
    put(home, begun())
    assert tracking.publish(home) == 0
    experiment = mlflow_client(home.tracking_uri).get_experiment_by_name("digits")
    assert experiment.artifact_location == (home.artifacts / DIGITS).as_uri()
    assert experiment.tags["mlflow.note.content"].startswith("Is less more?")
    stored = experiment.tags["mlflow.sharedViewState.sieve"]
    assert len(stored) < 20_000
    state = saved_state(stored)
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`result/val_accuracy`", False)
    assert "params.`lambda`" in state["selectedColumns"]
    charts = state["compareRunCharts"]
    overlays = {tuple(c["selectedMetricKeys"]) for c in charts if c["type"] == "LINE"}
    assert {("cost/train", "cost/val"), ("loss/train", "loss/val"), ("accuracy/train", "accuracy/val")} < overlays
    assert [c["xaxis"]["key"] for c in charts if c["type"] == "SCATTER"] == ["log10_lambda", "lambda", "hidden_sizes"]
    assert {"W1", "W1_final", "confusion"} <= {k for c in charts if c["type"] == "IMAGE" for k in c["imageKeys"]}
    sections = {s["uuid"] for s in state["compareRunSections"]}
    assert {c["metricSectionId"] for c in charts} == sections
    assert len({c["uuid"] for c in charts}) == len(charts)
    address = tracking.links(home, experiment.experiment_id)["charts"]
    assert address.endswith("compareRunsMode=CHART&viewStateShareKey=sieve")


def test_a_metric_to_minimise_is_ordered_upwards() -> None:
    """The best setting is on top for a loss too."""
    state = saved_state(tracking.saved_view({"metric": "val_loss"}, {}, 0))
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`result/val_loss`", True)


def test_only_a_publisher_imports_mlflow() -> None:
    """Importing the module, as the command line does, loads neither mlflow nor matplotlib."""
    code = "import sys; import search.tracking; print({'mlflow', 'matplotlib'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"set()\n"


FOLLOW = """
import sys
from search import tracking
from search.settings import Settings
print(tracking.publish(Settings.from_environment(), follow=True, parent=int(sys.argv[1])), flush=True)
"""


def follower(settings: Settings, parent: int) -> subprocess.Popen[bytes]:
    """A publisher process as `sieve launch` starts one."""
    environment = os.environ | {"SIEVE_HOME": str(settings.home), "MLFLOW_TRACKING_URI": settings.tracking_uri}
    return subprocess.Popen([sys.executable, "-c", FOLLOW, str(parent)], env=environment, stdout=subprocess.PIPE)


def unsent(settings: Settings) -> int:
    with Outbox(settings.outbox) as box:
        return box.unsent()


@pytest.mark.slow
@pytest.mark.fault
def test_what_a_killed_publisher_began_the_next_one_completes(home: Settings) -> None:
    """Killed again and again in the middle of its work: in the end every run is there once, whole, and closed."""
    put(home, begun(), *(record for n in range(12) for record in trial(n)))
    before = unsent(home)
    for share in (0.95, 0.6, 0.3):
        publisher = follower(home, os.getpid())
        until(lambda share=share: unsent(home) <= share * before)  # type: ignore[misc]
        publisher.kill()
        publisher.wait()
        publisher.stdout.close()  # type: ignore[union-attr]
    assert unsent(home) > 0
    assert tracking.publish(home) == 0
    found = runs(home.tracking_uri)
    assert [run.data.tags["sieve.uid"] for run in found] == sorted(f"{DIGITS}/s0.i{n}.r0/1" for n in range(12))
    for run in found:
        assert run.info.status == "FINISHED"
        assert [len(points(home.tracking_uri, run.info.run_id, key)) for key in KEYS] == [4] * 7


@pytest.mark.slow
def test_a_follower_ends_when_its_parent_has_and_all_is_sent(home: Settings) -> None:
    """It sends what comes while the parent lives, and what is left after the parent's end; then it is gone."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as parent:
        put(home, begun(), *trial(0))
        publisher = follower(home, parent.pid)
        until(lambda: unsent(home) == 0)
        put(home, *trial(1))
        until(lambda: unsent(home) == 0)
        assert publisher.poll() is None
        put(home, *trial(2))
        parent.kill()
    assert publisher.communicate(timeout=30)[0] == b"0\n"
    assert len(runs(home.tracking_uri)) == 3


# ---- whose experiment is it


def experiments(uri: str) -> dict[str, list[str]]:
    """Name -> the uids shown in it, of all experiments that are not deleted, but for MLflow's own."""
    client = mlflow_client(uri)
    return {
        e.name: sorted(run.data.tags["sieve.uid"] for run in client.search_runs([e.experiment_id]))
        for e in client.search_experiments(filter_string="name != 'Default'")
    }


def own(settings: Settings, name: str) -> Settings:
    """Another home that publishes to the same MLflow."""
    return replace(settings, home=settings.home.with_name(name))


@pytest.mark.parametrize("deleted", [False, True])
def test_a_name_that_is_used_again_is_another_experiment(home: Settings, deleted: bool) -> None:
    """The new study gets the name, the earlier one of this home keeps its runs under its name and id."""
    put(home, begun(), *trial(0))
    assert tracking.publish(home) == 0
    before = everything(home.tracking_uri)
    if deleted:
        client = mlflow_client(home.tracking_uri)
        client.delete_experiment(client.get_experiment_by_name("digits").experiment_id)
    put(home, begun(study="new"), *trial(1, study="new"))
    said: list[str] = []
    for _ in range(2):
        with Outbox(home.outbox) as box:  # as a launch's publisher, which mends nothing
            publisher = tracking._Publisher(home, box, said.append)
            tracking._drain(publisher, lambda: False, None, 5.0, lambda left: None, repair=False)
        tracking.redo(home, "new")
    earlier = f"digits ({DIGITS[:8]})"
    shown = {"digits": ["new/s0.i1.r0/1"]} | ({} if deleted else {earlier: [f"{DIGITS}/s0.i0.r0/1"]})
    assert experiments(home.tracking_uri) == shown
    if deleted:
        mlflow_client(home.tracking_uri).restore_experiment(
            mlflow_client(home.tracking_uri).get_experiment_by_name(earlier).experiment_id
        )
    assert everything(home.tracking_uri, earlier) == before
    assert len(said) == (0 if deleted else 1)


def test_two_homes_with_studies_of_one_name_share_no_run(home: Settings) -> None:
    """The second gets an experiment of its own, and a line that names it; sending again changes neither."""
    other, said = own(home, "other"), list[str]()
    put(home, begun(), *trial(0))
    put(other, begun(study="2c" * 8), *trial(0, study="2c" * 8))
    for _ in range(2):
        assert tracking.publish(home, warn=said.append) == 0
        assert tracking.publish(other, warn=said.append) == 0
        tracking.redo(home)
        tracking.redo(other)
    shown = {"digits": [f"{DIGITS}/s0.i0.r0/1"], "digits (2c2c2c2c)": [f"{'2c' * 8}/s0.i0.r0/1"]}
    assert experiments(home.tracking_uri) == shown
    assert said == ["MLflow has an experiment 'digits' of somebody else: this study is 'digits (2c2c2c2c)' there"]
    for name in shown:
        (run,) = runs(home.tracking_uri, name)
        assert [len(points(home.tracking_uri, run.info.run_id, key)) for key in KEYS] == [4] * 7


def test_a_home_that_takes_a_study_over_goes_on_in_its_experiment(home: Settings) -> None:
    """The same id from another home: one experiment, even under another name there, and one run for each attempt."""
    put(home, begun(), *trial(0)[:3])
    assert tracking.publish(home) == 0
    client = mlflow_client(home.tracking_uri)
    client.rename_experiment(client.get_experiment_by_name("digits").experiment_id, "renamed by a person")
    put(other := own(home, "other"), begun(), *trial(0), *trial(1))
    assert tracking.publish(other) == 0
    assert experiments(home.tracking_uri) == {"renamed by a person": [f"{DIGITS}/s0.i{n}.r0/1" for n in (0, 1)]}
    for run in runs(home.tracking_uri, "renamed by a person"):
        assert [len(points(home.tracking_uri, run.info.run_id, key)) for key in KEYS] == [4] * 7


def of_an_older_version(settings: Settings) -> None:
    """Publish study digits as it was done when its name was its id: no experiment carried one."""
    put(settings, begun(study="digits"), *trial(0, study="digits"), *trial(1, study="digits")[:3])
    assert tracking.publish(settings) == 0
    with closing(sqlite3.connect(settings.tracking_uri.removeprefix("sqlite:///"))) as database, database:
        assert database.execute("DELETE FROM experiment_tags WHERE key = 'sieve.id'").rowcount == 1


def test_a_study_of_an_older_version_keeps_its_experiment_and_its_runs(home: Settings) -> None:
    """Once it has an id its runs carry it, nothing is shown twice, and pictures are where the dashboard looks."""
    of_an_older_version(home)
    before = everything(home.tracking_uri)
    with Outbox(home.outbox) as box:
        box.rename("digits", DIGITS)
    put(home, begun(formerly="digits"), *trial(1)[3:])
    for _ in range(3):
        assert tracking.publish(home) == 0
        assert experiments(home.tracking_uri) == {"digits": [f"{DIGITS}/s0.i{n}.r0/1" for n in (0, 1)]}
        first, second = everything(home.tracking_uri)
        assert first[3].pop("sieve.uid").removeprefix(DIGITS) == before[0][3].get("sieve.uid").removeprefix("digits")
        assert first[:3] == before[0][:3]
        assert first[4:] == before[0][4:]
        assert (second[0], [step for step, _, _ in second[4]["eta"]]) == ("FINISHED", [1, 2, 3, 4])
        tracking.redo(home)
    assert (home.trial_artifacts / outbox.artifact_id(f"{DIGITS}/s0.i0.r0/1")).exists()


def test_of_two_homes_that_shared_an_experiment_one_keeps_it(home: Settings) -> None:
    """What an older version mixed is parted: who comes second sends all of its study again, to one of its own."""
    of_an_older_version(home)
    put(other := own(home, "other"), begun(study="digits"), *trial(0, study="digits"))
    assert tracking.publish(other) == 0
    for settings, study in ((home, DIGITS), (other, "2c" * 8)):
        with Outbox(settings.outbox) as box:
            box.rename("digits", study)
        put(settings, begun(study=study, formerly="digits"))
        assert tracking.publish(settings) == 0
    shown = {"digits": [f"{DIGITS}/s0.i{n}.r0/1" for n in (0, 1)], "digits (2c2c2c2c)": [f"{'2c' * 8}/s0.i0.r0/1"]}
    assert experiments(home.tracking_uri) == shown
    (run,) = runs(home.tracking_uri, "digits (2c2c2c2c)")
    assert run.info.status == "FINISHED"
    assert run.data.params["lambda"] == "0.1"


def test_somebody_elses_experiment_is_left_alone(home: Settings) -> None:
    """An experiment of that name that Sieve did not make gets neither run nor tag."""
    theirs = mlflow_client(home.tracking_uri).create_experiment("digits")
    put(home, begun(), *trial(0))
    assert tracking.publish(home) == 0
    assert experiments(home.tracking_uri) == {"digits": [], f"digits ({DIGITS[:8]})": [f"{DIGITS}/s0.i0.r0/1"]}
    assert mlflow_client(home.tracking_uri).get_experiment(theirs).tags == {}


def test_a_copied_study_has_its_copied_runs(home: Settings, tmp_path: Path) -> None:
    """In a copy of the whole home the runs learn the copy's id; those of the original stay as they are."""
    put(home, begun(), *trial(0), *trial(1)[:3])
    assert tracking.publish(home) == 0
    shutil.copytree(home.home, tmp_path / "copy")
    copy = Settings.from_environment({"SIEVE_HOME": str(tmp_path / "copy")})
    with Outbox(copy.outbox) as box:
        box.fork(DIGITS, "2c" * 8, keep_links=True)
    put(copy, *trial(1, study="2c" * 8)[3:])
    assert tracking.publish(copy) == 0
    assert experiments(copy.tracking_uri) == {"digits": [f"{'2c' * 8}/s0.i{n}.r0/1" for n in (0, 1)]}
    assert [run.info.status for run in runs(copy.tracking_uri)] == ["FINISHED", "FINISHED"]
    for run in runs(copy.tracking_uri):
        assert [len(points(copy.tracking_uri, run.info.run_id, key)) for key in KEYS] == [4] * 7
        assert run.info.artifact_uri.startswith(copy.artifacts.as_uri())
    assert [run.info.status for run in runs(home.tracking_uri)] == ["FINISHED", "RUNNING"]
    assert all(run.info.artifact_uri.startswith(home.artifacts.as_uri()) for run in runs(home.tracking_uri))


# ---- what somebody deletes, what is lost, and what is our fault


FOR_GOOD = [pytest.param(how, marks=pytest.mark.slow) for how in ("run for good", "experiment for good")]


@pytest.mark.parametrize("how", ["run", "experiment", *FOR_GOOD])
@pytest.mark.parametrize("then", ["sync", "redo", "follow"])
def test_what_is_deleted_in_mlflow_is_made_again(home: Settings, how: str, then: str) -> None:
    """Whole and once, by the next publisher: a plain one, one that sends all again, one that has more to send."""
    put(home, begun(), *trial(0)[:3], *trial(1))
    assert tracking.publish(home) == 0
    (before, _), client = runs(home.tracking_uri), mlflow_client(home.tracking_uri)
    if how.startswith("run"):
        client.delete_run(before.info.run_id)
    else:
        client.delete_experiment(before.info.experiment_id)
    if how.endswith("for good"):
        gc = [str(Path(sys.executable).with_name("mlflow")), "gc", "--backend-store-uri", home.tracking_uri]
        subprocess.run(gc, check=True, capture_output=True, env=os.environ | {"MLFLOW_TRACKING_URI": home.tracking_uri})
    if then == "redo":
        tracking.redo(home)
    put(home, *trial(0)[3:])
    with Outbox(home.outbox) as box:
        if then == "follow":
            publisher = tracking._Publisher(home, box)
            tracking._drain(publisher, lambda: False, None, 20.0, lambda left: None, repair=False)
        else:
            assert tracking.publish(home) == 0
        assert (box.unsent(), box.refusals()) == (0, [])
    found = runs(home.tracking_uri)
    if then == "follow" and how.startswith("experiment"):
        found = found[:1]  # the other comes with the next `sieve sync`
    assert [run.info.status for run in found] == ["FINISHED", "FINISHED"][: len(found)]
    for run in found:
        assert [len(points(home.tracking_uri, run.info.run_id, key)) for key in KEYS] == [4] * 7
        assert "weights.npz" in files(home.tracking_uri, run.info.run_id)


def test_what_is_deleted_under_a_publisher_at_work_is_made_again(home: Settings) -> None:
    """It notices in the middle of a study, when the run that it knows does not take the next points."""
    put(home, begun(), *trial(0)[:3], *trial(1)[:3])
    with Outbox(home.outbox) as box:
        publisher = tracking._Publisher(home, box)
        tracking._drain(publisher, lambda: False, None, 5.0, lambda left: None, repair=False)
        client = mlflow_client(home.tracking_uri)
        client.delete_run(runs(home.tracking_uri)[0].info.run_id)
        put(home, *trial(0)[3:])
        tracking._drain(publisher, lambda: False, None, 20.0, lambda left: None, repair=False)
        client.delete_experiment(client.get_experiment_by_name("digits").experiment_id)
        put(home, *trial(1)[3:])
        tracking._drain(publisher, lambda: False, None, 20.0, lambda left: None, repair=False)
        assert (box.unsent(), box.refusals()) == (0, [])
    found = {run.data.tags["sieve.uid"]: run for run in runs(home.tracking_uri) if run.info.status == "FINISHED"}
    assert sorted(found) == [f"{DIGITS}/s0.i{n}.r0/1" for n in (0, 1)]
    for run in found.values():
        assert [len(points(home.tracking_uri, run.info.run_id, key)) for key in KEYS] == [4] * 7


def later(record: Record) -> Record:
    """A record as it is put again after the journal was lost: the times at which it was first put are not known."""
    points = [(step, when + 1000, values) for step, when, values in record.payload.get("points", [])]
    return replace(record, when=record.when + 1000, payload=record.payload | ({"points": points} if points else {}))


@pytest.mark.parametrize("how", ["lost", "an older copy"])
@pytest.mark.parametrize("shown", [1, 4, 6])
def test_a_journal_that_was_lost_is_put_again_and_shows_nothing_twice(home: Settings, shown: int, how: str) -> None:
    """Whatever MLflow had before: one run, every point and picture once, with the time that it had there."""
    put(home, begun(), *trial(0)[:1])
    assert tracking.publish(home) == 0
    shutil.copy(home.outbox, older := home.home / "older.db")
    put(home, *trial(0)[:shown])
    assert tracking.publish(home) == 0
    before, first = everything(home.tracking_uri), {1: 0, 4: 4, 6: 4}[shown]
    shutil.rmtree(home.outbox.parent)
    if how != "lost":
        home.outbox.parent.mkdir()
        shutil.copy(older, home.outbox)
    put(home, begun(), *(outbox.recovered(later(record)) for record in trial(0)))
    for _ in range(3):
        assert tracking.publish(home) == 0
        ((status, _, params, _, curves, names),) = everything(home.tracking_uri)
        assert (status, params) == ("FINISHED", before[0][2])
        for key in KEYS:
            assert [(step, when < 1000 * (T0 + 1000)) for step, when, _ in curves[key]] == [
                (step, step <= first) for step in (1, 2, 3, 4)
            ]
        assert [len(curve) for key, curve in curves.items() if key not in KEYS] == [1, 1]
        assert len(names) == 2 * 5 + 1  # five pictures with their thumbnails, and the weights
        assert set(before[0][5]) <= set(names)
        tracking.redo(home)


def test_an_end_that_is_put_again_without_its_pictures_takes_none_away(home: Settings) -> None:
    """Of a lost journal's trials the storage has no weights: the run keeps its files, and its picture in the note."""
    put(home, begun(), *trial(0))
    assert tracking.publish(home) == 0
    (before,) = runs(home.tracking_uri)
    names = files(home.tracking_uri, before.info.run_id)
    shutil.rmtree(home.outbox.parent)
    start, *_, end = trial(0, confusion=None, weights=None)
    put(home, begun(), *(outbox.recovered(later(record)) for record in (start, end)))
    assert tracking.publish(home) == 0
    (after,) = runs(home.tracking_uri)
    assert files(home.tracking_uri, after.info.run_id) == names
    notes = [run.data.tags["mlflow.note.content"] for run in (before, after)]
    assert [note.startswith("![first layer](/get-artifact?path=images%2FW1%2Bstep%2B4") for note in notes] == [True] * 2


def test_our_own_mistake_is_called_so_and_holds_up_nobody(home: Settings) -> None:
    """A record that cannot be drawn is kept, counted and named as a fault of Sieve; all others arrive."""
    start, drawn, *rest = trial(0)
    put(home, begun(), start, replace(drawn, blob=b"not an npz"), *rest, *trial(1))
    said: list[str] = []
    assert tracking.publish(home, warn=said.append) == 1
    assert [run.info.status for run in runs(home.tracking_uri)] == ["FINISHED", "FINISHED"]
    (line,) = said
    assert line.startswith(
        "trial_weights of digits/s0.i0.r0/1 could not be sent because of a fault of Sieve: ValueError: "
    )
    with Outbox(home.outbox) as box:
        assert box.counts() == {DIGITS: Counts(sent=12, refused=1)}


def test_a_signal_ends_a_follower_between_two_records(home: Settings) -> None:
    """SIGTERM, SIGHUP or Ctrl-C: it leaves soon, with exit code 0, and marks as sent what it has sent."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        put(home, begun(), *trial(int(number)))
        publisher = follower(home, os.getpid())
        until(lambda: unsent(home) == 0)
        publisher.send_signal(number)
        assert publisher.communicate(timeout=30)[0] == b"0\n"
        assert publisher.returncode == 0


# ---- over HTTP


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_store, folder / "server.db")
    server = Server(folder, free_port())
    server.start()
    yield server
    server.kill()


@pytest.mark.slow
@pytest.mark.fault
def test_replies_that_get_lost_leave_one_run_and_every_point(settings: Settings, server: Server) -> None:
    """The server works, its answers vanish: creating the experiment, the run, and writing a batch."""
    faults = rule(experiments__create=["lose"] * 2, runs__create=["lose"] * 3, runs__log=["lose"] * 2)
    put(settings, begun("lossy"), *trial(0, "lossy"), *trial(1, "lossy"))
    with proxy(server.port, faults) as address:
        assert tracking.publish(replace(settings, tracking_uri=address)) == 0
    found = runs(server.uri, "lossy")
    assert [run.data.tags["sieve.uid"] for run in found] == [f"{ident('lossy')}/s0.i{n}.r0/1" for n in (0, 1)]
    for run in found:
        assert run.info.status == "FINISHED"
        assert [len(points(server.uri, run.info.run_id, key)) for key in KEYS] == [4] * 7
        assert "weights.npz" in files(server.uri, run.info.run_id)
    twins = mlflow_client(server.uri).search_runs([found[0].info.experiment_id], run_view_type=DELETED_ONLY)
    assert len(twins) >= 1  # the server really made more than one run


@pytest.mark.slow
@pytest.mark.fault
def test_a_burst_of_errors_is_waited_out(settings: Settings, server: Server) -> None:
    """503 to the first requests of every kind: nothing is lost, nothing is set aside."""
    put(settings, begun("busy"), *trial(0, "busy"))
    faults = rule(search=["503"] * 2, create=["503"] * 3, artifacts=["503"] * 3, log=["503"] * 3, update=["503"] * 2)
    with proxy(server.port, faults) as address:
        assert tracking.publish(replace(settings, tracking_uri=address)) == 0
    (run,) = runs(server.uri, "busy")
    assert run.info.status == "FINISHED"
    assert [len(points(server.uri, run.info.run_id, key)) for key in KEYS] == [4] * 7


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("how", ["dead", "hung"])
def test_without_a_server_nothing_is_lost(
    settings: Settings, server: Server, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused or never answered: publishing gives up in time and says how much is left; later all of it arrives."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    records = [begun(how), *trial(0, how)]
    put(settings, *records)
    with proxy(server.port, rule(api="hang")) as address:
        away = address if how == "hung" else f"http://127.0.0.1:{free_port()}"
        since = time.monotonic()
        assert tracking.publish(replace(settings, tracking_uri=away), timeout=0.5) == len(records)
        assert time.monotonic() - since < 25
    assert tracking.publish(replace(settings, tracking_uri=server.uri)) == 0
    assert [run.info.status for run in runs(server.uri, how)] == ["FINISHED"]


@pytest.mark.slow
@pytest.mark.fault
def test_homes_that_start_together_share_one_experiment(settings: Settings, server: Server) -> None:
    """Three publishers of three homes, one new study: one experiment, every run in it, none in experiment 0."""
    homes = [replace(settings, home=settings.home / str(n), tracking_uri=server.uri) for n in range(3)]
    for n, home in enumerate(homes):
        put(home, begun("shared"), *trial(n, "shared"))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    publishers = [follower(home, gone.pid) for home in homes]
    assert [publisher.communicate(timeout=90)[0] for publisher in publishers] == [b"0\n"] * 3
    assert len(runs(server.uri, "shared")) == 3
    assert mlflow_client(server.uri).search_runs(["0"]) == []


@pytest.mark.slow
@pytest.mark.fault
def test_homes_that_start_together_with_one_name_share_nothing(settings: Settings, server: Server) -> None:
    """Three publishers of three homes, three studies of one name: three experiments with a run each."""
    homes = [replace(settings, home=settings.home / str(n), tracking_uri=server.uri) for n in range(3)]
    for n, home in enumerate(homes):
        put(home, begun("ours", ident(str(n))), *trial(n, study=ident(str(n))))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    publishers = [follower(home, gone.pid) for home in homes]
    assert [publisher.communicate(timeout=90)[0] for publisher in publishers] == [b"0\n"] * 3
    shown = {name: uids for name, uids in experiments(server.uri).items() if name.startswith("ours")}
    assert sorted(uids for uids in shown.values()) == sorted([f"{ident(str(n))}/s0.i{n}.r0/1"] for n in range(3))
    others = {f"ours ({ident(str(n))[:8]})" for n in range(3)}
    assert "ours" in shown
    assert shown.keys() - {"ours"} < others


@pytest.mark.parametrize(
    ("text", "never"),
    [
        ("(sqlite3.IntegrityError) UNIQUE constraint failed: experiment_tags.key", False),
        ("(psycopg.errors.UniqueViolation) duplicate key value violates unique constraint", False),
        ("Metric value is not a number", True),
    ],
)
def test_who_was_overtaken_by_another_client_tries_again(text: str, never: bool) -> None:
    """MLflow answers 400 to a race for one row, as to what it will never take; only the latter is set aside."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import BAD_REQUEST

    assert (tracking._refusal(MlflowException(text, BAD_REQUEST)) is not None) is never


@pytest.mark.slow
@pytest.mark.fault
def test_a_server_that_is_killed_and_comes_back_has_everything(settings: Settings, server: Server) -> None:
    """SIGKILL in the middle; the publisher waits, and every point is there when the server is back."""
    home = replace(settings, tracking_uri=server.uri)
    put(home, begun("back"), *(record for n in range(8) for record in trial(n, "back")))
    before = unsent(home)
    publisher = follower(home, os.getpid())
    until(lambda: unsent(home) < before)
    server.kill()
    put(home, *trial(8, "back"))
    time.sleep(1)
    assert publisher.poll() is None
    server.start()
    until(lambda: unsent(home) == 0)
    publisher.kill()
    publisher.communicate()
    found = runs(server.uri, "back")
    assert [run.info.status for run in found] == ["FINISHED"] * 9
    for run in found:
        assert [len(points(server.uri, run.info.run_id, key)) for key in KEYS] == [4] * 7
