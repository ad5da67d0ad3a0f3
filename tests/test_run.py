import csv
import io
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import psutil
import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from optuna.importance import (
    FanovaImportanceEvaluator,
    MeanDecreaseImpurityImportanceEvaluator,
    get_param_importances,
)

from core.data import Dataset
from core.train import Keep, State, TrainConfig, advance, start
from search import checkpoint, doctor, outbox, plan, run, runner, serve
from search.datasets import open_dataset
from search.errors import Interrupted, SettingsError, StudyBusy, StudyConflict, StudyFailed, UnknownStudy
from search.executor import LocalExecutor, Slice
from search.objective import objective
from search.outbox import Outbox
from search.outcome import export, open_study, standing
from search.plan import Slot
from search.report import gather, trials_csv
from search.runner import MOST_COLUMNS, Runner, Status, Trial, groups
from search.settings import Settings
from search.show import progress_line
from search.storage import Attempt, locked, open_storage, registered
from search.study import StudySpec
from tests import failing
from tests.conftest import QUICK, stop_after_first_slice

Spec = Callable[..., StudySpec]


launch = partial(run.launch, publish=False)


def attempts(settings: Settings, study: str = "quick") -> list[Attempt]:
    return open_study(study, settings).attempts()


def values(settings: Settings, study: str = "quick") -> dict[Slot, list[tuple[Any, ...]]]:
    """All that a trial's result is, but for the time it took, per slot and attempt."""
    found: dict[Slot, list[tuple[Any, ...]]] = {}
    storage = open_study(study, settings).storage
    for a in attempts(settings, study):
        attrs = {k: v for k, v in a.attrs.items() if k not in ("seconds", "home")}
        curve = storage.get_trial(a.trial_id).intermediate_values
        found.setdefault(a.slot, []).append((a.state, a.value, json.dumps([a.params, attrs, curve], sort_keys=True)))
    return found


def sieve(settings: Settings, *words: str, **popen: Any) -> subprocess.Popen[str]:
    """The command in a process of its own; what is for MLflow stays in the outbox."""
    environment = os.environ | {"SIEVE_HOME": str(settings.home)}
    quietly = ["--no-publish"] if words[0] == "launch" else []
    command = [sys.executable, "-c", "from search.cli import app; app()", *words, *quietly]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **popen
    )


def study_file(folder: Path, **parts: Any) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(QUICK | parts))
    return path


def slow(epochs: int = 150, **parts: Any) -> dict[str, Any]:
    """Parts of a study whose trials take some seconds."""
    base = {"batch_size": 5, "epochs": epochs, "hidden_sizes": [60], "patience": None}
    space = {"eta": {"low": 1e-4, "high": 1e-2, "log": True}}
    search = {"method": "random", "trials": 4}
    return {"base": base, "space": space, "search": search, "confirm": False} | parts


def test_every_slot_of_the_plan_is_done_exactly_once(settings: Settings, quick: Spec) -> None:
    """A study runs each planned slot once, tells its state, and chooses by the mean over the confirm runs."""
    outcome = launch(quick(), settings, workers=2)
    done = attempts(settings)
    assert sorted(str(a.slot) for a in done) == sorted(
        [f"s{s}.i{i}.r0" for s in range(3) for i in range(4)] + [f"s3.i{i}.r{r}" for i in range(2) for r in (1, 2)]
    )
    assert {a.state.name for a in done} <= {"COMPLETE", "PRUNED"}
    confirmed = [a for a in done if a.slot in outcome.chosen.slots]
    assert len(confirmed) == outcome.chosen.n == 2
    assert outcome.chosen.mean == pytest.approx(sum(a.value or 0 for a in confirmed) / 2)
    assert outcome.test_accuracy is not None
    assert outcome.test_accuracy[0] == pytest.approx(sum(a.attrs["test_accuracy"] for a in confirmed) / 2)


def test_the_number_of_workers_changes_no_result(settings: Settings, quick: Spec, tmp_path: Path) -> None:
    """One worker and three give the same trials with the same values, bit for bit where the BLAS allows it."""
    other = Settings.from_environment({"SIEVE_HOME": str(tmp_path / "other")})
    launch(quick(), settings, workers=1)
    launch(quick(), other, workers=3)
    assert values(settings) == values(other)


def test_without_a_publisher_nothing_is_said_to_be_sent(settings: Settings, quick: Spec) -> None:
    """The result that is shown first announces no sending; the one at the end counts what waits for `sieve sync`."""
    shown = list[run.Outcome]()
    outcome = launch(quick(), settings, workers=1, concluded=shown.append)
    assert [early.unsent for early in shown] == [0]
    assert outcome.unsent > 0


