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

from core import data, files
from core.data import BATCHES, Dataset, Labels, Rows, Source, Split
from search.errors import DataError

if TYPE_CHECKING:
    from search.settings import Settings
    from search.study import DatasetSpec

Indices = NDArray[np.intp]
Chosen = tuple[Indices, Indices, Indices | None]  # rows to train, to validate, to test


def open_dataset(spec: DatasetSpec, settings: Settings) -> tuple[Dataset, list[str]]:
    """The dataset that a study asks for, and findings to be shown: unofficial files, parts without some class.

    CIFAR-10 and npz files are converted once, into settings.data_cache, and memory-mapped from there; a change of
    the files is noticed by their sizes, times and inodes. Raises DataError naming the file or the setting at fault.
    """
    with _as_data_error(spec.path or spec.name):
        if spec.name == "digits":
            source = data.read_digits()
            chosen = choose(spec, source.parts, source.y)
            dataset = _in_memory(source, chosen, spec.normalise)
        else:
            folder, findings = _stored(spec, settings)
            source = replace(data.load_stored(folder), findings=findings)
            chosen = choose(spec, source.parts, source.y)
            dataset = _by_reference(source, folder, chosen, spec.normalise)
    return dataset, [*source.findings, *_lacking(spec, source, chosen)]


PARTS = {"train": "train on", "validation": "choose by", "test": "test with"}  # the parts, and what they are there for


def class_counts(source: Source, chosen: Chosen) -> dict[str, NDArray[np.intp]]:
    """How many examples of each class the parts have, [C] each; only the parts that there are."""
    parts = zip(PARTS, chosen, strict=True)
    return {p: np.bincount(source.y[rows], minlength=len(source.classes)) for p, rows in parts if rows is not None}


def _lacking(spec: DatasetSpec, source: Source, chosen: Chosen) -> list[str]:
    """A line for each part that lacks classes; DataError if a single class is trained on or chosen by."""
    notes = []
    for part, counts in class_counts(source, chosen).items():
        if part != "test" and np.count_nonzero(counts) == 1:
            only = source.classes[int(counts.argmax())]
            hint = (
                "split: stratified" if spec.split == "last" else "more of them, or parts with names of other examples"
            )
            raise DataError(
                f"{spec.name}: all {counts.sum():,} examples to {PARTS[part]} are of class {only}; "
                f"expected two classes or more: try {hint}"
            )
        if len(missing := np.flatnonzero(counts == 0)):
            names = ", ".join(source.classes[label] for label in missing[:20]) + (", ..." if len(missing) > 20 else "")
            classes = f"{len(missing)} classes" if len(missing) > 1 else "1 class"
            notes.append(f"{spec.name}: no example to {PARTS[part]} of {classes}: {names}")
    return notes


