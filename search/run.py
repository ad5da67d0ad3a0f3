"""The one loop: register, propose, pack, submit, record, prune, tell, resume.

What will run is written down before it runs, and a slice that came back is durable (outbox, then
checkpoint, then storage) before the next one starts. So at any moment the process may be killed and
started again: trials found RUNNING are taken up from their checkpoint under the same slot.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import astuple, dataclass, field, replace
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from optuna.pruners import BasePruner
from optuna.trial import TrialState
from threadpoolctl import threadpool_info

from core.data import Dataset
from core.train import Progress, State, TrainConfig, advance, may_share, start
from search import __version__, checkpoint, outbox, plan, prune
from search.datasets import open_dataset
from search.errors import DataError, Interrupted, SieveError, StudyFailed, StudyFileError, UnknownStudy
from search.executor import LOST, Slice, advance_elsewhere, advance_here, open_executor
from search.failpoint import failpoint
from search.outbox import Outbox, Record, artifact_id
from search.plan import WORST, Finished, Params, Proposal, Slot
from search.samplers import asker, check_packages
from search.settings import Settings, redact
from search.storage import (
    PATIENCE,
    Attempt,
    StudyRecord,
    distribution,
    finished_attempts,
    is_empty,
    is_owned,
    open_storage,
    owned,
    register,
    study_names,
)
from search.study import Choice, Halving, Range, Sampler, StudySpec, narrowed
from search.tracking import links, run_link

NOTE_SECONDS = 5.0  # between looking for runs to link to
PUBLISHER_SECONDS = 20.0  # without getting on, before the rest is left to `sieve sync`
HURRY_SECONDS = 1.0  # all that it gets when the study was stopped
REQUEST_SECONDS = 2.0  # how often the storage is asked for a request
STOP_SECONDS = 7.0  # how long running slices may go on after a request to stop
SLICE_SECONDS = 5.0  # what is aimed at: short enough to stop soon, long enough to cost nothing ...
MOST_SLICE_SECONDS = 300.0  # ... and longer only where the way there and back takes more than
WAY_SHARE = 0.1  # of it
FIRST_RATE = 2e9  # floating-point operations per second, until it was measured: low, so that the first slice is short
MOST_COLUMNS = 1600  # first-layer columns of a group
MOST_TOGETHER = 1 << 10  # trials in a slice
FILLED = 16  # idle workers that get new trials before what came back is looked at
MOST_LOSSES = 3  # a slice lost so often is its trial's fault after all
FIRST_POINTS = 5  # shown by a dry run
GROUP = 16  # trials of its timed slice
BEST = 3  # trials whose curves are drawn as a figure
NOTED = 5  # repeated configurations in the study's note
KINDS = ("accuracy", "loss", "cost")


@dataclass
class Trial:
    """A slot that is being trained."""

    slot: Slot
    stage: str
    params: dict[str, Any]
    config: TrainConfig
    attempt: int
    trial_id: int
    number: int
    data: Dataset
    state: State
    progress: Progress = field(default_factory=Progress)  # all so far, but for snapshots
    losses: int = 0  # workers that died in a row while they trained it alone
    company: int = MOST_TOGETHER  # how many may share its slice: halved when that fails, doubled when it does not

    def uid(self, study: str) -> str:
        return f"{study}/{self.slot}/{self.attempt}"

    @property
    def cost(self) -> int:
        """Floating-point operations per epoch."""
        return self.config.cost(self.data.train.x.shape[1], len(self.data.classes)) * len(self.data.train)

    @property
    def columns(self) -> int:
        """Columns of the first layer."""
        return self.config.hidden_sizes[0] if self.config.hidden_sizes else len(self.data.classes)


def prepare(
    spec: StudySpec, data: Dataset, proposal: Proposal, attempt: int = 0, trial_id: int = 0, number: int = 0
) -> Trial:
    """What a slot's parameters mean: the config, and a state before the first update.

    Initial weights come from (study seed, slot), the order of the data from (study seed, repeat).
    Raises StudyFailed if this data, or this machine's memory, does not do for it.
    """
    slot = proposal.slot
    config = spec.config(proposal.params, **proposal.overrides)
    try:
        state = start(config, data, (spec.seed, *astuple(slot)), (spec.seed, slot.repeat))
    except (ValueError, MemoryError) as error:
        raise StudyFailed(f"slot {slot} cannot be trained: {error or 'out of memory'}") from None
    return Trial(slot, proposal.stage, dict(proposal.params), config, attempt, trial_id, number, data, state)


@dataclass(frozen=True)
class Status:
    """Where a study stands, for the command line to show."""

    study: str
    stage: str
    planned: int
    complete: int
    pruned: int
    failed: int
    running: int
    best: float | None
    best_params: dict[str, Any]
    epochs_per_second: float
    seconds_left: float | None


def groups(trials: Iterable[Trial], workers: int) -> list[list[Trial]]:
    """Pack trials that may share their batches into groups of about equal cost.

    A group gets at most MOST_COLUMNS first-layer columns and as many trials as their company allows, and there
    are as many as idle workers if the trials suffice.
    """

    def key(trial: Trial) -> tuple[Any, ...]:
        return trial.company, trial.data.reference or id(trial.data), may_share(trial.state)

    packed: list[list[Trial]] = []
    for _, shared in groupby(sorted(trials, key=lambda t: repr(key(t))), key):
        members = sorted(shared, key=lambda t: -t.cost)
        columns = sum(t.columns for t in members)
        fewest = max(math.ceil(columns / MOST_COLUMNS), math.ceil(len(members) / members[0].company), workers)
        count = min(len(members), fewest)
        bins: list[list[Trial]] = [[] for _ in range(count)]
        for trial in members:  # the costliest first, each into the cheapest group so far
            min(bins, key=lambda group: sum(t.cost for t in group)).append(trial)
        packed += bins
    return packed


def steady_clock() -> Callable[[], float]:
    """Unix seconds that begin now and only ever go on, whatever is done to the machine's clock."""
    began = time.time() - time.monotonic()
    return lambda: began + time.monotonic()


