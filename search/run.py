"""A study from its file to its outcome: launch, what a dry run would do, and requests to a running one."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from core.data import Dataset, Split, write_whole
from core.train import TrainConfig, advance
from search import COMMAND, outbox, plan
from search.datasets import open_dataset
from search.errors import (
    Interrupted,
    SieveError,
    StudyBusy,
    StudyFailed,
    StudyFileError,
    StudyGone,
    StudyTaken,
    StudyUnreadable,
    UnknownStudy,
    in_one_line,
)
from search.executor import open_executor
from search.outbox import Counts, Outbox, Record
from search.outcome import Outcome, best_first, conclude, open_study, study_note, summary
from search.plan import Params, Proposal
from search.recover import recover
from search.runner import REQUEST_SECONDS, STOP_SECONDS, Runner, Status, Trial, groups, is_asked, prepare
from search.samplers import asker, check_packages
from search.settings import Settings, redact, sqlite_path
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
    stored_states,
)
from search.study import StudySpec, narrowed

PUBLISHER_SECONDS = 20.0  # without getting on, before the rest is left to `sieve sync`
END_SECONDS = 5.0  # that it may take to end when it is told to
HURRY_SECONDS = 1.0  # all that it gets when the study was stopped
FIRST_POINTS = 5  # shown by a dry run
GROUP = 16  # trials of its timed slice, at the most ...
TIMED_WORK = 5e10  # ... and floating-point operations: some seconds
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
    concluded: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome:
    """Run a study to its end, from its beginning or from where it was left.

    `show` gets the status about twice a second; `started` gets the runner, to stop it from a
    signal handler; `warn` gets what a person should know; `concluded` gets the outcome before the rest of it is sent
    to MLflow, which may take its time: `unsent` is how much that is. Without `publish`, all for MLflow stays in
    the outbox. `report` makes the page that goes with the study's summary; if it fails, the study does not.
    Raises StudyConflict, StudyBusy, DataError, StudyFileError when the method needs a package that is not here or
    the space another study; Interrupted if it was stopped; StudyFailed without any result.
    """
    check_packages(spec.search.method, f"study '{spec.name}'")
    settings.make_home()
    spec = resolved(spec, settings)
    datasets = open_datasets(spec, settings, warn)
    digests = {stage: data.digest for stage, data in datasets.items()}
    with (
        Outbox(settings.outbox) as box,
        registered(settings.storage, spec, digests, PATIENCE, lambda found: identify(found, box, settings)) as record,
    ):
        record.warn = warn
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
            except (StudyBusy, StudyGone, StudyTaken):  # nothing of it is ours to write any more
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
            concluded(replace(outcome, unsent=box.unsent(record.id) if publish else 0))
        runner.write_notes()
        record.note(study_note(spec, outcome.stages, box.links(record.id).get(record.id), settings, outcome))
        sent = box.counts().get(record.id, Counts())
        return replace(outcome, unsent=sent.unsent, refused=sent.refused)


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
    try:
        storage = open_storage(settings.storage)
        names = list(stored_states(storage))
    except SieveError as error:
        warn(f"warning: the journal was not compared with the storage: {error}")
        return
    with Outbox(settings.outbox) as box:
        keep_home(box, settings)
        for name in names:
            try:
                record = StudyRecord(storage, name)
                if not record.attr("id") or is_owned(record) or not recover(record, box, settings, time.time):
                    continue
                if record.attr("state") == "done" and not box.records(record.id, "study_ended"):
                    box.put([_ended(record, conclude(record), None, time.time())])
            except UnknownStudy:  # deleted meanwhile
                continue
            except SieveError as error:
                warn(f"warning: study '{name}' was not compared with the journal: {error}")


def keep_home(box: Outbox, settings: Settings) -> None:
    """This home stays the same one when its journal is lost: its id, and where it lies, are written beside it too."""
    path, here = settings.home / "home.id", str(settings.home.resolve())
    known, _, place = (path.read_text() if path.exists() else "").partition("\n")
    if known and place == here and not box.counts():
        box.adopt(known)
    elif (known, place) != (box.home, here):
        write_whole(path, f"{box.home}\n{here}".encode())


def identify(record: StudyRecord, box: Outbox, settings: Settings) -> dict[str, str]:
    """Give what this home holds of a study the study's id, where an older version or the home's original gave another.

    A study that lies in the home itself and was copied with it is another one from now on: both may be trained.
    Gives the digest of each stage's data, of a study of an older version, which kept them in the journal alone.
    """
    keep_home(box, settings)
    inside = settings.storage.startswith("sqlite:///") and sqlite_path(settings.storage).is_relative_to(settings.home)
    if inside and box.was(record.attr("home") or ""):
        embedded = not settings.tracking_uri.startswith("http")
        own = hashlib.blake2b(f"{record.id} {box.home}".encode(), digest_size=8).hexdigest()  # again, after a crash
        box.fork(record.id, own, keep_links=embedded)
        record.become(own, box.home)
    if not record.attr("formerly"):
        return {}
    before, folder = settings.checkpoints / record.name, settings.checkpoints / record.id
    if before.exists():
        folder.mkdir(exist_ok=True)
        for path in before.iterdir():
            if not (folder / path.name).exists():  # else an older version ran it again in between
                path.rename(folder / path.name)
        shutil.rmtree(before)
    box.rename(record.name, record.id)
    return box.digests(record.id)


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
        _end(publisher)


def _end(publisher: subprocess.Popen[bytes]) -> None:
    """Let it end what it is sending; one that does not end is killed, which does no harm either."""
    for end in (publisher.terminate, publisher.kill):
        end()
        with suppress(subprocess.TimeoutExpired):
            publisher.wait(END_SECONDS)
            return


def resolved(spec: StudySpec, settings: Settings) -> StudySpec:
    """The study with absolute paths, and its space narrowed by the study it names, if any.

    To be called before the study is registered, so that what runs is written down before it runs. Raises
    StudyFileError if that other study is not finished.
    """
    spec = spec.located()
    if (source := spec.space_from) is None or _is_registered(spec, settings):
        return spec
    with suppress(UnknownStudy):
        other = open_study(source.study, settings)
        if other.attrs.get("state") == "done":
            settled = finished_attempts(other.attempts()).values()  # those that diverged count among the worst
            best = best_first(other.spec, settled)[: math.ceil(source.top * len(settled))]
            return narrowed(spec, [a.params for a in best])
    text = f"'{source.study}' is not finished in {redact(settings.storage)}; launch it first"
    raise StudyFileError([f"study '{spec.name}': space_from.study: {text}"])


def _is_registered(spec: StudySpec, settings: Settings) -> bool:
    """Whether this is the very specification that is stored: it was narrowed when it was."""
    with suppress(UnknownStudy, StudyUnreadable):
        return open_study(spec.name, settings).spec == spec
    return False


def dry_run(
    spec: StudySpec,
    settings: Settings,
    *,
    workers: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """What `launch` would do, and about how long, from one timed slice; nothing is written at home.

    The time is that of training every trial to its end: a pruner, patience and trials that diverge make it less.
    `say` gets what is being done. Raises DataError, StudyFileError, WorkersLost; StudyFailed if nothing can be timed.
    """
    spec = resolved(spec, settings)
    check_packages(spec.search.method, f"study '{spec.name}'")
    distributions = {name: distribution(d) for name, d in spec.dimensions.items()}
    ask = asker(spec.search.method, distributions, spec.seed) if is_asked(spec) else None
    say("planning the first trials ...")
    proposals = plan.propose(spec, [], ask)
    sample = proposals[:: math.ceil(len(proposals) / GROUP)]  # all over the space
    with tempfile.TemporaryDirectory() as folder:
        aside = replace(settings, home=Path(folder), data_dir=settings.data_dir or settings.data_cache)
        say("opening the data ...")
        datasets = open_datasets(spec, aside, say)
        rate, count = _rate(spec, next(iter(datasets.values())), sample, workers, say)
    table = list[dict[str, Any]]()
    for stage in plan.stages(spec):
        work = stage.trials * _work(spec, stage.overrides, datasets[stage.name], [p.params for p in sample])
        table.append({"name": stage.name, "trials": stage.trials, "seconds": work / rate / min(count, stage.trials)})
    limit = math.inf if spec.limits.minutes is None else 60 * spec.limits.minutes
    return {
        "study": spec.name,
        "stages": table,
        "first": [proposal.params for proposal in proposals[:FIRST_POINTS]],
        "workers": count,
        "seconds": min(sum(row["seconds"] for row in table), limit),
    }


def _work(spec: StudySpec, overrides: dict[str, Any], data: Dataset, points: Sequence[Params]) -> float:
    """Floating-point operations of a trial that is trained like this, on the mean over these points."""
    examples, inputs = data.train.x.shape
    each = []
    for params in points:
        with suppress(ValueError):  # one that cannot be trained takes no time
            config = spec.config(params, **overrides)
            epochs = config.epochs or (config.updates or 0) / math.ceil(examples / config.batch_size)
            each.append(config.cost(inputs, len(data.classes)) * examples * epochs)
    return statistics.fmean(each) if each else 0.0


def _rate(
    spec: StudySpec, data: Dataset, sample: Sequence[Proposal], workers: int | None, say: Callable[[str], None]
) -> tuple[float, int]:
    """Floating-point operations per second of one worker, from a slice that is timed there; and how many workers."""
    problem, configs = "", list[TrainConfig]()
    for proposal in sample:
        try:
            configs.append(spec.config(proposal.params, **proposal.overrides))
        except ValueError as error:
            problem = str(error)
    each = sum(config.cost(data.train.x.shape[1], len(data.classes)) for config in configs)
    least = max((config.batch_size for config in configs), default=1)
    few = _first(data, max(least, math.ceil(TIMED_WORK / max(each, 1))))
    trials = list[Trial]()
    for proposal in sample:
        try:
            trials.append(prepare(spec, few, proposal))
        except StudyFailed as error:
            problem = str(error)
    if not trials:
        raise StudyFailed(f"study '{spec.name}': none of its first trials can be trained: {problem}")
    group = groups(trials, 1)[0]
    say(f"timing one slice of {len(group)} trials ...")
    executor, count = open_executor("local", workers)
    try:
        states, _ = executor.submit(advance, [t.state for t in group], few, 1).result()
    except SieveError:
        raise
    except Exception as error:
        raise StudyFailed(f"study '{spec.name}': the slice that was to be timed failed: {in_one_line(error)}") from None
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
    return sum(t.cost for t in group) / max(sum(state.seconds for state in states), 1e-6), count()


def _first(data: Dataset, examples: int) -> Dataset:
    """So many examples to train on, and of the others in proportion."""
    share = min(1.0, examples / len(data.train))
    if share == 1.0:
        return data
    parts = [Split(of.x[: (n := math.ceil(share * len(of)))], of.y[:n]) for of in (data.train, data.validation)]
    return replace(data, train=parts[0], validation=parts[1], test=None, reference=None)


def request(study: str, what: str, settings: Settings) -> str:
    """Ask the runner of a study to "stop" or "cancel"; says what will happen. Raises UnknownStudy, StudyUnreadable."""
    record = open_study(study, settings)
    _ = record.spec  # it is one of ours
    launch = record.attr("launch")  # before it is looked whether it runs: a later launch is not meant
    if not is_owned(record):
        if record.attr("state") == "queued":
            with owned(record):
                if record.attr("state") == "queued":  # else a service was faster
                    record.set_attr("state", "stopped")
                    return f"study '{study}' does not wait for `sieve serve` any more"
        return f"study '{study}' is not running"
    record.set_attr("request", {"what": what, "launch": launch})
    return f"asked the runner of study '{study}' to {what}; it does within {REQUEST_SECONDS + STOP_SECONDS:.0f} seconds"
