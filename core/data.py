"""Datasets: images as the bytes they were published as, labels, a split, statistics of the training split.

Images stay uint8 [n, d] (or float32) and are normalised where they are used, (x - mean) * scale. One copy on
disk, memory-mapped by every process, is all a machine needs; a dataset travels between processes by reference.
Features that float32 would round too coarsely where they lie (seconds since 1970) are stored less a value amid them.

    read_digits(), read_cifar10(folder), read_npz(path) -> Source     a file's checksum comes first, then its content
    store(source, folder)                                             x.npy and y.npy, once per machine
    open_stored(folder, train, validation, test, normalise) -> Dataset    slices of the one array, nothing copied
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import json
import math
import os
import pickle
import uuid
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from core import files

Images = NDArray[Any]  # [n, d], uint8 or float32
Labels = NDArray[np.int64]  # [n]
Rows = tuple[int, int]  # first row, one past the last

NORMALISATIONS = ("none", "mean", "standard")
CHUNK = 2_000  # rows at a time in the statistics: 50 MB for CIFAR-10 in float64
SAMPLE = 10_000  # rows, spread evenly, that tell where a feature lies and what float32 makes of it
FAR = 2**10  # a feature this many times its deviation away from 0 loses ten of float32's 24 bits
MOST_CLASSES = 4_096  # a confusion matrix of 134 MB for each network

BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_OFFICIAL = {  # md5 of the files of the python version, sha256 of those of the binary version
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}


@dataclass(frozen=True, eq=False)
class Split:
    """Images x [n, d] (uint8 or float32) and their labels y [n] (int64, 0 .. classes - 1); read-only."""

    x: Images
    y: Labels

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training, validation and test split; normalised = (x - mean) * scale, from the training split alone.

    That holds for x as it was given, in float64. Where features lie far from 0, the splits hold x less an offset,
    and normalised = (x - shift) * scale of these, which float32 is precise enough for; else shift is the mean.
    `image_shape` is (32, 32, 3) for CIFAR-10, whose rows are channel-first (1,024 R, 1,024 G, 1,024 B), and
    (8, 8) for the digits. `digest` is the SHA-256 of the arrays in use. A dataset that was opened from a stored
    copy pickles as a reference to that copy.
    """

    name: str
    train: Split
    validation: Split
    test: Split | None
    classes: tuple[str, ...]
    image_shape: tuple[int, ...] | None
    mean: NDArray[np.floating[Any]]  # [d], float32; float64 where features lie far from 0
    scale: NDArray[np.float32]  # [d]
    shift: NDArray[np.float32]  # [d]
    digest: str
    reference: tuple[Any, ...] | None = field(default=None, repr=False)  # the arguments of `_reopen`

    @classmethod
    def from_arrays(
        cls,
        train: tuple[ArrayLike, ArrayLike],
        validation: tuple[ArrayLike, ArrayLike],
        test: tuple[ArrayLike, ArrayLike] | None = None,
        *,
        name: str = "arrays",
        classes: Sequence[str] = (),
        image_shape: Sequence[int] | None = None,
        normalise: str = "none",
    ) -> Dataset:
        """A dataset of arrays in memory. uint8 images stay bytes, all other numbers become float32 (see `settled`).

        Raises ValueError naming the array when its shape, type or content cannot be trained on.
        """
        given = {"train": train, "validation": validation} | ({} if test is None else {"test": test})
        splits = {part: checked(part, *pair) for part, pair in given.items()}
        widths = {part: split.x.shape[1] for part, split in splits.items()}
        if len(set(widths.values())) > 1:
            raise ValueError(f"x: expected the same number of pixels in every split, got {widths}")
        if image_shape is not None and math.prod(image_shape) != widths["train"]:
            raise ValueError(f"image_shape: expected {widths['train']} pixels, got {tuple(image_shape)}")
        if classes and (highest := max(int(split.y.max()) for split in splits.values())) >= len(classes):
            raise ValueError(f"y: expected labels below {len(classes)}, the number of classes, got {highest}")
        names = tuple(classes) or numbered(classes_of(splits))
        offset = offset_of(splits["train"].x)
        splits = {part: settled(part, split, offset) for part, split in splits.items()}
        return cls(
            name,
            splits["train"],
            splits["validation"],
            splits.get("test"),
            names,
            None if image_shape is None else tuple(image_shape),
            *_normalisation(normalise, *statistics(splits["train"].x), offset),
            content_digest(*splits.values(), offset=offset),
        )

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        if self.reference is not None:
            return _reopen, self.reference
        return Dataset, tuple(getattr(self, part.name) for part in fields(self))


