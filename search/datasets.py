"""From a study's dataset section to arrays: find the files, keep one converted copy, split, fetch, check.

open_dataset(spec, settings)     the dataset, and what its user should be told about it
fetch("cifar10", settings)       download, verify and unpack the official archive
listing(settings), check(...)    rows for `sieve data list` and `sieve data check`
"""

from __future__ import annotations

import hashlib
import json
import sys
import tarfile
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from core import data
from core.data import BATCHES, Dataset, Rows, Source, Split
from search.errors import DataError

if TYPE_CHECKING:
    from search.settings import Settings
    from search.study import DatasetSpec

Indices = NDArray[np.intp]
Chosen = tuple[Indices, Indices, Indices | None]  # rows to train, to validate, to test


def open_dataset(spec: DatasetSpec, settings: Settings) -> tuple[Dataset, list[str]]:
    """The dataset that a study asks for, and findings to be shown: unofficial files, classes never trained on.

    CIFAR-10 and npz files are converted once, into settings.data_cache, and memory-mapped from there; a change of
    the files is noticed by their sizes and times. Raises DataError naming the file or the setting at fault.
    """
    with _as_data_error():
        if spec.name == "digits":
            source = data.read_digits()
            chosen = choose(spec, source.parts)
            dataset = _in_memory(source, chosen, spec.normalise)
        else:
            folder, findings = _stored(spec, settings)
            source = replace(data.load_stored(folder), findings=findings)
            chosen = choose(spec, source.parts)
            dataset = _by_reference(source, folder, chosen, spec.normalise)
    untrained = sorted(set(range(len(source.classes))) - set(np.unique(dataset.train.y).tolist()))
    notes = list(source.findings)
    if untrained:
        names = ", ".join(source.classes[label] for label in untrained)
        notes.append(f"{spec.name}: no example to train on of {len(untrained)} classes: {names}")
    return dataset, notes


@contextmanager
def _as_data_error() -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        raise DataError(str(error)) from error


# Splits --------------------------------------------------------------------------------------------------------


def choose(spec: DatasetSpec, parts: Mapping[str, Rows]) -> Chosen:
    """Which rows to train on, to validate on and to test on: row numbers of the source, in its order.

    A count of validation images is taken from the end of those that `train` does not name (of all, if it names
    none or all), or of those that the data sets apart. What is left is trained on, or as much as `train` says.
    """
    rows = {name: np.arange(start, stop) for name, (start, stop) in parts.items()}
    test = rows.pop("test_batch", rows.pop("test", None))
    own = rows.pop("val", None)
    pool = np.concatenate(list(rows.values()))
    if test is not None:
        test = test if spec.test is True else _first(test, spec.test, "test") if spec.test else None
    elif not isinstance(spec.test, bool):  # data without test images: cut some off
        test = _last(pool, spec.test, "test")
        pool = pool[: -len(test)]

    named = _named(rows, spec.train, "train") if isinstance(spec.train, list) else pool
    unnamed = np.setdiff1d(pool, named) if len(named) < len(pool) else pool
    if isinstance(spec.validation, str):
        validation = _named(rows, [spec.validation], "validation")
    elif spec.validation is not None:
        base = pool if own is None else own
        validation = _last(unnamed if own is None else own, _count(spec.validation, base), "validation")
    elif own is not None:
        validation = own
    else:
        raise DataError("dataset.validation: the data sets no part aside for it; expected a count or a fraction")

    train = named if unnamed is not pool else np.setdiff1d(pool, validation)
    if len(np.intersect1d(train, validation)):
        raise DataError(f"dataset.validation: {spec.validation} is trained on; choose another part")
    if isinstance(spec.train, int | float):
        train = _first(train, _count(spec.train, train), "train")
    if spec.subset is not None:
        train = _first(train, spec.subset, "subset")
    if not len(train):
        raise DataError(f"dataset.validation: its {len(validation):,} images leave none to train on")
    return train, validation, test


def _count(amount: int | float, rows: Indices) -> int:
    return amount if isinstance(amount, int) else round(amount * len(rows))


def _last(rows: Indices, count: int, key: str) -> Indices:
    return _first(rows[::-1], count, key)[::-1]


def _first(rows: Indices, count: int, key: str) -> Indices:
    if not 1 <= count <= len(rows):
        raise DataError(f"dataset.{key}: expected 1 to {len(rows):,} images, got {count:,}")
    return rows[:count]


def _named(rows: Mapping[str, Indices], names: Sequence[str], key: str) -> Indices:
    if unknown := [name for name in names if name not in rows]:
        raise DataError(f"dataset.{key}: no part {', '.join(unknown)} here; expected {', '.join(rows)}")
    if not names or len(set(names)) < len(names):
        raise DataError(f"dataset.{key}: expected each part once, got {', '.join(names) or 'none'}")
    return np.concatenate([rows[name] for name in names])


