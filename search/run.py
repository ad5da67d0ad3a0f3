"""A study from its file to its outcome: launch, what a dry run would do, and requests to a running one."""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from core.data import Dataset
from core.train import advance
from search import COMMAND, outbox, plan
from search.datasets import open_dataset
from search.errors import Interrupted, SieveError, StudyBusy, StudyFileError, StudyGone, StudyTaken, UnknownStudy
from search.executor import open_executor
from search.outbox import Outbox, Record
from search.outcome import Outcome, best_first, conclude, open_study, study_note, summary
from search.recover import recover
from search.runner import REQUEST_SECONDS, STOP_SECONDS, Runner, Status, groups, is_asked, prepare
from search.samplers import asker, check_packages
from search.settings import Settings, redact
from search.storage import (
    PATIENCE,
    StudyRecord,
    distribution,
    finished_attempts,
    is_empty,
    is_owned,
    open_storage,
    owned,
    registered,
    study_names,
)
from search.study import StudySpec, narrowed

PUBLISHER_SECONDS = 20.0  # without getting on, before the rest is left to `sieve sync`
HURRY_SECONDS = 1.0  # all that it gets when the study was stopped
FIRST_POINTS = 5  # shown by a dry run
GROUP = 16  # trials of its timed slice
BEST = 3  # trials whose curves are drawn as a figure


def launch(
    spec: StudySpec,
    settings: Settings,
    *,
    workers: int | None = None,
    retry_failed: bool = False,
    publish: bool = True,
    show: Callable[[Status], None] = lambda status: None,
    started: Callable[[Runner], None] = lambda runner: None,
    warn: Callable[[str], None] = lambda text: None,
    report: Callable[[StudyRecord, Settings], bytes] | None = None,
) -> Outcome:
    """Run a study to its end, from its beginning or from where it was left.

    `show` gets the status about twice a second; `started` gets the runner, to stop it from a
    signal handler; `warn` gets what a person should know. Without `publish`, all for MLflow stays in
    the outbox. `report` makes the page that goes with the study's summary; if it fails, the study does not.
    Raises StudyConflict, StudyBusy, DataError, StudyFileError when the method needs a package that is not here or
    the space another study; Interrupted if it was stopped; StudyFailed without any result.
    """
    check_packages(spec.search.method, f"study '{spec.name}'")
    settings.home.mkdir(parents=True, exist_ok=True)
    spec = resolved(spec, settings)
    datasets = open_datasets(spec, settings, warn)
    digests = {stage: data.digest for stage, data in datasets.items()}
    with registered(settings.storage, spec, digests, PATIENCE) as record, Outbox(settings.outbox) as box:
        record.warn = warn
        identify(record, box, settings)
        recover(record, box, settings, time.time)
        runner: Runner | None = None
        with (
            publishing(box, record.id, settings, lambda: bool(runner and runner.stopping))
            if publish
            else nullcontext(),
            closing_workers(settings, workers) as (executor, count),
        ):
            record.set_attr("state", "running")
            runner = Runner(
                spec, settings, record, box, datasets, executor, count, retry_failed=retry_failed, warn=warn
            )
            started(runner)
            try:
                runner.run(show)
            except (StudyGone, StudyTaken):  # nothing of it is ours to write any more
                raise
            except BaseException:
                record.set_attr("state", "stopped")
                raise
            left = "queued" if runner.stopping == "later" else "stopped"
            record.set_attr("state", "done" if runner.done else left)
            if runner.stopping:
                raise Interrupted(f"study '{spec.name}' was stopped; `sieve launch` with its file goes on from here")
            outcome = conclude(record)
            record.set_attr("chosen", outcome.chosen.params)
            page = _page(report, record, settings, warn) if report else None
            box.put([_ended(record, outcome, page, runner.clock())])
        runner.write_notes()
        record.note(study_note(spec, outcome.stages, box.links(record.id).get(record.id), settings, outcome))
        return replace(outcome, unsent=box.unsent(record.id))


