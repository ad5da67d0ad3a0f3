"""What a command owes its machine: signals that end it, streams that may close, no proxy on the way to itself."""

import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, TextIO

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
GONE = (errno.EPIPE, errno.EIO)  # writing to a pipe that nobody reads, or to a terminal that was closed
PRIVATE = 0o077
LOOPBACK = ("localhost", "127.0.0.1", "127.0.0.0/8", "::1", "[::1]")  # as urllib, requests and curl write them


def on_end(handler: Callable[[int, Any], None]) -> None:
    """Let the signals that end a process do this; under nohup, which ignores SIGHUP, that stays ignored.

    When a session ends, SIGHUP follows SIGTERM, or itself: only the first signal may be one, for it means no haste.
    """

    def heard(number: int, frame: Any) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        handler(number, frame)

    for number in ENDING:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, heard)


def spare_loopback(environment: MutableMapping[str, str] = os.environ) -> None:
    """Whatever proxy is set, this machine's own addresses are not asked through it, here and in children."""
    known = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    if known.strip() == "*":
        return
    names = [name.strip() for name in known.split(",") if name.strip()]
    merged = ",".join([*names, *(name for name in LOOPBACK if name not in names)])
    environment["no_proxy"] = environment["NO_PROXY"] = merged


# ---- files

_of_the_user: int | None = None


def keep_private() -> None:
    """From here on only this user may read what is made: a home holds data, weights and addresses."""
    global _of_the_user
    before = os.umask(PRIVATE)
    _of_the_user = before if _of_the_user is None else _of_the_user


@contextmanager
def for_the_user() -> Iterator[None]:
    """What is made meanwhile was asked for by name, elsewhere than at home: the user's own umask says who may read."""
    ours = os.umask(PRIVATE if _of_the_user is None else _of_the_user)
    try:
        yield
    finally:
        os.umask(ours)


# ---- standard streams


def forgive_streams() -> None:
    """A character that the output does not know becomes a question mark, and a stream that was closed takes all."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def outlast_readers() -> None:
    """From here on nobody needs to read what this process says: a closed terminal or pipe does not end its work."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__") and stream.fileno() == number:
            setattr(sys, name, _lasting(stream, number))


def leave_streams() -> None:
    """Nobody reads any more: what is still to be written goes nowhere."""
    for number in (1, 2):
        _discard(number)


def _discard(number: int) -> None:
    """From here on what is written to this file goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


class _Lasting(io.TextIOWrapper):
    """A stream whose reader may go away; what is written then is lost. stderr may lose anything: it only informs.

    On top of the buffer, not below: a signal that came within a write of ours there would have it written again.
    """

    def write(self, text: str, /) -> int:
        with self._forgiving():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with self._forgiving():
            super().flush()

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in GONE and self.fileno() != 2:
                raise
            _discard(self.fileno())


def _lasting(stream: io.TextIOWrapper, number: int) -> TextIO:
    stream.flush()
    return _Lasting(
        io.BufferedWriter(io.FileIO(number, "w", closefd=False)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering or stream.write_through,
    )


def printable(text: str) -> str:
    """Text of others with its control characters shown, not obeyed: a terminal takes orders from them."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