def is_asked(spec: StudySpec) -> bool:
    """Whether one of Optuna's samplers chooses the points."""
    return isinstance(spec.search, Sampler)


def score(spec: StudySpec, attempt: Attempt) -> float:
    """The higher the better; -inf for what diverged or was pruned."""
    if attempt.state != TrialState.COMPLETE or attempt.value is None:
        return WORST
    return attempt.value if spec.maximise else -attempt.value


def results(spec: StudySpec, settled: Iterable[Attempt], failed: Mapping[Slot, Params]) -> list[Finished]:
    """What the plan needs to know."""
    finished = [Finished(a.slot, a.params, score(spec, a)) for a in settled]
    return finished + [Finished(slot, params, WORST) for slot, params in failed.items()]


def best_first(spec: StudySpec, attempts: Iterable[Attempt]) -> list[Attempt]:
    """Those with a result, the best first."""
    return sorted((a for a in attempts if score(spec, a) > WORST), key=lambda a: (-score(spec, a), a.slot))


@dataclass
class Flight:
    """A slice that an executor is working on."""

    trials: list[Trial]
    epochs: int
    since: float


class Runner:
    """The owner of one study while it runs. `stop` may be called from a signal handler."""

    def __init__(
        self,
        spec: StudySpec,
        settings: Settings,
        record: StudyRecord,
        box: Outbox,
        executor: Executor,
        workers: Callable[[], int],
        *,
        retry_failed: bool = False,
        warn: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.spec, self.settings, self.record, self.box = spec, settings, record, box
        self.executor, self.workers, self.warn = executor, workers, warn
        self.clock = clock or steady_clock()
        self.distributions = {name: distribution(d) for name, d in spec.dimensions.items()}
        self.datasets: dict[str, Dataset] = {}
        self.ask = asker(spec.search.method, self.distributions, spec.seed) if is_asked(spec) else None
        self.pruner = prune.optuna_pruner(spec)
        self.rungs = spec.pruner if isinstance(spec.pruner, Halving) and spec.pruner.barrier else None
        self.waiting: list[Trial] = []  # at a rung, for the rest of their stage
        self.at_rung: dict[tuple[int, int], dict[Slot, float]] = {}  # (stage, evaluations) -> scores there
        self.held: dict[Slot, Trial] = {}  # last repeats that wait for the others of their configuration
        self.todo: deque[Proposal] = deque()
        self.ready: list[Trial] = []
        self.flying: dict[Future[Slice], Flight] = {}
        self.stopping: str | None = None  # "stop", "cancel", or "later" for a service that goes down
        self.lonely = False  # no worker was there when work was
        self.limited = False  # a limit keeps slots of the plan from being begun
        self.began = self.asked = self.last_note = self.clock()
        self.rate = FIRST_RATE
        self.way = 0.0  # seconds of a slice, on the mean, that are not its worker's: transport and waiting
        self.epoch_times: deque[tuple[float, float]] = deque(maxlen=20)  # (when, trial epochs) of recent slices
        self.stage = ""

        attempts = record.attempts()
        self.settled: dict[Slot, Attempt] = finished_attempts(attempts)
        self.tries = Counter(a.slot for a in attempts)
        failed = {a.slot for a in attempts if a.state == TrialState.FAIL} - self.settled.keys()
        self.failed: dict[Slot, Params] = (
            {} if retry_failed else {a.slot: a.params for a in attempts if a.slot in failed}
        )
        noted = record.noted()
        uids = {f"{spec.name}/{a.slot}/{a.attempt}": a.trial_id for a in attempts}
        self.unnoted = {uid: trial_id for uid, trial_id in uids.items() if trial_id not in noted}
        self.best = next(iter(best_first(spec, self.settled.values())), None)
        self.states = Counter(a.state for a in self.settled.values())
        self.planned = sum(stage.trials for stage in plan.stages(spec))
        self.proposed_at = -1
        self.stages: list[dict[str, Any]] = []  # as they are in the storage by now
        self.before = len(self.settled) + len(self.failed)  # done by earlier launches
        if self.rungs:
            self._remember_rungs(self.rungs)
        for attempt in attempts:
            if attempt.state == TrialState.RUNNING:
                self._adopt(attempt)
        if retry_failed:
            self.todo.extend(_again(a) for a in {a.slot: a for a in attempts if a.slot in failed}.values())

    # ---- what is to be done

    def stop(self, how: str = "stop") -> None:
        """Start nothing more. "stop" and "later" keep the running trials, "cancel" gives them up.

        After "later" the study waits for the next `sieve serve`.
        """
        self.stopping = how
        self.record.patience = STOP_SECONDS

    def run(self, show: Callable[[Status], None] = lambda status: None) -> None:
        """Until nothing is left to do, or `stop` was called and the running slices are in."""
        self._announce()
        deadline = math.inf
        while True:
            self._read_request()
            if self.stopping:
                deadline = min(deadline, self.clock() + STOP_SECONDS)
            going_on = bool(self.flying) if self.stopping else self._dispatch()
            if not going_on or self.stopping == "cancel" or self.clock() > deadline:
                break
            if not self.flying:
                self._await_workers()
            filling = self.todo and len(self.flying) < self.workers() and not self.stopping
            for future in wait(self.flying, timeout=0 if filling else 0.5, return_when=FIRST_COMPLETED).done:
                self._collect(self.flying.pop(future), future)
            self.write_notes(every=NOTE_SECONDS)
            show(self.status())
        if self.stopping in (None, "cancel"):
            for trial in list(self.held.values()):
                self._settle(trial)
        if self.stopping == "cancel":
            self._give_up()
        show(self.status())

    def _propose(self) -> None:
        """Ask the plan what comes next, when all that it named before is settled: it names no more until then."""
        settled = len(self.settled) + len(self.failed)
        under_way = self.todo or self.ready or (self.proposed_at >= 0 and (self.waiting or self.flying))
        if under_way or settled == self.proposed_at:
            return
        self.proposed_at = settled
        finished = results(self.spec, self.settled.values(), self.failed)
        started = {t.slot: t.params for t in [*self.waiting, *self.held.values()]}
        started |= {t.slot: t.params for flight in self.flying.values() for t in flight.trials}
        known = self.settled.keys() | self.failed.keys() | started.keys()
        self.todo.extend(p for p in plan.propose(self.spec, finished, self.ask, started) if p.slot not in known)
        stages = [
            {"name": stage.name, "trials": stage.trials, "box": box}
            for stage, box in zip(plan.stages(self.spec), plan.boxes(self.spec, finished), strict=True)
        ]
        if stages != self.stages:
            self.stages = stages
            self.record.set_attr("stages", stages)
            words = stages_in_words(self.spec, finished)
            self.record.note(study_note(self.spec, words, self.box.links(self.spec.name), self.settings))

    def _dispatch(self) -> bool:
        """Keep every worker busy with a group of trials; False when nothing is left to do."""
        workers = self.workers()
        idle = workers - len(self.flying)
        if idle <= 0:
            return True
        self._propose()
        self._keep_limits()
        self._leave_rungs()
        self._propose()  # all who waited may have been cut
        packed, failed = groups(self.ready, 1 if self.todo else idle), len(self.failed)
        if self.todo and (free := min(idle - len(packed), FILLED)) > 0:
            packed += groups(self._begin_share(free / workers, free * MOST_COLUMNS), free)
        if len(self.failed) > failed and not packed and not self.flying:
            return self._dispatch()  # all of these have failed at once: what does the plan say to that?
        for trials in packed[:idle]:
            self._submit(trials)
        self.ready = [trial for trials in packed[idle:] for trial in trials]
        return bool(self.flying)

    def _begin_share(self, share: float, columns: int) -> list[Trial]:
        """New trials: this share of what is to be done, or as many as fill so many columns."""
        most = math.ceil(len(self.todo) * share)
        begun: list[Trial] = []
        while len(begun) < most and sum(t.columns for t in begun) < columns and (proposal := self._next()):
            if trial := self._begin(proposal):
                begun.append(trial)
        return begun

    def _next(self) -> Proposal | None:
        """What to begin next."""
        self._keep_limits()
        return self.todo.popleft() if self.todo else None

    def _keep_limits(self) -> None:
        """Begin no further slot once a limit of the study is reached; an attempt at one that was begun may be."""
        limits = self.spec.limits
        if limits.trials is not None and len(self.tries) >= limits.trials:
            reached = f"limits.trials: {limits.trials}"
        elif limits.minutes is not None and self.clock() - self.began > 60 * limits.minutes:
            reached = f"limits.minutes: {limits.minutes:g}"
        else:
            return
        allowed = deque(proposal for proposal in self.todo if proposal.slot in self.tries)
        if len(allowed) < len(self.todo) and not self.limited:
            self.limited = True
            self.warn(f"{reached} is reached, no further trial begins; launch with a higher limit to go on")
        self.todo = allowed

    def _await_workers(self) -> None:
        if not self.lonely:
            self.lonely = True
            self.warn(f"no worker is at {self.settings.executor} now; waiting for one")
        time.sleep(0.5)

    def _submit(self, trials: list[Trial]) -> None:
        seconds = min(max(SLICE_SECONDS, self.way / WAY_SHARE), MOST_SLICE_SECONDS)
        seconds /= 10 ** max(t.losses for t in trials)  # short enough to get through if workers die
        epochs = round(seconds * self.rate / sum(t.cost for t in trials))
        epochs = max(1, min(epochs, *(self._most_epochs(t) for t in trials)))
        states, data = [t.state for t in trials], trials[0].data
        if self.settings.executor == "local":
            future = self.executor.submit(advance_here, states, data, epochs)
        else:
            dataset = self.spec.dataset_of(trials[0].stage).model_dump_json()
            future = self.executor.submit(advance_elsewhere, states, dataset, data.digest, epochs)
        self.lonely = False
        self.flying[future] = Flight(trials, epochs, self.clock())

    def _most_epochs(self, trial: Trial) -> int:
        """How far a slice may go before its trial is compared with others."""
        state, done = trial.state, len(trial.progress.evaluations)
        per_evaluation = (trial.config.eval_every or state.per_epoch) / state.per_epoch
        if self.rungs:
            return max(1, round((prune.next_rung(self.rungs, done) - done) * per_evaluation))
        whole = math.ceil(state.total / state.per_epoch)
        return max(1, whole // prune.SLICES) if self.pruner else whole

    @property
    def done(self) -> bool:
        """Whether `run` came to the end of the plan."""
        left = [*self.flying, *self.ready, *self.waiting, *self.held, *self.todo]
        return not (self.stopping or self.limited or left)

    # ---- a trial's beginning

    def _data(self, stage: str) -> Dataset:
        self.stage = stage
        dataset = self.spec.dataset_of(stage).model_dump_json()
        if dataset not in self.datasets:
            self.datasets[dataset], notes = open_dataset(self.spec.dataset_of(stage), self.settings)
            for note in notes:
                self.warn(f"warning: {note}")
        return self.datasets[dataset]

    def _prepare(self, proposal: Proposal, attempt: int, trial_id: int, number: int) -> Trial | None:
        """What the slot's parameters mean: config, data, and a state before the first update. None if it has failed."""
        try:
            return prepare(self.spec, self._data(proposal.stage), proposal, attempt, trial_id, number)
        except StudyFailed as error:
            self.record.finish(trial_id, TrialState.FAIL, None, {"reason": str(error)})
            self.failed[proposal.slot] = proposal.params
            return None

    def _begin(self, proposal: Proposal) -> Trial | None:
        self._data(proposal.stage)  # without it, nothing is written
        self.tries[proposal.slot] += 1
        attempt = self.tries[proposal.slot]
        trial_id, number = self.record.begin(proposal, attempt, self.distributions)
        failpoint("begun")
        trial = self._prepare(proposal, attempt, trial_id, number)
        if trial is None:
            return None
        self.box.put([self._trial_begun(trial)])
        self.unnoted[trial.uid(self.spec.name)] = trial_id
        return trial

    def _adopt(self, attempt: Attempt) -> None:
        """Take up a trial that was running when its runner died."""
        trial = self._prepare(_again(attempt), attempt.attempt, attempt.trial_id, attempt.number)
        if trial is None:
            return
        with suppress(OSError, ValueError):  # it may have died before its first slice was in
            trial.state, trial.progress = checkpoint.load(self._checkpoint(trial))
        self.box.put([self._trial_begun(trial)])
        self.record.add_curves({trial.trial_id: self._curve(trial.progress)})  # it may have died before this
        if trial.state.finished:
            self.box.put([self._ended(trial)])
        self._go_on(trial)

    def _remember_rungs(self, rungs: Halving) -> None:
        """The scores at rungs of trials that are settled: the others are measured against them."""
        sign = 1 if self.spec.maximise else -1
        for slot, attempt in self.settled.items():
            if attempt.attrs["stage"] == "confirm":
                continue
            curve = self.record.curve(attempt.trial_id)
            self._note_rungs(rungs, slot, [sign * curve[step] for step in sorted(curve)])

    def _note_rungs(self, rungs: Halving, slot: Slot, scores: list[float]) -> None:
        rung = prune.next_rung(rungs, 0)
        while rung <= len(scores):
            self.at_rung.setdefault((slot.stage, rung), {})[slot] = scores[rung - 1]
            rung = prune.next_rung(rungs, rung)

    # ---- a slice's end

    def _collect(self, flight: Flight, future: Future[Slice]) -> None:
        trials = flight.trials
        try:
            states, progress, seconds = future.result()
        except DataError:  # of this machine's copy, not of the trial: nothing is settled
            raise
        except LOST as error:
            died = isinstance(error, BrokenExecutor)  # else the engine lost all its work, whoever's it was
            if died:
                self._part(trials)
            trials[0].losses += died and len(trials) == 1
            if trials[0].losses >= MOST_LOSSES:
                self._fail(trials[0], f"its worker died {MOST_LOSSES} times: {error or type(error).__name__}")
            else:
                self.ready += trials
        except Exception as error:
            if len(trials) > 1:
                self._part(trials)
                self.ready += trials
            else:
                self._fail(trials[0], "".join(traceback.format_exception(error)))
        else:
            self._record(flight, states, progress, seconds)

    def _part(self, trials: list[Trial]) -> None:
        """Find out whose fault it is: half of them at a time."""
        for trial in trials:
            trial.company = max(1, len(trials) // 2)

    def _record(self, flight: Flight, states: list[State], progress: list[Progress], seconds: float) -> None:
        """Make a slice durable: what is to be shown, then the state to go on from, then the storage."""
        now = self.clock()
        records: list[Record] = []
        curves: dict[int, list[tuple[int, float]]] = {}
        work = 0.0
        for trial, state, part in zip(flight.trials, states, progress, strict=True):
            epochs = (state.update - trial.state.update) / state.per_epoch
            work += trial.cost * epochs
            self.epoch_times.append((now, epochs))
            trial.state, trial.losses = state, 0
            trial.company = min(2 * trial.company, MOST_TOGETHER)
            trial.progress.evaluations += part.evaluations
            trial.progress.test, trial.progress.confusion = part.test, part.confusion
            records += self._shown(trial, part, flight.since, now)
            curves[trial.trial_id] = self._curve(part)
        speed = work / max(seconds, 1e-3)
        self.rate = speed if self.rate == FIRST_RATE else 0.5 * (self.rate + speed)
        self.way += 0.1 * (now - flight.since - seconds - self.way)
        self.box.put(records)
        failpoint("recorded")
        for trial in flight.trials:
            checkpoint.save(self._checkpoint(trial), trial.state, trial.progress)
        failpoint("saved")
        self.record.add_curves(curves)
        failpoint("curves")
        for trial in flight.trials:
            self._go_on(trial)

    def _go_on(self, trial: Trial) -> None:
        """After a slice: settle the trial, cut it, let it wait at a rung, or make it ready for the next slice."""
        done, judged = len(trial.progress.evaluations), trial.stage != "confirm"
        if self.rungs and judged:
            values = [self.spec.score([e]) for e in trial.progress.evaluations]
            self._note_rungs(self.rungs, trial.slot, values)
        if trial.state.finished:
            self._finish(trial)
        elif self.pruner and judged and self._is_worse(self.pruner, trial):
            self._cut(trial, f"pruned by {self.spec.pruner.method if self.spec.pruner else ''}")
        elif done in {evaluations for stage, evaluations in self.at_rung if stage == trial.slot.stage}:
            self.waiting.append(trial)
        else:
            self.ready.append(trial)

    def _is_worse(self, pruner: BasePruner, trial: Trial) -> bool:
        return self.record.retrying(prune.is_worse, pruner, self.record.storage, self.spec.name, trial.trial_id)

    def _leave_rungs(self) -> None:
        """Let the best of a stage go on once all of it is settled, or waits at this rung or a later one."""
        if not self.waiting or not self.rungs or self.todo or self.ready or self.flying:
            return
        rung = min(len(trial.progress.evaluations) for trial in self.waiting)
        here = [trial for trial in self.waiting if len(trial.progress.evaluations) == rung]
        self.waiting = [trial for trial in self.waiting if trial not in here]
        for trial in here:
            if trial.slot in prune.survivors(self.at_rung[trial.slot.stage, rung], self.rungs.reduction):
                self.ready.append(trial)
            else:
                self._cut(trial, "pruned at a rung")

    def _cut(self, trial: Trial, why: str) -> None:
        """Settle a trial that others have left behind. Its checkpoint says so first: this may be cut short as well."""
        trial.state.finished = True
        trial.state.diverged = f"{why} after {len(trial.progress.evaluations)} evaluations"
        checkpoint.save(self._checkpoint(trial), trial.state, trial.progress)
        self.box.put([self._ended(trial)])
        self._finish(trial)

    def _finish(self, trial: Trial) -> None:
        """Settle a trial that trained to its end, diverged on the way, or was cut.

        The last repeat of a configuration waits for the others: what is told cannot be changed any more, and its
        row is to show the mean and deviation over all of them.
        """
        if self._is_early(trial.slot):
            self.held[trial.slot] = trial
        else:
            self._settle(trial)

    def _is_early(self, slot: Slot) -> bool:
        """Whether this is the last repeat of a configuration of which others are still to be settled."""
        *others, last = plan.siblings(self.spec, slot)
        return slot == last and not all(other in self.settled or other in self.failed for other in others)

    def _settle_last(self, slot: Slot) -> None:
        """Settle the last repeat of this slot's configuration if it waited for this slot."""
        last = self.held.get(plan.siblings(self.spec, slot)[-1])
        if last and not self._is_early(last.slot):
            self._settle(last)

    def _settle(self, trial: Trial) -> None:
        self.held.pop(trial.slot, None)
        value = self.spec.value(trial.progress.evaluations)
        diverged = trial.state.diverged or (None if math.isfinite(value) else "there is no finite value")
        state = TrialState.PRUNED if diverged else TrialState.COMPLETE
        attrs: dict[str, Any] = dict(self._results(trial))
        attrs |= {"reason": diverged} if diverged else self._over_repeats(trial.slot, value)
        image = artifact_id(trial.uid(self.spec.name))
        self.record.finish(trial.trial_id, state, None if diverged else value, attrs, image)
        failpoint("told")
        settled = Attempt(trial.slot, trial.number, trial.trial_id, trial.attempt, trial.params, state, value, attrs)
        self.settled[trial.slot] = settled
        self.states[state] += 1
        if score(self.spec, settled) > (score(self.spec, self.best) if self.best else WORST):
            self.best = settled
        checkpoint.remove(self._checkpoint(trial))
        self._settle_last(trial.slot)

    def _over_repeats(self, slot: Slot, value: float) -> dict[str, float]:
        """Mean and deviation over all repeats of a configuration, for the row of the last; nothing for the others."""
        *others, last = plan.siblings(self.spec, slot)
        told = [self.settled[other] for other in others if other in self.settled]
        values = [value, *(a.value for a in told if a.state == TrialState.COMPLETE and a.value is not None)]
        if slot != last or not others or len(values) <= len(others):
            return {}
        return {"mean": statistics.fmean(values), "deviation": statistics.stdev(values)}

    def _fail(self, trial: Trial, reason: str, state: TrialState = TrialState.FAIL) -> None:
        """Settle a trial that could not be trained; `sieve retry` makes another attempt at its slot."""
        status = "FAILED" if state == TrialState.FAIL else "KILLED"
        ended = outbox.trial_ended(
            self.spec.name, trial.uid(self.spec.name), self.clock(), status, reason, self._results(trial)
        )
        self.box.put([ended])
        self.record.finish(trial.trial_id, TrialState.FAIL, None, {"reason": reason[-2000:]})
        self.failed[trial.slot] = trial.params
        self.unnoted[trial.uid(self.spec.name)] = trial.trial_id
        checkpoint.remove(self._checkpoint(trial))
        self._settle_last(trial.slot)

    def _give_up(self) -> None:
        flying = [trial for flight in self.flying.values() for trial in flight.trials]
        for trial in [*self.ready, *self.waiting, *flying]:
            self._fail(trial, "cancelled by the user")
        self.ready, self.waiting, self.flying = [], [], {}

    def _checkpoint(self, trial: Trial) -> Path:
        return self.settings.checkpoints / self.spec.name / f"{trial.slot}.{trial.attempt}.npz"

    # ---- what is shown

    def _curve(self, progress: Progress) -> list[tuple[int, float]]:
        """The metric of the study at each step."""
        return [(e.step, self.spec.value([e])) for e in progress.evaluations]

    def _results(self, trial: Trial) -> dict[str, float]:
        evaluations, test = trial.progress.evaluations, trial.progress.test
        results: dict[str, float] = {"seconds": round(trial.state.seconds, 3)}
        if evaluations:
            last = evaluations[-1].metrics
            results |= {f"{part}_{kind}": last[f"{kind}/{part}"] for part in ("train", "val") for kind in KINDS}
            results["best_val_accuracy"] = max(e.metrics["accuracy/val"] for e in evaluations)
            results["epochs"] = evaluations[-1].epoch
        if test is not None:
            results |= {f"test_{kind}": value for kind, value in test.items()}
        return {name: value for name, value in results.items() if math.isfinite(value)}

    def _announce(self) -> None:
        kinds = {
            name: "choice" if isinstance(d, Choice) else "log" if d.log else "linear"
            for name, d in self.spec.dimensions.items()
        }
        begun = outbox.study_begun(
            self.spec.name,
            json.loads(self.spec.to_json()),
            {"version": __version__} | {f"version.{name}": version for name, version in versions().items()},
            self.clock(),
            dimensions=kinds,
            optuna_study_id=self.record.study_id,
        )
        self.box.put([begun])
        self.record.set_attr("versions", versions())
        if note := prune.note(self.spec):
            self.record.set_attr("pruning", note)

    def _trial_begun(self, trial: Trial) -> Record:
        tags = {
            "stage": trial.stage,
            "slot": str(trial.slot),
            "repeat": str(trial.slot.repeat),
            "attempt": str(trial.attempt),
            "dataset": trial.data.name,
            "dataset_digest": trial.data.digest,
            "version": __version__,
            "configuration": f"{trial.slot.stage}.{trial.slot.index}",
        }
        params = trial.config.to_params() | trial.params
        return outbox.trial_begun(
            self.spec.name,
            trial.uid(self.spec.name),
            outbox.run_name(trial.params),
            params,
            tags,
            self.clock(),
            {"study_id": self.record.study_id, "number": trial.number},
        )

    def _shown(self, trial: Trial, part: Progress, since: float, now: float) -> list[Record]:
        """The records of one slice of a trial. Its points are spread evenly over the time it took."""
        study, uid, data = self.spec.name, trial.uid(self.spec.name), trial.data
        between = (now - since) / max(1, len(part.evaluations))
        points = [(e.step, since + between * (i + 1), e.metrics) for i, e in enumerate(part.evaluations)]
        records = [outbox.trial_progress(study, uid, trial.state.update, now, points)] if points else []
        classes = None if trial.config.hidden_sizes else data.classes
        records += [
            outbox.trial_weights(study, uid, step, now, step, weights, data.image_shape, data.mean, data.scale, classes)
            for step, weights in part.snapshots
        ]
        if trial.state.finished:
            records.append(self._ended(trial))
        return records

    def _ended(self, trial: Trial) -> Record:
        reason = trial.state.diverged
        return outbox.trial_ended(
            self.spec.name,
            trial.uid(self.spec.name),
            self.clock(),
            "KILLED" if reason else "FINISHED",
            reason,
            self._results(trial),
            trial.progress.confusion,
            trial.state.weights,
            classes=trial.data.classes,
        )

    # ---- how it stands

    def status(self) -> Status:
        flying = [trial for flight in self.flying.values() for trial in flight.trials]
        done = len(self.settled) + len(self.failed)
        fresh = done - self.before
        elapsed = self.clock() - self.began
        full = len(self.epoch_times) == self.epoch_times.maxlen
        window = self.clock() - self.epoch_times[0][0] if full else elapsed
        return Status(
            study=self.spec.name,
            stage=self.stage,
            planned=self.planned,
            complete=self.states[TrialState.COMPLETE],
            pruned=self.states[TrialState.PRUNED],
            failed=len(self.failed),
            running=len(flying) + len(self.ready) + len(self.waiting) + len(self.held),
            best=self.best.value if self.best else None,
            best_params=self.best.params if self.best else {},
            epochs_per_second=sum(epochs for _, epochs in self.epoch_times) / max(window, 1e-3),
            seconds_left=elapsed / fresh * (self.planned - done) if fresh else None,
        )

    def write_notes(self, every: float = 0.0) -> None:
        """Give each trial that has an MLflow run by now its note in the dashboard; at most every so many seconds."""
        if not self.unnoted or self.clock() - self.last_note < every:
            return
        self.last_note = self.clock()
        shown = self.box.links(self.spec.name)
        for uid in sorted(self.unnoted.keys() & shown.keys()):
            trial_id = self.unnoted.pop(uid)
            _, slot, attempt = uid.rsplit("/", 2)
            address = run_link(self.settings, *shown[uid])
            note = f"Slot **{slot}**, attempt {attempt}: [curves, images and weights in MLflow]({address})\n\n"
            if Slot.parse(slot) in self.failed:
                note += "It failed; its user attribute `reason` says why.\n"
            else:
                note += f"![first layer](/artifacts/{self.record.study_id}/{trial_id}/{artifact_id(uid)})\n"
            self.record.note(note, trial_id)

    def _read_request(self) -> None:
        """What `sieve stop` or `sieve cancel`, in another process, asked for."""
        if self.clock() - self.asked < REQUEST_SECONDS:
            return
        self.asked = self.clock()
        request = self.record.attrs.get("request")
        if request in ("stop", "cancel"):
            self.record.set_attr("request", None)
            self.stop(request)


def _again(attempt: Attempt) -> Proposal:
    """The proposal that a stored attempt came from."""
    return Proposal(attempt.slot, attempt.params, attempt.attrs["stage"], attempt.attrs["overrides"])


# ---- a study from the outside


@dataclass(frozen=True)
class Outcome:
    """How a study ended."""

    study: str
    metric: str
    chosen: plan.Chosen  # its mean and deviation are in the unit of the metric
    test_accuracy: tuple[float, float | None] | None  # mean and deviation over the chosen configuration's trials
    repeated: list[plan.Result]  # configurations with several runs, best mean first, in the unit of the metric
    border: list[str]  # where the best point lies on the border of the space
    stages: list[dict[str, Any]]  # each with its name, its trials, and in words the side of its box for each parameter
    table: list[Attempt]  # the best trials, best first
    failed: int
    unsent: int  # tracking records that did not reach MLflow yet


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
    with owned(settings.storage, spec.name) as still_owned, Outbox(settings.outbox) as box:
        spec = resolved(spec, settings)
        record = register(open_storage(settings.storage), spec, still_owned, PATIENCE)
        record.warn = warn
        runner: Runner | None = None
        with (
            publishing(box, spec.name, settings, lambda: bool(runner and runner.stopping))
            if publish
            else nullcontext(),
            closing_workers(settings, workers) as (executor, count),
        ):
            record.set_attr("state", "running")
            runner = Runner(spec, settings, record, box, executor, count, retry_failed=retry_failed, warn=warn)
            started(runner)
            try:
                runner.run(show)
            finally:
                left = "queued" if runner.stopping == "later" else "stopped"
                record.set_attr("state", "done" if runner.done else left)
            if runner.stopping:
                raise Interrupted(f"study '{spec.name}' was stopped; `sieve launch` with its file goes on from here")
            outcome = conclude(record)
            record.set_attr("chosen", outcome.chosen.params)
            page = _page(report, record, settings, warn) if report else None
            box.put([_ended(outcome, page)])
        runner.write_notes()
        record.note(study_note(spec, outcome.stages, box.links(spec.name), settings, outcome))
        return replace(outcome, unsent=box.unsent(spec.name))


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


def _ended(outcome: Outcome, page: bytes | None) -> Record:
    """What MLflow is to show of a study's end: the summary run, and means and deviations on repeated runs."""
    uids = {a.slot: f"{outcome.study}/{a.slot}/{a.attempt}" for a in outcome.table}
    repeated = {
        uids[slot]: {"mean": result.mean, "deviation": result.deviation or 0.0}
        for result in outcome.repeated
        for slot in result.slots
    }
    best = [uids[a.slot] for a in outcome.table[:BEST]]
    return outbox.study_ended(outcome.study, time.time(), summary(outcome), page, best=best, repeated=repeated)


def study_note(
    spec: StudySpec,
    stages: Iterable[Mapping[str, Any]],
    shown: Mapping[str, tuple[str, str]],
    settings: Settings,
    outcome: Outcome | None = None,
) -> str:
    """Markdown for the study's page in the Optuna dashboard: result, links into MLflow, repeats, stages, the spec.

    shown: uid -> (experiment id, run id) of what is in MLflow by now. outcome: None while the study runs.
    """

    def spread(mean: float, deviation: float | None) -> str:
        return f"{mean:.4f}" if deviation is None else f"{mean:.4f} ± {deviation:.4f}"

    parts = [spec.description]
    if outcome:
        chosen = outcome.chosen
        runs = "1 run" if chosen.n == 1 else f"{chosen.n} runs"
        figures = f"**{spec.metric} {spread(chosen.mean, chosen.deviation)}** ({runs})"
        parts.append(f"{figures}: {outbox.run_name(chosen.params)}")
        if outcome.test_accuracy:
            parts.append(f"test_accuracy {spread(*outcome.test_accuracy)}, not used to choose")
        parts += outcome.border
    if spec.name in shown:
        experiment, run = shown[spec.name]
        address = links(settings, experiment)
        parts.append(
            f"In MLflow: [charts]({address['charts']}) · [table]({address['table']}) · "
            f"[report and summary]({run_link(settings, experiment, run)})"
        )
    if outcome:
        parts.append(
            outbox.markdown(
                {"configuration": outbox.run_name(r.params), "runs": r.n, spec.metric: spread(r.mean, r.deviation)}
                for r in outcome.repeated[:NOTED]
            )
        )
    parts.append(f"{spec.search.method} on {spec.dataset.name}, seed {spec.seed}")
    parts.append(prune.note(spec))
    parts.append(outbox.markdown(stages))
    parts.append(f"```json\n{json.dumps(json.loads(spec.to_json()), indent=1)}\n```")
    return "\n\n".join(part for part in parts if part)


def versions() -> dict[str, str]:
    """Exactly what is at work here: Sieve, Python, the libraries, and NumPy's BLAS with its kernel."""
    blas = [library for library in threadpool_info() if library["user_api"] == "blas"]
    found = {"sieve": __version__, "python": platform.python_version()}
    found |= {name: metadata.version(name) for name in ("numpy", "optuna", "mlflow")}
    found["BLAS"] = " and ".join(
        f"{b['internal_api']} {b['version']} with kernel {b.get('architecture', '?')}" for b in blas
    )
    return found


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
    command = [sys.executable, "-c", "from search.cli import app; app()", "sync", "--follow", str(os.getpid())]
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


def conclude(record: StudyRecord) -> Outcome:
    """What the study says so far. Raises StudyFailed if no trial has a result."""
    spec, attempts = record.spec, record.attempts()
    settled = finished_attempts(attempts)
    failed = {a.slot: a.params for a in attempts if a.state == TrialState.FAIL and a.slot not in settled}
    finished = results(spec, settled.values(), failed)
    chosen = plan.choose(spec, finished)
    if chosen is None:
        reasons = sorted(
            {str(a.attrs.get("reason", "")).strip().splitlines()[-1:][0] for a in attempts if a.attrs.get("reason")}
        )
        raise StudyFailed(f"study '{spec.name}': none of {len(attempts)} trials has a result: {'; '.join(reasons[:3])}")
    tests = [settled[slot].attrs["test_accuracy"] for slot in chosen.slots if "test_accuracy" in settled[slot].attrs]
    sign = 1 if spec.maximise else -1
    by_slot = sorted(finished, key=lambda f: f.slot)
    configurations = plan.ranked(plan.results(by_slot, lambda f: f"{f.slot.stage}.{f.slot.index}"))
    return Outcome(
        study=spec.name,
        metric=spec.metric,
        chosen=replace(chosen, mean=sign * chosen.mean),
        repeated=[replace(result, mean=sign * result.mean) for result in configurations if result.n > 1],
        test_accuracy=(statistics.mean(tests), statistics.stdev(tests) if len(tests) > 1 else None) if tests else None,
        border=plan.border(spec, finished),
        stages=stages_in_words(spec, finished),
        table=best_first(spec, settled.values()),
        failed=len(failed),
        unsent=0,
    )


def stages_in_words(spec: StudySpec, finished: list[Finished]) -> list[dict[str, Any]]:
    """Each stage with its trials, and for each parameter the side of its box; none before the box is known."""

    def sides(box: plan.Box | None) -> dict[str, str]:
        return {name: side(d, box[name]) if box else "" for name, d in spec.dimensions.items()}

    every = zip(plan.stages(spec), plan.boxes(spec, finished), strict=True)
    return [{"stage": stage.name, "trials": stage.trials} | sides(box) for stage, box in every]


def side(dimension: Range | Choice, ends: Sequence[Any]) -> str:
    """One side of a box in words."""
    if isinstance(dimension, Choice):
        return ", ".join(f"{end:g}" if isinstance(end, float) else str(end) for end in ends)
    return f"{ends[0]:.3g} to {ends[1]:.3g}"


def summary(outcome: Outcome) -> dict[str, Any]:
    """An outcome as plain values, for MLflow and for --json."""
    chosen = outcome.chosen
    mean, deviation = outcome.test_accuracy or (None, None)
    return {
        "study": outcome.study,
        "params": chosen.params,
        "metric": outcome.metric,
        "mean": chosen.mean,
        "deviation": chosen.deviation,
        "n": chosen.n,
        "slots": [str(slot) for slot in chosen.slots],
        "test_accuracy": mean,
        "test_deviation": deviation,
        "border": outcome.border,
        "stages": outcome.stages,
        "failed": outcome.failed,
        "unsent": outcome.unsent,
    }


def stored(study: str, settings: Settings) -> StudyRecord:
    """The record of a study that exists. Raises UnknownStudy, and makes nothing."""
    if is_empty(settings.storage):
        raise UnknownStudy(study)
    return StudyRecord(open_storage(settings.storage), study)


def resolved(spec: StudySpec, settings: Settings) -> StudySpec:
    """The study with its space narrowed by the study it names, if any. Raises StudyFileError if that is not finished.

    To be called before the study is registered, so that its space is written down before it runs.
    """
    if (source := spec.space_from) is None:
        return spec
    with suppress(UnknownStudy):
        other = stored(source.study, settings)
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


def standing(settings: Settings, study: str | None = None) -> list[dict[str, Any]]:
    """How each study (or this one) stands, as rows of plain values. Raises UnknownStudy."""
    if study is not None:
        names = [stored(study, settings).name]
    else:
        names = [] if is_empty(settings.storage) else study_names(open_storage(settings.storage))
    if not names:
        return []
    storage = open_storage(settings.storage)
    with Outbox(settings.outbox) as box:
        return [_standing(StudyRecord(storage, name), box, settings) for name in names]


def _standing(record: StudyRecord, box: Outbox, settings: Settings) -> dict[str, Any]:
    attrs, attempts = record.attrs, record.attempts()
    row: dict[str, Any] = dict.fromkeys(("stage", "best", "waiting"))
    settled = finished_attempts(attempts)
    failed = {a.slot for a in attempts if a.state == TrialState.FAIL} - settled.keys()
    row |= {
        "study": record.name,
        "state": "running" if is_owned(settings.storage, record.name) else attrs.get("state", "-"),
        "complete": sum(a.state == TrialState.COMPLETE for a in settled.values()),
        "pruned": sum(a.state == TrialState.PRUNED for a in settled.values()),
        "running": sum(a.state == TrialState.RUNNING for a in attempts),
        "failed": len(failed),
        "unsent": box.unsent(record.name),
    }
    if "spec" in attrs:
        spec = record.spec
        best = next(iter(best_first(spec, settled.values())), None)
        planned = sum(stage.trials for stage in plan.stages(spec))
        row["best"] = best and round(best.value or 0.0, 6)
        row["stage"] = max(attempts, key=lambda a: a.slot).attrs["stage"] if attempts else None
        row["waiting"] = max(0, planned - len(settled) - len(failed) - row["running"])
        row["planned"] = planned
    return row


def request(study: str, what: str, settings: Settings) -> str:
    """Ask the runner of a study to "stop" or "cancel"; says what will happen. Raises UnknownStudy."""
    record = stored(study, settings)
    if not is_owned(settings.storage, study):
        if record.attrs.get("state") == "queued":
            record.set_attr("state", "stopped")
            return f"study '{study}' does not wait for `sieve serve` any more"
        return f"study '{study}' is not running"
    record.set_attr("request", what)
    return f"asked the runner of study '{study}' to {what}; it does within {REQUEST_SECONDS + STOP_SECONDS:.0f} seconds"


def export(study: str, path: Path, settings: Settings) -> str:
    """Write the chosen configuration's best weights and what prediction needs; says what was written."""
    record = stored(study, settings)
    outcome, spec = conclude(record), record.spec
    slots = set(outcome.chosen.slots)
    attempt = next(a for a in outcome.table if a.slot in slots)
    uid = f"{study}/{attempt.slot}/{attempt.attempt}"
    with Outbox(settings.outbox) as box:
        ended = box.records(uid, "trial_ended")
    if not ended or ended[0].blob is None:
        raise SieveError(f"study '{study}': this machine has no weights of trial {attempt.slot}; export where it ran")
    data, _ = open_dataset(spec.dataset_of(attempt.attrs["stage"]), settings)
    config = spec.config(attempt.params, **attempt.attrs["overrides"])
    about = {
        "study": study,
        "slot": str(attempt.slot),
        "config": config.to_params(),
        "classes": data.classes,
        "dataset": {"name": data.name, "digest": data.digest},
        "predict": "a = (x - mean) * scale; then a = activation(a W1 + b1), ...; classes[argmax(a W_L + b_L)]",
    }
    arrays = outbox.unpack(ended[0].blob) | {"mean": data.mean, "scale": data.scale}
    with path.open("wb") as file:
        np.savez(file, about=np.array(json.dumps(about)), **arrays)  # type: ignore[arg-type]
    return f"wrote {path}: {', '.join(sorted(arrays))} and about (JSON) of trial {attempt.slot}"
