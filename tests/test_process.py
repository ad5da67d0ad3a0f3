"""What commands owe their machine: they end when told to, leave nothing behind, and need nobody to listen."""

import errno
import os
import pty
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from search import outcome, process
from search.settings import Settings
from tests.processes import AN_EPOCH, await_slices, family, finish, sieve, study_file
from tests.servers import free_port, until
from tests.test_status import LONG, QUIETLY, TWO

DEAD = "http://127.0.0.1:9"  # where no proxy listens
PROXIES = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), DEAD)
PROXIES |= {"no_proxy": "intranet.example", "NO_PROXY": "intranet.example"}


@pytest.mark.fault
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT])
def test_the_end_of_a_session_saves_what_runs(settings: Settings, tmp_path: Path, number: signal.Signals) -> None:
    """Sent to all processes, and SIGHUP twice, as a closing terminal does: the slices end and are saved."""
    runner = sieve(settings, "launch", study_file(tmp_path, **LONG), *QUIETLY, slices=AN_EPOCH)
    await_slices(settings, runner, 2)
    for _ in range(2 if number == signal.SIGHUP else 1):
        os.killpg(runner.pid, number)
        time.sleep(0.05)
    said = finish(runner, 30)
    assert (runner.returncode, "goes on from here" in said) == (130, True), said
    assert outcome.standing(settings)[0]["state"] == "stopped"


@pytest.mark.fault
def test_a_study_under_nohup_outlives_its_terminal(settings: Settings, tmp_path: Path) -> None:
    """SIGHUP that was ignored at the start stays so."""
    runner = sieve(settings, "launch", study_file(tmp_path, **LONG), *QUIETLY, slices=AN_EPOCH, before=["nohup"])
    await_slices(settings, runner, 1)
    os.killpg(runner.pid, signal.SIGHUP)
    await_slices(settings, runner, 20)
    runner.terminate()
    assert finish(runner)
    assert runner.returncode == 130


@pytest.mark.fault
def test_a_terminal_that_is_gone_takes_no_study_along(settings: Settings, tmp_path: Path) -> None:
    """On a terminal whose other end is closed, with SIGHUP ignored, the study goes on to its end."""
    ours, theirs = pty.openpty()
    words = ["launch", str(study_file(tmp_path, **LONG | {"search": {"method": "random", "trials": 1}})), *QUIETLY]
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); from search import runner; "
    code += f"runner.SLICE_SECONDS = {AN_EPOCH}; runner.FIRST_RATE = 1e8; from search.cli import app; app()"
    runner = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        env=os.environ | {"SIEVE_HOME": str(settings.home), "TERM": "xterm"},
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    os.read(ours, 1)
    os.close(ours)  # from here on every write is EIO
    assert runner.wait(120) == 0
    assert outcome.standing(settings)[0]["state"] == "done"


@pytest.mark.fault
def test_a_pipe_that_nobody_reads_takes_no_study_along(settings: Settings, tmp_path: Path) -> None:
    """`sieve launch 2>&1 | true` is done, and `sieve status | true` says nothing of a broken pipe."""
    file = study_file(tmp_path, **TWO)
    script = 'set -o pipefail; sieve() { "$0" -c "from search.cli import app; app()" "$@"; }; '
    given = os.environ | {"SIEVE_HOME": str(settings.home)}
    launched = subprocess.run(
        ["bash", "-c", f"{script} sieve launch {file} {' '.join(QUIETLY)} 2>&1 | true", sys.executable],
        env=given, check=False,
    )  # fmt: skip
    assert launched.returncode == 0
    assert outcome.standing(settings)[0]["state"] == "done"
    for words in ("status", "best quick", "doctor"):
        command = ["bash", "-c", f"{script} sieve {words} | true", sys.executable]
        assert subprocess.run(command, env=given, check=False, capture_output=True).stderr == b""


@pytest.mark.parametrize(
    "given", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}]
)
def test_an_output_that_knows_few_characters_gets_those(
    settings: Settings, tmp_path: Path, given: dict[str, str]
) -> None:
    """A finished study with means and deviations exits with 0 where `±` cannot be written."""
    parts = {"search": {"method": "random", "trials": 2}, "confirm": {"top": 1, "repeats": 2}}
    command = sieve(settings, "launch", study_file(tmp_path, **parts), *QUIETLY, **given)
    out, said = command.communicate(timeout=120)
    assert command.returncode == 0, said
    assert "mean and deviation of" in out
    assert "±" not in out


def test_a_home_is_its_users_and_what_was_asked_for_is_not(settings: Settings, tmp_path: Path) -> None:
    """Under umask 022, in a home that was there before, all that is made is private; an export is as umask says."""
    settings.home.mkdir(mode=0o755)
    file, weights, pages = study_file(tmp_path, **TWO), tmp_path / "w.npz", tmp_path / "pages"
    before = os.umask(0o022)
    try:
        for words in (
            ["launch", file, "--workers", "1"],
            ["export", "quick", "--weights", weights],
            ["report", "quick"],
            ["report", "quick", "--out", pages],
        ):
            said = finish(command := sieve(settings, *map(str, words)))
            assert command.returncode == 0, said
    finally:
        os.umask(before)
    open_to_others = [path for path in settings.home.rglob("*") if stat.S_IMODE(path.lstat().st_mode) & 0o077]
    assert not open_to_others
    assert stat.S_IMODE(weights.stat().st_mode) == 0o644
    assert {stat.S_IMODE(path.stat().st_mode) for path in pages.iterdir()} == {0o644}
    fresh = Settings.from_environment({"SIEVE_HOME": str(tmp_path / "fresh")})
    finish(sieve(fresh, "launch", file, *QUIETLY))
    assert stat.S_IMODE(fresh.home.stat().st_mode) == 0o700


