"""A real MLflow server that can be killed, and a proxy before it that loses, delays or refuses."""

import asyncio
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path


def until(done: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


class Server:
    """A real `mlflow server` with one worker, which can be killed and started again on the same port."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def database(self) -> Path:
        return self.folder / "server.db"

    def start(self) -> None:
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    str(Path(sys.executable).with_name("mlflow")), "server",
                    *("--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"),
                    *("--backend-store-uri", f"sqlite:///{self.database}"),
                    *("--artifacts-destination", str(self.folder / "artifacts")),
                ],
                env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

        until(self.answers, 120)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def kill(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        return int(listener.getsockname()[1])


Rule = Callable[[str], str]


@contextmanager
def proxy(port: int, rule: Rule, *, latency: float = 0.0, rate: float | None = None) -> Iterator[str]:
    """Stands before the server: for each request line, `rule` says pass, lose (the reply), reset, hang, or a status.

    latency: seconds added to each request. rate: bytes per second at which its body passes.
    """

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.decode().split("\r\n")
            fields = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines[1:])}
            body = await reader.readexactly(int(fields.get("content-length", 0)))
            await asyncio.sleep(latency + (len(body) / rate if rate else 0.0))
            what = rule(lines[0])
            if what == "hang":
                await asyncio.sleep(30)
            elif what == "reset":
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            elif what.isdigit():
                writer.write(f"HTTP/1.1 {what} Busy\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
            else:
                upstream_reader, upstream = await asyncio.open_connection("127.0.0.1", port)
                with closing(upstream):
                    kept = [line for line in lines[:-2] if not line.lower().startswith("connection:")]
                    upstream.write("\r\n".join([*kept, "Connection: close", "", ""]).encode() + body)
                    reply = await upstream_reader.read(-1)
                if what == "pass":
                    writer.write(reply)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    loop = asyncio.new_event_loop()
    listener = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    finally:

        async def end() -> None:
            listener.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def now_and_then(share: float, *faults: str) -> Rule:
    """One of these faults, drawn anew for that share of all requests to the API."""
    chance = random.Random(1)
    return lambda request: chance.choice(faults) if "/api/" in request and chance.random() < share else "pass"


def rule(**faults: Sequence[str] | str) -> Rule:
    """Faults by part of a path, with "/" written "__": a sequence is used up, a single word is for ever."""
    left = {k.replace("__", "/"): list(v) if not isinstance(v, str) else v for k, v in faults.items()}

    def decide(request: str) -> str:
        for part, todo in left.items():
            if part in request and todo:
                return todo if isinstance(todo, str) else todo.pop(0)
        return "pass"

    return decide
