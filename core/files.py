"""What a file is, before it is read: only ordinary files, named for what they are, and no more of them than is needed.

regular(path)              ValueError for a FIFO, a device, a socket, a folder: nothing of it is opened
describe(path)             "a web page (HTML)", "a Git LFS pointer ...": for an error message
read_arrays(path, choose)  some arrays of an npz: nothing else is inflated, nothing is unpickled
"""

from __future__ import annotations

import math
import os
import re
import stat
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_BYTES = 16 * 2**30  # the arrays that are read from one npz, or this machine's memory if that is less
HEAD = 1024  # bytes that tell what a file is
MOST_RATIO = 1_032  # deflate makes nothing smaller than that

_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\x93NUMPY", "one array (.npy): np.savez puts several into one file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the data: `git lfs pull` fetches it"),
    (b"PK", "a zip archive"),
    (b"\x1f\x8b", "compressed with gzip: unpack it first"),
    (b"BZh", "compressed with bzip2: unpack it first"),
    (b"\xfd7zXZ", "compressed with xz: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"MATLAB 5.0 MAT-file", "a MATLAB file"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"SQLite format 3", "an SQLite database"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"%PDF", "a PDF"),
    *((bytes([0x80, protocol]), "a pickle, which is a program and is not run") for protocol in range(2, 6)),
)

_CONTROL = {*range(32)} - set(b"\t\n\r\f")  # bytes that no text has


def regular(path: Path) -> os.stat_result:
    """The file's stat. ValueError if it is no ordinary file: a FIFO would wait for ever, a device may not end.

    Raises OSError where there is none.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for holds, name in _KINDS if holds(found.st_mode)), "something else")
        raise ValueError(f"{path}: expected an ordinary file, got {kind}")
    return found


def describe(path: Path) -> str:
    """What an ordinary file is by its first bytes, in words for an error message."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    if not head:
        return "an empty file"
    if known := next((what for magic, what in _MAGIC if head.startswith(magic)), None):
        return known
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    if set(head) & _CONTROL:
        return f"bytes of an unknown kind, which begin with {head[:8].hex(' ')}"
    try:
        text = head.decode("utf-8-sig", "strict" if len(head) < HEAD else "ignore").strip()
    except UnicodeDecodeError:
        text = head.decode("latin-1").strip()
    if re.match(r"<(!doctype html|html|head|body|[?!].*<html)", text, re.IGNORECASE | re.DOTALL):
        return "a web page (HTML): was it downloaded from behind a login?"
    if text.startswith("<"):
        return "XML"
    first = text.partition("\n")[0].strip()
    if not text.startswith(("{", "[")) and any(mark in first for mark in ",;\t"):
        return f"a table as text (CSV), which begins with {first[:40]!r}"
    return f"text, which begins with {first[:40]!r}"


def read_arrays(path: Path, choose: Callable[[Sequence[str]], Sequence[str]], expected: str) -> dict[str, NDArray[Any]]:
    """The arrays of an npz that `choose` picks from their names; every other member stays as it is on disk.

    Raises ValueError, which names the file, for anything else than numbers as np.savez writes them, and for more
    than MOST_BYTES; OSError where the file cannot be read.
    """
    size = regular(path).st_size
    try:
        if not zipfile.is_zipfile(path):
            what = describe(path)
            cut = ", cut short or damaged" if what == "a zip archive" else ""
            raise ValueError(f"expected {expected}, got {what}{cut}")
        with zipfile.ZipFile(path) as archive:
            members = {i.filename.removesuffix(".npy"): i for i in archive.infolist() if i.filename.endswith(".npy")}
            if not members:
                inside = ", ".join(archive.namelist()[:3]) or "nothing"
                raise ValueError(f"expected {expected}, got a zip archive of other files ({inside:.100})")
            wanted = {key: members[key] for key in choose(sorted(members))}
            if (total := sum(info.file_size for info in wanted.values())) > (most := most_bytes()):
                raise ValueError(f"its arrays take {total:,} bytes, at most {most:,} are read on this machine")
            return {key: _read_array(archive, info, size) for key, info in wanted.items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except OSError:
        raise
    except Exception as error:  # a damaged archive raises anything, from zlib.error to struct.error
        raise ValueError(f"{path}: a damaged zip archive: {str(error) or type(error).__name__}") from error


def most_bytes() -> int:
    """How much is read from one npz: no more than this machine's memory holds."""
    try:
        return min(MOST_BYTES, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):  # not every system tells
        return MOST_BYTES


def _read_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, available: int) -> NDArray[Any]:
    """One member, if its header, the archive's directory and the bytes on disk agree about its size."""
    name = info.filename
    if info.flag_bits & 1:
        raise ValueError(f"{name} is encrypted")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name}: expected it stored or deflated, as np.savez does, got method {info.compress_type}")
    try:
        with archive.open(info) as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
            size = file.tell() + math.prod(shape) * dtype.itemsize
    except Exception as error:  # NumPy's own words may recommend to unpickle it
        raise ValueError(f"{name}: expected an array as np.savez writes it; damaged?") from error
    if dtype.hasobject:
        raise ValueError(f"{name}: expected numbers, got Python objects, which are not unpickled (rows of one length?)")
    packed = min(info.compress_size, available)
    if min(shape, default=1) < 0 or size != info.file_size or size > MOST_RATIO * (packed + 64):
        raise ValueError(f"{name}: expected {size:,} bytes by its header, the archive holds another number: damaged?")
    try:
        with archive.open(info) as file:
            return np.asarray(np.lib.format.read_array(file, allow_pickle=False))
    except MemoryError:
        raise ValueError(f"{name}: its {size:,} bytes are more than this process can have") from None
    except Exception as error:
        raise ValueError(f"{name}: damaged: {type(error).__name__}: {error}") from error