def test_loopback_is_added_to_what_needs_no_proxy() -> None:
    """What was named stays, whichever spelling it had; a star is all already."""
    for given in ({"no_proxy": "a.example, b"}, {"NO_PROXY": "a.example,b"}):
        process.spare_loopback(given)
        assert given["no_proxy"] == given["NO_PROXY"] == "a.example,b,localhost,127.0.0.1,127.0.0.0/8,::1,[::1]"
        process.spare_loopback(given)
        assert given["no_proxy"].count("localhost") == 1
    star = {"no_proxy": "*"}
    process.spare_loopback(star)
    assert star == {"no_proxy": "*"}


# ---- sieve ui


def pages(settings: Settings, **given: str) -> tuple[subprocess.Popen[str], list[int]]:
    """`sieve ui` once both pages answer, and their ports."""
    ports = [free_port(), free_port()]
    words = ["ui", "--mlflow-port", str(ports[0]), "--dashboard-port", str(ports[1])]
    ui = sieve(settings, *words, PYTHONUNBUFFERED="1", **given)
    assert ui.stdout is not None
    said = [line for line, _ in zip(iter(ui.stdout.readline, ""), range(2), strict=False)]
    assert len(said) == 2, finish(ui)
    return ui, ports


def host_is_answered(port: int, host: str) -> int:
    """The status that MLflow gives to a question that came under that name."""
    with closing(socket.create_connection(("127.0.0.1", port), 30)) as connection:
        ask = (
            f"GET /api/2.0/mlflow/experiments/get?experiment_id=0 HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
        )
        connection.sendall(ask.encode())
        return int(connection.makefile("rb").readline().split()[1])


@pytest.mark.slow
@pytest.mark.stack
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT, signal.SIGKILL])
def test_no_page_outlives_the_command(new_home: Callable[[str], Settings], number: signal.Signals) -> None:
    """Whatever ends `sieve ui`, both servers and all below them end; behind a dead proxy they began all the same."""
    ui, (mlflow, _) = pages(new_home("home"), **PROXIES)
    below = family(ui.pid)[1:]
    try:
        assert len(below) > 2
        assert host_is_answered(mlflow, f"localhost:{mlflow}") == 200
        assert host_is_answered(mlflow, "10.anything.example") == 403
        ui.send_signal(number)
        said = finish(ui, 60)
        until(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in below), 30)
        assert ui.returncode == (-9 if number == signal.SIGKILL else 0), said
    finally:
        for one in below:
            with suppress(psutil.NoSuchProcess):
                one.kill()


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["ui", "--mlflow-port", "70000"], "--mlflow-port"),
        (["ui", "--dashboard-port", "-1"], "--dashboard-port"),
        (["ui", "--mlflow-port", "8080"], "--mlflow-port"),
        (["dashboard", "--port", "70000"], "--port"),
        (["dashboard", "--host", "no such host", "--open"], "no such host"),
    ],
)
def test_a_port_that_cannot_be_is_one_line(settings: Settings, words: list[str], option: str) -> None:
    """It names the option and exits with 2."""
    said = finish(command := sieve(settings, *words), 60)
    assert (command.returncode, len(said.splitlines())) == (2, 1), said
    assert option in said


def test_streams_lose_only_what_nobody_can_read(tmp_path: Path) -> None:
    """A closed pipe is no error of stdout's, a full disk is one, and stderr forgives both."""
    code = """
import errno, os, sys
from search import process
process.outlast_readers()
print("x" * 100000); sys.stdout.flush()
for stream in (sys.stdout, sys.stderr):
    os.dup2(os.open("/dev/full", os.O_WRONLY), stream.fileno())
    try:
        print("y", file=stream); stream.flush()
    except OSError as error:
        os.write(3, errno.errorcode[error.errno].encode() + stream.name.__repr__().encode())
os._exit(0)
"""
    reading, writing = os.pipe()
    os.close(reading)
    with (tmp_path / "told").open("wb") as told:
        command = f"exec 3>{tmp_path / 'told'}; exec {sys.executable} -c '{code}'"
        subprocess.run(["bash", "-c", command], stdout=writing, stderr=subprocess.DEVNULL, check=True)
        os.close(writing)
        assert told.name
    assert (tmp_path / "told").read_text() == f"{errno.errorcode[errno.ENOSPC]}1"


def test_a_dashboard_ends_when_its_terminal_does(settings: Settings) -> None:
    """SIGHUP ends it as Ctrl-C does, with exit code 0."""
    port = free_port()
    board: Any = sieve(settings, "dashboard", "--port", str(port))

    def answers() -> bool:
        with suppress(OSError), closing(socket.create_connection(("127.0.0.1", port), 1)):
            return True
        return board.poll() is not None

    until(answers)
    board.send_signal(signal.SIGHUP)
    assert (finish(board, 30), board.returncode) == ("", 0)
