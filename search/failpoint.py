"""Places where a test may make a process die: SIEVE_FAILPOINT=name, or name:n for the n-th time it is reached."""

import os
import signal
from collections import Counter

_reached: Counter[str] = Counter()


def failpoint(name: str) -> None:
    """Die here as if killed, if the environment says so."""
    wanted, _, count = os.environ.get("SIEVE_FAILPOINT", "").partition(":")
    if name == wanted:
        _reached[name] += 1
        if not count or _reached[name] == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
