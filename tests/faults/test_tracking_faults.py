"""What training notices of a tracking server that is dead, hung or slow: nothing; and what is lost: nothing."""

import shutil
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from search import run, runner, tracking
from search.outbox import Outbox, progress_points
from search.settings import Settings
from search.study import restore
from tests.conftest import QUICK
from tests.oracle import verdict
from tests.processes import AN_EPOCH, await_slices, finish, publisher, send, sieve, study_file
from tests.servers import Server, free_port, now_and_then, proxy, rule, until
from tests.test_tracking import OLD_LOADER, begun, everything, files, points, put, runs, trial

STALL = 0.050  # seconds that tracking may take between a slice's end and the next slice
LONG: dict[str, Any] = {
    "dataset": {"name": "digits", "train": 1000, "validation": 100, "test": 100, "split": "last"},
    "base": {"batch_size": 5, "epochs": 80},
    "space": {"eta": {"low": 1e-4, "high": 1e-2, "log": True}, "hidden_sizes": [[60]]},
    "search": {"method": "random", "trials": 3},
    "confirm": False,
}

Calms = Callable[..., Any]
Figures = Callable[..., None]

pytestmark = [
    pytest.mark.fault,
    pytest.mark.slow,
    pytest.mark.filterwarnings(f"{OLD_LOADER}:sqlalchemy.exc.SADeprecationWarning"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, new_mlflow: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(new_mlflow, folder / "server.db")
    server = Server(folder, free_port())
    server.start()
    yield server
    server.kill()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return study_file(tmp_path)


def unsent(settings: Settings) -> int:
    with Outbox(settings.outbox) as box:
        return box.unsent()


@pytest.mark.long
@pytest.mark.parametrize("how", ["dead", "hung", "slow"])
def test_training_does_not_wait_for_tracking(
    settings: Settings, server: Server, how: str, monkeypatch: pytest.MonkeyPatch, calm: Calms, figures: Figures
) -> None:
    """Refused, never answered, or 200 ms and 10 kB/s: putting a slice's records away takes as long as ever."""
    spent: list[float] = []

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*given: Any) -> Any:
            begun = time.perf_counter()
            result = call(*given)
            spent.append(time.perf_counter() - begun)
            return result

        return wrapper

    monkeypatch.setattr(Outbox, "put", timed(Outbox.put))
    monkeypatch.setattr(Outbox, "links", timed(Outbox.links))  # read for the dashboard's notes
    monkeypatch.setattr(runner, "SLICE_SECONDS", 0.1)
    monkeypatch.setattr(runner, "FIRST_RATE", 1e8)
    monkeypatch.setattr(run, "PUBLISHER_SECONDS", 0.0)
    slow = {"latency": 0.2, "rate": 10_000.0} if how == "slow" else {}
    with proxy(server.port, rule(api="hang") if how == "hung" else rule(), **slow) as address:
        away = address if how != "dead" else f"http://127.0.0.1:{free_port()}"
        found = run.launch(restore(QUICK | LONG | {"name": how}), replace(settings, tracking_uri=away), workers=1)
    worst, usual = max(spent), statistics.median(spent)
    assert found.unsent > 0  # the fault was there to the end
    assert len(spent) > 20
    assert statistics.quantiles(spent, n=20)[-1] < STALL
    assert worst < 1  # one wait for the disk of a busy machine, where a wait for the server would be ten seconds
    tracking.publish(replace(settings, tracking_uri=server.uri))
    found_ = verdict(settings, how, calm(**LONG).results, server.database)
    stall = f"{len(spent)} calls: {1000 * usual:.1f} ms usually, {1000 * worst:.1f} ms at worst"
    figures(f"tracking server {how} during the study", found_, also=stall)


@pytest.mark.long
def test_a_server_that_never_comes_back_costs_a_warning(
    settings: Settings, file: Path, new_home: Callable[[str], Settings], calm: Calms, figures: Figures
) -> None:
    """The study completes with exit code 0 and says how many records wait and what sends them; later it does."""
    away = replace(settings, tracking_uri=f"http://127.0.0.1:{free_port()}")
    said = finish(launched := sieve(away, "launch", file, patience=1))
    left = unsent(settings)
    assert launched.returncode == 0, said
    assert left >= 16 * 4  # each trial's beginning, curve, picture and end
    assert f"warning: {left} tracking records are not sent yet; `sieve sync` sends them" in said
    there = new_home("there")
    back = replace(settings, tracking_uri=there.tracking_uri)
    since = time.monotonic()
    out, said = (synced := sieve(back, "sync")).communicate(timeout=120)
    recovery = time.monotonic() - since
    assert (synced.returncode, out) == (0, "everything is sent\n"), said
    found = verdict(back, "quick", calm().results, there.home / "mlflow.db")
    figures("tracking server never comes back", found, recovery=recovery, also=f"{left} records sent later")
    (summary,) = runs(back.tracking_uri, "quick", kind="summary")
    assert files(back.tracking_uri, summary.info.run_id) == ["report.html", "summary.json"]


@pytest.mark.long
def test_what_a_killed_runner_had_not_sent_arrives_later(
    settings: Settings, tmp_path: Path, new_home: Callable[[str], Settings], calm: Calms, figures: Figures
) -> None:
    """Killed after trials were told and before anything was sent: each has one run with every point it had recorded."""
    parts = LONG | {"base": {"batch_size": 5, "epochs": 40}}
    path = study_file(tmp_path, **parts)
    away = replace(settings, tracking_uri=f"http://127.0.0.1:{free_port()}")
    launched = sieve(away, "launch", path, "--workers", "1", SIEVE_FAILPOINT="told:2")
    until(lambda: len(publisher(launched.pid)) > 0)
    (sender,) = publisher(launched.pid)
    said = finish(launched)
    assert launched.returncode == -signal.SIGKILL, said
    with suppress(psutil.NoSuchProcess):
        sender.kill()
    waiting, there = unsent(settings), new_home("there")
    assert waiting >= 3 * 3
    back = replace(settings, tracking_uri=there.tracking_uri)
    said = finish(resumed := sieve(back, "launch", path, "--workers", "1"))
    assert resumed.returncode == 0, said
    tracking.publish(back)
    found_ = verdict(back, "quick", calm(**parts).results, there.home / "mlflow.db")
    figures("killed after trials were told, nothing sent", found_, also=f"{waiting} records waited")
    found = runs(back.tracking_uri, "quick")
    assert [r.data.tags["slot"] for r in found] == [f"s0.i{i}.r0" for i in range(3)]
    with Outbox(settings.outbox) as box:
        for r in found:
            recorded = [step for step, _, _ in progress_points(box.records(r.data.tags["sieve.uid"]))]
            assert recorded == list(range(1, 41))
            assert [step for step, _, _ in points(back.tracking_uri, r.info.run_id, "loss/val")] == recorded


@pytest.mark.long
def test_a_slow_line_only_takes_longer(settings: Settings, server: Server) -> None:
    """Over 200 ms and 10 kB/s one trial arrives whole, its end last."""
    put(settings, begun("line"), *trial(0, "line"))
    requests: list[str] = []

    def listen(request: str) -> str:
        requests.append(request.rpartition(" ")[0])
        return "pass"

    since = time.monotonic()
    with proxy(server.port, listen, latency=0.2, rate=10_000) as address:
        assert tracking.publish(replace(settings, tracking_uri=address)) == 0
    print(f"{len(requests)} requests in {time.monotonic() - since:.1f} s")
    (found,) = runs(server.uri, "line")
    assert found.info.status == "FINISHED"
    assert len(points(server.uri, found.info.run_id, "loss/val")) == 4
    assert "weights.npz" in files(server.uri, found.info.run_id)
    changes = [r for r in requests if r.startswith(("POST", "PUT", "PATCH")) and "search" not in r]
    assert changes[-1] == "POST /api/2.0/mlflow/runs/update"


def test_a_point_that_comes_late_leaves_the_status_alone(
    settings: Settings, new_home: Callable[[str], Settings]
) -> None:
    """A finished run takes the rest of its curve and keeps status and end time; three passes are as good as one."""
    home = new_home("late")
    first, *between, last = trial(0)
    late = [r for r in between if r.kind == "trial_progress"][-1]
    put(home, begun(), first, *[r for r in between if r is not late], last)
    assert tracking.publish(home) == 0
    (before,) = everything(home.tracking_uri)
    put(home, late)
    for _ in range(3):
        assert tracking.publish(home) == 0
        (after,) = everything(home.tracking_uri)
        assert after[:2] == before[:2]
        assert [step for step, _, _ in after[4]["loss/val"]] == [1, 2, 3, 4]
        tracking.redo(home)


THREE: dict[str, Any] = {"search": {"method": "random", "trials": 3}, "confirm": False}


@pytest.mark.long
@pytest.mark.parametrize(
    ("fault", "share", "kinds"),
    [
        ("replies lost", 0.3, ["lose"]),
        ("connections reset", 0.3, ["reset"]),
        ("answers of 500, 503 and 429", 0.4, ["500", "503", "429"]),
        ("all of these at once", 0.3, ["lose", "reset", "500", "503"]),
    ],
)
def test_a_server_that_misbehaves_gets_everything_once(
    settings: Settings,
    tmp_path: Path,
    server: Server,
    calm: Calms,
    figures: Figures,
    fault: str,
    share: float,
    kinds: list[str],
) -> None:
    """Whatever happens to a third of all requests: one experiment, one run for each trial, every point once."""
    name, hit = fault.replace(" ", "-").replace(",", ""), list[str]()
    chosen = now_and_then(share, *kinds)

    def listen(request: str) -> str:
        hit.append(chosen(request))
        return hit[-1]

    with proxy(server.port, listen) as address:
        away, since = replace(settings, tracking_uri=address), time.monotonic()
        launched = sieve(away, "launch", study_file(tmp_path, name=name, **THREE), "--workers", "2", patience=5)
        said = finish(launched)
        assert launched.returncode == 0, said
        until(lambda: tracking.publish(away) == 0, 120)
    faults = sum(what != "pass" for what in hit)
    assert faults >= 3
    found = verdict(settings, name, calm(**THREE).results, server.database)
    figures(
        f"tracking: {fault}", found, faults, also=f"of {len(hit)} requests, {time.monotonic() - since:.0f} s in all"
    )


@pytest.mark.long
def test_a_publisher_may_die_between_any_two_requests(
    new_home: Callable[[str], Settings], tmp_path: Path, calm: Calms, figures: Figures
) -> None:
    """Killed after it made a run, after it sent values, and before it noted so; then three passes over everything."""
    settings = new_home("home")
    finish(sieve(settings, "launch", study_file(tmp_path, **THREE), "--workers", "2", "--no-publish"))
    points = ("created:1", "created:2", "logged:1", "sent:2")
    for point in points:
        synced = sieve(settings, "sync", SIEVE_FAILPOINT=point)
        said = finish(synced)
        assert synced.returncode == -signal.SIGKILL, (point, said)
    for again in ([], ["--redo"], ["--redo"]):
        send(settings, *again)
        found = verdict(settings, "quick", calm(**THREE).results, settings.home / "mlflow.db")
        assert not any(found), found
    figures("publisher killed between two requests", found, len(points), also="all sent three times")


@pytest.mark.long
def test_a_server_that_was_away_gets_everything(
    settings: Settings, tmp_path: Path, server: Server, calm: Calms, figures: Figures
) -> None:
    """Killed in the middle of a study and away for half a minute, the server has every point soon after it is back."""
    away = replace(settings, tracking_uri=server.uri)
    parts = LONG | {"search": {"method": "random", "trials": 6}}
    path = study_file(tmp_path, name="away", **parts)
    launched = sieve(away, "launch", path, "--workers", "2", slices=AN_EPOCH, patience=300)
    await_slices(settings, launched, 1)
    server.kill()
    time.sleep(30)
    server.start()
    since = time.monotonic()
    said = finish(launched)
    recovery = time.monotonic() - since
    assert (launched.returncode, unsent(settings)) == (0, 0), said
    assert tracking.publish(away) == 0
    found = verdict(settings, "away", calm(**parts).results, server.database)
    figures("tracking server killed, back after 30 s", found, recovery=recovery)