def checked(part: str, x: ArrayLike, y: ArrayLike) -> Split:
    """The arrays as a split, the images as they are given; ValueError with `part` and what is wrong with which.

    They can be trained on once they are `settled`.
    """
    images, labels = np.asarray(x), np.asarray(y)
    if images.ndim != 2 or 0 in images.shape:
        hint = ": flatten each image to a row" if images.ndim > 2 else ""
        raise ValueError(f"{part} x: expected images as rows, [n, d] with n, d > 0, got {images.shape}{hint}")
    if labels.shape != (len(images),):
        raise ValueError(f"{part} y: expected one label per image, [{len(images)}], got {labels.shape}")
    if images.dtype.kind not in "iuf":
        raise ValueError(f"{part} x: expected uint8 or floating-point numbers, got {images.dtype}")
    _check_labels(part, labels)
    return Split(_read_only(images), _read_only(labels.astype(np.int64, copy=False)))


def _check_labels(part: str, y: NDArray[Any]) -> None:
    """ValueError for labels that number no classes, in their own type: a conversion would make others of them."""
    expected = f"{part} y: expected whole numbers from 0 up"
    if y.dtype.kind not in "iu":
        odd = ~np.isfinite(y) if y.dtype.kind in "fc" else np.zeros(len(y), bool)
        where = f" with {y[odd.argmax()]} in row {odd.argmax()}" if odd.any() else ""
        raise ValueError(f"{expected}, got {y.dtype}{where}")
    if y.min() < 0:
        raise ValueError(f"{expected}, got {y.min()} in row {y.argmin()}")
    if int(y.max()) >= MOST_CLASSES:
        most = f"at most {MOST_CLASSES:,} classes"
        raise ValueError(f"{expected} for {most}, got {y.max()} in row {y.argmax()}; {_RENUMBER}")


_RENUMBER = "renumber them: np.unique(y, return_inverse=True)[1]"


def classes_of(splits: Mapping[str, Split]) -> int:
    """The highest label of all splits; ValueError if most labels up to it have no example: they number no classes."""
    used = np.bincount(np.concatenate([split.y for split in splits.values()])) > 0
    highest, unused = len(used) - 1, int((~used).sum())
    if unused > len(used) / 2:
        part, row = next((part, int(s.y.argmax())) for part, s in splits.items() if s.y.max() == highest)
        raise ValueError(
            f"{part} y: label {highest} in row {row} makes {len(used):,} classes, {unused:,} of them without any "
            f"example; leave out the examples whose label means none (ignore), or {_RENUMBER}"
        )
    return highest


# Numbers of other types than uint8 and float32 ------------------------------------------------------------------


