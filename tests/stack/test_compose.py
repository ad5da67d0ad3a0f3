"""docker-compose.yml as a contract: every service is started natively with the command and environment it gives."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.conftest import QUICK
from tests.stack.conftest import PASSWORD, Postgres, await_port, execute, free_port

pytest.importorskip("distributed", reason="needs Dask: pip install distributed")
pytestmark = [pytest.mark.stack, pytest.mark.slow]

FILE = Path(__file__).parents[2] / "docker-compose.yml"
GIVEN = {"POSTGRES_PASSWORD": PASSWORD}


def interpolate(text: str, given: Mapping[str, str]) -> str:
    """As Compose does, for the forms that the file uses: ${NAME:?message} and ${NAME:-default}."""

    def value(match: re.Match[str]) -> str:
        name, kind, rest = match.groups()
        if kind == "?" and not given.get(name):
            raise KeyError(f"{name}: {rest}")
        return given.get(name) or rest

    return re.sub(r"\$\{(\w+):([?-])([^}]*)\}", value, text)


def read(given: Mapping[str, str]) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(interpolate(FILE.read_text(), given))
    return content


SERVICES: dict[str, dict[str, Any]] = read(GIVEN)["services"]


def test_it_refuses_to_start_without_a_password() -> None:
    """There is no default password in the file."""
    with pytest.raises(KeyError, match="POSTGRES_PASSWORD"):
        read({})


@pytest.mark.parametrize("name", SERVICES)
def test_each_container_is_contained(name: str) -> None:
    """Read-only, no capabilities but the database's few, limits, and ports on loopback only."""
    service = SERVICES[name]
    assert service["read_only"]
    assert service["init"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {"mem_limit", "pids_limit"} <= service.keys()
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert ("front" in service["networks"]) == bool(service.get("ports"))
    assert "cluster" not in service["networks"] or name in ("sieve", "scheduler", "worker")
    assert name == "db" or (service["user"] == "10001:10001" and "cap_add" not in service)
    assert PASSWORD not in json.dumps([service.get("command"), service.get("entrypoint"), service.get("healthcheck")])
    assert name == "migrate" or "healthcheck" in service


def test_workers_and_their_scheduler_know_nothing_else() -> None:
    """They have neither the password, nor the address of the database or MLflow, nor a network in common with them."""
    for name in ("worker", "scheduler"):
        assert SERVICES[name]["networks"] == ["cluster"]
        text = json.dumps(SERVICES[name])
        assert not re.search(r"PGPASSWORD|SIEVE_STORAGE|MLFLOW|postgresql|@db", text)
        assert PASSWORD not in text


def test_compose_itself_takes_the_file(tmp_path: Path) -> None:
    """`docker compose config` finds no fault with it, and one without a password."""
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("needs the Compose plugin of Docker's client")
    command = [docker, "compose", "-f", str(FILE), "config", "--quiet"]
    without = {name: value for name, value in os.environ.items() if name != "POSTGRES_PASSWORD"}
    assert subprocess.run(command, env=without | GIVEN, cwd=tmp_path).returncode == 0
    assert subprocess.run(command, env=without, cwd=tmp_path, capture_output=True).returncode != 0


class Stack:
    """The services as processes: names, ports and paths of containers become those of this machine."""

    def __init__(self, folder: Path, postgres: Postgres) -> None:
        self.folder, self.processes = folder, dict[str, subprocess.Popen[bytes]]()
        self.ports = {"5000": free_port(), "8080": free_port(), "8786": free_port()}
        for name in ("sieve", "mlflow", "data", "tmp"):
            (folder / name).mkdir()
        local = "127.0.0.1"
        self.places = {
            "@db:5432": f"@{local}:{postgres.port}",
            **{f"{host}:{port}": f"{local}:{here}" for host in ("mlflow", "scheduler", "127.0.0.1", "localhost")
               for port, here in self.ports.items()},
            **{f"port={port}": f"port={here}" for port, here in self.ports.items()},
            **{f"'{host}', {port}": f"'{local}', {here}" for host in (local, "scheduler")
               for port, here in self.ports.items()},
            "host=0.0.0.0": f"host={local}",
            "/var/lib/sieve": str(folder / "sieve"),
            "/var/lib/mlflow": str(folder / "mlflow"),
            "directory=/tmp": f"directory={folder}/tmp",
        }  # fmt: skip

    def here(self, text: str) -> str:
        for there, here in self.places.items():
            text = text.replace(there, here)
        return str(self.folder / "data") if text == "/data" else text

    def environment(self, name: str) -> dict[str, str]:
        kept = {key: os.environ[key] for key in ("HOME", "LANG", "TMPDIR") if key in os.environ}
        given = {key: self.here(str(value)) for key, value in SERVICES[name].get("environment", {}).items()}
        return kept | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"} | given

    def command(self, name: str, words: list[str] | None = None) -> list[str]:
        service = SERVICES[name]
        return [self.here(word) for word in [*service.get("entrypoint", []), *(words or service["command"])]]

    def start(self, name: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                self.command(name), env=self.environment(name), stdout=log, stderr=log, cwd=self.folder
            )

    def run(self, name: str, *words: str) -> str:
        command = self.command(name, list(words))
        done = subprocess.run(command, env=self.environment(name), capture_output=True, text=True, cwd=self.folder)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def healthy(self, name: str) -> bool:
        test = [self.here(word) for word in SERVICES[name]["healthcheck"]["test"][1:]]
        return subprocess.run(test, env=self.environment(name), capture_output=True, cwd=self.folder).returncode == 0

    def close(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                    child.kill()
            process.wait()


@pytest.fixture
def stack(tmp_path: Path, own_postgres: Postgres) -> Iterator[Stack]:
    folder = tmp_path / "stack"
    folder.mkdir()
    roles = FILE.parent / read(GIVEN)["configs"]["roles"]["file"]
    psql = [own_postgres.programs / "psql", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-p", str(own_postgres.port)]
    environment = os.environ | {"PGPASSWORD": PASSWORD} | SERVICES["db"]["environment"]
    subprocess.run([*psql, "-U", "postgres", "-q", "-f", roles], env=environment, check=True)
    stack = Stack(folder, own_postgres)
    yield stack
    stack.close()
    for name in ("sieve", "mlflow"):
        execute(own_postgres.url, f"DROP DATABASE {name} WITH (FORCE)")
    for name in ("viewer", "mlflow", "sieve"):
        execute(own_postgres.url, f"DROP ROLE {name}")


def ask(url: str, data: dict[str, Any] | None = None) -> Any:
    body = None if data is None else json.dumps(data).encode()
    with urllib.request.urlopen(
        urllib.request.Request(url, body, {"Content-Type": "application/json"}), timeout=30
    ) as answer:
        return json.loads(answer.read())


def test_the_services_work_together_as_the_file_says(stack: Stack) -> None:
    """A study launched on the stack is run by its workers, and is seen in MLflow and in the dashboard."""
    stack.run("migrate", *SERVICES["migrate"]["command"])
    for name in ("scheduler", "worker", "sieve", "dashboard", "mlflow"):
        stack.start(name)
    (stack.folder / "studies").mkdir()
    study = QUICK | {"name": "stack", "search": {"method": "random", "trials": 3}, "confirm": False}
    (stack.folder / "studies" / "stack.yaml").write_text(yaml.safe_dump(study))
    assert "waits for `sieve serve`" in stack.run("sieve", "launch", "--detach", "studies/stack.yaml")
    for port in stack.ports.values():
        await_port(port, 120)
    done = json.loads(stack.run("sieve", "status", "stack", "--follow", "--json"))
    assert [(row["state"], row["complete"]) for row in done] == [("done", 3)]
    assert all(stack.healthy(name) for name in ("mlflow", "dashboard", "scheduler", "worker", "sieve"))
    studies = ask(f"http://127.0.0.1:{stack.ports['8080']}/api/studies")
    assert [study["study_name"] for study in studies["study_summaries"]] == ["stack"]
    api = f"http://127.0.0.1:{stack.ports['5000']}/api/2.0/mlflow"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = ask(f"{api}/experiments/search", {"max_results": 10, "filter": "name = 'stack'"})["experiments"]
        ids = [experiment["experiment_id"] for experiment in found]
        query = {"experiment_ids": ids, "filter": "tags.kind = 'trial'"}
        runs = ask(f"{api}/runs/search", query).get("runs", []) if ids else []
        if [run["info"]["status"] for run in runs] == ["FINISHED"] * 3:
            break
        time.sleep(1)
    else:
        raise AssertionError((stack.folder / "sieve.log").read_text())
    doctor = stack.run("sieve", "doctor")
    assert "BAD" not in doctor
    for log in stack.folder.glob("*.log"):
        assert PASSWORD not in log.read_text()
    for process in psutil.process_iter(["cmdline"]):
        assert PASSWORD not in " ".join(process.info["cmdline"] or [])
    stack.processes["sieve"].terminate()
    assert stack.processes["sieve"].wait(15) == 0
