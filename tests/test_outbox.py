"""The outbox: durable, idempotent, shared by processes."""

import json
import math
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from search import outbox
from search.outbox import Counts, Outbox, Record


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Outbox]:
    with Outbox(tmp_path / "outbox" / "outbox.db") as opened:
        yield opened


def progress(seq: int, *steps: int, uid: str = "s/a/1", when: float = 100.0) -> Record:
    """One slice's record with a point at each of these steps."""
    return outbox.trial_progress("s", uid, seq, when, [(step, when + step, {"loss/val": 1.0 / step}) for step in steps])


def test_putting_a_record_again_changes_nothing(box: Outbox) -> None:
    """The first record of a (uid, kind, seq) stays as it is, with its own timestamps."""
    first = outbox.trial_begun("s", "s/a/1", "a", {"eta": 0.1}, {}, 100.0, {"number": 0})
    box.put([first])
    box.put([outbox.trial_begun("s", "s/a/1", "other", {}, {}, 999.0, {"number": 0}), first])
    assert box.pending() == [first]


def test_a_study_that_begins_otherwise_is_told_of_again(box: Outbox) -> None:
    """Another text of the study replaces the first at its place, unsent; the same one changes nothing."""
    first = outbox.study_begun("s", {"name": "quick"}, {"version": "1"}, 100.0)
    box.put([first, progress(1, 1)])
    box.mark_sent([record.id for record in box.pending()])
    box.put([outbox.study_begun("s", {"name": "quick"}, {"version": "1"}, 900.0)])
    assert box.unsent() == 0
    box.put([outbox.study_begun("s", {"name": "quick"}, {"version": "2"}, 900.0)])
    (again,) = box.pending()
    assert (again.payload["tags"], again.when) == ({"version": "2"}, 100.0)
    box.put([outbox.study_begun("s", {"name": "quick"}, {"version": "2"}, 900.0, formerly="quick")])
    box.put([outbox.study_begun("s", {"name": "quick"}, {"version": "3"}, 900.0)])
    (last,) = box.records("s", "study_begun")
    assert (last.payload["tags"], outbox.formerly(last.payload)) == ({"version": "3"}, ["quick"])


def test_studies_of_one_name_are_told_apart(box: Outbox) -> None:
    """Each id has its name, each name its ids, the newest last; without a beginning the id stands for the name."""
    box.put([outbox.study_begun(i, {"name": name}, {}, 0.0) for i, name in [("b1", "x"), ("a2", "x"), ("c3", "y")]])
    box.put([outbox.trial_begun("d4", "d4/a/1", "a", {}, {}, 0.0, {})])
    assert box.names() == {"b1": "x", "a2": "x", "c3": "y", "d4": "d4"}
    assert (box.ids("x"), box.ids("z")) == (["b1", "a2"], [])


def ended(study: str) -> Record:
    """A study's end that tells of one of its trials."""
    uid = f"{study}/a/1"
    return outbox.study_ended(study, 9.0, {"mean": 1.0}, best=[uid], repeated={uid: {"mean": 1.0}})


def test_a_study_gets_another_id_in_everything_that_is_recorded(box: Outbox) -> None:
    """Records, links and the uids within records carry it, what was sent stays so; a second time changes nothing."""
    box.put([outbox.study_begun("s", {"name": "s"}, {}, 0.0), progress(1, 1), progress(2, 1, uid="s/b/1"), ended("s")])
    box.put([outbox.study_begun("s-2", {"name": "s-2"}, {}, 0.0), progress(1, 1, uid="s-2/a/1")])
    box.mark_sent([record.id for record in box.pending()])
    box.link("s", "s", "7", "summary")
    box.link("s", "s/a/1", "7", "run")
    for _ in range(2):
        box.rename("s", "1d")
        assert box.names() == {"1d": "s", "s-2": "s-2"}
        assert box.links() == {"1d": ("7", "summary"), "1d/a/1": ("7", "run")}
        assert [len(box.records(uid)) for uid in ("1d", "1d/a/1", "1d/b/1", "s", "s/a/1")] == [2, 1, 1, 0, 0]
        (end,) = box.records("1d", "study_ended")
        assert (end.payload["best"], end.payload["repeated"]) == (["1d/a/1"], {"1d/a/1": {"mean": 1.0}})
        assert box.unsent() == 0


