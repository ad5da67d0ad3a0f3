"""What launches that were cut short, older versions and lost journals leave of a study."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest

from search import run
from search.outbox import Outbox
from search.settings import Settings
from search.storage import StudyRecord, open_storage, register, registered, study_names
from search.study import StudySpec

Quick = Callable[..., StudySpec]
RANDOM: dict[str, Any] = {"search": {"method": "random", "trials": 2}, "confirm": None}


@pytest.fixture
def home(settings: Settings) -> Settings:
    settings.make_home()
    return settings


def test_points_that_no_trial_was_begun_with_go_with_their_specification(home: Settings, quick: Quick) -> None:
    """A launch that dies between deciding its points and the first trial leaves none to a study of other parts."""
    asked: dict[str, Any] = {"search": {"method": "tpe", "trials": 4, "generation": 2}, "confirm": None}
    with registered(home.storage, quick(**asked), {}) as record:
        record.decide({"0.0": [{"eta": 0.1}, {"eta": 0.2}]})
    with registered(home.storage, quick(**asked, seed=1), {}) as record:
        assert record.decided() == {}


def of_an_older_version(record: StudyRecord, **attrs: Any) -> None:
    """What an older version wrote of a study: no id, no launch."""
    with record.storage.engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM study_user_attributes WHERE key != 'spec'")
    for key, value in attrs.items():
        record.storage.set_study_user_attr(record.study_id, key, value)


def test_a_study_that_an_older_version_queued_can_be_stopped(home: Settings, quick: Quick) -> None:
    """Nobody has taken it yet, which does not mean that it was deleted."""
    register(storage := open_storage(home.storage), quick(**RANDOM), {})
    of_an_older_version(record := StudyRecord(storage, "quick"), state="queued")
    assert "does not wait" in run.request("quick", "stop", home)
    assert record.attr("state") == "stopped"


def test_one_damaged_study_does_not_keep_the_others_from_the_journal(home: Settings, quick: Quick) -> None:
    """What the journal lacks of the study beside it is put there, and the damaged one is named."""
    for name in ("a", "b"):
        run.launch(quick(**RANDOM, name=name), home, workers=1, publish=False)
    StudyRecord(storage := open_storage(home.storage), "a").set_attr("spec", "{")
    assert study_names(storage) == ["a", "b"]
    home.outbox.unlink()
    said: list[str] = []
    run.recover_all(home, said.append)
    assert ["'a'" in line for line in said] == [True]
    with Outbox(home.outbox) as box:
        assert list(box.attempts(StudyRecord(storage, "b").id))


def test_a_journal_that_was_lost_knows_its_studies_again(home: Settings, quick: Quick) -> None:
    """`sieve sync` alone, without another launch, shows what it recovers under the study's name."""
    run.launch(quick(**RANDOM), home, workers=1, publish=False)
    home.outbox.unlink()
    run.recover_all(home, print)
    with Outbox(home.outbox) as box:
        assert box.ids("quick") == [StudyRecord(open_storage(home.storage), "quick").id]
        assert [record.kind for record in box.pending()][:: len(box.pending()) - 1] == ["study_begun", "study_ended"]


def test_a_stored_study_does_not_ask_again_where_another_one_did_best(home: Settings, quick: Quick) -> None:
    """`sieve retry` and the service take what was registered, whatever became of the study that narrowed it."""
    search = {"search": {"method": "random", "trials": 3}}
    run.launch(quick(**RANDOM | search, name="a"), home, workers=1, publish=False)
    narrow = run.resolved(quick(**RANDOM, name="b", space_from={"study": "a", "top": 1.0}), home)
    with registered(home.storage, narrow, {}):
        optuna.delete_study(study_name="a", storage=open_storage(home.storage))
    assert run.resolved(StudyRecord(open_storage(home.storage), "b").spec, home) == narrow


def test_a_home_may_be_reached_by_two_paths(home: Settings, tmp_path: Path) -> None:
    """It is the same one when its journal was lost, by whichever path it is opened."""
    (tmp_path / "link").symlink_to(home.home)
    with Outbox(home.outbox) as box:
        run.keep_home(box, home)
        known = box.home
    shutil.rmtree(home.outbox.parent)
    linked = replace(home, home=tmp_path / "link")
    with Outbox(linked.outbox) as box:
        run.keep_home(box, linked)
        assert box.home == known


def test_an_older_version_may_run_a_study_in_between(home: Settings, quick: Quick) -> None:
    """Its checkpoints join those under the study's id; one that is there already stays."""
    with registered(home.storage, quick(**RANDOM), {}) as record, Outbox(home.outbox) as box:
        record.set_attr("formerly", True)
        for folder, files in {"quick": ("both", "older"), record.id: ("both",)}.items():
            (home.checkpoints / folder).mkdir(parents=True)
            for file in files:
                (home.checkpoints / folder / file).write_text(folder)
        run.identify(record, box, home)
        found = {path.name: path.read_text() for path in (home.checkpoints / record.id).iterdir()}
    assert found == {"both": record.id, "older": "quick"}
    assert not (home.checkpoints / "quick").exists()