def open_datasets(spec: StudySpec, settings: Settings, warn: Callable[[str], None]) -> dict[str, Dataset]:
    """The data of each stage; `warn` gets what its user should know, once. Raises DataError."""
    opened: dict[str, tuple[Dataset, list[str]]] = {}
    for stage in plan.stages(spec):
        dataset = spec.dataset_of(stage.name)
        if (key := dataset.model_dump_json()) not in opened:
            opened[key] = open_dataset(dataset, settings)
    for note in dict.fromkeys(note for _, notes in opened.values() for note in notes):
        warn(f"warning: {note}")
    return {stage.name: opened[spec.dataset_of(stage.name).model_dump_json()][0] for stage in plan.stages(spec)}


def recover_all(settings: Settings, warn: Callable[[str], None]) -> None:
    """Put into this home's journal what it lacks of the studies that nobody runs now; `sieve sync` does so."""
    if is_empty(settings.storage):
        return
    storage = open_storage(settings.storage)
    for name in study_names(storage):
        try:
            record = StudyRecord(storage, name)
            if record.attr("id") and not is_owned(record):
                with Outbox(settings.outbox) as box, owned(record):
                    recover(record, box, settings, time.time)
        except StudyBusy:  # its runner has just begun, and does so itself
            continue
        except SieveError as error:
            warn(str(error))


def identify(record: StudyRecord, box: Outbox, settings: Settings) -> None:
    """Give what this home holds of a study the study's id, where an older version or the home's original gave another.

    A study that lies in the home itself and was copied with it is another one from now on: both may be trained.
    """
    inside = settings.storage.startswith("sqlite:///") and Path(settings.storage[10:]).is_relative_to(settings.home)
    if inside and box.was(record.attr("home") or ""):
        embedded = not settings.tracking_uri.startswith("http")
        record.set_attr("home", box.home)
        box.fork(record.id, record.renew(), keep_links=embedded)
    if record.attr("formerly") and (before := settings.checkpoints / record.name).exists():
        before.rename(settings.checkpoints / record.id)
    if record.attr("formerly"):
        box.rename(record.name, record.id)


def _page(
    report: Callable[[StudyRecord, Settings], bytes],
    record: StudyRecord,
    settings: Settings,
    warn: Callable[[str], None],
) -> bytes | None:
    try:
        return report(record, settings)
    except Exception as error:
        warn(f"warning: there is no report: {type(error).__name__}: {error}; `sieve report {record.name}` tries again")
        return None


def _ended(record: StudyRecord, outcome: Outcome, page: bytes | None, when: float) -> Record:
    """What MLflow is to show of a study's end: the summary run, and means and deviations on repeated runs."""
    uids = {a.slot: record.uid(a.slot, a.attempt) for a in outcome.table}
    repeated = {
        uids[slot]: {"mean": result.mean, "deviation": result.deviation or 0.0}
        for result in outcome.repeated
        for slot in result.slots
    }
    best = [uids[a.slot] for a in outcome.table[:BEST]]
    return outbox.study_ended(record.id, when, summary(outcome), page, best=best, repeated=repeated)


@contextmanager
def closing_workers(settings: Settings, workers: int | None) -> Iterator[tuple[Executor, Callable[[], int]]]:
    """An executor and the number of its workers; leaving ends them, whatever they are doing."""
    executor, count = open_executor(settings.executor, workers)
    try:
        yield executor, count
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


