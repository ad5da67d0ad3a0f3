"""The one loop: register, propose, pack, submit, record, prune, tell, resume.

What will run is written down before it runs, and a slice that came back is durable (outbox, then
checkpoint, then storage) before the next one starts. So at any moment the process may be killed and
started again: trials found RUNNING are taken up from their checkpoint under the same slot.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from contextlib import suppress
from dataclasses import astuple, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from optuna.trial import TrialState

from core.data import Dataset
from core.train import Progress, State, TrainConfig, may_share, start
from search import checkpoint, outbox, plan, prune
from search.errors import DataError, StudyFailed, WorkersLost, brief, details, in_one_line, one_line
from search.executor import LOST, Slice, advance_elsewhere, advance_here
from search.failpoint import failpoint
from search.outbox import Outbox, Record, artifact_id
from search.outcome import DIVERGED, best_first, fate, results, score, stages_in_words, study_note, versions, why
from search.plan import WORST, Params, Proposal, Slot
from search.recover import study_begun, trial_begun
from search.samplers import asker
from search.settings import Settings
from search.storage import (
    LEFT,
    Attempt,
    StudyRecord,
    distribution,
    failed_attempts,
    finished_attempts,
)
from search.study import Halving, Sampler, StudySpec
from search.tracking import run_link

NOTE_SECONDS = 5.0  # between looking for runs to link to
REQUEST_SECONDS = 2.0  # how often the storage is asked for a request
STOP_SECONDS = 7.0  # how long running slices may go on after a request to stop
SLICE_SECONDS = 5.0  # what is aimed at: short enough to stop soon, long enough to cost nothing ...
MOST_SLICE_SECONDS = 300.0  # ... and longer only where the way there and back takes more than
WAY_SHARE = 0.1  # of it
FIRST_RATE = 2e9  # floating-point operations per second, until it was measured: low, so that the first slice is short
MOST_COLUMNS = 1600  # first-layer columns of a group
MOST_TOGETHER = 1 << 10  # trials in a slice
FILLED = 16  # idle workers that get new trials before what came back is looked at
RECENT = 100  # slices from which the pace of training is told
MOST_LOSSES = 3  # a slice lost so often is its trial's fault after all
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
    try:
        config = spec.config(proposal.params, **proposal.overrides)
        state = start(config, data, (spec.seed, *astuple(slot)), (spec.seed, slot.repeat), spec.keep)
    except (ValueError, MemoryError) as error:
        raise StudyFailed(f"slot {slot} cannot be trained: {str(error) or 'out of memory'}") from None
    return Trial(slot, proposal.stage, dict(proposal.params), config, attempt, trial_id, number, data, state)


def unprepared(data: Dataset, proposal: Proposal, attempt: int, trial_id: int, number: int) -> Trial:
    """A trial that cannot be trained, to be ended: it has no weights, and its config says nothing."""
    config = TrainConfig()
    state = State(config, (), np.random.default_rng(0), layers=[], scale=1.0, memory=[], total=0, per_epoch=1)
    params = dict(proposal.params)
    return Trial(proposal.slot, proposal.stage, params, config, attempt, trial_id, number, data, state)


@dataclass(frozen=True)
class Status:
    """Where a study stands, for the command line to show."""

    study: str
    stage: str
    planned: int
    complete: int
    pruned: int
    diverged: int
    failed: int
    running: int
    trained: float  # of all epochs that are planned, the share that is behind us: trained, or not needed any more
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


@dataclass
class Flight:
    """A slice that an executor is working on."""

    trials: list[Trial]
    epochs: float
    since: float


class Runner:
    """The owner of one study while it runs. `stop` may be called from a signal handler."""

    def __init__(
        self,
        spec: StudySpec,
        settings: Settings,
        record: StudyRecord,
        box: Outbox,
        datasets: Mapping[str, Dataset],
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
        self.datasets = datasets  # of each stage
        self.ask = asker(spec.search.method, self.distributions, spec.seed) if is_asked(spec) else None
        self.rivals = prune.rivals(spec)  # by stage
        self.units = prune.units(spec)  # of the steps of each stage
        self.rungs = spec.pruner if isinstance(spec.pruner, Halving) and spec.pruner.barrier else None
        self.waiting: list[Trial] = []  # at a rung, for the rest of their stage
        self.at_rung: dict[tuple[int, int], dict[Slot, float]] = {}  # (stage, rung) -> scores there
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
        self.slices: deque[tuple[float, float]] = deque(maxlen=RECENT)  # (when it ended, trial epochs) of recent ones
        self.lengths: dict[Slot, float] = {}  # epochs of each slot that has a configuration
        self.stage = ""

        attempts = record.attempts()
        self.home = record.attr("home") or box.home  # that of the last runner: older versions noted no other
        self.settled: dict[Slot, Attempt] = finished_attempts(attempts)
        self.tries = Counter(a.slot for a in attempts)
        failed = failed_attempts(attempts)
        self.failed: dict[Slot, Params] = {} if retry_failed else {slot: a.params for slot, a in failed.items()}
        noted = record.noted()
        self.unnoted = {record.uid(a.slot, a.attempt): a.trial_id for a in attempts if a.trial_id not in noted}
        self.left = {record.uid(a.slot, a.attempt) for a in attempts if LEFT in a.attrs}
        self.begun = {a.slot: a.params for a in attempts}
        self.decided: plan.Decided = record.decided()
        self.best = next(iter(best_first(spec, self.settled.values())), None)
        self.fates = Counter(map(fate, self.settled.values()))
        self.reasons = {a.trial_id: text for a in attempts if (text := why(a))}  # of trials without a result
        self.stage_plan = plan.stages(spec)
        self.planned = sum(stage.trials for stage in self.stage_plan)
        self.proposed_at = -1
        self.stages: list[dict[str, Any]] = []  # as they are in the storage by now
        if spec.pruner:
            self._remember_curves(attempts)
        self.todo.extend(_again(a) for a in failed_attempts(attempts, left=True).values())
        for attempt in attempts:
            if attempt.state == TrialState.RUNNING:
                self._adopt(attempt)
        if retry_failed:
            self.todo.extend(_again(a) for a in failed.values())

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
        started = {t.slot for t in [*self.waiting, *self.held.values()]}
        started |= {t.slot for flight in self.flying.values() for t in flight.trials}
        known = self.settled.keys() | self.failed.keys() | started
        decided = plan.decide(self.spec, finished, self.ask, self.begun, self.decided)
        self.record.decide({key: points for key, points in decided.items() if key not in self.decided})
        self.decided = decided
        proposals = plan.propose(self.spec, finished, self.ask, self.begun, decided)
        self.todo.extend(proposal for proposal in proposals if proposal.slot not in known)
        stages = [
            {"name": stage.name, "trials": stage.trials, "box": box}
            for stage, box in zip(plan.stages(self.spec), plan.boxes(self.spec, finished), strict=True)
        ]
        if stages != self.stages:
            self.stages = stages
            self.record.set_attr("stages", stages)
            words = stages_in_words(self.spec, finished)
            self.record.note(study_note(self.spec, words, self._page(), self.settings))

    def _dispatch(self) -> bool:
        """Keep every worker busy with a group of trials; False when nothing is left to do."""
        workers = self.workers()
        idle = workers - len(self.flying)
        if idle <= 0 and self.flying:
            return True
        self._propose()
        self._keep_limits()
        self._leave_rungs()
        self._propose()  # all who waited may have been cut
        if idle <= 0:  # there is no worker at all
            return bool(self.ready or self.todo)
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
        epochs = max(1, round(seconds * self.rate / sum(t.cost for t in trials)))
        most = min(epochs, *(self._most_epochs(t) for t in trials))
        states, data, now = [t.state for t in trials], trials[0].data, self.clock()
        if self.settings.executor == "local":
            future = self.executor.submit(advance_here, states, data, most)
        else:
            dataset = self.spec.dataset_of(trials[0].stage).model_dump_json()
            future = self.executor.submit(advance_elsewhere, states, dataset, data.digest, most)
        self.lonely = False
        if not self.slices:
            self.slices.append((now, 0.0))  # from here on
        self.flying[future] = Flight(trials, most, now)

    def _most_epochs(self, trial: Trial) -> float:
        """How far a slice may go before its trial is compared with others."""
        state, step = trial.state, trial.config.eval_every or 1
        if self.rungs:  # exactly to the evaluation at the next one
            done = trial.progress.evaluations[-1].step if trial.progress.evaluations else 0
            rung = prune.next_rung(self.rungs, done, self.units[trial.slot.stage])
            updates = math.ceil(rung / step) * (trial.config.eval_every or state.per_epoch)
            return (updates - state.update) / state.per_epoch
        whole = math.ceil(state.total / state.per_epoch)
        return max(1, whole // prune.SLICES) if self.rivals else whole

    @property
    def done(self) -> bool:
        """Whether `run` came to the end of the plan."""
        left = [*self.flying, *self.ready, *self.waiting, *self.held, *self.todo]
        return not (self.stopping or self.limited or left)

    # ---- a trial's beginning

    def _page(self) -> tuple[str, str] | None:
        """The experiment and the summary run of the study, if MLflow has them by now."""
        return self.box.links(self.record.id).get(self.record.id)

    def _prepare(self, proposal: Proposal, attempt: int, trial_id: int, number: int) -> Trial | None:
        """What the slot's parameters mean: config, data, and a state before the first update. None if it has failed."""
        self.stage, data = proposal.stage, self.datasets[proposal.stage]
        try:
            return prepare(self.spec, data, proposal, attempt, trial_id, number)
        except StudyFailed as error:
            trial = unprepared(data, proposal, attempt, trial_id, number)
            self.box.put([self._trial_begun(trial)])
            self._fail(trial, in_one_line(error))
            return None

    def _begin(self, proposal: Proposal) -> Trial | None:
        self.tries[proposal.slot] += 1
        self.begun[proposal.slot] = proposal.params
        attempt = self.tries[proposal.slot]
        trial_id, number = self.record.begin(proposal, attempt, self.distributions, self.box.home)
        failpoint("begun")
        trial = self._prepare(proposal, attempt, trial_id, number)
        if trial is None:
            return None
        self.box.put([self._trial_begun(trial)])
        self.unnoted[self.record.uid(trial.slot, trial.attempt)] = trial_id
        return trial

    def _adopt(self, attempt: Attempt) -> None:
        """Take up a trial that was running when its runner died, or leave it to another attempt."""
        trial = self._prepare(_again(attempt), attempt.attempt, attempt.trial_id, attempt.number)
        if trial is None:
            return
        if (attempt.home or self.home) != self.box.home:
            self._leave(attempt, trial)
            return
        ended = self.box.records(self.record.uid(trial.slot, trial.attempt), "trial_ended")
        if ended and ended[0].payload["status"] == "FAILED":  # the runner died when it had said so in the journal alone
            self._fail(trial, brief(ended[0].payload["reason"]))
            return
        with suppress(OSError, ValueError):  # it may have died before its first slice was in
            trial.state, trial.progress = checkpoint.load(self._checkpoint(trial), self._whose(trial), trial.state)
        self.box.put([self._trial_begun(trial)])
        self.record.add_curves({trial.trial_id: self._curve(trial.progress)})  # it may have died before this
        if trial.state.finished:
            self.box.put([self._ended(trial)])
        self._go_on(trial)

    def _leave(self, attempt: Attempt, trial: Trial) -> None:
        """End an attempt that another home began and may have shown more of than this one knows.

        That home may have sent points of it, so the next attempt has a run of its own in MLflow, with all points.
        """
        uid, reason = self.record.uid(trial.slot, trial.attempt), "its runner is gone, and its checkpoint with it"
        ended = outbox.trial_ended(self.record.id, uid, self.clock(), "KILLED", reason, {})
        self.box.put([self._trial_begun(trial), ended])
        self.record.finish(trial.trial_id, TrialState.FAIL, None, {"reason": reason, LEFT: True})
        self.unnoted[uid] = trial.trial_id
        self.reasons[trial.trial_id] = reason
        self.left.add(uid)
        self.todo.append(_again(attempt))

    def _remember_curves(self, attempts: list[Attempt]) -> None:
        """What the pruner knew when the last launch ended: new trials are measured against these."""
        curves, sign = self.record.curves(), 1 if self.spec.maximise else -1
        for attempt in attempts:
            if attempt.state == TrialState.FAIL:
                continue
            curve = [(step, sign * value) for step, value in sorted(curves[attempt.trial_id].items())]
            self._compare(attempt.slot, attempt.attrs["stage"], curve, attempt.state == TrialState.COMPLETE)

    # ---- a slice's end

    def _collect(self, flight: Flight, future: Future[Slice]) -> None:
        trials = flight.trials
        try:
            states, progress, seconds = future.result()
        except (DataError, WorkersLost):  # of this machine, not of the trial: nothing is settled
            raise
        except LOST as error:
            died = isinstance(error, BrokenExecutor)  # else the engine lost all its work, whoever's it was
            if died:
                self._part(trials)
            trials[0].losses += died and len(trials) == 1
            if trials[0].losses >= MOST_LOSSES:
                last = str(error) or type(error).__name__
                self._fail(trials[0], one_line(f"its worker died {MOST_LOSSES} times: {last}"))
            else:
                self.ready += trials
        except Exception as error:
            if len(trials) > 1:
                self._part(trials)
                self.ready += trials
            else:
                self._fail(trials[0], in_one_line(error), details(error))
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
        work = trained = 0.0
        for trial, state, part in zip(flight.trials, states, progress, strict=True):
            epochs = (state.update - trial.state.update) / state.per_epoch
            work += trial.cost * epochs
            trained += epochs
            trial.state, trial.losses = state, 0
            trial.company = min(2 * trial.company, MOST_TOGETHER)
            trial.progress.evaluations += part.evaluations
            trial.progress.test, trial.progress.confusion = part.test, part.confusion
            records += self._shown(trial, part, flight.since, now)
            curves[trial.trial_id] = self._curve(part)
        self.slices.append((now, trained))
        speed = work / max(seconds, 1e-3)
        self.rate = speed if self.rate == FIRST_RATE else 0.5 * (self.rate + speed)
        self.way += 0.1 * (now - flight.since - seconds - self.way)
        self.record.still_ours()
        self.box.put(records)
        failpoint("recorded")
        for trial in flight.trials:
            checkpoint.save(self._checkpoint(trial), trial.state, trial.progress, self._whose(trial))
        failpoint("saved")
        self.record.add_curves(curves)
        failpoint("curves")
        for trial in flight.trials:
            self._go_on(trial)

    def _go_on(self, trial: Trial) -> None:
        """After a slice: settle the trial, cut it, let it wait at a rung, or make it ready for the next slice."""
        complete = trial.state.finished and not trial.state.diverged
        worse = self._compare(trial.slot, trial.stage, self._scores(trial), complete)
        if trial.state.finished:
            self._finish(trial)
        elif worse:
            self._cut(trial, f"pruned by {self.spec.pruner.method if self.spec.pruner else ''}")
        elif self._rung(trial):
            self.waiting.append(trial)
        else:
            self.ready.append(trial)

    def _scores(self, trial: Trial) -> list[tuple[int, float]]:
        """What its pruner sees of a trial."""
        return [(e.step, self.spec.score([e])) for e in trial.progress.evaluations] if self.spec.pruner else []

    def _compare(self, slot: Slot, stage: str, curve: prune.Curve, complete: bool) -> bool:
        """Enter how far a trial has come among those it is compared with, and say whether the pruner would stop it."""
        if self.rungs and stage != "confirm":
            for rung, score in prune.at_rungs(self.rungs, self.units[slot.stage], curve):
                self.at_rung.setdefault((slot.stage, rung), {})[slot] = score
        return slot.stage in self.rivals and self.rivals[slot.stage].is_worse(slot, curve, complete)

    def _rung(self, trial: Trial) -> int:
        """The rung with a barrier at which a trial stands; 0 between two."""
        if not self.rungs or trial.stage == "confirm":
            return 0
        unit, curve = self.units[trial.slot.stage], self._scores(trial)
        reached, before = (prune.at_rungs(self.rungs, unit, points) for points in (curve, curve[:-1]))
        return reached[-1][0] if len(reached) > len(before) else 0

    def _leave_rungs(self) -> None:
        """Let the best of a stage go on once all of it is settled, or waits at this rung or a later one."""
        if not self.waiting or not self.rungs or self.todo or self.ready or self.flying:
            return
        rung = min(map(self._rung, self.waiting))
        here = [trial for trial in self.waiting if self._rung(trial) == rung]
        self.waiting = [trial for trial in self.waiting if trial not in here]
        for trial in here:
            if trial.slot in prune.survivors(self.at_rung[trial.slot.stage, rung], self.rungs.reduction):
                self.ready.append(trial)
            else:
                self._cut(trial, "pruned at a rung")

    def _cut(self, trial: Trial, why: str) -> None:
        """Settle a trial that others have left behind. Its checkpoint says so first: this may be cut short as well."""
        self.record.still_ours()
        trial.state.finished = True
        trial.state.diverged = f"{why} after {len(trial.progress.evaluations)} evaluations"
        checkpoint.save(self._checkpoint(trial), trial.state, trial.progress, self._whose(trial))
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
        value, reason = self.spec.value(trial.progress.evaluations), self._why_not(trial)
        state = TrialState.PRUNED if reason else TrialState.COMPLETE
        attrs: dict[str, Any] = dict(self._results(trial))
        attrs |= {"reason": reason} if reason else self._over_repeats(trial.slot, value)
        image = artifact_id(self.record.uid(trial.slot, trial.attempt))
        self.record.finish(trial.trial_id, state, None if reason else value, attrs, image)
        failpoint("told")
        settled = Attempt(trial.slot, trial.number, trial.trial_id, trial.attempt, trial.params, state, value, attrs)
        self.settled[trial.slot] = settled
        self.fates[fate(settled)] += 1
        if reason:
            self.reasons[trial.trial_id] = reason
        if score(self.spec, settled) > (score(self.spec, self.best) if self.best else WORST):
            self.best = settled
        checkpoint.remove(self._checkpoint(trial))
        self._settle_last(trial.slot)

    def _why_not(self, trial: Trial) -> str | None:
        """Why a trial that is at its end has no value: it diverged, or was cut. None if it has one."""
        if trial.state.diverged or math.isfinite(self.spec.value(trial.progress.evaluations)):
            return trial.state.diverged
        return f"{DIVERGED[0]}: there is no finite {self.spec.metric}"

    def _over_repeats(self, slot: Slot, value: float) -> dict[str, float]:
        """Mean and deviation over all repeats of a configuration, for the row of the last; nothing for the others."""
        *others, last = plan.siblings(self.spec, slot)
        told = [self.settled[other] for other in others if other in self.settled]
        values = [value, *(a.value for a in told if a.state == TrialState.COMPLETE and a.value is not None)]
        if slot != last or not others or len(values) <= len(others):
            return {}
        return {"mean": statistics.fmean(values), "deviation": statistics.stdev(values)}

    def _fail(self, trial: Trial, reason: str, details: str | None = None) -> None:
        """Settle a trial that could not be trained; `sieve retry` makes another attempt at its slot."""
        self.record.still_ours()
        ended = outbox.trial_ended(
            self.record.id,
            self.record.uid(trial.slot, trial.attempt),
            self.clock(),
            "FAILED",
            reason,
            self._results(trial),
            details=details,
        )
        self.box.put([ended])
        failpoint("failed")
        self.record.finish(trial.trial_id, TrialState.FAIL, None, {"reason": reason})
        self.reasons[trial.trial_id] = reason
        self.failed[trial.slot] = trial.params
        self.unnoted[self.record.uid(trial.slot, trial.attempt)] = trial.trial_id
        checkpoint.remove(self._checkpoint(trial))
        self._settle_last(trial.slot)

    def _give_up(self) -> None:
        flying = [trial for flight in self.flying.values() for trial in flight.trials]
        for trial in [*self.ready, *self.waiting, *flying]:
            self._fail(trial, "cancelled by the user")
        self.ready, self.waiting, self.flying = [], [], {}

    def _checkpoint(self, trial: Trial) -> Path:
        return self.settings.checkpoints / self.record.id / f"{trial.slot}.{trial.attempt}.npz"

    def _whose(self, trial: Trial) -> str:
        """What a checkpoint must be of to be this trial's."""
        return f"{self.record.uid(trial.slot, trial.attempt)} on {trial.data.digest}"

    # ---- what is shown

    def _curve(self, progress: Progress) -> list[tuple[int, float]]:
        """The metric of the study at each step."""
        return [(e.step, self.spec.value([e])) for e in progress.evaluations]

    def _results(self, trial: Trial) -> dict[str, float]:
        """A trial's figures: of the evaluation that its value is of, but for `epochs`, which were trained in all."""
        evaluations, test = trial.progress.evaluations, trial.progress.test
        results: dict[str, float] = {"seconds": round(trial.state.seconds, 3)}
        if evaluations:
            reported = self.spec.reported(evaluations)
            shown = (reported or evaluations[-1]).metrics
            results |= {f"{part}_{kind}": shown[f"{kind}/{part}"] for part in ("train", "val") for kind in KINDS}
            results["best_val_accuracy"] = max(e.metrics["accuracy/val"] for e in evaluations)
            results["epochs"] = evaluations[-1].epoch
            if reported and self.spec.keep:
                results |= {self.spec.metric: reported.metrics[self.spec.keep.series], "best_epoch": reported.epoch}
        if test is not None:
            results |= {f"test_{kind}": value for kind, value in test.items()}
        return {name: value for name, value in results.items() if math.isfinite(value)}

    def _announce(self) -> None:
        self.box.put([study_begun(self.record, self.spec, versions(), self.clock())])
        self.record.set_attr("home", self.box.home)
        self.record.set_attr("versions", versions())
        if note := prune.note(self.spec):
            self.record.set_attr("pruning", note)

    def _trial_begun(self, trial: Trial) -> Record:
        attempt = Attempt(
            trial.slot,
            trial.number,
            trial.trial_id,
            trial.attempt,
            trial.params,
            TrialState.RUNNING,
            None,
            {"stage": trial.stage},
        )
        data = trial.data.name, trial.data.digest
        given = trial.config.to_params() if trial.state.layers else self.spec.base
        return trial_begun(self.record, attempt, given, data, self.clock())

    def _shown(self, trial: Trial, part: Progress, since: float, now: float) -> list[Record]:
        """The records of one slice of a trial. Its points are spread evenly over the time it took."""
        study, uid, data = self.record.id, self.record.uid(trial.slot, trial.attempt), trial.data
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
        reason = self._why_not(trial)
        return outbox.trial_ended(
            self.record.id,
            self.record.uid(trial.slot, trial.attempt),
            self.clock(),
            "KILLED" if reason else "FINISHED",
            reason,
            self._results(trial),
            trial.progress.confusion,
            trial.state.weights,
            (trial.data.mean, trial.data.scale),
            classes=trial.data.classes,
        )

    # ---- how it stands

    def status(self) -> Status:
        flying = [trial for flight in self.flying.values() for trial in flight.trials]
        done, planned = self._epochs()
        pace = self._pace()
        return Status(
            study=self.spec.name,
            stage=self.stage,
            planned=self.planned,
            complete=self.fates["complete"],
            pruned=self.fates["pruned"],
            diverged=self.fates["diverged"],
            failed=len(self.failed),
            running=len(flying) + len(self.ready) + len(self.waiting) + len(self.held),
            best=self.best.value if self.best else None,
            best_params=self.best.params if self.best else {},
            trained=done / planned if planned else 1.0,
            epochs_per_second=pace,
            seconds_left=self._seconds_left(planned - done, pace),
        )

    def _pace(self) -> float:
        """Trial epochs per second, over recent slices; 0 before the first of them."""
        if len(self.slices) < 2:
            return 0.0
        (first, _), *later = self.slices
        return sum(epochs for _, epochs in later) / max(later[-1][0] - first, 1e-3)

    def _seconds_left(self, epochs: float, pace: float) -> float | None:
        """Seconds for so many epochs; between two slices they get fewer as time goes by."""
        if not pace:
            return None
        return max(0.0, epochs / pace - min(self.clock() - self.slices[-1][0], SLICE_SECONDS))

    def _epochs(self) -> tuple[float, float]:
        """Epochs that are behind us, and all that are planned; each stage with the length of its own trials.

        A trial that is settled or has failed is behind us as a whole, however early it ended.
        """
        flying = [trial for flight in self.flying.values() for trial in flight.trials]
        running = [*flying, *self.ready, *self.waiting, *self.held.values()]
        ended = self.settled.keys() | self.failed.keys()
        params = {slot: a.params for slot, a in self.settled.items()} | self.failed
        params |= {trial.slot: trial.params for trial in running} | {p.slot: p.params for p in self.todo}
        for slot in params.keys() - self.lengths.keys():
            self.lengths[slot] = self._length(params[slot], slot.stage)
        done = sum(self.lengths[slot] for slot in ended)
        for trial in running:
            share = 1.0 if trial.state.finished else trial.state.update / trial.state.total
            done += share * self.lengths[trial.slot]
        planned, lengths = 0.0, dict[int, list[float]]()
        for slot in params:
            lengths.setdefault(slot.stage, []).append(self.lengths[slot])
        for number, stage in enumerate(self.stage_plan):
            known = lengths.get(number, [])
            expected = known or [self._length(p, number) for p in list(params.values())[:FILLED]] or [0.0]
            planned += sum(known) + max(0, stage.trials - len(known)) * statistics.fmean(expected)
        return done, planned

    def _length(self, params: Params, number: int) -> float:
        """Epochs of a trial with these parameters in the stage of this number; 0 if it cannot be trained."""
        stage = self.stage_plan[number]
        try:
            config = self.spec.config(params, **stage.overrides)
        except ValueError:
            return 0.0
        if config.updates is None:
            return float(config.epochs or 0)
        return config.updates / math.ceil(len(self.datasets[stage.name].train) / config.batch_size)

    def write_notes(self, every: float = 0.0) -> None:
        """Give each trial that has an MLflow run by now its note in the dashboard; at most every so many seconds."""
        if not self.unnoted or self.clock() - self.last_note < every:
            return
        self.last_note = self.clock()
        shown = self.box.links(self.record.id)
        for uid in sorted(self.unnoted.keys() & shown.keys()):
            trial_id = self.unnoted.pop(uid)
            _, slot, attempt = uid.rsplit("/", 2)
            address = run_link(self.settings, *shown[uid])
            note = f"Slot **{slot}**, attempt {attempt}: [curves, images and weights in MLflow]({address})\n\n"
            failed = Slot.parse(slot) in self.failed or uid in self.left
            if reason := self.reasons.get(trial_id, "").replace("`", "'"):
                note += f"{'It failed' if failed else 'It ended early'}: `{reason}`\n\n"
            if not failed:
                note += f"![first layer](/artifacts/{self.record.study_id}/{trial_id}/{artifact_id(uid)})\n"
            self.record.note(note, trial_id)

    def _read_request(self) -> None:
        """What `sieve stop` or `sieve cancel`, in another process, asked for."""
        if self.clock() - self.asked < REQUEST_SECONDS:
            return
        self.asked = self.clock()
        request = self.record.attr("request") or {}
        if request.get("launch") == self.record.launch:  # else it was meant for an earlier one
            self.stop(request["what"])


def _again(attempt: Attempt) -> Proposal:
    """The proposal that a stored attempt came from."""
    return Proposal(attempt.slot, attempt.params, attempt.attrs["stage"], attempt.attrs["overrides"])