def _in_memory(source: Source, chosen: Chosen, normalise: str) -> Dataset:
    pairs = [(source.x[rows], source.y[rows]) for rows in chosen if rows is not None]
    return Dataset.from_arrays(
        *pairs,
        name=source.name,
        classes=source.classes,
        image_shape=source.image_shape,
        normalise=normalise,
    )


def _by_reference(source: Source, folder: Path, chosen: Chosen, normalise: str) -> Dataset:
    """Slices of the stored arrays; rows that are none get a copy of their own, in their own order."""
    splits = [rows for rows in chosen if rows is not None]
    if not all(np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))) for rows in splits):
        order = np.concatenate(splits)
        folder = folder.with_name(f"{folder.name}-{hashlib.sha256(order.tobytes()).hexdigest()[:16]}")
        try:
            data.load_stored(folder)
        except (OSError, ValueError):
            data.store(replace(source, x=source.x[order], y=source.y[order], parts={}), folder)
        ends = np.cumsum([len(rows) for rows in splits])
        splits = [np.arange(end - len(rows), end) for rows, end in zip(splits, ends, strict=True)]
    ranges = [(int(rows[0]), int(rows[-1]) + 1) for rows in splits]
    return data.open_stored(folder, ranges[0], ranges[1], ranges[2] if chosen[2] is not None else None, normalise)


# The files and their one converted copy --------------------------------------------------------------------------


def find_cifar10(settings: Settings, path: str | None = None) -> Path:
    """The folder that holds the batches: the given path, SIEVE_DATA_DIR or the data folder, or one below it."""
    base = Path(path).expanduser().absolute() if path else settings.data_dir or settings.data_cache
    for folder in (base, *(base / archive.folder for archive in ARCHIVES.values())):
        if any((folder / (name + suffix)).is_file() for name in BATCHES for suffix in ("", ".bin")):
            return folder
    raise DataError(
        f"cifar10: no batches in {base}, {' or '.join(archive.folder for archive in ARCHIVES.values())}; "
        "run `sieve data fetch cifar10`, or set SIEVE_DATA_DIR to the folder that holds them"
    )


def _stored(spec: DatasetSpec, settings: Settings) -> tuple[Path, tuple[str, ...]]:
    """(folder of the converted copy, findings), reading the files only if they are new or have changed."""
    if spec.name == "cifar10":
        path = find_cifar10(settings, spec.path)
        watched = [*sorted(path.glob("*_batch*")), path / "SHA256SUMS", path.parent / "SHA256SUMS"]
    else:
        if spec.path is None:
            raise DataError(f"dataset.path: expected the path of {spec.name}'s file")
        path = Path(spec.path).expanduser().absolute()
        if not path.exists():
            raise DataError(f"{path}: no such file (dataset.path)")
        watched = [path, *sorted(path.rglob("*"))]
    stamps = {str(file): [(at := file.stat()).st_size, at.st_mtime_ns] for file in watched if file.is_file()}
    cache = settings.data_cache
    note = cache / f"{spec.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:16]}.json"
    try:
        known = json.loads(note.read_bytes())
        folder = cache / known["folder"]
        if known["files"] == stamps and data.load_stored(folder):
            return folder, tuple(known["findings"])
    except (OSError, ValueError, KeyError):
        pass  # never read before, or the copy is not whole: read the files
    source = data.READERS[spec.name](path)
    folder = cache / _copy_name(source)
    data.store(source, folder)
    content = {"folder": folder.name, "files": stamps, "findings": source.findings}
    data.write_atomically(note, lambda file: file.write(json.dumps(content, indent=1).encode()))
    return folder, source.findings


def _copy_name(source: Source) -> str:
    content = data.content_digest(Split(source.x, source.y)) + json.dumps(source.parts)
    return f"{source.name}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


# sieve data ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of `sieve data list` or `sieve data check`."""

    name: str
    state: str
    detail: str
    ok: bool = True


def listing(settings: Settings) -> list[Row]:
    """The datasets by name, whether they are here, and where."""
    rows = []
    places: dict[str, Callable[[], object]] = {
        "digits": lambda: data.read_digits().files[0],
        "cifar10": lambda: find_cifar10(settings),
    }
    for name, place in places.items():
        try:
            rows.append(Row(name, "here", str(place())))
        except (DataError, ValueError) as error:
            rows.append(Row(name, "missing", str(error), ok=False))
    about = {name: (read.__doc__ or "").partition("\n")[0] for name, read in data.READERS.items()}
    return rows + [Row(name, "yours", f"dataset.path: {about[name]}") for name in about if name not in places]


