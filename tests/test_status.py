"""`sieve status` and its like: a study's lock says whether it runs, and one that cannot be read hides no other."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest

from search import outcome, run, serve
from search.outbox import Outbox, study_begun
from search.settings import Settings
from search.study import StudySpec
from tests.processes import AN_EPOCH, await_slices, finish, sieve, study_file
from tests.servers import until

TWO: dict[str, Any] = {"search": {"method": "random", "trials": 2}, "confirm": False}
LONG: dict[str, Any] = {
    "base": {"batch_size": 5, "epochs": 60, "hidden_sizes": [60]},
    "space": {"eta": {"low": 1e-4, "high": 1e-2, "log": True}},
    "search": {"method": "random", "trials": 6},
    "confirm": False,
}
QUIETLY = ("--workers", "1", "--no-publish")


def status(settings: Settings, *words: str) -> list[dict[str, Any]]:
    asked = sieve(settings, "status", *words, "--json")
    out, said = asked.communicate(timeout=60)
    assert asked.returncode == 0, said
    rows: list[dict[str, Any]] = json.loads(out)
    return rows


def execute(settings: Settings, statement: str, *values: object) -> None:
    """One statement on the stored studies, past everything that guards them."""
    with closing(sqlite3.connect(settings.home / "sieve.db", timeout=30)) as db:
        db.execute(statement, values)
        db.commit()


def of_another_tool(settings: Settings, name: str) -> None:
    study = optuna.create_study(study_name=name, storage=settings.storage)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)


def spec_attr(settings: Settings, name: str, value: str | None) -> None:
    """Replace the stored specification, which is JSON in JSON."""
    where = "key = 'spec' AND study_id = (SELECT study_id FROM studies WHERE study_name = ?)"
    if value is None:
        execute(settings, f"DELETE FROM study_user_attributes WHERE {where}", name)
    else:
        execute(settings, f"UPDATE study_user_attributes SET value_json = ? WHERE {where}", value, name)


@pytest.mark.fault
def test_a_study_whose_runner_was_killed_is_interrupted(settings: Settings, tmp_path: Path) -> None:
    """While it runs it is running; after SIGKILL it is interrupted, `--follow` ends and says how to go on."""
    runner = sieve(settings, "launch", study_file(tmp_path, **LONG), *QUIETLY, slices=AN_EPOCH)
    await_slices(settings, runner, 2)
    assert [row["state"] for row in status(settings)] == ["running"]
    os.kill(runner.pid, signal.SIGKILL)
    finish(runner)
    assert [row["state"] for row in status(settings, "quick")] == ["interrupted"]
    followed = sieve(settings, "status", "quick", "--follow")
    out, said = followed.communicate(timeout=60)
    assert followed.returncode == 0, said
    assert "interrupted" in out
    assert "`sieve launch` with its file" in out
    assert "`sieve launch` with its file" in said
    assert serve.waiting(serve.open_storage(settings.storage)) == ["quick"]  # a service would take it up


@pytest.mark.fault
def test_following_an_interrupted_study_outlasts_the_service_that_takes_it_up(
    settings: Settings, tmp_path: Path
) -> None:
    """A follower that sees the dead runner's study goes on until the service that was begun then has finished it."""
    parts = LONG | {"search": {"method": "random", "trials": 1}, "base": LONG["base"] | {"epochs": 30}}
    runner = sieve(settings, "launch", study_file(tmp_path, **parts), *QUIETLY, slices=AN_EPOCH)
    await_slices(settings, runner, 1)
    os.kill(runner.pid, signal.SIGKILL)
    finish(runner)
    followed = sieve(settings, "status", "--follow", "--json")
    service = sieve(settings, "serve", "--workers", "1")
    try:
        out, said = followed.communicate(timeout=120)
    finally:
        service.terminate()
        finish(service)
    assert [row["state"] for row in json.loads(out)] == ["done"], said