@pytest.mark.parametrize("keep", [True, False])
def test_a_copied_study_goes_its_own_way(box: Outbox, keep: bool) -> None:
    """With its runs it has to send its new beginning alone; without them everything, and it claims no other's runs."""
    box.put([outbox.study_begun("s", {"name": "s"}, {}, 0.0, formerly="old"), progress(1, 1), ended("s")])
    box.mark_sent([record.id for record in box.pending()])
    box.link("s", "s/a/1", "7", "run")
    box.fork("s", "1d", keep_links=keep)
    (begun,) = box.records("1d", "study_begun")
    assert outbox.formerly(begun.payload) == (["old", "s"] if keep else [])
    assert box.links() == ({"1d/a/1": ("7", "run")} if keep else {})
    assert [record.kind for record in box.pending()] == (
        ["study_begun"] if keep else ["study_begun", "trial_progress", "study_ended"]
    )
    box.mark_sent([record.id for record in box.pending()])
    box.fork("s", "1d", keep_links=keep)
    assert box.unsent() == 0


def test_a_home_that_is_moved_stays_itself_and_a_copy_does_not(tmp_path: Path) -> None:
    """A moved journal keeps its id; a copied one gets its own and knows whose copy it is; the original keeps its."""
    first, second, third = (tmp_path / name / "outbox" / "outbox.db" for name in ("first", "seco%nd é", "third"))
    with Outbox(first) as box:
        home = box.home
    shutil.move(tmp_path / "first", tmp_path / "seco%nd é")
    with Outbox(second) as box:
        assert (box.home, box.was(home)) == (home, False)
    shutil.copytree(tmp_path / "seco%nd é", tmp_path / "third")
    for _ in range(2):
        with Outbox(third) as box:
            copied = box.home
            assert copied != home
            assert (box.was(home), box.was(copied)) == (True, False)
        with Outbox(second) as box:
            assert (box.home, box.was(copied)) == (home, False)
    shutil.rmtree(tmp_path / "seco%nd é")
    with Outbox(third) as box:
        assert box.home == copied
    (tmp_path / "link").symlink_to(tmp_path / "third")
    with Outbox(tmp_path / "link" / "outbox" / "outbox.db") as box:
        assert box.home == copied


OLD_JOURNAL = """
CREATE TABLE records (
    id INTEGER PRIMARY KEY AUTOINCREMENT, study TEXT NOT NULL, uid TEXT NOT NULL, kind TEXT NOT NULL,
    seq INTEGER NOT NULL, time REAL NOT NULL, payload TEXT NOT NULL, blob BLOB, last_step INTEGER,
    state TEXT NOT NULL DEFAULT 'unsent', reason TEXT, UNIQUE (uid, kind, seq));
CREATE TABLE runs (uid TEXT PRIMARY KEY, study TEXT NOT NULL, experiment_id TEXT NOT NULL, run_id TEXT NOT NULL);
CREATE TABLE home (id TEXT NOT NULL);
INSERT INTO home VALUES ('00c0ffee00c0ffee');
INSERT INTO records (study, uid, kind, seq, time, payload, state) VALUES
    ('quick', 'quick', 'study_begun', 0, 1.0, '{"spec": {"name": "quick"}, "tags": {}}', 'sent'),
    ('quick', 'quick/s0.i0.r0/1', 'trial_begun', 0, 2.0, '{"name": "a"}', 'sent');
INSERT INTO runs VALUES ('quick/s0.i0.r0/1', 'quick', '1', 'run');
PRAGMA user_version = 1;
"""


def test_a_journal_of_an_older_version_is_read(tmp_path: Path) -> None:
    """Its study has its name as its id until it is given one; the home keeps its id."""
    with closing(sqlite3.connect(tmp_path / "outbox.db")) as database:
        database.executescript(OLD_JOURNAL)
    for _ in range(2):
        with Outbox(tmp_path / "outbox.db") as box:
            assert (box.home, box.names(), box.unsent()) == ("00c0ffee00c0ffee", {"quick": "quick"}, 0)
            assert box.links() == {"quick/s0.i0.r0/1": ("1", "run")}


def test_a_put_is_all_or_nothing(box: Outbox) -> None:
    """One record that JSON cannot hold keeps the whole batch out."""
    with pytest.raises(TypeError, match="JSON"):
        box.put([progress(1, 1), Record("x", "s", "s", 0, 0.0, {"not": object()})])
    assert box.unsent() == 0


