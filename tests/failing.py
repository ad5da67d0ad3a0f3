"""Work that raises, for workers: they import it by its name."""

from collections.abc import Sequence

from core.data import Dataset
from core.train import State
from search.executor import Slice, advance_here


class Awkward(Exception):
    """One that cannot be pickled: it wants more than its message."""

    def __init__(self, message: str, more: object) -> None:
        super().__init__(message)
        self.more = more


def noted() -> Exception:
    error = ValueError("its message")
    error.add_note("its note")
    return error


# the learning rate of a trial -> what training it raises, and the line that everybody is to read
ERRORS: dict[float, tuple[Exception, str]] = {
    0.11: (ValueError("shapes do not fit"), "ValueError: shapes do not fit"),
    0.12: (AssertionError(), "AssertionError"),
    0.13: (RuntimeError("first line\n  second line\n\n"), "RuntimeError: first line second line"),
    0.14: (noted(), "ValueError: its message"),
    0.15: (Awkward("it is awkward", lambda: 0), "Awkward: it is awkward"),
    0.16: (MemoryError(), "MemoryError"),
    0.17: (KeyError("no such key"), "KeyError: 'no such key'"),
    0.18: (OSError(5, "Input/output error", "/data/x"), "OSError: [Errno 5] Input/output error: '/data/x'"),
    0.19: (ValueError("^^^^^"), "ValueError: ^^^^^"),
}


def fail(eta: float) -> None:
    raise ERRORS[eta][0]


def advance_or_fail(states: Sequence[State], data: Dataset, epochs: int) -> Slice:
    """Train a slice, but for a trial of which the table says otherwise."""
    for state in states:
        if state.config.eta in ERRORS:
            fail(state.config.eta)
    return advance_here(states, data, epochs)


def advance_elsewhere_or_fail(states: Sequence[State], dataset: str, digest: str, epochs: int) -> Slice:
    """The same on a host of its own."""
    from search.executor import own_copy

    return advance_or_fail(states, own_copy(dataset, digest), epochs)