def test_the_last_repeat_of_a_configuration_shows_mean_and_deviation(
    settings: Settings, quick: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row alone has both, over all repeats: trained before the others, it is told after them."""
    few = {"method": "list", "settings": [{"eta": 0.1}, {"eta": 0.01}]}
    base = {"batch_size": 50, "epochs": 2, "hidden_sizes": [16], "lambda": 0.0}
    spec = quick(search=few, space={}, base=base, confirm=False, repeats=3)
    monkeypatch.setattr(runner, "MOST_COLUMNS", 1)  # one trial at a time
    launch(spec, settings, workers=1, started=lambda runner: runner.todo.extend(reversed(plan.propose(spec, []))))
    told = {a.slot: a for a in attempts(settings)}
    storage = open_study("quick", settings).storage
    assert len(told) == 6
    for index in (0, 1):
        repeats = [told[Slot(0, index, repeat)] for repeat in range(3)]
        values = [a.value for a in repeats if a.value is not None]
        assert [a.number for a in repeats] == sorted((a.number for a in repeats), reverse=True)
        assert repeats[2].attrs["mean"] == pytest.approx(statistics.mean(values))
        assert repeats[2].attrs["deviation"] == pytest.approx(statistics.stdev(values))
        assert not any({"mean", "deviation"} & a.attrs.keys() for a in repeats[:2])
        ends = [storage.get_trial(a.trial_id).datetime_complete for a in repeats]
        assert max(ends) == ends[2]


def test_a_last_repeat_that_waits_survives_a_stop(
    settings: Settings, quick: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while it waits for the first repeat, the study goes on and tells it once, with its mean."""
    few = {"method": "list", "settings": [{"eta": 0.1}]}
    spec = quick(search=few, space={}, base={"epochs": 2, "hidden_sizes": [], "lambda": 0.0}, confirm=False, repeats=2)
    monkeypatch.setattr(runner, "MOST_COLUMNS", 1)
    runners: list[Runner] = []

    def backwards(runner: Runner) -> None:
        runners.append(runner)
        runner.todo.extend(reversed(plan.propose(spec, [])))

    def stop_when_held(status: Status) -> None:
        if runners[0].held:
            runners[0].stop()

    with pytest.raises(Interrupted):
        launch(spec, settings, workers=1, started=backwards, show=stop_when_held)
    assert [a.state.name for a in attempts(settings) if a.slot.repeat == 1] == ["RUNNING"]
    outcome = launch(spec, settings, workers=1)
    (last,) = [a for a in attempts(settings) if a.slot.repeat == 1]
    assert (last.state.name, last.attrs["mean"]) == ("COMPLETE", pytest.approx(outcome.chosen.mean))


@pytest.mark.fault
def test_a_killed_runner_is_taken_up_where_it_was(settings: Settings, tmp_path: Path) -> None:
    """However often the runner is killed, the study ends with each slot done once and undisturbed values."""
    path = study_file(tmp_path)
    calm = Settings.from_environment({"SIEVE_HOME": str(tmp_path / "calm")})
    sieve(calm, "launch", str(path), "--workers", "2").communicate()
    for seconds in (1.2, 1.6, 2.0):
        runner = sieve(settings, "launch", str(path), "--workers", "2")
        time.sleep(seconds)
        runner.kill()
        runner.communicate()
    last = sieve(settings, "launch", str(path), "--workers", "1")
    last.communicate()
    assert last.returncode == 0
    assert values(settings) == values(calm)
    assert not list(settings.checkpoints.rglob("*.npz"))


@pytest.mark.fault
def test_workers_end_with_their_runner(settings: Settings, tmp_path: Path) -> None:
    """A second after the runner was killed, none of its workers is left."""
    runner = sieve(settings, "launch", str(study_file(tmp_path, **slow())), "--workers", "2")
    workers = await_workers(runner.pid, 2)
    runner.kill()
    runner.communicate()
    gone, alive = psutil.wait_procs(workers, timeout=5)
    assert len(gone) == 2
    assert not alive


def await_workers(pid: int, count: int, timeout: float = 30.0) -> list[psutil.Process]:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        with suppress(psutil.Error):
            children = [p for p in psutil.Process(pid).children() if p.status() != psutil.STATUS_ZOMBIE]
            workers = [p for p in children if "spawn_main" in " ".join(p.cmdline())]
            if len(workers) >= count:
                return workers
        time.sleep(0.1)
    raise AssertionError(f"{count} workers did not start within {timeout} s")


@pytest.mark.fault
def test_a_killed_worker_loses_only_its_slice(settings: Settings, tmp_path: Path) -> None:
    """A worker killed in the middle of a slice is replaced, and the study ends with undisturbed values."""
    path = study_file(tmp_path, **slow(base={"batch_size": 5, "epochs": 60, "hidden_sizes": [60]}))
    calm = Settings.from_environment({"SIEVE_HOME": str(tmp_path / "calm")})
    sieve(calm, "launch", str(path), "--workers", "2").communicate()
    runner = sieve(settings, "launch", str(path), "--workers", "2")
    await_workers(runner.pid, 2)[0].kill()
    time.sleep(1.5)
    await_workers(runner.pid, 1)[0].kill()
    runner.communicate(timeout=120)
    assert runner.returncode == 0
    assert values(settings) == values(calm)


def test_another_spec_under_the_same_name_is_refused(settings: Settings, quick: Spec) -> None:
    """A study of that name with other trials is a conflict that says where they differ; another text is not."""
    small = {"method": "random", "trials": 2}
    launch(quick(search=small, confirm=False), settings, workers=1)
    launch(quick(search=small, confirm=False, description="other words"), settings, workers=1)
    assert len(attempts(settings)) == 2
    with pytest.raises(StudyConflict, match=r"search\.trials: 2 as stored, 1 as given"):
        launch(quick(search=small | {"trials": 1}, confirm=False), settings, workers=1)


GRID = {
    "space": {"lambda": [0.1, 0.0], "hidden_sizes": [[], [8]], "eta": {"low": 0.01, "high": 1.0, "log": True}},
    "search": {"method": "grid", "points": 2},
    "confirm": False,
}
WIDER = GRID | {
    "space": {"lambda": [0.0, 0.5, 0.1], "hidden_sizes": [[], [8]], "eta": {"low": 0.01, "high": 1.0, "log": True}},
    "search": {"method": "grid", "points": 3},
}
FEW, MORE = ({"search": {"method": "random", "trials": n, "points": "uniform"}, "confirm": False} for n in (3, 5))


@pytest.mark.parametrize(("first", "then", "count"), [(GRID, WIDER, 18), (FEW, MORE, 5)], ids=["grid", "random"])
def test_an_extended_study_keeps_what_is_done(
    settings: Settings, quick: Spec, first: dict[str, Any], then: dict[str, Any], count: int
) -> None:
    """A grid or random search with more points trains the new ones only, once each, in one space for all of them."""
    launch(quick(**first), settings, workers=1)
    done = attempts(settings)
    launch(quick(**then), settings, workers=2)
    extended = attempts(settings)
    assert extended[: len(done)] == done
    assert len({json.dumps(a.params, sort_keys=True) for a in extended}) == len(extended) == count
    trials = optuna.load_study(study_name="quick", storage=settings.storage).get_trials()
    assert len({str(sorted(t.distributions.items())) for t in trials}) == 1
    with pytest.raises(StudyConflict, match="as stored"):
        launch(quick(**first), settings, workers=1)


def test_an_extended_grid_takes_up_what_was_running(
    settings: Settings, quick: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grid stopped in the middle and extended ends with every combination once, the running ones in their slots."""
    monkeypatch.setattr(runner, "SLICE_SECONDS", 1e-6)
    with pytest.raises(Interrupted):
        launch(quick(**GRID), settings, workers=1, started=stop_after_first_slice)
    begun = {a.slot: a.params for a in attempts(settings) if a.state.name == "RUNNING"}
    assert begun
    launch(quick(**WIDER), settings, workers=2)
    done = {a.slot: a.params for a in attempts(settings)}
    assert begun.items() <= done.items()
    assert len({json.dumps(params, sort_keys=True) for params in done.values()}) == len(attempts(settings)) == 18


def test_a_limit_of_trials_counts_repeats_and_confirm(settings: Settings, quick: Spec) -> None:
    """A study with a limit has the first so many slots of its plan, says so, and goes on when it is raised."""
    parts: dict[str, Any] = {"search": {"method": "random", "trials": 3}, "repeats": 2}
    said: list[str] = []
    launch(quick(**parts, limits={"trials": 7}), settings, workers=2, warn=said.append)
    assert [str(a.slot) for a in attempts(settings)] == [
        *(f"s0.i{i}.r{r}" for i in range(3) for r in range(2)),
        "s1.i0.r2",
    ]
    assert said == ["limits.trials: 7 is reached, no further trial begins; launch with a higher limit to go on"]
    assert standing(settings, "quick")[0]["state"] == "stopped"
    launch(quick(**parts, limits={"trials": 10}), settings, workers=1)
    assert len(attempts(settings)) == 10
    assert standing(settings, "quick")[0]["state"] == "done"


def test_no_trial_begins_after_a_limit_of_minutes(settings: Settings, quick: Spec) -> None:
    """When the minutes are over, what runs is trained to its end and nothing else begins."""
    wide = {"base": {"hidden_sizes": [800]}, "space": {"eta": {"low": 1e-3, "high": 0.1}}}  # two of them fill a group
    spec = quick(**wide, search={"method": "random", "trials": 40}, confirm=False, limits={"minutes": 0.005})
    launch(spec, settings, workers=1)
    found = attempts(settings)
    assert 0 < len(found) < 40
    assert {a.state.name for a in found} <= {"COMPLETE", "PRUNED"}


def test_a_second_runner_is_refused(settings: Settings, quick: Spec) -> None:
    """While a study has an owner, another launch of it says so and touches nothing."""
    with locked(settings.storage, "quick", "quick"), pytest.raises(StudyBusy, match="sieve stop quick"):
        launch(quick(), settings)
    assert not (settings.home / "sieve.db").exists()


def test_divergence_is_a_result(settings: Settings, quick: Spec) -> None:
    """A trial whose cost is not finite ends with that reason, is never chosen, and is called diverged everywhere."""
    spec = quick(search={"method": "list", "settings": [{"eta": 1e9}, {"eta": 0.1}]}, space={}, confirm=False)
    shown: list[Status] = []
    outcome = launch(spec, settings, workers=1, show=shown.append)
    assert (shown[-1].complete, shown[-1].pruned, shown[-1].diverged, shown[-1].failed) == (1, 0, 1, 0)
    assert "1 diverged" in progress_line(shown[-1])
    assert "pruned" not in progress_line(shown[-1])
    (row,) = standing(settings)
    assert (row["complete"], row["pruned"], row["diverged"], row["failed"]) == (1, 0, 1, 0)
    assert (outcome.pruned, outcome.diverged, outcome.failed) == (0, 1, 0)
    rows = csv.DictReader(io.StringIO(trials_csv(gather(open_study("quick", settings), settings))))
    assert [r["status"] for r in rows] == ["diverged", "complete"]
    diverged, fine = attempts(settings)
    assert (diverged.state.name, fine.state.name) == ("PRUNED", "COMPLETE")
    assert "diverged: the loss was" in diverged.attrs["reason"]
    assert outcome.chosen.params == {"eta": 0.1}


def test_a_study_without_any_result_has_failed(settings: Settings, quick: Spec) -> None:
    """When every trial diverges there is nothing to choose, and the error gives the reason."""
    spec = quick(search={"method": "list", "settings": [{"eta": 1e9}, {"eta": 1e10}]}, space={}, confirm=False)
    with pytest.raises(StudyFailed, match="none of 2 trials has a result: diverged"):
        launch(spec, settings, workers=1)


def test_a_stopped_study_goes_on_later(settings: Settings, quick: Spec) -> None:
    """`stop` saves what runs; the next launch takes it up and ends with the slots of the plan, each once."""
    spec = quick(**slow())

    def stop_soon(runner: Runner) -> None:
        runner.stop()

    with pytest.raises(Interrupted, match="goes on from here"):
        launch(spec, settings, workers=2, started=stop_soon)
    assert standing(settings, "quick")[0]["state"] == "stopped"
    launch(spec, settings, workers=2)
    assert sorted(str(a.slot) for a in attempts(settings)) == [f"s0.i{i}.r0" for i in range(4)]
    assert standing(settings, "quick")[0]["waiting"] == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_a_signal_ends_the_slices_and_says_how_to_go_on(
    settings: Settings, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """The first SIGINT or SIGTERM ends the process within ten seconds, with what runs saved."""
    runner = sieve(settings, "launch", str(study_file(tmp_path, **slow(epochs=10_000))), "--workers", "2")
    await_workers(runner.pid, 2)
    time.sleep(1.0)
    began = time.monotonic()
    runner.send_signal(number)
    _, shown = runner.communicate(timeout=30)
    assert time.monotonic() - began < 10
    assert runner.returncode == code
    assert "goes on from here" in shown
    assert "Traceback" not in shown


def test_cancelled_trials_fail_and_can_be_retried(settings: Settings, tmp_path: Path, quick: Spec) -> None:
    """`cancel` gives up the running trials with that reason; a retry makes a second attempt at each slot."""
    parts = slow(epochs=1000)
    spec = quick(**parts)
    runner = sieve(settings, "launch", str(study_file(tmp_path, **parts)), "--workers", "2")
    await_workers(runner.pid, 2)
    assert "asked the runner" in run.request("quick", "cancel", settings)
    runner.communicate(timeout=30)
    assert runner.returncode == 130
    given_up = attempts(settings)
    assert {a.attrs["reason"] for a in given_up} == {"cancelled by the user"}
    launch(spec, settings, workers=2, retry_failed=True)
    again = {a.slot: a for a in attempts(settings)}
    assert {a.attempt for a in again.values()} == {2}
    assert {a.state.name for a in again.values()} == {"COMPLETE"}
    assert {slot: a.params for slot, a in again.items()} == {a.slot: a.params for a in given_up}


def test_a_dry_run_writes_nothing(settings: Settings, quick: Spec) -> None:
    """A dry run counts the trials per stage and names the first points, and leaves the home as it was: missing."""
    plan_ = run.dry_run(quick(), settings, workers=1)
    assert [(s["name"], s["trials"]) for s in plan_["stages"]][-1] == ("confirm", 4)
    assert [s["trials"] for s in plan_["stages"]] == [4, 4, 4, 4]
    assert plan_["first"][0] == plan.propose(quick(), [])[0].params
    assert plan_["seconds"] > 0
    assert not settings.home.exists()


@pytest.mark.parametrize("place", [".", "missing/w.npz"])
def test_weights_go_into_a_file_of_a_folder_that_exists(settings: Settings, tmp_path: Path, place: str) -> None:
    """A folder, or a file below one that is not there, is a mistake in the command and no trouble of the disk."""
    with pytest.raises(SettingsError, match="expected a file, new or old, in a folder that exists"):
        export("quick", tmp_path / place, settings)


def test_exported_weights_predict_as_the_trial_did(settings: Settings, quick: Spec, tmp_path: Path) -> None:
    """Prediction by hand from the exported arrays alone gives the test accuracy that was recorded."""
    spec = quick(search={"method": "random", "trials": 3}, confirm=False)
    outcome = launch(spec, settings, workers=1)
    export("quick", tmp_path / "best.npz", settings)
    with np.load(tmp_path / "best.npz", allow_pickle=False) as arrays:
        data, _ = open_dataset(spec.dataset, settings)
        assert data.test is not None
        a = (data.test.x - arrays["mean"]) * arrays["scale"]
        layers = sorted(key for key in arrays if key.startswith("W"))
        for w in layers:
            a = a @ arrays[w] + arrays["b" + w[1:]]
            a = np.maximum(a, 0) if w != layers[-1] else a
        assert json.loads(str(arrays["about"]))["study"] == "quick"
    accuracy = float((a.argmax(axis=1) == data.test.y).mean())
    assert outcome.test_accuracy is not None
    assert accuracy == pytest.approx(outcome.test_accuracy[0], abs=1e-9)


RISING: dict[str, Any] = {  # validation gets worse again after a few epochs
    "base": {"batch_size": 20, "epochs": 10, "hidden_sizes": [60], "momentum": 0.9},
    "space": {"eta": [0.1, 0.3], "lambda": [0.0, 1e-3]},
    "search": {"method": "grid"},
    "dataset": {"name": "digits", "train": 120, "validation": 100, "test": 100},
    "confirm": False,
}


def figures(data: Dataset, part: str, arrays: Any) -> tuple[float, float, list[list[int]]]:
    """Loss, accuracy and confusion counts of exported arrays on a split, in float64 by hand."""
    split, classes = getattr(data, part), len(data.classes)
    a = (split.x.astype(float) - arrays["mean"]) * arrays["scale"]
    layers = sorted(key for key in arrays if key.startswith("W"))
    for w in layers:
        a = a @ arrays[w].astype(float) + arrays["b" + w[1:]]
        a = np.maximum(a, 0) if w != layers[-1] else a
    a -= a.max(axis=1, keepdims=True)
    losses = np.log(np.exp(a).sum(axis=1)) - a[np.arange(len(a)), split.y]
    counts = [[int(((split.y == t) & (a.argmax(axis=1) == p)).sum()) for p in range(classes)] for t in range(classes)]
    return float(losses.mean()), float((a.argmax(axis=1) == split.y).mean()), counts


@pytest.mark.parametrize("metric", ["best_val_loss", "best_val_accuracy", "val_loss"])
def test_weights_and_figures_are_those_of_the_evaluation_that_is_reported(
    settings: Settings, quick: Spec, tmp_path: Path, metric: str
) -> None:
    """Value, exported weights, test figures and confusion matrix of a trial belong to one and the same evaluation."""
    spec = quick(**RISING, metric=metric)
    outcome = launch(spec, settings, workers=1)
    (best, *_), data = outcome.table, open_dataset(spec.dataset, settings)[0]
    export("quick", tmp_path / "best.npz", settings)
    record = open_study("quick", settings)
    with Outbox(settings.outbox) as box:
        uid = record.uid(best.slot, best.attempt)
        (ended,) = box.records(uid, "trial_ended")
        points = [p for r in box.records(uid, "trial_progress") for p in r.payload["points"]]
    with np.load(tmp_path / "best.npz", allow_pickle=False) as arrays:
        validation, test = figures(data, "validation", arrays), figures(data, "test", arrays)
    value = {"loss": validation[0], "accuracy": validation[1]}[metric.rpartition("_")[2]]
    assert best.value == pytest.approx(value, rel=1e-6, abs=1e-6)
    assert (best.attrs["val_loss"], best.attrs["val_accuracy"]) == pytest.approx(validation[:2], rel=1e-5)
    assert (best.attrs["test_loss"], best.attrs["test_accuracy"]) == pytest.approx(test[:2], rel=1e-5)
    assert ended.payload["confusion"] == test[2]
    assert ended.payload["results"][metric] == best.value
    assert best.attrs["epochs"] == 10
    series = [
        metrics[{"loss": "loss/val", "accuracy": "accuracy/val"}[metric.rpartition("_")[2]]] for *_, metrics in points
    ]
    if metric.startswith("best_"):
        assert best.attrs["best_epoch"] == 1 + series.index(max(series) if "accuracy" in metric else min(series)) < 10
    else:
        assert "best_epoch" not in best.attrs


def test_an_objective_reports_the_test_figures_of_its_value(quick: Spec, settings: Settings) -> None:
    """With plain Optuna too, the test figures beside a best value are those of a training that ends there."""
    spec, at = quick(**RISING, metric="best_val_loss"), {"eta": 0.3, "lambda": 0.0}
    data, trial = open_dataset(spec.dataset, settings)[0], optuna.trial.FixedTrial(at)
    value = objective(spec, data)(trial)
    _, (whole,) = advance([start(spec.config(at), data, (0, 0), (0, 0))], data, 10)
    losses = [e.metrics["loss/val"] for e in whole.evaluations]
    assert value == min(losses) < losses[-1]
    config = spec.config(at, epochs=1 + losses.index(value))
    _, (short,) = advance([start(config, data, (0, 0), (0, 0))], data, 10)
    assert {kind: trial.user_attrs[f"test_{kind}"] for kind in ("loss", "accuracy")} == short.test != whole.test


def test_the_best_weights_survive_stops(settings: Settings, quick: Spec, tmp_path: Path) -> None:
    """A study stopped after every slice of three epochs ends with the weights of one that was left alone."""
    spec = quick(**RISING, metric="best_val_loss")
    other = Settings.from_environment({"SIEVE_HOME": str(tmp_path / "other")})
    launch(spec, settings, workers=1)

    def three_epochs(runner: Runner) -> None:
        runner._most_epochs = lambda trial: 3  # type: ignore[method-assign]
        stop_after_first_slice(runner)

    for _ in range(60):
        with suppress(Interrupted):
            launch(spec, other, workers=2, started=three_epochs)
            break
    assert values(settings) == values(other)
    for home in (settings, other):
        export("quick", tmp_path / f"{home.home.name}.npz", home)
    with np.load(tmp_path / "home.npz") as ours, np.load(tmp_path / "other.npz") as theirs:
        assert {k for k in ours if not np.array_equal(ours[k], theirs[k])} <= {"about"}


def test_a_checkpoint_holds_the_best_network_and_older_ones_are_read(quick: Spec, tmp_path: Path) -> None:
    """The network set aside comes back with the state; an older file without one is taken if none is asked for."""
    data, keep = open_dataset(quick().dataset, Settings.from_environment({"SIEVE_HOME": str(tmp_path)}))[0], "loss/val"
    config = TrainConfig(hidden_sizes=(5,), momentum=0.9, lam=0.01, eta=0.1, batch_size=50, epochs=4)
    for asked in (Keep(keep, maximise=False), None):
        fresh = start(config, data, (1,), (0,), asked)
        (state,), (progress,) = advance([fresh], data, 2)
        checkpoint.save(tmp_path / "a.npz", state, progress, "it")
        back, _ = checkpoint.load(tmp_path / "a.npz", "it", fresh)
        assert back.keep == asked
        ends = [advance([s], data, 9)[0][0].weights for s in (state, back)]
        assert all(np.array_equal(ours[0], theirs[0]) for ours, theirs in zip(*ends, strict=True))
    with np.load(tmp_path / "a.npz") as archive:
        header = json.loads(str(archive["header"]))
        del header["kept"], header["state"]["keep"]
        np.savez(tmp_path / "old.npz", **{**archive, "header": np.array(json.dumps(header))})
    back, _ = checkpoint.load(tmp_path / "old.npz", "it", start(config, data, (1,), (0,)))
    assert back.update == state.update
    with pytest.raises(ValueError, match="another training"):
        checkpoint.load(tmp_path / "old.npz", "it", start(config, data, (1,), (0,), Keep(keep, maximise=False)))


def test_everything_shown_is_in_the_outbox(settings: Settings, quick: Spec) -> None:
    """Each trial's record holds its beginning, every point of its curves, three weight images, and its end."""
    launch(quick(search={"method": "random", "trials": 2}, confirm=False), settings, workers=1)
    with Outbox(settings.outbox) as box:
        for a in attempts(settings):
            records = box.records(open_study("quick", settings).uid(a.slot, 1))
            kinds = [record.kind for record in records]
            assert kinds.count("trial_begun") == kinds.count("trial_ended") == 1
            assert kinds.count("trial_weights") == 3
            points = [p for r in records if r.kind == "trial_progress" for p in r.payload["points"]]
            assert [step for step, *_ in points] == [1, 2, 3]
            assert sorted(when for _, when, _ in points) == [when for _, when, _ in points]


def test_an_unknown_study_lists_near_names(settings: Settings, quick: Spec) -> None:
    """A misspelled name is answered with the names that are like it."""
    launch(quick(search={"method": "random", "trials": 1}, confirm=False), settings, workers=1)
    with pytest.raises(UnknownStudy, match="did you mean quick"):
        open_study("quikc", settings)


def test_optuna_reads_the_study_as_its_own(settings: Settings, quick: Spec) -> None:
    """Optuna finds the full space in every trial, the direction of the metric, and the same best value."""
    outcome = launch(quick(), settings, workers=2)
    study = optuna.load_study(study_name="quick", storage=settings.storage)
    assert study.direction.name == "MAXIMIZE"
    assert study.best_value == outcome.table[0].value
    spaces = {str(sorted(t.distributions.items())) for t in study.get_trials()}
    assert len(spaces) == 1
    assert study.get_trials()[0].distributions["lambda"] == optuna.distributions.FloatDistribution(1e-6, 1e-1, log=True)


def test_importance_is_right_after_coarse_to_fine(settings: Settings, quick: Spec) -> None:
    """Optuna's importance, over the full space in every trial, finds the one parameter of three that matters."""
    space = {"eta": {"low": 1e-6, "high": 1.0, "log": True}, "lambda": {"low": 0.0, "high": 1e-6}}
    spec = quick(space=space | {"eval_every": [3, 6]}, search={"method": "coarse-to-fine", "trials_per_stage": 6})
    launch(spec, settings, workers=2)
    study = optuna.load_study(study_name="quick", storage=settings.storage)
    full = {
        "eta": optuna.distributions.FloatDistribution(1e-6, 1.0, log=True),
        "eval_every": optuna.distributions.CategoricalDistribution([3, 6]),
        "lambda": optuna.distributions.FloatDistribution(0.0, 1e-6),
    }
    assert all(trial.distributions == full for trial in study.trials)
    for evaluator in (FanovaImportanceEvaluator(seed=0), MeanDecreaseImpurityImportanceEvaluator(seed=0)):
        importances = get_param_importances(study, evaluator=evaluator)
        assert importances.keys() == full.keys()
        assert max(importances, key=importances.__getitem__) == "eta"


def test_a_coarse_and_a_fine_stage_then_the_best_on_nearly_all_data(settings: Settings, quick: Spec) -> None:
    """Two cycles in a wide range, two in a narrower one around the best, and three for the best with more images."""
    base = {"schedule": "cyclical", "eta_min": 1e-3, "eta": 0.3, "n_s": 6, "batch_size": 50, "updates": 24}
    stages = [{"name": "coarse", "trials": 5}, {"name": "fine", "trials": 7, "width": 0.35}]
    spec = quick(
        base=base,
        space={"lambda": {"low": 1e-5, "high": 1e-1, "log": True}},
        search={"method": "coarse-to-fine", "stages": stages},
        confirm={"top": 1, "repeats": 1, "base": {"updates": 36}, "dataset": {"train": 350, "validation": 50}},
    )
    outcome = launch(spec, settings, workers=2)
    found = attempts(settings)
    assert [a.attrs["stage"] for a in found] == ["coarse"] * 5 + ["fine"] * 7 + ["confirm"]
    assert [round(a.attrs["epochs"] * 300 / 50) for a in found[:12]] == [24] * 12
    assert found[-1].attrs["epochs"] == pytest.approx(36 / 7)
    decades = [math.log10(a.params["lambda"]) for a in found[5:12]]
    assert max(decades) - min(decades) <= 0.35 * 4
    best = max(found[:12], key=lambda a: (a.value, a.slot))
    assert outcome.chosen.params == found[-1].params == best.params


def test_a_best_point_at_the_border_is_said_wherever_results_are(settings: Settings, tmp_path: Path) -> None:
    """Launch, best, report and the note in the dashboard name the border that the best point lies at."""
    space = {"eta": {"low": 1e-5, "high": 1e-3, "log": True}}
    path = study_file(tmp_path, space=space, search={"method": "grid", "points": 3}, confirm=False)
    words = "eta: the best value 0.001 lies at the upper border 0.001 of the space; widen it"
    assert words in sieve(settings, "launch", str(path)).communicate()[0]
    assert words in sieve(settings, "best", "quick").communicate()[0]
    sieve(settings, "report", "quick", "--out", str(tmp_path)).communicate()
    assert words in (tmp_path / "report.html").read_text()
    record = open_study("quick", settings)
    assert words in record.storage.get_study_system_attrs(record.study_id)["dashboard:note_str:0"]


@given(
    sizes=st.lists(st.integers(0, 900), min_size=1, max_size=30),
    batches=st.lists(st.sampled_from([10, 20]), min_size=30, max_size=30),
    workers=st.integers(1, 4),
)
@hypothesis_settings(deadline=None, max_examples=40)
def test_packing_puts_each_trial_into_one_group_of_its_kind(sizes: list[int], batches: list[int], workers: int) -> None:
    """Groups share batch size and order, hold every trial once, and are not wider than allowed."""
    rng = np.random.default_rng(0)
    data = Dataset.from_arrays(*[(rng.random((40, 3), np.float32), np.arange(40) % 2)] * 2)
    trials = []
    for i, (size, batch) in enumerate(zip(sizes, batches, strict=False)):
        config = TrainConfig(hidden_sizes=(size,) if size else (), batch_size=batch)
        state = start(config, data, (i,), (0,))
        trials.append(Trial(Slot(0, i, 0), "random", {}, config, 1, i, i, data, state))
    packed = groups(trials, workers)
    assert sorted(t.number for group in packed for t in group) == list(range(len(trials)))
    for group in packed:
        assert len({t.config.batch_size for t in group}) == 1
        assert len(group) == 1 or sum(t.columns for t in group) <= 2 * MOST_COLUMNS
    if len(set(batches[: len(sizes)])) == 1:
        assert len(packed) >= min(workers, len(trials))


# ---- trials that fail


def test_why_a_trial_failed_is_one_line_everywhere(
    settings: Settings, quick: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage, report, outcome and the journal say what was raised; the journal keeps the worker's traceback, too."""
    monkeypatch.setattr(runner, "advance_here", failing.advance_or_fail)
    points = [{"eta": eta} for eta in (0.1, *failing.ERRORS)]
    spec = quick(search={"method": "list", "settings": points}, space={}, confirm=False)
    outcome = launch(spec, settings, workers=2)
    expected = {eta: line for eta, (_, line) in failing.ERRORS.items()}
    found = {a.params["eta"]: a for a in attempts(settings)}
    assert {eta: a.attrs.get("reason") for eta, a in found.items()} == {0.1: None} | expected
    material = gather(open_study("quick", settings), settings)
    rows = csv.DictReader(io.StringIO(trials_csv(material)))
    assert {float(r["eta"]): r["reason"] for r in rows} == {0.1: ""} | expected
    assert set(outcome.reasons) <= set(expected.values())
    assert (outcome.failed, len(outcome.reasons)) == (len(expected), 3)
    with Outbox(settings.outbox) as box:
        ends = {r.uid: r.payload for r in box.pending(1000) if r.kind == "trial_ended"}
    failed = [end for end in ends.values() if end["status"] == "FAILED"]
    assert sorted(end["reason"] for end in failed) == sorted(expected.values())
    assert all("in fail" in end["details"] for end in failed)


def test_a_study_of_failures_says_what_they_were(
    settings: Settings, quick: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any result, the error names what was raised and holds no line of a traceback."""
    monkeypatch.setattr(runner, "advance_here", failing.advance_or_fail)
    spec = quick(search={"method": "list", "settings": [{"eta": 0.11}]}, space={}, confirm=False)
    with pytest.raises(StudyFailed) as raised:
        launch(spec, settings, workers=1)
    assert str(raised.value) == "study 'quick': none of 1 trials has a result: ValueError: shapes do not fit"


def ends(settings: Settings) -> dict[str, list[tuple[str, str | None]]]:
    """Of each attempt in the journal, how it began and how it ended."""
    found: dict[str, list[tuple[str, str | None]]] = {}
    with Outbox(settings.outbox) as box:
        for r in box.pending(10_000):
            if r.kind == "trial_begun":
                found.setdefault(r.uid.partition("/")[2], []).append(("begun", None))
            elif r.kind == "trial_ended":
                found.setdefault(r.uid.partition("/")[2], []).append((r.payload["status"], r.payload["reason"]))
    return found


def out_of_memory(*_: Any) -> State:
    raise MemoryError


def test_a_running_trial_that_cannot_go_on_is_ended_in_both_places(
    settings: Settings, quick: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken up where there is no memory for it, it fails in storage and journal alike; no checkpoint stays."""
    monkeypatch.setattr(runner, "SLICE_SECONDS", 1e-6)  # an epoch
    spec = quick(**slow())
    with pytest.raises(Interrupted):
        launch(spec, settings, workers=2, started=stop_after_first_slice)
    running = {f"{a.slot}/{a.attempt}" for a in attempts(settings) if a.state.name == "RUNNING"}
    assert running
    monkeypatch.setattr(runner, "start", out_of_memory)
    with pytest.raises(StudyFailed, match="cannot be trained: out of memory"):
        launch(spec, settings, workers=2)
    told = {f"{a.slot}/{a.attempt}": (a.state.name, a.attrs["reason"]) for a in attempts(settings)}
    assert len(told) == 4
    assert running <= told.keys()
    assert {state for state, _ in told.values()} == {"FAIL"}
    assert ends(settings) == {uid: [("begun", None), ("FAILED", reason)] for uid, (_, reason) in told.items()}
    assert not list(settings.checkpoints.rglob("*.npz"))


def test_what_the_journal_calls_failed_fails(settings: Settings, quick: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runner that was killed between its journal and the storage had said the end of a trial already."""
    monkeypatch.setattr(runner, "SLICE_SECONDS", 1e-6)  # an epoch
    spec = quick(**slow(epochs=8))
    with pytest.raises(Interrupted):
        launch(spec, settings, workers=2, started=stop_after_first_slice)
    first = next(a for a in attempts(settings) if a.state.name == "RUNNING")
    with Outbox(settings.outbox) as box:
        (uid,) = {r.uid for r in box.pending(1000) if r.uid.endswith(f"/{first.slot}/1")}
        study = next(r.study for r in box.pending(1000))
        box.put([outbox.trial_ended(study, uid, time.time(), "FAILED", "cancelled by the user", {})])
    launch(spec, settings, workers=2)
    (again,) = [a for a in attempts(settings) if a.slot == first.slot]
    assert (again.state.name, again.attrs["reason"]) == ("FAIL", "cancelled by the user")
    assert standing(settings)[0]["complete"] == 3


# ---- workers


def test_a_study_without_work_needs_no_worker(settings: Settings, quick: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no worker left, what is finished ends at once; where work is left it is waited for, and that is said."""
    spec = quick(search={"method": "random", "trials": 2}, confirm=False)
    first = launch(spec, settings, workers=1)
    monkeypatch.setattr(run, "open_executor", lambda *_: (LocalExecutor(0), lambda: 0))

    def not_for_ever(runner: Runner) -> None:
        timer = threading.Timer(3, runner.stop)
        timer.daemon = True
        timer.start()

    said: list[str] = []
    assert launch(spec, settings, started=not_for_ever, warn=said.append).chosen == first.chosen
    assert said == []
    more = quick(search={"method": "random", "trials": 3}, confirm=False)
    with pytest.raises(Interrupted):
        launch(more, settings, started=not_for_ever, warn=said.append)
    assert said == ["no worker is at local now; waiting for one"]


def test_processes_of_the_caller_live_on(settings: Settings, quick: Spec) -> None:
    """Neither a launch, nor a dry run, nor doctor ends a process that the program has begun for itself."""
    other = get_context("spawn").Process(target=time.sleep, args=(120,))
    other.start()
    try:
        launch(quick(search={"method": "random", "trials": 2}, confirm=False), settings, workers=1)
        run.dry_run(quick(), settings, workers=1)
        doctor.examine(settings)
        assert other.is_alive()
    finally:
        other.kill()
        other.join()


# ---- the time that is left


class Simulated(Executor):
    """Trains at once, and says that it took as long as its work at a fixed speed on one worker."""

    def __init__(self, per_epoch: float) -> None:
        self.now, self.per_epoch = 1000.0, per_epoch

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        states, data, epochs = args
        new, progress = advance(states, data, epochs)
        took = self.per_epoch * sum((n.update - s.update) / s.per_epoch for n, s in zip(new, states, strict=True))
        self.now += took
        result: Slice = (new, progress, took)
        future: Future[Any] = Future()
        future.set_result(result)
        return future


def simulate(spec: StudySpec, settings: Settings, per_epoch: float) -> list[tuple[float, Status]]:
    """A whole study by that clock: (seconds since its first slice, what it showed then)."""
    engine, shown = Simulated(per_epoch), list[tuple[float, Status]]()
    settings.home.mkdir(parents=True, exist_ok=True)
    datasets = run.open_datasets(spec, settings, lambda note: None)
    with registered(settings.storage, spec, {}) as record, Outbox(settings.outbox) as box:
        one = Runner(spec, settings, record, box, datasets, engine, lambda: 1, clock=lambda: engine.now)
        one.run(lambda status: shown.append((engine.now - 1000.0, status)))
    return shown


@pytest.mark.parametrize("length", [{"epochs": 40}, {"updates": 240}], ids=["epochs", "updates"])
def test_the_time_left_is_right_from_the_first_slice_on(
    settings: Settings, quick: Spec, monkeypatch: pytest.MonkeyPatch, length: dict[str, int]
) -> None:
    """Sixteen trials side by side in stages of 4 and 40 epochs: it falls steadily, and is the truth all along."""
    monkeypatch.setattr(runner, "FIRST_RATE", 1.0)  # slices of one epoch
    monkeypatch.setattr(runner, "SLICE_SECONDS", 1e-9)
    stages = [{"name": "short", "trials": 16, "base": {"epochs": 4}}, {"name": "long", "trials": 4}]
    spec = quick(
        base={"batch_size": 50, "hidden_sizes": []} | length,
        space={"eta": {"low": 1e-3, "high": 1e-1, "log": True}},
        search={"method": "coarse-to-fine", "stages": stages},
        confirm=False,
    )
    shown = simulate(spec, settings, per_epoch=3.0)
    total = 3.0 * (16 * 4 + 4 * 40)
    assert shown[-1][0] == pytest.approx(total)
    told = [(when, s.seconds_left) for when, s in shown if s.seconds_left is not None]
    assert told[0][0] == pytest.approx(3.0 * 16)  # the first slice
    assert [left for _, left in told] == pytest.approx([total - when for when, _ in told], abs=1e-3)
    assert shown[-1][1].trained == pytest.approx(1.0)
    early = next(s for when, s in shown if s.trained > 0 and s.complete == 0)
    assert early.trained == pytest.approx(16 / (16 * 4 + 4 * 40))
    assert "0/20 done" in progress_line(early)
    assert "7% trained" in progress_line(early)


def test_trials_that_end_early_leave_no_time_behind(
    settings: Settings, quick: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Diverged, failed and patient trials count as done: at the end nothing is left, and nothing ever gets more."""
    monkeypatch.setattr(runner, "FIRST_RATE", 1.0)
    monkeypatch.setattr(runner, "SLICE_SECONDS", 1e-9)
    points = [
        {"eta": eta, "patience": patience, "batch_size": size}
        for eta, patience, size in ((1e9, 99, 50), (1e-9, 1, 50), (0.1, 99, 5000), (0.1, 99, 50))
    ]
    spec = quick(
        base={"epochs": 20, "hidden_sizes": [16]},
        space={}, search={"method": "list", "settings": points}, confirm=False,
    )  # fmt: skip
    shown = simulate(spec, settings, per_epoch=2.0)
    left = [s.seconds_left for _, s in shown if s.seconds_left is not None]
    assert all(later <= before + 1e-6 for before, later in pairwise(left))
    last = shown[-1][1]
    assert (last.seconds_left, last.trained) == (0.0, 1.0)
    assert (last.failed, last.diverged) == (1, 1)


# ---- dry runs


def test_a_dry_run_adds_up_its_stages(settings: Settings, quick: Spec) -> None:
    """Each stage takes its trials times its own epochs, repeats and data; what is done meanwhile is said."""
    stages = [{"name": "short", "trials": 4, "base": {"epochs": 2}}, {"name": "long", "trials": 6}]
    spec = quick(
        base={"batch_size": 50, "epochs": 30, "hidden_sizes": [20]},
        space={"eta": {"low": 1e-3, "high": 1e-1, "log": True}},
        search={"method": "coarse-to-fine", "stages": stages},
        repeats=3,
        confirm={"top": 2, "repeats": 2, "base": {"epochs": 60}, "dataset": {"train": 150}},
    )
    said: list[str] = []
    planned = run.dry_run(spec, settings, workers=1, say=said.append)
    work = {"short": 4 * 3 * 2 * 300, "long": 6 * 3 * 30 * 300, "confirm": 2 * 2 * 60 * 150}
    seconds = {stage["name"]: stage["seconds"] for stage in planned["stages"]}
    assert seconds.keys() == work.keys()
    assert planned["seconds"] == pytest.approx(sum(seconds.values()))
    assert {name: took / seconds["short"] for name, took in seconds.items()} == pytest.approx(
        {name: amount / work["short"] for name, amount in work.items()}
    )
    assert [line for line in said if line.startswith("timing one slice of ")]


@pytest.mark.parametrize("begin", [partial(run.dry_run, workers=1), serve.enqueue], ids=["dry run", "for serve"])
def test_whoever_begins_a_study_is_warned_of_its_data(
    settings: Settings, quick: Spec, tmp_path: Path, begin: Callable[..., object]
) -> None:
    """What is to be known of the data is said before anything is trained, to who leaves it to a service too."""
    y = np.append(np.arange(60) % 2, 2)  # the only example of class 2 is trained on
    np.savez(tmp_path / "rare.npz", x=np.random.default_rng(0).normal(size=(61, 3)), y=y)
    dataset = {"name": "npz", "path": str(tmp_path / "rare.npz"), "validation": 20}
    said = list[str]()
    spec = quick(dataset=dataset | {"split": "stratified"}, base={"batch_size": 20, "epochs": 1})
    begin(spec, settings, **{"say" if isinstance(begin, partial) else "warn": said.append})
    assert "warning: npz: no example to choose by of 1 class: 2" in said


def test_a_dry_run_times_little_of_much(settings: Settings, quick: Spec, tmp_path: Path) -> None:
    """Of 500 costly trials on many examples, it trains for seconds only, and every step is said before it is taken."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "big.npz", x=rng.integers(0, 256, (20_000, 1500), np.uint8), y=np.arange(20_000) % 10)
    data = {"name": "npz", "path": str(tmp_path / "big.npz"), "validation": 1000, "test": 1000}
    spec = quick(
        dataset=data, space={"eta": {"low": 1e-3, "high": 1e-1}}, base={"epochs": 40, "hidden_sizes": [400, 400]},
        search={"method": "random", "trials": 500}, confirm=False,
    )  # fmt: skip
    said: list[tuple[float, str]] = []
    began = time.process_time(), time.monotonic()
    planned = run.dry_run(spec, settings, workers=1, say=lambda text: said.append((time.monotonic(), text)))
    # 500 trials x 40 epochs x 18,000 examples x (4 * 1500 * 400 + 6 * (400 * 400 + 400 * 10)) operations
    operations = 500 * 40 * 18_000 * (4 * 1500 * 400 + 6 * (400 * 400 + 400 * 10))
    assert 1e9 < operations / planned["seconds"] < 1e12  # of a core
    assert [text.partition(" ")[0] for _, text in said] == ["planning", "opening", "timing"]
    assert time.monotonic() - began[1] < 60
    assert not settings.home.exists()


# ---- files


def test_what_is_told_survives_a_power_cut(settings: Settings) -> None:
    """Every connection to the embedded storage waits for the disk at each commit: SQLite's synchronous is FULL (2)."""
    settings.home.mkdir(parents=True)
    with open_storage(settings.storage).engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
