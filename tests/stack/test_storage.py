"""PostgreSQL as the storage: the same values, and no slot lost or done twice whatever happens to the server."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
from optuna import delete_study
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from search import run
from search.errors import SettingsError, StorageLost, StudyBusy, StudyGone, StudyTaken
from search.plan import Proposal, Slot
from search.settings import Settings
from search.storage import StudyRecord, open_storage, registered
from search.study import StudySpec
from tests.stack.conftest import PASSWORD, execute, free_port
from tests.test_run import values

pytestmark = pytest.mark.stack

Spec = Callable[..., StudySpec]
Home = Callable[..., Settings]
FIRST = Proposal(Slot(0, 0, 0), {}, "random", {})
launch = partial(run.launch, publish=False, workers=2)


def test_a_study_has_one_owner(storage: str, quick: Spec) -> None:
    """On either database a second owner is refused, another study is not, and the end of the first frees it."""
    with registered(storage, quick(name="a"), {}):
        with pytest.raises(StudyBusy, match="'a' is being run"), registered(storage, quick(name="a"), {}):
            pass
        with registered(storage, quick(name="b"), {}):
            pass
    with registered(storage, quick(name="a"), {}):
        pass


def test_eight_that_start_at_once_have_one_winner(storage: str, quick: Spec) -> None:
    """Of many that want a study at the same moment exactly one gets it."""
    open_storage(storage)
    barrier, held = threading.Barrier(8), threading.Barrier(8)

    def contend(_: int) -> bool:
        barrier.wait()
        try:
            with registered(storage, quick(), {}):
                held.wait()
                return True
        except StudyBusy:
            held.wait()
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(contend, range(8))) == 1


def test_processes_that_start_together_make_the_tables_once(storage: str) -> None:
    """Eight that open an empty database at once all succeed."""
    with ThreadPoolExecutor(8) as pool:
        opened = list(pool.map(open_storage, [storage] * 8))
    assert all(isinstance(one, RDBStorage) for one in opened)


def test_a_study_has_the_same_values_on_either_database(
    home: Home, new_database: Callable[[], str], quick: Spec
) -> None:
    """Every trial's parameters, curve and results are those of the same study on SQLite, bit for bit."""
    embedded, server = home("embedded"), home("server", SIEVE_STORAGE=new_database())
    spec = quick(search={"method": "coarse-to-fine", "stages": 2, "trials_per_stage": 3}, confirm=False)
    launch(spec, embedded)
    launch(spec, server)
    assert values(server) == values(embedded)


CUT = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"


def test_an_owner_that_lost_its_lock_to_another_stops(new_database: Callable[[], str], quick: Spec) -> None:
    """If another runner took the study while the connection was cut, the first one writes no more."""
    url = new_database()
    with registered(url, quick(), {}, patience=30) as record:
        record.set_attr("state", "running")
        name = url.rpartition("/")[2]
        execute(url.replace(name, "postgres"), CUT.format(name=name))
        with registered(url, quick(), {}) as other, pytest.MonkeyPatch.context() as patch:
            other.set_attr("state", "the other's")
            patch.setattr("search.storage.RETAKE_SECONDS", 0.2)
            with pytest.raises(StudyBusy):
                record.set_attr("state", "mine")
        with pytest.raises(StudyTaken):
            record.set_attr("state", "mine again")
    assert StudyRecord(open_storage(url), "quick").attr("state") == "the other's"


def test_a_trial_whose_reply_was_lost_is_not_made_twice(
    new_database: Callable[[], str], quick: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server commits a new trial and dies before it says so: the next try finds it."""
    url = new_database()
    with registered(url, quick(), {}, patience=30) as record:
        create, calls = record.storage.create_new_trial, 0

        def commits_and_dies(*args: object, **kwargs: object) -> int:
            nonlocal calls
            calls += 1
            trial_id = create(*args, **kwargs)  # type: ignore[arg-type]
            if calls == 1:
                raise StorageLost("gone")
            return trial_id

        monkeypatch.setattr(record.storage, "create_new_trial", commits_and_dies)
        trial_id, number = record.begin(Proposal(Slot(0, 0, 0), {}, "coarse", {}), 1, {}, "home")
        assert (number, len(record.attempts())) == (0, 1)
        monkeypatch.undo()
        for _ in range(2):  # the second time as if the first reply was lost
            record.finish(trial_id, TrialState.COMPLETE, 0.5, {"epochs": 1.0})
        assert record.attempts()[0].value == 0.5


def test_what_can_not_be_opened_is_said_in_one_line_without_the_password(server_url: str) -> None:
    """No server, no database, a wrong password, no such driver: each names the storage and hides the password."""
    nowhere = f"postgresql+psycopg://sieve:{PASSWORD}@127.0.0.1:{free_port()}/x"
    missing = server_url.rpartition("/")[0] + "/missing"
    wrong = server_url.replace(":" + server_url.split(":")[2].split("@")[0] + "@", f":{PASSWORD}2@")
    for url, match in ((nowhere, "refused"), (missing, "missing"), (wrong, "password authentication failed")):
        with pytest.raises(StorageLost, match=match) as caught:
            open_storage(url)
        assert PASSWORD not in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(SettingsError, match=r"pip install 'sieve\[postgres\]'"):
        open_storage(f"postgresql+pg8000://sieve:{PASSWORD}@127.0.0.1/x")


CALLS: dict[str, Callable[[StudyRecord, int], Any]] = {
    "set_attr": lambda record, trial: record.set_attr("state", "stopped"),
    "note": lambda record, trial: record.note("of the old one", trial),
    "begin": lambda record, trial: record.begin(FIRST, 1, {}, "home"),
    "decide": lambda record, trial: record.decide({"1": [{}]}),
    "add_curves": lambda record, trial: record.add_curves({trial: [(1, 0.5)]}),
    "finish": lambda record, trial: record.finish(trial, TrialState.FAIL, None, {"reason": "of the old one"}),
    "still_ours": lambda record, trial: record.still_ours(),
}


@pytest.mark.parametrize("again", [True, False], ids=["used again", "not used again"])
def test_the_runner_of_a_deleted_study_writes_nothing_into_the_next_of_its_name(
    storage: str, quick: Spec, again: bool
) -> None:
    """SQLite gives the numbers of the study and of its trials to the next one, and both were taken once."""
    spec = quick(search={"method": "random", "trials": 2}, confirm=None)
    with registered(storage, spec, {}) as old, ExitStack() as held:
        trial, _ = old.begin(FIRST, 1, {}, "home")
        delete_study(study_name="quick", storage=open_storage(storage))
        before = None
        if again:
            new = held.enter_context(registered(storage, spec, {}))
            new.begin(FIRST, 1, {}, "home")
            assert new.id != old.id
            before = new.attrs, new.attempts(), new.curves(), new.noted()
        for call in CALLS.values():
            with pytest.raises(StudyGone):
                call(old, trial)
        if again:
            assert (new.attrs, new.attempts(), new.curves(), new.noted()) == before
