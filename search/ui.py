"""`sieve ui`: MLflow's server and the Optuna dashboard on the embedded stores, both on loopback."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from search import COMMAND, ROOT, embedded
from search.errors import SettingsError, SieveError
from search.outbox import Outbox
from search.process import on_end
from search.settings import Settings

LOOK_SECONDS = 1.0  # between looks whether MLflow has another study
START_SECONDS = 180.0  # MLflow's server takes 6 s alone, and half a minute beside a running study


def serve(settings: Settings, mlflow_port: int, dashboard_port: int, say: Callable[[str], None]) -> None:
    """Start both, wait until both answer, say where, and end both on Ctrl-C.

    What waits to be sent to MLflow is sent meanwhile; the link of a study is said once MLflow has it.
    Raises SettingsError if a port is taken, SieveError if one ends early.
    """
    from search.storage import open_storage

    pages = {"Optuna dashboard": (dashboard_command(dashboard_port), f"http://127.0.0.1:{dashboard_port}")}
    if not settings.tracking_uri.startswith("http"):
        pages = {"MLflow": (mlflow_command(settings, mlflow_port), f"http://127.0.0.1:{mlflow_port}")} | pages
        _check_free(mlflow_port, "--mlflow-port")
        if mlflow_port == dashboard_port:
            raise SettingsError(f"--mlflow-port and --dashboard-port: expected two ports, got {mlflow_port} for both")
    _check_free(dashboard_port, "--dashboard-port")
    settings.make_home()
    settings.trial_artifacts.mkdir(exist_ok=True)
    open_storage(settings.storage)  # the dashboard refuses a database without tables
    embedded.prepare(settings)  # here, and not by a server that may be ended within it
    environment = os.environ | {
        "PYTHONSAFEPATH": "1",  # no module of the current folder is imported ...
        "UVICORN_APP_DIR": str(ROOT),  # ... which uvicorn, below MLflow, would put first
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_BACKEND_STORE_URI": settings.tracking_uri,  # not on the command line: it may hold a password
        "SIEVE_HOME": str(settings.home),
        "SIEVE_STORAGE": settings.storage,
    }
    with Outbox(settings.outbox) as box:
        unsent = box.unsent()
    on_end(signal.default_int_handler)  # a shell may have left SIGINT ignored
    with (settings.home / "ui.log").open("wb") as log, _ending_children() as entrust:

        def begin(command: Sequence[str]) -> subprocess.Popen[bytes]:
            return entrust(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))

        try:
            servers = {name: begin(command) for name, (command, _) in pages.items()}
            for name, (_, address) in pages.items():
                _await_answer(name, servers[name], address)
            for name, (_, address) in pages.items():
                say(f"{name}: {address}")
            for line in elsewhere(settings, {name: address for name, (_, address) in pages.items()}):
                say(line)
            if unsent:
                begin([*COMMAND, "sync"])
            _say_links(replace(settings, mlflow_ui=pages.get("MLflow", ("", settings.mlflow_ui))[1]), servers, say)
            raise SieveError(f"one of the servers ended by itself; {settings.home / 'ui.log'} says why")
        except KeyboardInterrupt:
            say("ended")


# A process of its own: it gets the ids of children, one a line, and ends them and theirs when its input ends, however
# that comes about. It waits for them to be gone before it does.
UNDERTAKER = """
import os, signal, sys, time
groups = [int(line) for line in sys.stdin]
for number, seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, 5)):
    until = time.monotonic() + seconds
    for group in list(groups):
        try:
            os.killpg(group, number)
        except ProcessLookupError:
            groups.remove(group)
    while groups and time.monotonic() < until:
        time.sleep(0.05)
        for group in list(groups):
            try:
                os.killpg(group, 0)
            except ProcessLookupError:
                groups.remove(group)
"""

Child = subprocess.Popen[bytes]


@contextmanager
def _ending_children() -> Iterator[Callable[[Child], Child]]:
    """Hand children over that lead process groups: all of them end with this block, or with this process (SIGKILL)."""
    undertaker = subprocess.Popen(
        [sys.executable, "-I", "-c", UNDERTAKER], stdin=subprocess.PIPE, start_new_session=True
    )
    assert undertaker.stdin is not None
    register, children = undertaker.stdin, list[Child]()

    def entrust(child: Child) -> Child:
        children.append(child)
        register.write(f"{child.pid}\n".encode())
        register.flush()
        return child

    try:
        yield entrust
    finally:
        register.close()
        while undertaker.poll() is None:
            for child in children:
                child.poll()  # a child that nobody asked for counts as there
            time.sleep(0.05)


def _say_links(settings: Settings, servers: Mapping[str, subprocess.Popen[bytes]], say: Callable[[str], None]) -> None:
    """Each study's link, now or as soon as MLflow has the study, while all servers live."""
    said = study_links(settings)
    for line in [*said, "Ctrl-C ends both"]:
        say(line)
    while all(server.poll() is None for server in servers.values()):
        time.sleep(LOOK_SECONDS)
        new = [line for line in study_links(settings) if line not in said]
        for line in new:
            say(line)
        said += new