DAMAGE: dict[str, Callable[[Settings], None]] = {
    "a broken specification": lambda home: spec_attr(home, "odd", json.dumps("{broken")),
    "a specification that is no JSON at all": lambda home: spec_attr(home, "odd", "{broken"),
    "a specification that is a list": lambda home: spec_attr(home, "odd", json.dumps("[1]")),
    "a newer version's specification": lambda home: spec_attr(home, "odd", json.dumps('{"name": "odd", "quantum": 1}')),
    "a trial without our attributes": lambda home: execute(
        home,
        "DELETE FROM trial_user_attributes WHERE key = 'stage' AND trial_id IN "
        "(SELECT trial_id FROM trials JOIN studies USING (study_id) WHERE study_name = 'odd')",
    ),
    "a slot that is none": lambda home: execute(
        home,
        "UPDATE trial_user_attributes SET value_json = '7' WHERE key = 'slot' AND trial_id IN "
        "(SELECT trial_id FROM trials JOIN studies USING (study_id) WHERE study_name = 'odd')",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_an_unreadable_study_is_one_row_and_one_line(
    settings: Settings, quick: Callable[..., StudySpec], damage: Callable[[Settings], None], tmp_path: Path
) -> None:
    """The others are listed as ever; each command on it says in one line which study it is and what is wrong."""
    for name in ("odd", "sound"):
        run.launch(quick(name=name, **TWO), settings, workers=1, publish=False)
    damage(settings)
    rows = {row["study"]: row["state"] for row in status(settings)}
    assert rows["sound"] == "done"
    assert rows["odd"].startswith("unreadable: ")
    asked = [sieve(settings, *words) for words in on_one(tmp_path, "odd")]
    for command in asked:
        out, said = command.communicate(timeout=60)
        assert "Traceback" not in out + said
        assert (command.returncode, len(said.splitlines())) == (2, 1), said
        assert "odd" in said


def on_one(tmp_path: Path, study: str) -> list[list[str]]:
    return [
        ["best", study],
        ["report", study],
        ["export", study, "--weights", str(tmp_path / "w.npz")],
        ["retry", study],
    ]


def test_a_study_of_another_tool_is_named_as_such(
    settings: Settings, quick: Callable[..., StudySpec], tmp_path: Path
) -> None:
    """It is a row; `best`, `report`, `export`, `retry`, `stop` and `cancel` say so in one line; ours is as ever."""
    run.launch(quick(**TWO), settings, workers=1, publish=False)
    of_another_tool(settings, "theirs")
    states = {row["study"]: row["state"] for row in status(settings)}
    assert states == {"quick": "done", "theirs": "not made by Sieve"}
    asked = [
        sieve(settings, *words) for words in [*on_one(tmp_path, "theirs"), ["stop", "theirs"], ["cancel", "theirs"]]
    ]
    for command in asked:
        _, said = command.communicate(timeout=60)
        assert (command.returncode, len(said.splitlines())) == (2, 1), said
        assert "theirs" in said
        assert "not made by Sieve" in said


def test_names_of_others_do_not_command_the_terminal(settings: Settings) -> None:
    """An escape sequence in a study's name is shown, on a terminal too."""
    settings.home.mkdir()
    serve.open_storage(settings.storage)
    of_another_tool(settings, "\x1b]0;gone\x07\x1b[31mred\u009b2J")
    words = [sys.executable, "-c", "from search.cli import app; app()", "status"]
    given = os.environ | {"SIEVE_HOME": str(settings.home), "FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "200"}
    out = subprocess.run(words, env=given, capture_output=True, check=True).stdout.decode()
    assert "\\x1b]0;gone\\x07\\x1b[31mred\\x9b2J" in out
    assert not {"\x1b]", "\x07", "\x1b[31m", "\u009b"} & {out[i : i + n] for n in (1, 2, 5) for i in range(len(out))}


@pytest.mark.fault
def test_a_service_outlives_its_studies(settings: Settings, quick: Callable[..., StudySpec], tmp_path: Path) -> None:
    """One study that is deleted while it runs, one that nobody can read, then a good one: that one is done."""
    for name, parts in (("unread", TWO), ("gone", LONG), ("good", TWO)):
        serve.enqueue(quick(**parts | {"name": name}), settings)
    spec_attr(settings, "unread", json.dumps("{broken"))
    service = sieve(settings, "serve", "--workers", "1", slices=AN_EPOCH)
    await_slices(settings, service, 2)
    optuna.delete_study(study_name="gone", storage=settings.storage)
    try:
        until(lambda: service.poll() is not None or outcome.standing(settings, "good")[0]["state"] == "done", 90)
        assert service.poll() is None, finish(service)
    finally:
        service.terminate()
        out, said = service.communicate(timeout=60)
    assert "Traceback" not in out + said
    assert "study 'gone'" in out
    assert "study 'unread'" in out
    assert {row["study"] for row in outcome.standing(settings)} == {"unread", "good"}


def test_refused_records_are_seen_beside_unsent_ones(
    settings: Settings, quick: Callable[..., StudySpec], tmp_path: Path
) -> None:
    """A record that MLflow would not take is counted by `status` and, with its reason, by `doctor`."""
    run.launch(quick(**TWO), settings, workers=1, publish=False)
    with Outbox(settings.outbox) as box:
        *others, last = box.pending(1000)
        box.mark_sent([record.id for record in others])
        box.refuse([last.id], "400: no such thing\nsecond line")
    (row,) = status(settings)
    assert (row["unsent"], row["refused"]) == (0, 1)
    asked = sieve(settings, "doctor")
    out, _ = asked.communicate(timeout=120)
    (line,) = [line for line in out.splitlines() if "records refused" in line]
    assert line.startswith("BAD outbox")
    assert "1 records refused by MLflow" in line
    assert "no such thing" in line
    assert "`sieve sync` tries again" in line
    again = sieve(settings, "launch", study_file(tmp_path, **TWO), *QUIETLY)
    assert "refused 1 tracking record" in finish(again)


def test_a_percent_sign_in_the_homes_path_is_itself(tmp_path: Path) -> None:
    """Every store of a home named `50%25 done ü` lies in that folder, and nothing beside it."""
    settings = Settings.from_environment({"SIEVE_HOME": str(tmp_path / "50%25 done ü")})
    command = sieve(settings, "launch", study_file(tmp_path, **TWO), "--workers", "1", "--no-publish")
    said = finish(command)
    assert command.returncode == 0, said
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == ["50%25 done ü", "quick.yaml"]
    assert {"sieve.db", "outbox", "locks"} <= {path.name for path in settings.home.iterdir()}
    assert [row["state"] for row in status(settings)] == ["done"]


def test_a_follower_ends_with_a_study_that_nobody_can_read(settings: Settings, quick: Callable[..., StudySpec]) -> None:
    """`--follow` waits for nothing that can never come."""
    run.launch(quick(**TWO), settings, workers=1, publish=False)
    spec_attr(settings, "quick", json.dumps("{broken"))
    since = time.monotonic()
    followed = sieve(settings, "status", "--follow")
    finish(followed, 30)
    assert (followed.returncode, time.monotonic() - since < 20) == (0, True)
    with pytest.raises(outcome.StudyUnreadable):
        outcome.conclude(outcome.open_study("quick", replace(settings)))
    with Outbox(settings.outbox) as box:
        box.put([study_begun("other", {}, {}, 0.0)])  # records of a study that is in no storage disturb nobody
    assert len(status(settings)) == 1