def _sample(x: Images) -> Images:
    return x[:: -(-len(x) // SAMPLE)]


def offset_of(x: Images) -> NDArray[np.float64] | None:
    """[d]: 0, or a value amid the feature where it lies so far from 0 that float32 would round it too coarsely.

    None if there is no such feature. Medians of examples: exact, whole numbers stay whole, outliers do not move them,
    and every machine finds the same.
    """
    if np.can_cast(x.dtype, np.float32):
        return None
    sample = _sample(x).astype(np.float64)
    sample = sample[np.isfinite(sample).all(axis=1)]
    if not len(sample):
        return None
    half = (len(sample) - 1) // 2
    middle = np.partition(sample, half, axis=0)[half]
    with np.errstate(over="ignore"):
        rounded = (sample.astype(np.float32) != sample).any(axis=0)
        spread = np.partition(np.abs(sample - middle), half, axis=0)[half]
        far = rounded & (np.abs(middle) > FAR * spread)
    return np.where(far, middle, 0.0) if far.any() else None


def _less(x: Images, offset: NDArray[np.float64] | None) -> Images:
    """x - offset in float64, which float64 itself would round for whole numbers above 2**53."""
    if offset is None:
        return x
    wide = np.asarray(x.astype(np.float64) - offset)
    if x.dtype.kind == "f" or x.dtype.itemsize < 8:
        return wide
    whole = np.array([int(value) % 2**64 for value in offset], np.uint64)  # differences modulo 2**64 are exact
    return np.where(np.abs(wide) < 2.0**62, (x.astype(np.uint64) - whole).view(np.int64), wide)


def settled(part: str, split: Split, offset: NDArray[np.float64] | None) -> Split:
    """The split with images of uint8 as they are, or of x - offset in float32; ValueError if not all are finite."""
    if offset is None and split.x.dtype == np.uint8:
        return split
    if offset is None and split.x.dtype == np.float32:
        images = split.x
    else:
        images = np.empty(split.x.shape, np.float32)
        with np.errstate(over="ignore"):  # what is too large for float32 is reported below
            for i in range(0, len(images), CHUNK):
                images[i : i + CHUNK] = _less(split.x[i : i + CHUNK], offset)
    if not (finite := np.isfinite(images).all(axis=1)).all():
        raise ValueError(f"{part} x: expected finite float32 numbers, image {finite.argmin()} has others")
    return Split(_read_only(images), split.y)


def fallen_together(x: Images, offset: NDArray[np.float64] | None) -> tuple[str, ...]:
    """What to tell of features whose distinct values become one: a sentence for each precision that is too coarse."""
    if np.can_cast(x.dtype, np.float32):
        return ()
    sample, found = _sample(x), {precision: list[str]() for precision in _PRECISIONS}
    for j in range(0, x.shape[1], 64):  # columns at a time: sorting takes a copy
        part = slice(j, j + 64)
        values = np.sort(sample[:, part], axis=0)
        before = _distinct(values)
        for precision, rounded in _PRECISIONS.items():
            with np.errstate(over="ignore"):
                after = _distinct(rounded(values, None if offset is None else offset[part]))
            lost = np.flatnonzero(before - after > 0.02 * before).tolist()  # of thousands some meet by chance
            found[precision] += [f"feature {j + k} ({after[k]:,} of {before[k]:,} are left)" for k in lost]
    return tuple(
        f"distinct values fall together in {precision}: {', '.join(which[:5])}"
        + (f" and {len(which) - 5:,} more" if len(which) > 5 else "")
        for precision, which in found.items()
        if which
    )


_PRECISIONS: dict[str, Callable[[Images, NDArray[np.float64] | None], Images]] = {
    "float32, the precision of training; rescale or split": lambda x, offset: _less(x, offset).astype(np.float32),
    "float64, the precision of prediction; subtract something first": lambda x, _: x.astype(np.float64),
}


def _distinct(ordered: Images) -> NDArray[np.intp]:
    """How many values each column has, [d], which is sorted."""
    return np.asarray(1 + np.count_nonzero(ordered[1:] != ordered[:-1], axis=0))


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    view = array.view()
    view.flags.writeable = False
    return view


def numbered(highest: int) -> tuple[str, ...]:
    """Class names for labels 0 .. highest that have none; two classes at least."""
    return tuple(str(label) for label in range(max(highest, 1) + 1))


def statistics(x: Images) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and population deviation of each pixel, [d] each; of uint8 from integer sums, hence exact."""
    n, chunks = len(x), [x[i : i + CHUNK] for i in range(0, len(x), CHUNK)]
    if x.dtype == np.uint8:
        total = sum(chunk.sum(axis=0, dtype=np.int64) for chunk in chunks)
        squares = sum(np.square(chunk, dtype=np.uint16).sum(axis=0, dtype=np.int64) for chunk in chunks)
        return total / n, np.sqrt(n * squares - total * total) / n
    mean = sum(chunk.sum(axis=0, dtype=np.float64) for chunk in chunks) / n
    variance = sum(np.square(chunk - mean).sum(axis=0) for chunk in chunks) / n
    constant = x.min(axis=0) == x.max(axis=0)  # rounding must not make these vary
    return np.where(constant, x[0], mean), np.where(constant, 0.0, np.sqrt(variance))


def _normalisation(
    name: str, mean: NDArray[np.float64], deviation: NDArray[np.float64], offset: NDArray[np.float64] | None = None
) -> tuple[NDArray[np.floating[Any]], NDArray[np.float32], NDArray[np.float32]]:
    """(mean, scale, shift) [d] from the statistics of x - offset; a pixel that does not vary has scale 1."""
    if name not in NORMALISATIONS:
        raise ValueError(f"normalise: expected one of {', '.join(NORMALISATIONS)}, got {name!r}")
    zero = np.zeros_like(mean) if offset is None else -offset
    shift = (zero if name == "none" else mean).astype(np.float32)
    varies = (deviation > 1e-30) & (name == "standard")
    scale = np.divide(1.0, deviation, out=np.ones_like(deviation), where=varies)
    whole = shift if offset is None else np.zeros_like(mean) if name == "none" else offset + shift
    return _read_only(whole), _read_only(scale.astype(np.float32)), _read_only(shift)


def content_digest(*splits: Split, offset: NDArray[np.float64] | None = None) -> str:
    """SHA-256 over the types, shapes and bytes of the splits' arrays, in order, and of what was subtracted from x."""
    sha = hashlib.sha256()
    arrays = [array for split in splits for array in (split.x, split.y)]
    for array in arrays if offset is None else [*arrays, offset]:
        sha.update(f"{array.dtype.str}{array.shape}".encode())
        sha.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return sha.hexdigest()


# Sources: all of a dataset as published -----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Source:
    """All images of a dataset in their order, x [n, d] and y [n], and where its parts lie in them."""

    name: str
    x: Images
    y: Labels
    classes: tuple[str, ...]
    image_shape: tuple[int, ...] | None
    parts: dict[str, Rows]  # the training parts in order, then "test_batch" or "test" if there is one
    files: tuple[Path, ...] = ()  # what it was read from
    findings: tuple[str, ...] = ()  # what its user should be told
    offset: NDArray[np.float64] | None = None  # [d], what was subtracted from the x that was given
    digest: str | None = None  # of a stored copy's content when it was written


def read_digits() -> Source:
    """The 1,797 handwritten digits (8 x 8, values 0 .. 16) in a file of scikit-learn, which is not imported.

    Neighbours in the file were written by the same hand, so its order is changed, once and for all, by a
    permutation with a fixed seed; the last 360 are the test part.
    """
    package = importlib.util.find_spec("sklearn")
    folders = [Path(folder) for folder in (package and package.submodule_search_locations) or ()]
    path = next((file for f in folders if (file := f / "datasets/data/digits.csv.gz").is_file()), None)
    if path is None:
        raise ValueError("digits: expected digits.csv.gz inside scikit-learn: pip install scikit-learn")
    with gzip.open(path, "rt", encoding="ascii") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    if table.shape != (1797, 65) or table[:, :64].max() > 16 or table[:, 64].max() > 9:
        raise ValueError(f"{path}: expected 1,797 rows of 64 values 0 to 16 and a label 0 to 9")
    table = table[np.random.default_rng(1797).permutation(1797)]
    x, y = np.ascontiguousarray(table[:, :64]), table[:, 64].astype(np.int64)
    return Source("digits", x, y, numbered(9), (8, 8), {"train": (0, 1437), "test": (1437, 1797)}, (path,))


NPZ = "an npz archive (np.savez) with x_train, y_train[, x_val, y_val][, x_test, y_test] or x, y"


def read_npz(path: Path) -> Source:
    """A user's own data: x_train, y_train[, x_val, y_val][, x_test, y_test]; or x, y, to be split by counts.

    Raises ValueError naming the file when it is not a plain npz of such arrays. Nothing in it is unpickled, and
    no other array is read.
    """

    def choose(names: Sequence[str]) -> list[str]:
        in_parts = [[f"{axis}_{part}" for axis in "xy"] for part in ("train", "val", "test")]
        pairs = in_parts if any(set(pair) & set(names) for pair in in_parts) else [["x", "y"]]
        wanted = [key for i, pair in enumerate(pairs) if i == 0 or set(pair) & set(names) for key in pair]
        if missing := [key for key in wanted if key not in names]:
            raise ValueError(f"no array {missing[0]!r} among {', '.join(names):.200}; expected {NPZ}")
        return wanted

    arrays = files.read_arrays(path, choose, NPZ)
    try:
        keys = [key for key in arrays if key.startswith("x")]
        splits = {key[2:] or "train": checked(key[2:] or "train", arrays[key], arrays[f"y{key[1:]}"]) for key in keys}
        widths = {f"{split.x.shape[1]} x {split.x.dtype}" for split in splits.values()}
        if len(widths) > 1:
            raise ValueError(f"expected images of one width and type, got {', '.join(sorted(widths))}")
        classes = numbered(classes_of(splits))
        offset = offset_of(splits["train"].x)
        given, splits = splits, {part: settled(part, split, offset) for part, split in splits.items()}
        findings = fallen_together(given["train"].x, offset)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    ends = np.cumsum([0, *map(len, splits.values())]).tolist()
    parts = {part: (ends[i], ends[i + 1]) for i, part in enumerate(splits)}
    x, y = (np.concatenate([getattr(split, axis) for split in splits.values()]) for axis in "xy")
    return Source("npz", x, y, classes, None, parts, (path,), tuple(f"{path}: {text}" for text in findings), offset)


def read_cifar10(folder: Path) -> Source:
    """CIFAR-10 in the official order, from the files of its binary or its python version.

    A file other than the SHA256SUMS in the folder or beside it promises is refused. A file that is not the
    official one is read with care and used; `findings` says so. Raises ValueError naming file and fault.
    """
    suffix = ".bin" if (folder / "data_batch_1.bin").is_file() else ""
    files = tuple(folder / (name + suffix) for name in BATCHES)
    x, y = np.empty((60_000, 3072), np.uint8), np.empty(60_000, np.int64)
    parts = {name: (10_000 * i, 10_000 * (i + 1)) for i, name in enumerate(BATCHES)}
    seen: dict[str, str] = {}
    doubtful: list[str] = []
    promised = read_sums(folder)
    for path, (start, stop) in zip(files, parts.values(), strict=True):
        raw = read_batch(path)
        sha256, verdict = vouch(path, raw, promised)
        if (twin := seen.setdefault(sha256, path.name)) != path.name:
            raise ValueError(f"{path}: the wrong file: its content is that of {twin}")
        x[start:stop], y[start:stop] = parse_batch(path, raw)
        if verdict != "official":
            doubtful.append(f"{path.name} ({verdict})")
    findings = (
        f"{folder}: {len(doubtful)} of {len(files)} checksums differ from the official ones of CIFAR-10, "
        f"the files are used all the same: {', '.join(doubtful)}",
    )
    return Source("cifar10", x, y, CIFAR10_CLASSES, (32, 32, 3), parts, files, findings if doubtful else ())


# The datasets that are read from files, by the name that study files give them; all but cifar10 need `path` there.
READERS: dict[str, Callable[[Path], Source]] = {"cifar10": read_cifar10, "npz": read_npz}


def read_sums(folder: Path) -> dict[str, str]:
    """File name -> SHA-256, of the SHA256SUMS in a folder or beside it; empty if there is none."""
    for path in (folder / "SHA256SUMS", folder.parent / "SHA256SUMS"):
        if path.is_file() and path.stat().st_size < 1_000_000:
            lines = [line.split() for line in path.read_text(errors="replace").splitlines()]
            return {words[-1].lstrip("*").split("/")[-1]: words[0].lower() for words in lines if len(words) == 2}
    return {}


def read_batch(path: Path) -> bytes:
    """The bytes of a file that could be a batch by its size: 30,730,000 bytes; more in the python version."""
    if not path.exists():
        raise ValueError(f"{path}: missing; expected {', '.join(BATCHES)}, or the same with .bin")
    if not 30_730_000 <= (size := files.regular(path).st_size) <= 60_000_000:
        raise ValueError(f"{path}: {size:,} bytes; expected 30,730,000 to 60,000,000, got {files.describe(path)}")
    return path.read_bytes()


def vouch(path: Path, raw: bytes, promised: Mapping[str, str]) -> tuple[str, str]:
    """(SHA-256, "official" | "as in SHA256SUMS" | "unknown"); ValueError if SHA256SUMS promises another."""
    sha256, official = hashlib.sha256(raw).hexdigest(), CIFAR10_OFFICIAL.get(path.name)
    if official in (sha256, hashlib.md5(raw, usedforsecurity=False).hexdigest()):
        return sha256, "official"
    if (expected := promised.get(path.name)) not in (None, sha256):
        raise ValueError(f"{path}: damaged: expected sha256 {expected} as in SHA256SUMS, got {sha256}")
    return sha256, "as in SHA256SUMS" if expected else "unknown"


def parse_batch(path: Path, raw: bytes) -> tuple[Images, list[int]]:
    """10,000 images (uint8 [n, 3072]) and their labels, in the layout that the name says: .bin or python."""
    if path.suffix == ".bin":
        if len(raw) != 10_000 * 3073:
            raise ValueError(f"{path}: expected 10,000 records of 3,073 bytes, got {len(raw):,} bytes")
        records = np.frombuffer(raw, np.uint8).reshape(10_000, 3073)
        pixels, labels = records[:, 1:], records[:, 0].tolist()
    else:
        pixels, labels = _parse_pickle(path, raw)
    for i, label in enumerate(labels):
        if type(label) is not int or not 0 <= label <= 9:
            raise ValueError(f"{path}: expected labels 0 to 9, image {i} has {label!r:.50}")
    return pixels, labels


def _parse_pickle(path: Path, raw: bytes) -> tuple[Images, list[Any]]:
    try:
        content = _Unpickler(io.BytesIO(raw), encoding="bytes").load()
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
        labels, (_, shape, dtype, fortran, pixels) = batch["labels"], batch["data"].state
        layout = (shape, str(dtype.arguments[0]), fortran, type(pixels), len(pixels), type(labels), len(labels))
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # a pickle is a program; a damaged one raises anything
        raise ValueError(f"{path}: not a batch of CIFAR-10: {type(error).__name__}: {error}") from error
    kinds = ("u1", "b'u1'")
    if layout not in [((10_000, 3072), kind, False, bytes, 30_720_000, list, 10_000) for kind in kinds]:
        raise ValueError(f"{path}: expected uint8 [10000, 3072] and a list of 10,000 labels, got {layout!r:.200}")
    expected = f"training batch {path.name[-1]} of 5" if path.name != "test_batch" else "testing batch 1 of 1"
    if (name := batch.get("batch_label", expected)) not in (expected, expected.encode()):
        raise ValueError(f"{path}: the wrong file: it calls itself {name!r:.50}, expected {expected!r}")
    return np.frombuffer(pixels, np.uint8).reshape(10_000, 3072), labels


class _Inert:
    """Stands for NumPy's names in a pickle: keeps what it is given and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


_ALLOWED: dict[str, Callable[..., Any]] = {
    "numpy.core.multiarray._reconstruct": _Inert,
    "numpy._core.multiarray._reconstruct": _Inert,
    "numpy.ndarray": _Inert,
    "numpy.dtype": _Inert,
    "_codecs.encode": lambda text, _: text.encode("latin-1"),  # how Python 3 writes bytes in protocol 2
}


class _Unpickler(pickle._Unpickler):  # the one in Python: a flipped bit makes the one in C ask for gigabytes
    """Reads a batch and runs nothing: the few names that batches use are inert, every other is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _ALLOWED:
            raise pickle.UnpicklingError(f"refused: it asks for {module}.{name}, which no batch of CIFAR-10 does")
        return _ALLOWED[f"{module}.{name}"]


# One copy per machine -----------------------------------------------------------------------------------------


def store(source: Source, folder: Path) -> None:
    """Write a source to a folder, as x.npy and y.npy; two processes may do so at once."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # data may be confidential, whatever the home is
    kept = {key: getattr(source, key) for key in ("name", "classes", "image_shape", "parts")}
    kept["offset"] = None if source.offset is None else source.offset.tolist()
    kept["digest"] = content_digest(Split(source.x, source.y), offset=source.offset)
    write_atomically(folder / "x.npy", lambda file: np.save(file, source.x))
    write_atomically(folder / "y.npy", lambda file: np.save(file, source.y))
    write_atomically(folder / "meta.json", lambda file: file.write(json.dumps(kept).encode()))


def load_stored(folder: Path) -> Source:
    """A stored source, its arrays memory-mapped. Raises OSError or ValueError when there is no whole copy."""
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        x, y = (np.asarray(np.load(folder / f"{axis}.npy", mmap_mode="r")) for axis in "xy")
        parts = {part: (start, stop) for part, (start, stop) in meta["parts"].items()}
        shape = None if meta["image_shape"] is None else tuple(meta["image_shape"])
        offset = None if meta.get("offset") is None else np.array(meta["offset"], np.float64)
        source = Source(
            meta["name"], x, y, tuple(meta["classes"]), shape, parts, offset=offset, digest=meta.get("digest")
        )
    except (EOFError, KeyError, TypeError, AttributeError) as error:  # a file is empty, or another's
        raise ValueError(f"{folder}: damaged: {type(error).__name__}: {error}; delete it") from error
    if x.shape[:1] != y.shape:
        raise ValueError(f"{folder}: damaged: {x.shape} images and {y.shape} labels; delete it")
    return source


def stamp(path: Path) -> list[int]:
    """What tells a file from another in its place: size, times of its content and of its entry, inode."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """The file is there whole, or not at all."""
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with unfinished.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """The same for a file that a person named: a link is followed, and an error names the file that was asked for.

    A pipe or a device is written to as it is: nothing may take its place.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        write_atomically(path.resolve(), lambda file: file.write(content))
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


@lru_cache(maxsize=8)
def open_stored(
    folder: Path, train: Rows, validation: Rows, test: Rows | None = None, normalise: str = "none"
) -> Dataset:
    """A dataset of slices of the stored arrays, memory-mapped; statistics and digest are stored when first asked.

    Raises OSError or ValueError when the folder holds no whole copy.
    """
    source = load_stored(folder)
    ranges = [rows for rows in (train, validation, test) if rows is not None]
    splits = [Split(source.x[start:stop], source.y[start:stop]) for start, stop in ranges]
    known = folder / f"split-{'_'.join(f'{start}-{stop}' for start, stop in ranges)}.npz"
    stamps = np.array([stamp(folder / f"{axis}.npy") for axis in "xy"])
    try:
        with np.load(known, allow_pickle=False) as archive:
            moments, digest = archive["moments"], str(archive["digest"])
            whole = np.array_equal(archive["stamps"], stamps)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        whole = False
    if not whole:
        moments, digest = np.array(statistics(splits[0].x)), content_digest(*splits, offset=source.offset)
        kept = {"moments": moments, "digest": np.array(digest), "stamps": stamps}
        with suppress(OSError):  # it saves time, and no more
            write_atomically(known, lambda file: np.savez(file, **kept))  # type: ignore[arg-type]
    return Dataset(
        source.name,
        splits[0],
        splits[1],
        splits[2] if test is not None else None,
        source.classes,
        source.image_shape,
        *_normalisation(normalise, moments[0], moments[1], source.offset),
        digest,
        reference=(str(folder), train, validation, test, normalise, digest),
    )


def _reopen(folder: str, train: Rows, validation: Rows, test: Rows | None, normalise: str, digest: str) -> Dataset:
    """What unpickling a reference calls: within a process, the same dataset for the same reference."""
    try:
        dataset = open_stored(Path(folder), train, validation, test, normalise)
    except OSError as error:
        raise FileNotFoundError(f"{folder}: this machine has no copy of the dataset: {error}") from error
    if dataset.digest != digest:
        raise ValueError(f"{folder}: the data changed: expected digest {digest}, got {dataset.digest}")
    return dataset