def check(name: str, settings: Settings, path: str | None = None) -> list[Row]:
    """Read every file of a dataset again, and its converted copies: one row each, `ok` False if it is damaged."""
    if name == "cifar10":
        folder = find_cifar10(settings, path)
        suffix = ".bin" if (folder / "data_batch_1.bin").is_file() else ""
        promised = data.read_sums(folder)
        rows = [_check_batch(folder / (batch + suffix), promised) for batch in BATCHES]
        for i, row in enumerate(rows):
            if row.ok and row.detail in {earlier.detail for earlier in rows[:i]}:
                rows[i] = replace(row, state="refused", detail="the same as an earlier batch", ok=False)
    elif name == "digits" or (name in data.READERS and path):
        with _as_data_error():
            source = data.read_digits() if name == "digits" else data.READERS[name](Path(str(path)).expanduser())
        rows = [Row(source.files[0].name, "readable", f"{len(source.y):,} examples of {source.x.shape[1]} values")]
    else:
        with_path = " or ".join(other for other in data.READERS if other != "cifar10")
        raise DataError(f"expected digits, cifar10, or {with_path} with the path of a file, got {name!r}")
    copies = sorted(settings.data_cache.glob(f"{name}-{'?' * 16}/"))
    return rows + [_check_copy(copy) for copy in copies]


def _check_copy(folder: Path) -> Row:
    try:
        if _copy_name(data.load_stored(folder)) == folder.name:
            return Row(folder.name, "whole copy", str(folder))
    except (ValueError, OSError):
        pass
    return Row(folder.name, "damaged copy", f"delete {folder}: it will be made again", ok=False)


def _check_batch(path: Path, promised: Mapping[str, str]) -> Row:
    try:
        raw = data.read_batch(path)
        sha256, verdict = data.vouch(path, raw, promised)
        data.parse_batch(path, raw)
    except (ValueError, OSError) as error:
        return Row(path.name, "refused", str(error), ok=False)
    return Row(path.name, verdict, f"sha256 {sha256}")


@dataclass(frozen=True)
class Archive:
    """An archive to fetch: where, its SHA-256, its one folder and the files wanted from it with their sizes."""

    url: str
    sha256: str
    folder: str
    members: Mapping[str, int]


_PYTHON_SIZES = (31_035_704, 31_035_320, 31_035_999, 31_035_696, 31_035_623, 31_035_526)
ARCHIVES = {
    "binary": Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        "cifar-10-batches-bin",
        {f"{name}.bin": 30_730_000 for name in BATCHES},
    ),
    "python": Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        "cifar-10-batches-py",
        dict(zip(BATCHES, _PYTHON_SIZES, strict=True)),
    ),
}


def fetch(name: str, settings: Settings, archive: Archive = ARCHIVES["binary"]) -> Path:
    """Download an archive to SIEVE_DATA_DIR or the data folder, verify it, unpack it; returns the folder.

    The binary version of CIFAR-10 is the default: its layout needs no pickle. Raises DataError.
    """
    if name != "cifar10":
        raise DataError(f"{name}: only cifar10 is fetched; digits come with scikit-learn, npz files are yours")
    into = settings.data_dir or settings.data_cache
    if (into / archive.folder).exists():
        return into / archive.folder
    import pooch  # here: it brings requests along, and only a download needs it

    file = archive.url.rpartition("/")[2]
    try:
        into.mkdir(parents=True, exist_ok=True)
        download = pooch.HTTPDownloader(timeout=60, progressbar=sys.stderr.isatty())
        got = pooch.retrieve(archive.url, f"sha256:{archive.sha256}", fname=file, path=into, downloader=download)
    except (OSError, ValueError) as error:  # every error of requests is an OSError; ValueError: another checksum
        raise DataError(f"could not fetch {archive.url}: {error}; or unpack it yourself into {into}") from error
    folder = extract(Path(got), archive, into)
    Path(got).unlink(missing_ok=True)
    return folder


def extract(path: Path, archive: Archive, into: Path) -> Path:
    """Unpack the wanted files, and nothing but them, from a tar.gz to `into`/folder, all or nothing.

    Each must be an ordinary file of its known size. Raises DataError on any other member but the folder itself,
    its readme and its list of names.
    """
    wanted = {f"{archive.folder}/{file}": size for file, size in archive.members.items()}
    ignored = {f"{archive.folder}{rest}" for rest in ("", "/readme.html", "/batches.meta", "/batches.meta.txt")}
    unfinished = into / f".{archive.folder}.{uuid.uuid4().hex}"
    try:
        unfinished.mkdir(parents=True)
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                size = wanted.pop(member.name, None)
                plain = member.isreg() and not member.issparse()
                if member.name in ignored and (plain or member.isdir()) and member.size <= 100_000:
                    continue
                content = tar.extractfile(member) if plain and member.size == size else None
                if content is None:
                    kind = f"{member.size:,} bytes" if plain else "not an ordinary file"
                    raise DataError(f"{path}: refused: unexpected member {member.name!r} ({kind})")
                (unfinished / member.name.rpartition("/")[2]).write_bytes(content.read())
        if wanted:
            raise DataError(f"{path}: expected {', '.join(sorted(wanted))} in it")
        unfinished.rename(into / archive.folder)
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise DataError(f"{path}: could not be unpacked to {into}: {error}") from error
    finally:
        rmtree(unfinished, ignore_errors=True)
    return into / archive.folder
