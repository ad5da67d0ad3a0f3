"""`sieve doctor`: each part that a study needs is looked at where it is, and a finding says what to do."""

import sqlite3
import subprocess
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from search import doctor
from search.outbox import Outbox, study_begun
from search.settings import Settings
from search.storage import open_storage
from tests.processes import sieve


def by_part(settings: Settings) -> dict[str, list[doctor.Finding]]:
    found: dict[str, list[doctor.Finding]] = {}
    for finding in doctor.examine(settings):
        found.setdefault(finding.what, []).append(finding)
    return found


def test_a_new_home_is_fine_and_stays_away(settings: Settings) -> None:
    """Before the first launch every part is fine, workers have one BLAS thread, and nothing is made."""
    found = by_part(settings)
    assert {part for part, findings in found.items() if not all(finding.ok for finding in findings)} <= {"blas"}
    assert "threads: 1" in found["blas"][0].text
    assert {"home", "storage", "mlflow", "data", "outbox", "executor", "versions"} <= found.keys()
    assert not settings.home.exists()


def test_what_is_down_is_named_with_what_to_do(settings: Settings) -> None:
    """A tracking server, a database and a scheduler that do not answer, and records not sent, one line each."""
    given = {
        "SIEVE_HOME": str(settings.home),
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
        "SIEVE_EXECUTOR": "dask://127.0.0.1:9",
        "SIEVE_STORAGE": "postgresql://sieve:S3cr3t-canary@127.0.0.1:9/sieve",
    }
    with closing(Outbox(settings.outbox)) as box:
        box.put([study_begun("a", {}, {}, 0.0)])
    pytest.importorskip("psycopg")
    pytest.importorskip("distributed")
    found = by_part(Settings.from_environment(given))
    bad = {part: str(findings[0]) for part, findings in found.items() if not findings[0].ok}
    assert bad.keys() == {"storage", "mlflow", "outbox", "executor"}
    assert "correct SIEVE_STORAGE" in bad["storage"]
    assert "`sieve sync`" in bad["outbox"]
    assert "dask scheduler" in bad["executor"]
    assert "correct MLFLOW_TRACKING_URI" in bad["mlflow"]
    assert "S3cr3t-canary" not in str(found)
    assert not any("\n" in line for line in bad.values())


def test_a_store_that_is_there_is_opened(settings: Settings) -> None:
    """An existing storage is opened and its studies are counted."""
    settings.home.mkdir()
    open_storage(settings.storage)
    assert "0 studies" in by_part(settings)["storage"][0].text


class NeedsPassword(BaseHTTPRequestHandler):
    """Answers the question of a client that knows the user and the password, or the token."""

    def do_POST(self) -> None:
        knows = self.headers.get("Authorization") in (f"Basic {b64encode(b'ann:S3cr3t-canary').decode()}", "Bearer tok")
        body = b'{"experiments": []}' if knows else b"who are you?"
        self.send_response(200 if knows else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def port() -> Iterator[int]:
    """Of an HTTP server that demands basic authentication."""
    with ThreadingHTTPServer(("127.0.0.1", 0), NeedsPassword) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


DEAD = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
KNOWN = {"MLFLOW_TRACKING_USERNAME": "ann", "MLFLOW_TRACKING_PASSWORD": "S3cr3t-canary"}


@pytest.mark.parametrize(
    ("uri", "given", "words"),
    [
        ("http://127.0.0.1:{port}", KNOWN, "answers"),
        ("http://localhost:{port}/", KNOWN, "answers"),
        ("http://ann:S3cr3t-canary@127.0.0.1:{port}", {}, "answers"),
        ("http://127.0.0.1:{port}", {"MLFLOW_TRACKING_TOKEN": "tok"}, "answers"),
        ("http://127.0.0.1:{port}", {}, "answers 401"),
        ("http://ann:S3cr3t-wrong@127.0.0.1:{port}", {}, "answers 401"),
        ("http://ann:S3cr3t-canary@127.0.0.1:9", {}, "Connection refused"),
        ("http://ann:S3cr3t-canary@no-such-host.invalid:{port}", {}, "does not answer"),
    ],
)
def test_a_server_is_asked_as_the_client_asks_it(
    settings: Settings, port: int, uri: str, given: dict[str, str], words: str
) -> None:
    """With its credentials, wherever they stand, past any proxy on loopback, and no password is printed."""
    address = replace(settings, tracking_uri=uri.format(port=port))
    asked = sieve(address, "doctor", **DEAD | given)
    out, said = asked.communicate(timeout=120)
    (line,) = [line for line in out.splitlines() if line[4:].startswith("mlflow ")]
    assert line.startswith("ok " if words == "answers" else "BAD"), out + said
    assert words in line
    assert "S3cr3t" not in out + said
    if "401" in words:
        assert "MLFLOW_TRACKING_USERNAME" in line


AN_EXPERIMENT = "INSERT INTO experiments (experiment_id, name) VALUES (7, 'mine')"


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        (None, "embedded"),
        ("CREATE TABLE _alembic_tmp_runs (a)", "left _alembic_tmp_runs; it holds nothing yet"),
        (f"CREATE TABLE _alembic_tmp_runs (a); {AN_EXPERIMENT}", "left _alembic_tmp_runs; move it away"),
        ("UPDATE alembic_version SET version_num = 'f00dfeed0000'", "layout f00dfeed0000, which MLflow"),
    ],
)
def test_an_embedded_mlflow_that_is_not_whole_is_said(
    new_home: Callable[[str], Settings], statement: str | None, words: str
) -> None:
    """What a migration that was cut short, or another MLflow, left is named with what to do; a whole one is fine."""
    settings = new_home("home")
    if statement:
        with closing(sqlite3.connect(settings.home / "mlflow.db")) as db:
            db.executescript(statement)
    (finding,) = by_part(settings)["mlflow"]
    assert finding.ok == (statement is None)
    assert words in str(finding)


def test_rubbish_in_place_of_mlflow_is_said(settings: Settings) -> None:
    """A file that is no database is named."""
    settings.home.mkdir()
    (settings.home / "mlflow.db").write_bytes(b"not a database" * 100)
    (finding,) = by_part(settings)["mlflow"]
    assert not finding.ok
    assert "mlflow.db" in finding.text


def test_a_home_that_others_can_read_is_said(settings: Settings) -> None:
    """What an older version made readable is found, and the advice mends it."""
    settings.home.mkdir()
    settings.home.chmod(0o755)
    (settings.home / "sieve.db").touch(0o644)
    (settings.home / "sieve.db").chmod(0o644)
    (finding,) = list(doctor._home(settings))
    assert not finding.ok
    command = finding.advice.split("`")[1]
    subprocess.run(command, shell=True, check=True)
    assert all(finding.ok for finding in doctor._home(settings))