@contextmanager
def _as_data_error(given: str) -> Iterator[None]:
    """`given` is named where an error knows no file: one of reading, unlike one of opening, does not."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename or given}: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(str(error)) from error


# Splits --------------------------------------------------------------------------------------------------------


def choose(spec: DatasetSpec, parts: Mapping[str, Rows], y: Labels) -> Chosen:
    """Which rows to train on, to validate on and to test on: row numbers of the source, in its order.

    Counts are drawn at random, of each class in proportion (`split: stratified`); or, with `split: last`, validation
    images are the end of those that `train` does not name (of all, if it names none or all), or of those that the
    data sets apart. What is left is trained on, or as much as `train` says. Parts with a name stay as they are.
    """
    rows = {name: np.arange(start, stop) for name, (start, stop) in parts.items()}
    test = rows.pop("test_batch", rows.pop("test", None))
    own = rows.pop("val", None)
    pool = np.concatenate(list(rows.values()))

    def some(of: Indices, count: int, key: str, last: bool = False, leave: int = 0) -> Indices:
        if not len(of):
            raise DataError(f"dataset.{key}: expected some images, none are left for it")
        if not 1 <= count <= len(of):
            share = getattr(spec, key)
            got = f"{share} of {len(of):,}, which is {count}" if isinstance(share, float) else f"{count:,}"
            raise DataError(f"dataset.{key}: expected 1 to {len(of):,} images, got {got}")
        if spec.split == "last" or count == len(of):
            return of[len(of) - count :] if last else of[:count]
        return of[stratified(y[of], count, (spec.seed, _DRAWS.index(key)), leave)]

    if test is not None:
        test = test if spec.test is True else some(test, spec.test, "test") if spec.test else None
    elif not isinstance(spec.test, bool):  # data without test images: cut some off
        both = own is None and not isinstance(spec.validation, str)
        test = some(pool, spec.test, "test", last=True, leave=2 if both else 1)
        pool = pool[~np.isin(pool, test)]

    named = _named(rows, spec.train, "train") if isinstance(spec.train, list) else pool
    unnamed = np.setdiff1d(pool, named) if len(named) < len(pool) else pool
    if isinstance(spec.validation, str):
        validation = _named(rows, [spec.validation], "validation")
    elif spec.validation is not None:
        base = pool if own is None else own
        leave = 1 if own is None and unnamed is pool else 0
        count = _count(spec.validation, base)
        validation = some(unnamed if own is None else own, count, "validation", last=True, leave=leave)
    elif own is not None:
        validation = own
    else:
        raise DataError("dataset.validation: the data sets no part aside for it; expected a count or a fraction")

    train = named if unnamed is not pool else np.setdiff1d(pool, validation)
    if len(np.intersect1d(train, validation)):
        raise DataError(f"dataset.validation: {spec.validation} is trained on; choose another part")
    if isinstance(spec.train, int | float):
        train = some(train, _count(spec.train, train), "train")
    if spec.subset is not None:
        train = some(train, spec.subset, "subset")
    if not len(train):
        raise DataError(f"dataset.validation: its {len(validation):,} images leave none to train on")
    return train, validation, test


_DRAWS = ("test", "validation", "train", "subset")  # each draw has a seed of its own, whatever others there are


def _count(amount: int | float, rows: Indices) -> int:
    return amount if isinstance(amount, int) else round(amount * len(rows))


def stratified(y: Labels, count: int, seed: Sequence[int], leave: int = 0) -> Indices:
    """Positions, ascending, of `count` examples drawn at random, of each class in proportion.

    A class has its share rounded down or up, by the largest remainders. But at least one example of it is drawn, if
    `count` allows that for all, and `leave` of it are left, if the classes allow that together.
    """
    rng = np.random.default_rng(list(seed))
    sizes = np.unique(y, return_counts=True)[1]
    order, ties = rng.permutation(len(y)), rng.permutation(len(sizes))
    order = order[np.argsort(y[order], kind="stable")]  # class by class, at random within
    place = np.arange(len(y)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    shares = _shares(sizes.astype(np.int64), count, leave, ties)
    return np.sort(order[place < np.repeat(shares, sizes)])


def _shares(sizes: NDArray[np.int64], count: int, leave: int, ties: Indices) -> NDArray[np.int64]:
    """How many of the `count` each class of these sizes has; equal remainders are ranked by `ties`."""
    while (most := np.maximum(sizes - leave, 0)).sum() < count:
        leave -= 1
    least = np.minimum(most, 1)
    if least.sum() > count:
        least = np.zeros_like(most)
    total = int(sizes.sum())
    shares = np.clip(count * sizes // total, least, most)
    while missing := count - int(shares.sum()):
        sign = 1 if missing > 0 else -1
        room = most - shares if missing > 0 else shares - least
        owed = sign * (count * sizes - shares * total)
        ranked = np.lexsort((ties, -owed))
        ranked = ranked[room[ranked] > 0][: abs(missing)]
        if len(ranked) == abs(missing):
            shares[ranked] += sign
        else:  # bounds hold many: all that have room share what is missing
            shares += sign * (room * abs(missing) // int(room.sum()))
    return shares


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


def located(path: str, setting: str = "dataset.path") -> Path:
    """The absolute path of a file or folder that a user named. Raises DataError if there is none."""
    try:
        found = Path(path).expanduser().absolute()
        found.stat()
    except (RuntimeError, ValueError) as error:  # "~nobody", or a NUL
        raise DataError(f"{path!r}: expected the path of a file ({setting}): {error}") from None
    except FileNotFoundError:
        raise DataError(f"{found}: no such file ({setting})") from None
    except OSError as error:
        raise DataError(f"{found}: {error.strerror} ({setting})") from None
    return found


def find_cifar10(settings: Settings, path: str | None = None) -> Path:
    """The folder that holds the batches: the given path, SIEVE_DATA_DIR or the data folder, or one below it."""
    base = located(path) if path else settings.data_dir or settings.data_cache
    for folder in (base, *(base / archive.folder for archive in ARCHIVES.values())):
        if any((folder / (name + suffix)).is_file() for name in BATCHES for suffix in ("", ".bin")):
            return folder
    raise DataError(
        f"cifar10: no batches in {base}, {' or '.join(archive.folder for archive in ARCHIVES.values())}; "
        "run `sieve data fetch cifar10`, or set SIEVE_DATA_DIR to the folder that holds them"
    )


CONVERTED = 2  # how files become copies; a copy that was made in another way is made again
ENDS = 65_536  # bytes at a file's beginning and end that are looked at: an npz has its checksums there


def _stamps(watched: Sequence[Path]) -> dict[str, list[int | str]]:
    """What tells these files from others in their places, without reading them whole."""
    found: dict[str, list[int | str]] = {}
    for path in filter(Path.is_file, watched):
        with path.open("rb") as file:
            sha = hashlib.sha256(file.read(ENDS))
            file.seek(-min(ENDS, path.stat().st_size), 2)
            sha.update(file.read(ENDS))
        found[str(path)] = [*data.stamp(path), sha.hexdigest()]
    return found


def _read(name: str, path: Path) -> Source:
    """The source that the reader of this name finds there, checked and ready to be trained on."""
    source = data.READERS[name](path)
    split = data.checked(name, source.x, source.y)
    if source.x.dtype in (np.uint8, np.float32):
        return source
    offset = data.offset_of(split.x)
    findings = data.fallen_together(split.x, offset)
    return replace(source, x=data.settled(name, split, offset).x, findings=(*source.findings, *findings), offset=offset)


def _stored(spec: DatasetSpec, settings: Settings) -> tuple[Path, tuple[str, ...]]:
    """(folder of the converted copy, findings), reading the files only if they are new or have changed."""
    if spec.name == "cifar10":
        path = find_cifar10(settings, spec.path)
        watched = [*sorted(path.glob("*_batch*")), path / "SHA256SUMS", path.parent / "SHA256SUMS"]
    else:
        if spec.path is None:
            raise DataError(f"dataset.path: expected the path of {spec.name}'s file")
        path = located(spec.path)
        if spec.name == "npz" or not path.is_dir():
            files.regular(path)
        watched = [path, *sorted(path.rglob("*"))]
    stamps = _stamps(watched)
    cache = settings.data_cache
    note = cache / f"{spec.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:16]}.json"
    try:
        known = json.loads(note.read_bytes())
        folder = cache / known["folder"]
        if (known["converted"], known["files"]) == (CONVERTED, stamps) and data.load_stored(folder):
            return folder, tuple(known["findings"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # never read before, or the copy is not whole: read the files
    source = _read(spec.name, path)
    if _stamps(watched) != stamps:
        raise DataError(f"{path}: it changed while it was read; launch again when it is written whole")
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = cache / _copy_name(source)
    data.store(source, folder)
    content = {"folder": folder.name, "converted": CONVERTED, "files": stamps, "findings": source.findings}
    data.write_atomically(note, lambda file: file.write(json.dumps(content, indent=1).encode()))
    return folder, source.findings


def _copy_name(source: Source) -> str:
    content = data.content_digest(Split(source.x, source.y), offset=source.offset) + json.dumps(source.parts)
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
    """Read every file of a dataset again, and its converted copies: one row each, `ok` False if it is damaged.

    If it is whole, also a row for each class: how many examples each part has of it, as split by default.
    """
    if name == "cifar10":
        folder = find_cifar10(settings, path)
        suffix = ".bin" if (folder / "data_batch_1.bin").is_file() else ""
        promised = data.read_sums(folder)
        rows = [_check_batch(folder / (batch + suffix), promised) for batch in BATCHES]
        for i, row in enumerate(rows):
            if row.ok and row.detail in {earlier.detail for earlier in rows[:i]}:
                rows[i] = replace(row, state="refused", detail="the same as an earlier batch", ok=False)
        if all(row.ok for row in rows):
            with _as_data_error(str(folder)):
                rows += _check_classes(name, data.read_cifar10(folder))
    elif name == "digits" or (name in data.READERS and path):
        with _as_data_error(path or name):
            source = data.read_digits() if name == "digits" else _read(name, located(str(path), "PATH"))
        rows = [Row(source.files[0].name, "readable", f"{len(source.y):,} examples of {source.x.shape[1]} values")]
        rows += [Row(name, "warning", finding) for finding in source.findings] + _check_classes(name, source, path)
    else:
        with_path = " or ".join(other for other in data.READERS if other != "cifar10")
        raise DataError(f"expected digits, cifar10, or {with_path} with the path of a file, got {name!r}")
    copies = sorted(settings.data_cache.glob(f"{name}-{'?' * 16}*/"))
    return rows + [_check_copy(copy) for copy in copies]


MOST_ROWS = 100  # classes that `sieve data check` shows


def _check_classes(name: str, source: Source, path: str | None = None) -> list[Row]:
    """A row for each class: its examples in each part, as split by default; and one for each finding about them."""
    from search.study import DatasetSpec

    spec, how = DatasetSpec.model_validate({"name": name, "path": path}), ""
    if spec.validation is None and "val" not in source.parts:
        spec, how = spec.model_copy(update={"validation": 0.2}), " with validation: 0.2"
    try:
        chosen = choose(spec, source.parts, source.y)
        notes = _lacking(spec, source, chosen)
    except DataError as error:
        return [Row(name, "refused", str(error), ok=False)]
    counts = class_counts(source, chosen)
    rows = [
        Row(f"class {label}", f"as split{how}", ", ".join(f"{part} {n[k]:,}" for part, n in counts.items()))
        for k, label in enumerate(source.classes[:MOST_ROWS])
    ]
    if (more := len(source.classes) - MOST_ROWS) > 0:
        rows.append(Row("classes", "not shown", f"{more:,} more"))
    return rows + [Row(name, "warning", note) for note in notes]


def _check_copy(folder: Path) -> Row:
    try:
        source = data.load_stored(folder)
        if source.digest is None:
            return Row(folder.name, "not checked", f"an older version made {folder}")
        if data.content_digest(Split(source.x, source.y), offset=source.offset) == source.digest:
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