def elsewhere(settings: Settings, pages: Mapping[str, str]) -> list[str]:
    """What to set so that the links from one UI into the other lead to these addresses."""
    wanted = {"MLflow": ("SIEVE_MLFLOW_UI", settings.mlflow_ui)}
    wanted["Optuna dashboard"] = ("SIEVE_DASHBOARD_UI", settings.dashboard_ui)
    moved = [f"{wanted[name][0]}={address}" for name, address in pages.items() if wanted[name][1] != address]
    return [f"links within the pages lead elsewhere; launch studies with {' '.join(moved)}"] if moved else []


def study_links(settings: Settings) -> list[str]:
    """Where MLflow shows the charts of each study: its own start page shows none of them."""
    from search import tracking

    with Outbox(settings.outbox) as box:
        names, shown = box.names(), {uid: experiment for uid, (experiment, _) in box.links().items() if "/" not in uid}
    newest = {name: study for study, name in names.items()}
    lines = []
    for study, name in names.items():
        if study in shown:
            label = name if newest[name] == study else f"{name} ({study[:8]})"
            lines.append(f"  {label}: {tracking.links(settings, shown[study])['charts']}")
    return lines


def mlflow_command(settings: Settings, port: int) -> list[str]:
    """One worker: uvicorn kills workers of a group that do not answer within 5 s on a busy machine."""
    return [
        str(Path(sys.executable).with_name("mlflow")),
        "server",
        *("--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--artifacts-destination", str(settings.artifacts)),
        *("--allowed-hosts", "localhost:*,127.0.0.1:*"),  # its default lets names in that lead anywhere
    ]


def dashboard_command(port: int) -> list[str]:
    return [*COMMAND, "dashboard", "--port", str(port)]


def dashboard(
    settings: Settings,
    host: str,
    port: int,
    *,
    writable: bool = False,
    open_: bool = False,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Serve the Optuna dashboard behind our guard until SIGTERM or Ctrl-C.

    Elsewhere than on loopback it asks for SIEVE_DASHBOARD_PASSWORD, unless it is `open_`: published on
    loopback only, by a container's engine. Raises SettingsError.
    """
    import optuna_dashboard
    import waitress

    from search.guard import LOOPBACK, guard
    from search.storage import artifacts, open_storage

    _check_port(port, "--port")
    password = environment.get("SIEVE_DASHBOARD_PASSWORD") or None
    if host not in LOOPBACK and password is None and not open_:
        raise SettingsError(
            f"--host {host}: others could reach the dashboard; set SIEVE_DASHBOARD_PASSWORD, or say --open "
            "where only this machine can"
        )
    hosts = {*LOOPBACK, *environment.get("SIEVE_DASHBOARD_HOSTS", "").replace(",", " ").split()} | {host}
    app = optuna_dashboard.wsgi(open_storage(settings.storage), artifact_store=artifacts(settings.trial_artifacts))
    on_end(signal.default_int_handler)
    guarded = guard(app, hosts=hosts, password=password, writable=writable)
    try:
        waitress.serve(guarded, host=host, port=port, threads=8, ident=None, _quiet=True)
    except (OSError, ValueError) as error:
        raise SettingsError(f"the dashboard cannot listen at {host}:{port}: {error}") from None


def _check_port(port: int, option: str) -> None:
    if not 0 < port < 1 << 16:
        raise SettingsError(f"{option}: expected a port from 1 to 65535, got {port}")


def _check_free(port: int, option: str) -> None:
    _check_port(port, option)
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:
        raise SettingsError(f"port {port}: {os.strerror(error.errno or 0)}; choose another with {option}") from None


def _await_answer(name: str, server: subprocess.Popen[bytes], address: str) -> None:
    directly = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has no way to our loopback
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with directly.open(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise SieveError(f"{name} did not answer at {address}; ui.log at home says why")