def test_records_come_back_as_they_went_in(box: Outbox) -> None:
    """NaN, infinities, NumPy scalars and bytes survive, in the order in which they were put."""
    points = [(1, 5.5, {"loss/val": math.nan, "cost/val": math.inf, "eta": np.float32(0.5)})]
    box.put([outbox.trial_progress("s", "s/a/1", 7, 6.0, points)])  # type: ignore[list-item]
    box.put([Record("x", "s", "s", 0, 0.0, {"n": np.int64(3)}, b"\x00bytes")])
    back, other = box.pending()
    ((step, when, metrics),) = outbox.progress_points([back])
    assert (step, when, metrics["cost/val"], metrics["eta"]) == (1, 5.5, math.inf, 0.5)
    assert math.isnan(metrics["loss/val"])
    assert (other.payload, other.blob) == ({"n": 3}, b"\x00bytes")


def test_a_slice_trained_twice_gives_every_step_once(box: Outbox) -> None:
    """After a crash the slices may end elsewhere; steps that are stored already keep their first timestamp."""
    box.put([progress(100, 1, 2, 3)])
    box.put([progress(50, 1, 2, when=900.0), progress(120, 3, 4, when=900.0)])
    points = outbox.progress_points(box.records("s/a/1"))
    assert [(step, when) for step, when, _ in points] == [(1, 101.0), (2, 102.0), (3, 103.0), (4, 904.0)]


def test_sent_records_stay_to_be_sent_again(box: Outbox) -> None:
    """Marking empties the queue, not the box; requeue fills the queue again, for a uid, a study or all."""
    box.put([progress(1, 1), progress(2, 1, uid="s/b/1")])
    box.link("s", "s/a/1", "7", "run")
    box.mark_sent([record.id for record in box.pending()])
    assert (box.unsent(), box.unsent("s"), box.counts()) == (0, 0, {"s": Counts(sent=2)})
    assert box.requeue(uid="s/a/1") == 1
    assert box.links("s") == {}
    assert box.requeue(study="other") == 0
    assert box.requeue() == 1
    assert box.unsent("s") == 2


def test_a_refused_record_steps_aside_with_its_reason(box: Outbox) -> None:
    """It is counted as refused, no longer pending, not part of what a run must hold, and can be tried again."""
    box.put([progress(1, 1), progress(2, 2)])
    bad, good = box.pending()
    box.refuse([bad.id], "too long")
    assert box.pending() == [good]
    assert box.records("s/a/1", refused=False) == [good]
    assert box.counts() == {"s": Counts(unsent=1, refused=1)}
    assert box.refusals() == [("s/a/1", "trial_progress", "too long")]
    assert box.requeue(refused_only=True) == 1
    assert box.pending() == [bad, good]


def test_a_deleted_study_is_gone_and_others_are_not(box: Outbox) -> None:
    """Records and links of the study go, those of another stay."""
    box.put([progress(1, 1), outbox.study_begun("t", {}, {}, 0.0)])
    box.link("s", "s/a/1", "1", "r")
    box.link("t", "t", "2", "q")
    box.delete("s")
    assert box.counts() == {"t": Counts(unsent=1)}
    assert box.links() == {"t": ("2", "q")}


def test_pending_is_limited_and_filtered(box: Outbox) -> None:
    """The oldest first, as many as asked for, of one study if asked."""
    box.put([progress(n, n) for n in range(1, 6)] + [outbox.study_begun("t", {}, {}, 0.0)])
    assert [record.seq for record in box.pending(2)] == [1, 2]
    assert [record.study for record in box.pending(study="t")] == ["t"]


def test_a_torn_write_loses_only_itself(tmp_path: Path) -> None:
    """Cut the log at any offset: every record that was durable before that offset can still be read."""
    live = tmp_path / "live" / "outbox.db"
    log = live.with_name("outbox.db-wal")
    sizes = []
    with Outbox(live) as box:
        for seq in range(1, 9):
            box.put([progress(seq, seq)])
            sizes.append(log.stat().st_size)
        database, whole = live.read_bytes(), log.read_bytes()
    rng = np.random.default_rng(0)
    offsets = {0, *sizes, *(size - 1 for size in sizes), *(int(n) for n in rng.integers(0, len(whole), 60))}
    for offset in sorted(offsets):
        torn = tmp_path / "torn" / "outbox.db"
        torn.parent.mkdir()
        torn.write_bytes(database)
        torn.with_name("outbox.db-wal").write_bytes(whole[:offset])
        with Outbox(torn) as box:
            kept = [record.seq for record in box.pending()]
            assert kept == list(range(1, 1 + sum(size <= offset for size in sizes)))
            box.put([progress(99, 99)])
            assert box.unsent() == len(kept) + 1
        shutil.rmtree(torn.parent)


