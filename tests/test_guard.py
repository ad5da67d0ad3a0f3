"""The guard of the dashboard: over HTTP, on a dashboard of a real study."""

import base64
import http.client
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from search import run
from search.cli import app
from search.errors import SettingsError
from search.settings import Settings
from search.storage import artifacts, open_storage
from search.study import restore
from tests.conftest import QUICK
from tests.stack.conftest import await_port, free_port

PASSWORD = "S3cr3t-canary"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A home with a study and one picture."""
    settings = Settings.from_environment({"SIEVE_HOME": str(tmp_path_factory.mktemp("home"))})
    spec = restore(QUICK | {"search": {"method": "random", "trials": 2}, "confirm": False})
    run.launch(spec, settings, workers=1, publish=False)
    artifacts(settings.trial_artifacts)
    storage = open_storage(settings.storage)
    system = storage.get_trial(1).system_attrs
    (settings.trial_artifacts / json.loads(next(iter(system.values())))["artifact_id"]).write_bytes(b"\x89PNG picture")
    return settings


def start(settings: Settings, port: int, *words: str, **environment: str) -> subprocess.Popen[bytes]:
    given = os.environ | {"SIEVE_HOME": str(settings.home), "SIEVE_STORAGE": settings.storage} | environment
    command = [sys.executable, "-c", "from search.cli import app; app()", "dashboard", "--port", str(port), *words]
    process = subprocess.Popen(command, env=given, stderr=subprocess.PIPE)
    await_port(port)
    return process


@pytest.fixture(scope="module")
def open_port(settings: Settings) -> Iterator[int]:
    port = free_port()
    process = start(settings, port)
    yield port
    process.terminate()
    assert process.wait(10) == 0
    assert process.stderr is not None
    process.stderr.close()


def ask(port: int, method: str, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.putrequest(method, path, skip_host="Host" in named)
        for name, value in named.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:1234", "[::1]:80"])
def test_known_hosts_see_the_study(open_port: int, host: str) -> None:
    """Loopback names are answered, whatever port they name, with headers that keep the page to itself."""
    status, headers, body = ask(open_port, "GET", "/api/studies", Host=host)
    assert status == 200
    assert b'"quick"' in body
    assert headers["x-frame-options"] == "DENY"


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "[", "localhost@evil.example"])
def test_other_hosts_see_nothing(open_port: int, host: str) -> None:
    """A name that somebody made to point here (DNS rebinding) gets no data."""
    status, _, body = ask(open_port, "GET", "/api/studies", Host=host)
    assert status in (400, 403)
    assert b"quick" not in body


@pytest.mark.parametrize("method", ["DELETE", "POST", "PUT", "PATCH", "BREW"])
def test_nothing_can_be_changed(open_port: int, settings: Settings, method: str) -> None:
    """Every method but reading ones is refused, and the study is still there."""
    status, headers, _ = ask(open_port, method, "/api/studies/1")
    assert (status, headers["allow"]) == (405, "GET, HEAD, OPTIONS")
    assert len(open_storage(settings.storage).get_all_studies()) == 1


def test_pictures_of_trials_are_served(open_port: int, settings: Settings) -> None:
    """The page, its scripts and the stored artifacts come through the guard."""
    assert ask(open_port, "GET", "/dashboard")[0] == 200
    storage = open_storage(settings.storage)
    artifact = json.loads(next(iter(storage.get_trial(1).system_attrs.values())))["artifact_id"]
    assert ask(open_port, "GET", f"/artifacts/1/1/{artifact}")[2] == b"\x89PNG picture"


def test_who_may_write_may_not_from_another_page(settings: Settings) -> None:
    """--writable lets this page write, and no page of another origin."""
    port = free_port()
    process = start(settings, port, "--writable")
    try:
        assert ask(port, "PUT", "/api/studies/1/note", Origin="http://evil.example")[0] == 403
        assert ask(port, "PUT", "/api/studies/1/note", Origin=f"http://127.0.0.1:{port}")[0] not in (403, 405)
    finally:
        process.terminate()
        process.communicate()


def test_a_password_is_asked_for(settings: Settings) -> None:
    """Without the right password every path is refused; any user may have it; extra hosts are named by a setting."""
    port = free_port()
    process = start(settings, port, SIEVE_DASHBOARD_PASSWORD=PASSWORD, SIEVE_DASHBOARD_HOSTS="box.example, other")

    def status(authorization: str) -> int:
        return ask(port, "GET", "/api/studies", Host="box.example", Authorization=authorization)[0]

    def basic(text: str) -> str:
        return "Basic " + base64.b64encode(text.encode()).decode()

    try:
        assert ask(port, "GET", "/static/bundle.js")[0] == 401
        assert "basic" in ask(port, "GET", "/dashboard")[1]["www-authenticate"].lower()
        assert status(basic(f"anyone:{PASSWORD}")) == 200
        wrong = [basic("anyone:"), basic(PASSWORD), "Basic ", "Basic !!", f"Bearer {PASSWORD}", basic(f"a:{PASSWORD}x")]
        assert {status(one) for one in wrong} == {401}
        listing = subprocess.run(["ps", "-ww", "-o", "args", "-p", str(process.pid)], capture_output=True, text=True)
        assert PASSWORD not in listing.stdout
    finally:
        process.terminate()
        process.communicate()


def test_others_can_not_reach_it_without_a_password(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listening elsewhere than on loopback needs a password, or the word that only this machine can reach it."""
    from typer.testing import CliRunner

    monkeypatch.setenv("SIEVE_HOME", str(settings.home))
    monkeypatch.delenv("SIEVE_DASHBOARD_PASSWORD", raising=False)
    result = CliRunner().invoke(app, ["dashboard", "--host", "0.0.0.0"])
    assert result.exit_code == 2
    assert "SIEVE_DASHBOARD_PASSWORD" in result.output


def test_the_ui_keeps_passwords_off_command_lines(tmp_path: Path) -> None:
    """`sieve ui` starts its servers with their addresses in the environment."""
    from search import ui

    tracking = f"postgresql://mlflow:{PASSWORD}@127.0.0.1/mlflow"
    storage = f"postgresql://sieve:{PASSWORD}@127.0.0.1/sieve"
    given = {"SIEVE_HOME": str(tmp_path), "SIEVE_STORAGE": storage, "MLFLOW_TRACKING_URI": tracking}
    settings = Settings.from_environment(given)
    assert PASSWORD not in " ".join([*ui.mlflow_command(settings, 1), *ui.dashboard_command(2)])


def test_a_taken_port_is_named_with_the_option_that_moves_it(tmp_path: Path) -> None:
    """Before anything starts, or another program's page would be announced as ours; nothing is made at home."""
    from search import ui

    settings = Settings.from_environment({"SIEVE_HOME": str(tmp_path / "home")})
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = other.getsockname()[1]
        with pytest.raises(SettingsError, match=f"port {port}: Address already in use; .*--mlflow-port"):
            ui.serve(settings, port, port + 1, print)
        with pytest.raises(SettingsError, match="--dashboard-port"):
            ui.serve(settings, free_port(), port, print)
    assert not settings.home.exists()