@contextmanager
def publishing(box: Outbox, study: str, settings: Settings, in_a_hurry: Callable[[], bool]) -> Iterator[None]:
    """A publisher at work: a process of its own, which alone imports mlflow.

    Leaving waits for it to send the rest of the study, as long as it gets on, and then ends it: what is
    not sent stays in the outbox, and being cut short does no harm. Who is in a hurry waits a second.
    """
    command = [*COMMAND, "sync", "--follow", str(os.getpid())]
    addresses = {"SIEVE_HOME": str(settings.home), "MLFLOW_TRACKING_URI": settings.tracking_uri}
    addresses |= {"SIEVE_MLFLOW_UI": settings.mlflow_ui, "SIEVE_DASHBOARD_UI": settings.dashboard_ui}
    with (settings.home / "publisher.log").open("ab") as log:
        publisher = subprocess.Popen(
            command,
            env=os.environ | addresses,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    whole = False
    try:
        yield
        whole = True
    finally:
        left, deadline = box.unsent(study), time.monotonic() + PUBLISHER_SECONDS
        while left and publisher.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
            now = box.unsent(study)
            if in_a_hurry() or not whole:
                deadline = min(deadline, time.monotonic() + HURRY_SECONDS)
            elif now < left:
                deadline = time.monotonic() + PUBLISHER_SECONDS
            left = now
        publisher.terminate()
        publisher.wait()


def resolved(spec: StudySpec, settings: Settings) -> StudySpec:
    """The study with absolute paths, and its space narrowed by the study it names, if any.

    To be called before the study is registered, so that what runs is written down before it runs. Raises
    StudyFileError if that other study is not finished.
    """
    spec = spec.located()
    if (source := spec.space_from) is None:
        return spec
    with suppress(UnknownStudy):
        other = open_study(source.study, settings)
        if other.attrs.get("state") == "done":
            settled = finished_attempts(other.attempts()).values()  # those that diverged count among the worst
            best = best_first(other.spec, settled)[: math.ceil(source.top * len(settled))]
            return narrowed(spec, [a.params for a in best])
    text = f"'{source.study}' is not finished in {redact(settings.storage)}; launch it first"
    raise StudyFileError([f"study '{spec.name}': space_from.study: {text}"])


def dry_run(spec: StudySpec, settings: Settings, *, workers: int | None = None) -> dict[str, Any]:
    """What `launch` would do, and about how long, from one timed slice; nothing is written at home."""
    spec = resolved(spec, settings)
    check_packages(spec.search.method, f"study '{spec.name}'")
    distributions = {name: distribution(d) for name, d in spec.dimensions.items()}
    ask = asker(spec.search.method, distributions, spec.seed) if is_asked(spec) else None
    proposals = plan.propose(spec, [], ask)
    stages = plan.stages(spec)
    with tempfile.TemporaryDirectory() as folder:
        aside = replace(settings, home=Path(folder), data_dir=settings.data_dir or settings.data_cache)
        data, _ = open_dataset(spec.dataset_of(proposals[0].stage), aside)
        trials = [prepare(spec, data, proposal) for proposal in proposals[:GROUP]]
        group = groups(trials, 1)[0]
        executor, count = open_executor("local", workers)
        try:
            states, _ = executor.submit(advance, [t.state for t in group], group[0].data, 1).result()
        finally:
            executor.shutdown()
    rate = sum(t.cost for t in group) / sum(state.seconds for state in states)
    work = statistics.mean(t.cost * t.state.total / t.state.per_epoch for t in trials)
    return {
        "study": spec.name,
        "stages": [{"name": stage.name, "trials": stage.trials} for stage in stages],
        "first": [proposal.params for proposal in proposals[:FIRST_POINTS]],
        "workers": count(),
        "seconds": work * sum(stage.trials for stage in stages) / rate / count(),
    }


def request(study: str, what: str, settings: Settings) -> str:
    """Ask the runner of a study to "stop" or "cancel"; says what will happen. Raises UnknownStudy."""
    record = open_study(study, settings)
    if not is_owned(record):
        if record.attr("state") == "queued":
            with owned(record):
                record.set_attr("state", "stopped")
            return f"study '{study}' does not wait for `sieve serve` any more"
        return f"study '{study}' is not running"
    record.set_attr("request", {"what": what, "launch": record.attr("launch")})
    return f"asked the runner of study '{study}' to {what}; it does within {REQUEST_SECONDS + STOP_SECONDS:.0f} seconds"