PUTS = """
import sys
from pathlib import Path
from search import outbox
with outbox.Outbox(Path(sys.argv[1])) as box:
    for seq in range(25):
        box.put([outbox.trial_progress("s", sys.argv[2], seq, 0.0, [(seq, 0.0, {"eta": 1.0})])])
print("done", flush=True)
"""


def test_processes_share_a_new_outbox(tmp_path: Path) -> None:
    """Four processes create it at the same moment and put records: none is lost, none fails."""
    path = tmp_path / "outbox.db"
    writers = [
        subprocess.Popen([sys.executable, "-c", PUTS, str(path), f"s/{n}/1"], stdout=subprocess.PIPE) for n in range(4)
    ]
    assert [writer.communicate()[0] for writer in writers] == [b"done\n"] * 4
    with Outbox(path) as box:
        assert box.unsent() == 100


def test_every_record_is_on_disk_when_put_returns(box: Outbox) -> None:
    """The journal is a write-ahead log that is flushed at every commit."""
    assert box._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert box._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


def test_weights_are_kept_small_and_finite() -> None:
    """Half precision, a hundred units, no overflow; a scale is kept only where it differs between inputs."""
    w = np.random.default_rng(0).normal(size=(64, 300))
    w[0, 0] = 1e30
    record = outbox.trial_weights("s", "s/a/1", 0, 0.0, 3, w, (8, 8), np.zeros(64), np.ones(64))
    arrays = outbox.unpack(record.blob or b"")
    assert arrays["w"].shape == (64, 100)
    assert arrays["w"].dtype == np.float16
    assert np.isfinite(arrays["w"]).all()
    assert "scale" not in arrays
    assert json.loads(json.dumps(record.payload))["image_shape"] == [8, 8]
    scaled = outbox.trial_weights("s", "s/a/1", 0, 0.0, 3, w, (8, 8), None, np.linspace(1, 2, 64))
    assert "scale" in outbox.unpack(scaled.blob or b"")


def test_weights_of_a_trial_come_back_exactly() -> None:
    """The npz that a trial ends with holds every layer, in the precision it was trained in."""
    w, b = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32), np.zeros(3, np.float32)
    record = outbox.trial_ended("s", "s/a/1", 0.0, "FINISHED", None, {}, weights=[(w, b), (w.T, b)])
    arrays = outbox.unpack(record.blob or b"")
    assert list(arrays) == ["W1", "b1", "W2", "b2"]
    assert np.array_equal(arrays["W1"], w)
    assert arrays["W1"].dtype == np.float32


def test_an_unknown_status_is_an_error() -> None:
    """A run ends in one of MLflow's three ways."""
    with pytest.raises(ValueError, match="expected FINISHED, FAILED or KILLED, got PRUNED"):
        outbox.trial_ended("s", "s/a/1", 0.0, "PRUNED", None, {})


def test_a_run_is_named_by_its_parameters() -> None:
    """Numbers are short, words stay."""
    name = outbox.run_name({"lambda": 0.00123456, "hidden_sizes": "[50]", "batch_size": 100})
    assert name == "lambda=0.00123, hidden_sizes=[50], batch_size=100"


def test_layers_that_are_searched_one_by_one_are_named_together() -> None:
    """A name shows the layers that a network has, in their order, and none that it has not."""
    units = {f"hidden_sizes.units_{k}": k for k in (1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9)}  # as texts are sorted
    assert outbox.run_name({"hidden_sizes.layers": 2} | units | {"lambda": 0.1}) == "hidden_sizes=[1, 2], lambda=0.1"
    assert outbox.run_name({"hidden_sizes.layers": 0} | units) == "hidden_sizes=[]"
    assert outbox.run_name(units) == f"hidden_sizes={list(range(1, 12))}"
    assert outbox.run_name({"hidden_sizes.layers": 2}) == "hidden_sizes.layers=2"
