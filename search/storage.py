"""A study's record in Optuna's storage, the one truth about what is done: one writer, few transactions."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from search.errors import StudyConflict, UnknownStudy
from search.plan import Proposal, Slot
from search.study import Choice, Range, StudySpec, difference, restore

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class Attempt:
    """One trial as it is stored: one attempt at a slot."""

    slot: Slot
    number: int
    trial_id: int
    attempt: int
    params: dict[str, Any]
    state: TrialState
    value: float | None
    attrs: dict[str, Any]

    @property
    def done(self) -> bool:
        return self.state in (TrialState.COMPLETE, TrialState.PRUNED)


def open_storage(url: str) -> RDBStorage:
    """The storage at a URL, made if it is missing. SQLite is set up for one writer and many readers."""
    if not url.startswith("sqlite"):
        return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
    storage = RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})

    @sqlalchemy.event.listens_for(storage.engine, "connect")
    def write_ahead(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    storage.engine.dispose()  # connections from before the listener
    return storage


def is_empty(url: str) -> bool:
    """Whether nothing was ever stored there, as far as that can be told without making it."""
    return url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).exists()


def distribution(dimension: Range | Choice) -> BaseDistribution:
    """What Optuna is told of a dimension: always the full space, so that its plots and samplers stay right."""
    if isinstance(dimension, Choice):
        return CategoricalDistribution(dimension.choices)
    if dimension.integer:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


class StudyRecord:
    """One study in a storage. Only the runner that owns the study writes through this."""

    def __init__(self, storage: RDBStorage, name: str) -> None:
        self.storage, self.name = storage, name
        try:
            self.study_id = storage.get_study_id_from_name(name)
        except KeyError:
            raise UnknownStudy(name, study_names(storage)) from None

    @property
    def attrs(self) -> dict[str, Any]:
        return self.storage.get_study_user_attrs(self.study_id)

    @property
    def spec(self) -> StudySpec:
        return restore(json.loads(self.attrs["spec"]))

    def set_attr(self, key: str, value: Any) -> None:
        self.storage.set_study_user_attr(self.study_id, key, value)

    def attempts(self) -> list[Attempt]:
        """Every trial of the study, in the order of their numbers."""
        return [
            Attempt(
                slot=Slot.parse(trial.user_attrs["slot"]),
                number=trial.number,
                trial_id=trial._trial_id,
                attempt=trial.user_attrs["attempt"],
                params=trial.params,
                state=trial.state,
                value=trial.value,
                attrs=trial.user_attrs,
            )
            for trial in self.storage.get_all_trials(self.study_id, deepcopy=False)
            if "slot" in trial.user_attrs
        ]

    def begin(self, proposal: Proposal, attempt: int, distributions: Mapping[str, BaseDistribution]) -> tuple[int, int]:
        """Write a proposal down as a RUNNING trial, in one transaction; returns (trial id, number)."""
        slot = proposal.slot
        attrs = {
            "stage": proposal.stage,
            "slot": str(slot),
            "repeat": slot.repeat,
            "attempt": attempt,
            "overrides": proposal.overrides,
        }
        trial = create_trial(
            state=TrialState.RUNNING,
            params=proposal.params,
            distributions={name: distributions[name] for name in proposal.params},
            user_attrs=attrs,
        )
        trial_id = self.storage.create_new_trial(self.study_id, template_trial=trial)
        return trial_id, self.storage.get_trial_number_from_id(trial_id)

    def add_curves(self, curves: Mapping[int, Sequence[tuple[int, float]]]) -> None:
        """Intermediate values of trials, {trial id: [(step, value)]}, in one transaction.

        Writing them again is harmless. Optuna's own call takes a transaction for each value, at 19 times the cost.
        """
        table = sqlalchemy.table(
            "trial_intermediate_values",
            *map(sqlalchemy.column, ("trial_id", "step", "intermediate_value", "intermediate_value_type")),
        )
        rows = [_intermediate_row(trial, step, value) for trial, curve in curves.items() for step, value in curve]
        if not rows:
            return
        with self.storage.engine.begin() as connection:
            for trial, curve in curves.items():
                steps = [step for step, _ in curve]
                connection.execute(table.delete().where(table.c.trial_id == trial, table.c.step.in_(steps)))
            connection.execute(table.insert(), rows)

    def finish(
        self,
        trial_id: int,
        state: TrialState,
        value: float | None,
        attrs: Mapping[str, Any],
        image: str | None = None,
    ) -> None:
        """Tell how an attempt ended; `image` is the id of the picture that the publisher draws of its weights."""
        for key, attr in attrs.items():
            self.storage.set_trial_user_attr(trial_id, key, attr)
        if image is not None:
            meta = {"artifact_id": image, "filename": "first-layer.png", "mimetype": "image/png", "encoding": None}
            self.storage.set_trial_system_attr(trial_id, f"artifacts:{image}", json.dumps(meta))
        self.storage.set_trial_state_values(trial_id, state, None if value is None else [value])

    # The dashboard's own calls read every note of the study to write one; these are the same records.

    def note(self, body: str, trial_id: int | None = None) -> None:
        """Markdown for the dashboard, on a trial or on the study; at most 2,000 characters are kept."""
        prefix = "dashboard:" if trial_id is None else f"dashboard:{trial_id}:"
        self.storage.set_study_system_attr(self.study_id, f"{prefix}note_str:0", body[:2000])
        self.storage.set_study_system_attr(self.study_id, f"{prefix}note_ver", 1)

    def noted(self) -> set[int]:
        """The ids of the trials that have a note."""
        keys = (key.split(":") for key in self.storage.get_study_system_attrs(self.study_id))
        return {int(key[1]) for key in keys if len(key) == 3 and key[2] == "note_ver"}


def _intermediate_row(trial_id: int, step: int, value: float) -> dict[str, Any]:
    kind = "FINITE" if math.isfinite(value) else "NAN" if math.isnan(value) else "INF_POS" if value > 0 else "INF_NEG"
    finite = value if math.isfinite(value) else None
    return {"trial_id": trial_id, "step": step, "intermediate_value": finite, "intermediate_value_type": kind}


def register(storage: RDBStorage, spec: StudySpec) -> StudyRecord:
    """The record of this study: new, or the one to resume. Raises StudyConflict if another spec has the name."""
    if spec.name not in study_names(storage):
        direction = StudyDirection.MAXIMIZE if spec.maximise else StudyDirection.MINIMIZE
        study_id = storage.create_new_study([direction], study_name=spec.name)
        storage.set_study_system_attr(study_id, "study:metric_names", [spec.metric])  # as Study.set_metric_names
        storage.set_study_user_attr(study_id, "spec", spec.to_json())
    record = StudyRecord(storage, spec.name)
    if "spec" not in record.attrs:
        if storage.get_all_trials(record.study_id, deepcopy=False):
            raise StudyConflict(spec.name, ["the stored study was not made by Sieve"])
        record.set_attr("spec", spec.to_json())  # its registration was cut short
    if differences := difference(record.spec, spec):
        raise StudyConflict(spec.name, differences)
    if record.attrs["spec"] != spec.to_json():
        record.set_attr("spec", spec.to_json())  # another description or limit, the same trials
    return record


def study_names(storage: RDBStorage) -> list[str]:
    return [study.study_name for study in storage.get_all_studies()]


def finished_attempts(attempts: Iterable[Attempt]) -> dict[Slot, Attempt]:
    """The one attempt that settled each slot that is done."""
    return {attempt.slot: attempt for attempt in attempts if attempt.done}
