"""Every error that Sieve raises on purpose: what was given, what was expected, what to do next.

SieveError                     exit 1
├── StudyFileError             exit 2    mistakes in a study file or in --set, one line each
├── StudyConflict              exit 2    a study of that name exists with another specification
│   └── NameTaken              exit 2    another tool's study has the name
├── UnknownStudy               exit 2    no study of that name; lists the near names
├── StudyUnreadable            exit 2    a study of another tool or of a newer version, or a damaged one
├── StudyBusy                  exit 2    another runner owns the study
├── DataError                  exit 2    a dataset that is missing, damaged or not what it says it is
├── SettingsError              exit 2    an environment variable or an option that cannot be meant
├── WorkersLost                exit 1    no worker process begins; what is stored is safe
├── StudyTaken                 exit 1    another runner took the study over while this one stood still
├── StudyGone                  exit 1    the study was deleted while it ran
├── StorageLost                exit 1    the database does not answer; what it holds is safe
├── DiskError                  exit 1    a full disk, or a file of ours that is damaged or may not be written
├── StudyFailed                exit 1    the study ended without a result
└── Interrupted                exit 130  stopped by a signal; `sieve launch` goes on where it stopped

Each is built from plain values (`args` are the constructor's arguments), so it survives being pickled.
"""

import errno
import traceback
from collections.abc import Sequence
from difflib import get_close_matches

FULL = (errno.ENOSPC, errno.EDQUOT)  # with which a disk that is full, or full for this user, answers


class SieveError(Exception):
    """The root: a command line shows its text without a traceback and leaves with `exit_code`."""

    exit_code = 1


class StudyFileError(SieveError):
    """A study file that cannot be meant; `mistakes` holds one line for each mistake."""

    exit_code = 2

    def __init__(self, mistakes: Sequence[str]) -> None:
        super().__init__(list(mistakes))
        self.mistakes = list(mistakes)

    def __str__(self) -> str:
        return "\n".join(self.mistakes)


class StudyConflict(SieveError):
    """The study `name` is stored with another specification; `differences` says where, one line each."""

    exit_code = 2

    def __init__(self, name: str, differences: Sequence[str]) -> None:
        super().__init__(name, list(differences))
        self.name, self.differences = name, list(differences)

    def __str__(self) -> str:
        return "\n".join(
            [
                f"study '{self.name}' exists with another specification:",
                *(f"  {line}" for line in self.differences),
                "give this one another name, or launch the file as it was to resume it;",
                "only a grid, a list or a random search can be extended, by more points and nothing else",
            ]
        )


class NameTaken(StudyConflict):
    """Another tool's study has the name; `differences` say what it is."""

    def __str__(self) -> str:
        what = ", ".join(self.differences)
        return f"study '{self.name}' is there already, {what}; it is left as it is: give this one another name"


class UnknownStudy(SieveError):
    """No study is called `name`; `known` are the names that exist."""

    exit_code = 2

    def __init__(self, name: str, known: Sequence[str] = ()) -> None:
        super().__init__(name, list(known))
        self.name, self.known = name, list(known)

    def __str__(self) -> str:
        near = get_close_matches(self.name, self.known, n=3)
        if near:
            return f"no study is called {self.name!r}; did you mean {' or '.join(near)}?"
        return f"no study is called {self.name!r}; `sieve status` lists those that exist"


class StudyUnreadable(SieveError):
    """The stored study `name` cannot be understood; `problem` says why, in words that fit a table's cell."""

    exit_code = 2

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(name, problem)
        self.name, self.problem = name, problem

    def __str__(self) -> str:
        return f"study '{self.name}' cannot be read: {self.problem}; other studies are not affected"


class StudyBusy(SieveError):
    """Another runner owns the study."""

    exit_code = 2


class StudyTaken(SieveError):
    """Another runner took over the study `name` while this one stood still; this one has written nothing since."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return (
            f"study '{self.name}' was taken over by another runner while this one stood still; nothing is lost, "
            f"`sieve status {self.name}` shows it"
        )


class StudyGone(SieveError):
    """The study `name` was deleted while it ran."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return f"study '{self.name}' was deleted while it ran; `sieve launch` with its file begins it anew"


class DataError(SieveError):
    """A dataset that cannot be used; the text names the file and what was found in it."""

    exit_code = 2


class SettingsError(SieveError):
    """An environment variable, or an option, that cannot be meant."""

    exit_code = 2


class StorageLost(SieveError):
    """The database does not answer; nothing that it holds is lost, and `sieve launch` goes on from there."""


class WorkersLost(SieveError):
    """No worker process begins; nothing that is stored is lost, and `sieve launch` goes on from there."""


class DiskError(SieveError):
    """A file of ours cannot be read or written now; what was stored before is safe."""

    def __init__(self, what: str, problem: str) -> None:
        super().__init__(what, problem)
        self.what, self.problem = what, problem

    def __str__(self) -> str:
        return (
            f"{self.what}: {self.problem}; nothing that was stored is lost: make room, or give this user the right to "
            "write there, and launch the study again (SIEVE_HOME names another home)"
        )


class StudyFailed(SieveError):
    """The study ended without a single usable result."""


class Interrupted(SieveError):
    """Stopped by a signal after the running slices were saved."""

    exit_code = 130


# ---- reasons: what is kept and shown of an error that is a trial's result

LONGEST_REASON = 500
IN_WORKER = "In the worker:"  # begins the note that holds the worker's traceback


class InWords(RuntimeError):
    """An exception of another process as "Type: message", where the exception itself cannot be pickled."""


def details(error: BaseException) -> str:
    """The whole traceback of an exception; of one that a worker raised, the worker's."""
    found = [note for note in getattr(error, "__notes__", ()) if note.startswith(IN_WORKER)]
    return found[-1] if found else "".join(traceback.format_exception(error))


def in_one_line(error: BaseException) -> str:
    """An exception as tables show it: its type and its message, "ValueError: ..."; our own errors are sentences."""
    try:
        text = str(error)
    except Exception:  # of somebody's class
        text = ""
    if not isinstance(error, SieveError | InWords):
        text = f"{type(error).__name__}: {text}" if text.strip() else type(error).__name__
    return one_line(text)


def one_line(text: str) -> str:
    """Text without line breaks and control characters, and not too long."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= LONGEST_REASON else f"{text[: LONGEST_REASON - 3]}..."


def brief(reason: object) -> str:
    """The one line of a stored reason. Older versions stored a traceback: its last line, before the worker's own."""
    text = "" if reason is None else str(reason)
    return one_line("".join(text.partition(f"\n{IN_WORKER}")[0].strip().splitlines()[-1:]))
