"""search.datasets: from a study's dataset section to arrays, and `sieve data`."""

import functools
import gzip
import hashlib
import io
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import settings as budget
from hypothesis import strategies as st

from core import data, files
from core.data import BATCHES
from search import datasets
from search.datasets import Archive, choose, open_dataset
from search.errors import DataError, SieveError, StudyFileError
from search.settings import Settings
from search.study import DatasetSpec, load

HERE = Path(__file__).resolve().parents[1]
CIFAR = Path(os.environ.get("SIEVE_DATA_DIR", HERE.parent / "shared" / "cifar10"))
FILES = tuple(f"{name}.bin" for name in BATCHES)
PARTS = {name: (10_000 * i, 10_000 * (i + 1)) for i, name in enumerate(BATCHES)}
LABELS = np.arange(60_000) % 10


def spec(name: str = "cifar10", **given: Any) -> DatasetSpec:
    return DatasetSpec.model_validate({"name": name, **given})


def at(home: Path, data_dir: Path | None = None) -> Settings:
    return Settings(home=home, storage="sqlite://", tracking_uri="sqlite://", data_dir=data_dir)


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """CIFAR-10 in the binary version, made up: pixels at random, image i of a batch of class i mod 10."""
    folder = tmp_path_factory.mktemp("cifar") / "cifar-10-batches-bin"
    folder.mkdir()
    for i, file in enumerate(FILES):
        records = np.frombuffer(np.random.default_rng(i).bytes(30_730_000), np.uint8).reshape(10_000, 3073).copy()
        records[:, 0] = np.arange(10_000) % 10
        (folder / file).write_bytes(records.tobytes())
    yield folder
    shutil.rmtree(folder.parent)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One home for all tests that do not change the files: the converted copy is large."""
    folder = tmp_path_factory.mktemp("home")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def linked(batches: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder of the same batches whose files may be replaced."""
    folder = tmp_path / "batches"
    folder.mkdir()
    for file in FILES:
        (folder / file).hardlink_to(batches / file)
    yield folder
    shutil.rmtree(tmp_path)


def images(folder: Path, *numbers: int) -> np.ndarray:
    """The pixels of these batches (0 to 5), read without the project's code."""
    raw = b"".join((folder / FILES[i]).read_bytes() for i in numbers)
    return np.frombuffer(raw, np.uint8).reshape(-1, 3073)[:, 1:]


# Splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "train", "validation", "test"),
    [
        ({}, (0, 45_000), (45_000, 50_000), (50_000, 60_000)),
        ({"train": ["data_batch_1"], "validation": "data_batch_2"}, (0, 10_000), (10_000, 20_000), (50_000, 60_000)),
        ({"train": 49_000, "validation": 1_000, "test": 1_000}, (0, 49_000), (49_000, 50_000), (50_000, 51_000)),
        ({"train": ["data_batch_1"], "validation": 1_000}, (0, 10_000), (49_000, 50_000), (50_000, 60_000)),
        ({"train": list(BATCHES[:5]), "validation": 1_000}, (0, 49_000), (49_000, 50_000), (50_000, 60_000)),
        ({"train": 0.5, "validation": 0.2, "test": False}, (0, 20_000), (40_000, 50_000), None),
        ({"validation": "data_batch_5", "subset": 100}, (0, 100), (40_000, 50_000), (50_000, 60_000)),
    ],
)
def test_the_splits_of_the_reports(given: Any, train: Any, validation: Any, test: Any) -> None:
    """Batches, counts, fractions and subsets choose the rows that their words promise."""
    expected = [None if rows is None else list(range(*rows)) for rows in (train, validation, test)]
    chosen = choose(spec(split="last", **given), PARTS, LABELS)
    assert [None if rows is None else rows.tolist() for rows in chosen] == expected


def test_rows_that_are_not_neighbours_keep_their_order() -> None:
    """Training batches come in the order they are named, and validation from what they leave."""
    wanted = spec(train=["data_batch_4", "data_batch_2"], validation=15_000, split="last")
    train, validation, _ = choose(wanted, PARTS, LABELS)
    assert train.tolist() == [*range(30_000, 40_000), *range(10_000, 20_000)]
    assert validation.tolist() == [*range(25_000, 30_000), *range(40_000, 50_000)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"validation": 50_001}, "dataset.validation: expected 1 to 50,000 images, got 50,001"),
        ({"validation": 50_000}, "leave none to train on"),
        ({"train": 45_001}, "dataset.train: expected 1 to 45,000 images, got 45,001"),
        ({"test": 10_001}, "dataset.test: expected 1 to 10,000 images"),
        ({"subset": 45_001}, "dataset.subset: expected 1 to 45,000 images"),
        ({"train": 1e-9}, "dataset.train: expected 1 to 45,000 images, got 1e-09 of 45,000, which is 0"),
    ],
)
def test_more_images_than_there_are(given: Any, message: str) -> None:
    """Counts that the data cannot give are refused with what it can."""
    with pytest.raises(DataError, match=message):
        choose(spec(**given), PARTS, LABELS)


@drawn(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    shares=st.tuples(st.floats(0.02, 0.5), st.floats(0.02, 0.45), st.floats(0.1, 1)),
    seed=st.integers(0, 2**32 - 1),
)
@budget(max_examples=200, deadline=None)
def test_a_stratified_split_has_every_class_in_proportion(sizes: Any, shares: Any, seed: int) -> None:
    """Parts are disjoint and cover all; a class that can be in every part is, by its share within one example."""
    y = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    n = len(y)
    test, validation = max(1, int(shares[0] * n)), max(1, int(shares[1] * n))
    if test + validation >= n:
        return
    wanted = {"path": "x", "seed": seed, "validation": validation, "test": test}
    chosen = choose(spec("npz", **wanted), {"train": (0, n)}, y)
    parts = [part.tolist() for part in chosen if part is not None]
    assert [len(part) for part in parts] == [n - test - validation, validation, test]
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))
    assert all(part == sorted(part) for part in parts)
    counts = np.array([np.bincount(y[part], minlength=len(sizes)) for part in parts])
    if min(test, validation) >= len(sizes) and test + validation <= n - 2 * len(sizes):
        assert (counts[:, np.array(sizes) >= 3] > 0).all()
        assert (counts[0] > 0).all()  # the rarest are trained on
    share = np.array(sizes) * test / n
    if (share >= 1).all() and (share <= np.array(sizes) - 2).all():
        assert (np.abs(counts[2] - share) < 1).all()
    left = np.array(sizes) - counts[2]
    share = left * validation / (n - test)
    if (share >= 1).all() and (share <= left - 1).all():
        assert (np.abs(counts[1] - share) < 1).all()
    # whatever else is asked for, in any order, the same examples choose and test
    count = max(1, int(shares[2] * len(parts[0])))
    fewer = choose(spec("npz", **wanted, train=count), {"train": (0, n)}, y)
    assert len(fewer[0]) == count
    assert [part.tolist() for part in fewer[1:] if part is not None] == parts[1:]
    assert set(fewer[0].tolist()) <= set(parts[0])


def test_a_stratified_split_is_another_for_another_seed() -> None:
    """Each seed gives a split of its own; the same seed, the same one; the names of classes do not matter."""
    y = np.arange(300) // 100
    splits = [choose(spec("npz", path="x", validation=60, seed=seed), {"train": (0, 300)}, y) for seed in range(20)]
    assert len({tuple(validation.tolist()) for _, validation, _ in splits}) == 20
    again = choose(spec("npz", path="x", validation=60, seed=7), {"train": (0, 300)}, y)
    assert again[1].tolist() == splits[7][1].tolist()
    assert np.bincount(y[again[1]]).tolist() == [20, 20, 20]


def test_parts_with_a_name_are_never_reshuffled(tmp_path: Path) -> None:
    """Batches, and the parts that an npz has, are taken as they are; only counts within them are drawn."""
    train, validation, test = choose(spec(train=["data_batch_4"], validation="data_batch_2"), PARTS, LABELS)
    assert (train.tolist(), validation.tolist()) == (list(range(30_000, 40_000)), list(range(10_000, 20_000)))
    assert test is not None
    assert test.tolist() == list(range(50_000, 60_000))
    x, y = np.arange(40.0).reshape(20, 2), np.arange(20) % 2
    np.savez(tmp_path / "own.npz", x_train=x, y_train=y, x_val=x + 100, y_val=y, x_test=x + 200, y_test=y)
    dataset, _ = open_dataset(spec("npz", path=str(tmp_path / "own.npz")), at(tmp_path / "home"))
    assert dataset.test is not None
    assert [part.x[:, 0].tolist() for part in (dataset.train, dataset.validation, dataset.test)] == [
        (x[:, 0] + offset).tolist() for offset in (0, 100, 200)
    ]


def test_a_count_within_a_part_is_in_proportion_too() -> None:
    """The count of test images, of training images and a subset are drawn of each class in proportion."""
    y = np.arange(60_000) // 1_000 % 10  # sorted by class within each batch
    chosen = choose(spec(validation=1_000, test=500, train=2_000, subset=200), PARTS, y)
    assert [np.bincount(y[rows]).tolist() for rows in chosen if rows is not None] == [[20] * 10, [100] * 10, [50] * 10]
    larger = choose(spec(validation=1_000, test=500, train=2_000), PARTS, y)[0]
    assert set(chosen[0].tolist()) <= set(larger.tolist())


def iris() -> tuple[np.ndarray, np.ndarray]:
    """Three classes of fifty that a line tells apart, sorted by class as such files ship."""
    y = np.arange(150) // 50
    return np.random.default_rng(0).normal(size=(150, 4)) + 5 * y[:, None], y


def test_a_file_sorted_by_class_is_split_fairly(tmp_path: Path) -> None:
    """Of a file sorted by class, every part has every class in proportion, and there is nothing to be told."""
    x, y = iris()
    np.savez(tmp_path / "iris.npz", x=x, y=y)
    wanted = spec("npz", path=str(tmp_path / "iris.npz"), validation=0.2, test=30)
    dataset, findings = open_dataset(wanted, at(tmp_path / "home"))
    assert dataset.test is not None
    parts = (dataset.train, dataset.validation, dataset.test)
    assert [np.bincount(part.y).tolist() for part in parts] == [[32] * 3, [8] * 3, [10] * 3]
    assert findings == []
    other = open_dataset(wanted.model_copy(update={"seed": 1}), at(tmp_path / "home"))[0]
    assert other.digest != dataset.digest
    assert open_dataset(wanted, at(tmp_path / "elsewhere"))[0].digest == dataset.digest


def test_a_part_of_one_class_is_refused_and_one_that_lacks_some_is_told(tmp_path: Path) -> None:
    """A validation or training part of one class is an error that says what to do; a part without a class a warning."""
    x, y = iris()
    np.savez(tmp_path / "iris.npz", x=x, y=y)
    wanted = spec("npz", path=str(tmp_path / "iris.npz"), validation=0.2, split="last")
    with pytest.raises(
        DataError, match=r"all 30 examples to choose by are of class 2; .*try split: stratified"
    ) as caught:
        open_dataset(wanted, at(tmp_path))
    assert caught.value.exit_code == 2
    _, findings = open_dataset(wanted.model_copy(update={"validation": 70, "test": 20}), at(tmp_path))
    assert findings == [
        "npz: no example to train on of 1 class: 2",
        "npz: no example to choose by of 1 class: 0",
        "npz: no example to test with of 2 classes: 0, 1",
    ]
    for wrong in ({"validation": 110}, {"validation": 110, "subset": 1}):
        with pytest.raises(DataError, match="examples to train on are of class 0"):
            open_dataset(wanted.model_copy(update=wrong), at(tmp_path))
    np.savez(tmp_path / "one.npz", x=x[:50], y=y[:50])
    with pytest.raises(DataError, match="are of class 0; expected two classes or more"):
        open_dataset(spec("npz", path=str(tmp_path / "one.npz"), validation=10), at(tmp_path))


def test_a_class_of_one_example_is_trained_on(tmp_path: Path) -> None:
    """The only example of a class is trained on, and a warning says which part lacks it; of two, one chooses."""
    x, y = iris()
    y = np.concatenate([y[:-3], [3, 4, 4]])
    np.savez(tmp_path / "rare.npz", x=x, y=y)
    wanted = spec("npz", path=str(tmp_path / "rare.npz"), validation=30, test=30)
    dataset, findings = open_dataset(wanted, at(tmp_path))
    assert np.bincount(dataset.train.y)[3:].tolist() == [1, 1]
    assert np.bincount(dataset.validation.y, minlength=5)[3:].tolist() == [0, 1]
    assert findings == [
        "npz: no example to choose by of 1 class: 3",
        "npz: no example to test with of 2 classes: 3, 4",
    ]


def test_data_check_counts_each_class_in_each_part(tmp_path: Path) -> None:
    """`sieve data check` shows how many examples of each class are in each part, and what is odd about them."""
    x, y = iris()
    np.savez(tmp_path / "plain.npz", x=x, y=y)
    rows = datasets.check("npz", at(tmp_path), str(tmp_path / "plain.npz"))
    assert [(row.name, row.detail) for row in rows[1:]] == [
        (f"class {label}", "train 40, validation 10") for label in range(3)
    ]
    np.savez(tmp_path / "parts.npz", x_train=x[:100], y_train=y[:100], x_val=x[100:], y_val=y[100:])
    assert datasets.check("npz", at(tmp_path), str(tmp_path / "parts.npz"))[-1].ok is False
    np.savez(tmp_path / "parts.npz", x_train=x[:120], y_train=y[:120], x_val=x[90:], y_val=y[90:])
    rows = datasets.check("npz", at(tmp_path), str(tmp_path / "parts.npz"))
    assert [row.detail for row in rows[1:]] == [
        "train 50, validation 0",
        "train 50, validation 10",
        "train 20, validation 50",
        "npz: no example to choose by of 1 class: 0",
    ]
    digits = datasets.check("digits", at(tmp_path))
    assert sum(int(row.detail.split()[-1]) for row in digits[1:]) == 360
    assert len(digits) == 11


# Opening ----------------------------------------------------------------------------------------------------------


def test_digits_need_no_file_and_no_folder(tmp_path: Path) -> None:
    """The digits open without settings or files, split as asked, the statistics from the training split."""
    dataset, findings = open_dataset(spec("digits", validation=360), at(tmp_path / "home"))
    assert [len(split) for split in (dataset.train, dataset.validation, dataset.test or ())] == [1077, 360, 360]
    assert findings == []
    assert not (tmp_path / "home").exists()
    np.testing.assert_allclose(dataset.mean, dataset.train.x.mean(axis=0), rtol=1e-6)


def test_cifar10_opens_as_slices_of_one_mapped_array(batches: Path, home: Path) -> None:
    """Splits are views of one read-only memory map, the content is the files', and the doubt is told."""
    dataset, findings = open_dataset(spec(split="last"), at(home, batches.parent))
    assert dataset.test is not None
    assert np.array_equal(dataset.validation.x, images(batches, 4)[5_000:])
    assert np.array_equal(dataset.test.x, images(batches, 5))
    assert dataset.train.x.base is dataset.validation.x.base
    assert not dataset.train.x.flags.writeable
    assert dataset.train.y[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert dataset.image_shape == (32, 32, 3)
    assert len(findings) == 1
    assert "6 of 6 checksums differ from the official ones" in findings[0]
    np.testing.assert_allclose(dataset.mean, dataset.train.x.mean(axis=0), rtol=1e-6)
    again, same = open_dataset(spec(split="last"), at(home, batches))
    assert again is dataset
    assert same == findings
    assert len(pickle.dumps({"data": dataset})) < 2_000


def test_batches_that_are_not_neighbours_get_a_copy_of_their_own(batches: Path, home: Path) -> None:
    """Training on batches 4 and 2 maps exactly these images, in this order, and the copy is made once."""
    wanted = spec(train=["data_batch_4", "data_batch_2"], validation="data_batch_1", test=100, split="last")
    dataset, _ = open_dataset(wanted, at(home, batches))
    assert dataset.test is not None
    assert np.array_equal(dataset.train.x, images(batches, 3, 1))
    assert np.array_equal(dataset.validation.x, images(batches, 0))
    assert np.array_equal(dataset.test.x, images(batches, 5)[:100])
    copies = {path: path.stat().st_mtime_ns for path in home.glob("data/*/x.npy")}
    data.open_stored.cache_clear()
    assert open_dataset(wanted, at(home, batches))[0].digest == dataset.digest
    assert {path: path.stat().st_mtime_ns for path in home.glob("data/*/x.npy")} == copies


def _open_there(home: Path, folder: Path) -> str:
    return open_dataset(spec(subset=100, split="last"), at(home, folder))[0].digest


def test_two_processes_may_open_new_data_at_once(linked: Path, tmp_path: Path) -> None:
    """Processes that convert the same files at the same time both succeed, with the same data."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        digests = list(pool.map(_open_there, [tmp_path / "home"] * 2, [linked] * 2))
    assert digests[0] == digests[1]
    assert len(list(tmp_path.glob("home/data/*/x.npy"))) == 1


def test_changed_files_are_noticed(linked: Path, tmp_path: Path) -> None:
    """When a source file changes, the next opening reads it again; a copy that was cut short is made again."""
    here = at(tmp_path / "home", linked)
    before, _ = open_dataset(spec(split="last"), here)
    raw = bytearray((linked / FILES[0]).read_bytes())
    raw[1] ^= 255
    overwrite(linked / FILES[0], bytes(raw))
    after, _ = open_dataset(spec(split="last"), here)
    assert after.train.x[0, 0] == before.train.x[0, 0] ^ 255
    assert after.digest != before.digest
    data.open_stored.cache_clear()
    copies = list(tmp_path.glob("home/data/*/x.npy"))
    for copy in copies:
        os.truncate(copy, 1_000_000)
    assert {row.state for row in datasets.check("cifar10", here)} == {"unknown", "as split", "damaged copy"}
    assert np.array_equal(open_dataset(spec(split="last"), here)[0].train.x[:10_000], images(linked, 0))


def overwrite(path: Path, raw: bytes) -> None:
    """New content for a linked file, the original's kept."""
    path.unlink()
    path.write_bytes(raw)


def test_damaged_files_are_refused_by_name(linked: Path, tmp_path: Path) -> None:
    """Missing, short, swapped and damaged files are errors that name the file and the finding."""
    here = at(tmp_path / "home", linked)
    original = (linked / FILES[2]).read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(DataError, match=rf"{FILES[2]}: {message}"):
            open_dataset(spec(), here)
        row = datasets.check("cifar10", here)[2]
        assert (row.name, row.state, row.ok) == (FILES[2], "refused", False)

    (linked / FILES[2]).unlink()
    refused("missing")
    damaged = {"0 bytes": b"", "30,729,999 bytes": original[:-1], "expected labels 0 to 9": b"\xff" + original[1:]}
    for message, raw in damaged.items():
        (linked / FILES[2]).write_bytes(raw)
        refused(message)
    (linked / FILES[2]).write_bytes((linked / FILES[1]).read_bytes())
    refused("the wrong file: its content is that of data_batch_2.bin")
    sha256 = hashlib.sha256(original).hexdigest()
    (linked / "SHA256SUMS").write_text(f"{sha256}  {FILES[2]}\n")
    refused(f"damaged: expected sha256 {sha256} as in SHA256SUMS, got [0-9a-f]")
    (linked / FILES[2]).write_bytes(original)
    assert "data_batch_3.bin (as in SHA256SUMS)" in open_dataset(spec(), here)[1][0]


def test_missing_cifar10_says_what_to_do(tmp_path: Path) -> None:
    """Without the batches, the error names the folder, the command and the variable."""
    for here in (at(tmp_path), at(tmp_path, tmp_path / "elsewhere")):
        with pytest.raises(DataError, match=r"sieve data fetch cifar10.*SIEVE_DATA_DIR") as caught:
            open_dataset(spec(), here)
        assert str(here.data_dir or here.data_cache) in str(caught.value)
    assert [(row.name, row.ok) for row in datasets.listing(at(tmp_path))][:2] == [("digits", True), ("cifar10", False)]


@pytest.mark.skipif(not CIFAR.is_dir(), reason=f"no CIFAR-10 in {CIFAR}; set SIEVE_DATA_DIR")
def test_the_real_cifar10_opens_from_its_parent_folder(tmp_path: Path) -> None:
    """The real batches open, balanced over ten classes, with published statistics of their colours."""
    dataset, findings = open_dataset(spec(validation=5_000, normalise="mean", split="last"), at(tmp_path, CIFAR))
    assert len(findings) <= 1
    assert dataset.test is not None
    assert np.bincount(dataset.test.y).tolist() == [1_000] * 10
    counts = np.bincount(np.concatenate([dataset.train.y, dataset.validation.y]))
    assert counts.tolist() == [5_000] * 10
    colours = dataset.mean.reshape(3, 1024).mean(axis=1)
    np.testing.assert_allclose(colours, [125.3, 123.0, 113.9], atol=0.3)  # quoted in many papers
    shutil.rmtree(tmp_path)


def test_npz_of_ones_own(tmp_path: Path) -> None:
    """An npz uses its own parts, or is split by counts; classes that are never trained on are told."""
    x, y = np.random.default_rng(0).normal(size=(50, 6)), np.arange(50) // 10
    np.savez(tmp_path / "parts.npz", x_train=x[:30], y_train=y[:30], x_val=x[30:], y_val=y[30:])
    np.savez(tmp_path / "plain.npz", x=x, y=y)
    parts, findings = open_dataset(spec("npz", path=str(tmp_path / "parts.npz")), at(tmp_path))
    assert (len(parts.train), len(parts.validation), parts.test) == (30, 20, None)
    assert findings == [
        "npz: no example to train on of 2 classes: 3, 4",
        "npz: no example to choose by of 3 classes: 0, 1, 2",
    ]
    plain = spec("npz", path=str(tmp_path / "plain.npz"), validation=15, test=10, split="last")
    dataset, findings = open_dataset(plain, at(tmp_path))
    assert dataset.test is not None
    assert np.array_equal(dataset.test.x, x[40:].astype(np.float32))
    assert np.array_equal(dataset.validation.x, x[25:40].astype(np.float32))
    assert len(pickle.dumps(dataset)) < 2_000
    with pytest.raises(DataError, match="expected a count or a fraction"):
        open_dataset(spec("npz", path=str(tmp_path / "plain.npz")), at(tmp_path))
    with pytest.raises(DataError, match=r"none\.npz: no such file"):
        open_dataset(spec("npz", path=str(tmp_path / "none.npz")), at(tmp_path))


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize("part", ["val", "test", "train"])
def test_x_and_y_beside_other_parts_are_no_whole(tmp_path: Path, part: str) -> None:
    """x and y would be cut up, and the part beside them left out without a word: the file is refused instead."""
    x, y = np.arange(90.0).reshape(30, 3), np.arange(30) % 3
    np.savez(tmp_path / "mixed.npz", **{"x": x, "y": y, f"y_{part}": y})
    with pytest.raises(DataError, match=r"mixed\.npz: no array 'x_train' among .*x, .*; expected an npz"):
        open_dataset(spec("npz", path=str(tmp_path / "mixed.npz"), validation=6), at(tmp_path))


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"validation": 0.01}, "dataset.validation: expected 1 to 30 images, got 0.01 of 30, which is 0"),
        ({"validation": 31}, "dataset.validation: expected 1 to 30 images, got 31"),
        ({"validation": 6, "test": 30}, "dataset.validation: expected some images, none are left for it"),
        ({"validation": 6, "train": 0.01}, "dataset.train: expected 1 to 24 images, got 0.01 of 24, which is 0"),
    ],
)
def test_amounts_that_there_are_not(tmp_path: Path, wanted: dict[str, Any], said: str) -> None:
    """A count or a fraction that cannot be taken is repeated as it was given."""
    x, y = np.arange(90.0).reshape(30, 3), np.arange(30) % 3
    np.savez(tmp_path / "a.npz", x=x, y=y)
    with pytest.raises(DataError) as error:
        open_dataset(spec("npz", path=str(tmp_path / "a.npz"), **wanted), at(tmp_path))
    assert str(error.value) == said


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no such file here")
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Errors of reading, unlike those of opening, know no name: the path that was given stands before them."""
    with pytest.raises(DataError, match=r"^/proc/self/mem: Input/output error$"):
        open_dataset(spec("npz", path="/proc/self/mem", validation=6), at(tmp_path))
    with pytest.raises(DataError, match=r"^/proc/self/mem: "):
        datasets.check("npz", at(tmp_path), "/proc/self/mem")


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b'{"name": "npz"}', b"\xff\xfe", b"\x93NUMPY\x01\x00"])
@pytest.mark.parametrize("kept", ["npz-*.json", "npz-*/meta.json", "npz-*/x.npy", "npz-*/y.npy", "npz-*/split-*.npz"])
def test_copies_of_any_content_are_made_again(tmp_path: Path, kept: str, content: bytes) -> None:
    """Whatever a crash or a disk left of what is kept beside the files, the files are read again without a word."""
    np.savez(tmp_path / "own.npz", x=np.arange(90.0).reshape(30, 3), y=np.arange(30) % 3)
    wanted = spec("npz", path=str(tmp_path / "own.npz"), validation=6)
    first, _ = open_dataset(wanted, at(tmp_path / "home"))
    damaged = list(at(tmp_path / "home").data_cache.glob(kept))
    assert damaged
    for path in damaged:
        path.write_bytes(content)
    data.open_stored.cache_clear()  # as in another process
    again, _ = open_dataset(wanted, at(tmp_path / "home"))
    assert again.digest == first.digest
    assert again.mean.tolist() == first.mean.tolist()


def test_every_copy_is_checked(tmp_path: Path) -> None:
    """A bit that fell over is seen in the copy of the file, and in that of the examples as they were drawn."""
    np.savez(tmp_path / "own.npz", x=np.arange(90.0).reshape(30, 3), y=np.arange(30) % 3)
    home = at(tmp_path / "home")
    open_dataset(spec("npz", path=str(tmp_path / "own.npz"), validation=6), home)

    def states() -> dict[str, str]:
        return {r.name: r.state for r in datasets.check("npz", home, str(tmp_path / "own.npz")) if "copy" in r.state}

    copies = sorted(folder.name for folder in home.data_cache.glob("npz-*/"))
    assert len(copies) == 2
    assert states() == dict.fromkeys(copies, "whole copy")
    for name in copies:
        file = home.data_cache / name / "x.npy"
        file.write_bytes(file.read_bytes()[:-2] + b"??")
    assert states() == dict.fromkeys(copies, "damaged copy")


def npz_of(**members: Any) -> bytes:
    """An npz of arrays; bytes are a member's content as they are."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content if isinstance(content, bytes) else npy(content))
    return buffer.getvalue()


def other_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("word/document.xml", "<xml/>")
    return buffer.getvalue()


PAGE = b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 123\n"
WRONG: dict[str, tuple[bytes, str]] = {
    "csv": (b"length,width,class\n5.1,3.5,0\n", "CSV"),
    "csv with a mark": (b"\xef\xbb\xbf5.1;3.5;0\n", "CSV"),
    "tabs": (b"5.1\t3.5\t0\n" * 500, "CSV"),
    "text": (b"to be done\n", "text, which begins with 'to be done'"),
    "json": (b'{"x": [1, 2], "y": [0]}', "text"),
    "html": (b"\n" + PAGE, "a web page"),
    "xhtml": (b'<?xml version="1.0"?>\n<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0">\n' + PAGE, "a web page"),
    "csv in latin-1": ("Länge,Breite\n5.1,3.5\n".encode("latin-1"), "CSV"),
    "lfs": (LFS, "Git LFS pointer.*git lfs pull"),
    "npy": (npy(np.zeros((3, 2))), "one array"),
    "other zip": (other_zip(), "zip archive of other files .word/document.xml"),
    "empty zip": (b"PK\x05\x06" + bytes(18), "zip archive of other files .nothing"),
    "cut zip": (npz_of(x=np.zeros((9, 9)), y=np.arange(9) % 2)[:-40], "a zip archive, cut short or damaged"),
    "empty": (b"", "an empty file"),
    "gzip": (gzip.compress(b"1,2,0"), "gzip"),
    "pickle": (pickle.dumps({"x": [[1.0]], "y": [0]}), "a pickle"),
    "old pickle": (pickle.dumps([1.0], 2), "a pickle"),
    "bytes": (bytes(range(255, -1, -1)), "bytes of an unknown kind, which begin with ff fe fd"),
    "objects": (npz_of(x=np.array([[1], [1, 2]], object), y=np.arange(2)), "expected numbers, got Python objects"),
    "no array": (npz_of(x=b"hello", y=np.arange(2)), "x.npy: expected an array as np.savez writes it"),
    "a header of code": (
        npz_of(x=b"\x93NUMPY\x01\x00\x40\x00" + b"__import__('os').getcwd()".ljust(64), y=np.arange(2)),
        "x.npy: expected an array as np.savez writes it",
    ),
    "a header of 60 KB": (
        npz_of(x=b"\x93NUMPY\x01\x00\x00\xf0" + b" " * 0xF000, y=np.arange(2)),
        "x.npy: expected an array as np.savez writes it",
    ),
    "other names": (npz_of(X=np.zeros((2, 2)), Y=np.arange(2)), "no array 'x' among X, Y"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_named_for_what_it_is(kind: str, tmp_path: Path) -> None:
    """What is no npz of numbers is refused in one line that says what it is; nobody is told to unpickle anything."""
    raw, said = WRONG[kind]
    path = tmp_path / "mine.npz"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=said) as caught:
        open_dataset(spec("npz", path=str(path), validation=1), at(tmp_path / "home"))
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "pickle" not in text.replace("a pickle, which is a program and is not run", "").replace("not unpickled", "")
    assert "\n" not in text
    with pytest.raises(DataError, match=said):
        datasets.check("npz", at(tmp_path / "home"), str(path))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "folder", "endless device"])
def test_only_ordinary_files_are_opened(kind: str, tmp_path: Path) -> None:
    """A pipe, a socket, a device and a folder are refused at once, as data and as a study file."""
    path = tmp_path / "x.npz"
    with socket.socket(socket.AF_UNIX) as listener:
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            listener.bind(str(path))
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to("/dev/zero" if kind == "endless device" else "/dev/null")
        word = {"fifo": "named pipe", "endless device": "device"}.get(kind, kind)
        expected = rf"{path}: expected an ordinary file, got a {word}"
        here = at(tmp_path / "home")
        with pytest.raises(DataError, match=expected):
            open_dataset(spec("npz", path=str(path), validation=1), here)
        with pytest.raises(DataError, match=expected):
            datasets.check("npz", here, str(path))
        with pytest.raises(StudyFileError, match=expected):
            load(path)
        with pytest.raises(ValueError, match=expected):
            data.read_batch(path)


@pytest.mark.parametrize("path", ["~nobody-of-this-name/x.npz", "x\0y.npz", "x" * 5_000, "none.npz", "{file}/x.npz"])
def test_a_path_that_leads_nowhere_is_one_line(path: str, tmp_path: Path) -> None:
    """A user who does not exist, a NUL, an endless name and a file as a folder are errors about the path."""
    (tmp_path / "file").write_bytes(b"")
    given = path.format(file=tmp_path / "file")
    for ask in (
        lambda: open_dataset(spec("npz", path=given, validation=1), at(tmp_path)),
        lambda: datasets.check("npz", at(tmp_path), given),
        lambda: open_dataset(spec(path=given), at(tmp_path)),
    ):
        with pytest.raises(SieveError, match=r"dataset.path|PATH") as caught:
            ask()
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 2


def test_members_that_nobody_asked_for_are_not_read(tmp_path: Path) -> None:
    """A member beside the arrays in use is left alone: damaged, of objects or endless, it costs nothing."""
    x, y = iris()
    raw = bytearray(npz_of(x=x, y=y, z=b"A" * 10_000, more=np.array([{}], object)))
    at_z = raw.index(b"z.npy") + 5
    raw[at_z : at_z + 8] = b"damaged!"
    (tmp_path / "mine.npz").write_bytes(raw)
    with zipfile.ZipFile(tmp_path / "mine.npz") as archive, pytest.raises(zlib.error):
        archive.read("z.npy")
    dataset, _ = open_dataset(spec("npz", path=str(tmp_path / "mine.npz"), validation=30), at(tmp_path))
    assert len(dataset.train) == 120


def header_of(*shape: int) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def lying(size: int) -> bytes:
    """An npz whose x is 144 bytes by its header and on disk, and `size` bytes by the archive's directory."""
    raw = bytearray(npz_of(x=np.zeros((2, 1)), y=np.arange(2)))
    for entry in (raw.index(b"PK\x03\x04") + 22, raw.index(b"PK\x01\x02") + 24):
        assert int.from_bytes(raw[entry : entry + 4], "little") == 144
        raw[entry : entry + 4] = size.to_bytes(4, "little")
    return bytes(raw)


SIZES = {
    "by its header alone": (npz_of(x=header_of(10**9, 1_000), y=np.arange(2)), "expected 8,000,000,000,128 bytes"),
    "by a negative length": (npz_of(x=header_of(-1, 4), y=np.arange(2)), "x.npy: expected"),
    "more by the archive": (lying(2**31), "x.npy: expected 144 bytes by its header"),
    "less by the archive": (lying(20), "x.npy: expected"),
}  # fmt: skip


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", SIZES)
def test_sizes_that_cannot_be_are_refused_before_anything_is_made_of_them(kind: str, tmp_path: Path) -> None:
    """Where the header, the archive's directory and the bytes on disk disagree about a size, nothing is allocated."""
    (tmp_path / "mine.npz").write_bytes(SIZES[kind][0])
    with pytest.raises(DataError, match=SIZES[kind][1]):
        open_dataset(spec("npz", path=str(tmp_path / "mine.npz"), validation=1), at(tmp_path))


def test_arrays_beyond_the_bound_are_not_inflated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays in use that would take more than the bound are refused by their declared sizes, with both numbers."""
    np.savez_compressed(tmp_path / "zeros.npz", x=np.zeros((1_000, 1_000)), y=np.arange(1_000) % 2)
    monkeypatch.setattr(files, "MOST_BYTES", 10**6)
    with pytest.raises(DataError, match="its arrays take 8,008,256 bytes, at most 1,000,000 are read"):
        open_dataset(spec("npz", path=str(tmp_path / "zeros.npz"), validation=10), at(tmp_path))


def test_a_page_in_the_place_of_a_batch_is_named(linked: Path, tmp_path: Path) -> None:
    """A batch of CIFAR-10 that is a web page, or a pointer to it, is told to be one."""
    for content, said in ((PAGE, "a web page"), (LFS, "Git LFS pointer")):
        overwrite(linked / FILES[1], content)
        with pytest.raises(DataError, match=f"{FILES[1]}: .*{said}"):
            open_dataset(spec(), at(tmp_path / "home", linked))


def test_another_file_of_the_same_size_and_time_is_noticed(tmp_path: Path) -> None:
    """A file replaced by another one of its size, with its time restored, is another dataset."""
    x, y = iris()
    path, wanted = tmp_path / "mine.npz", spec("npz", path=str(tmp_path / "mine.npz"), validation=30)
    np.savez(path, x=x, y=y)
    before, stat = open_dataset(wanted, at(tmp_path / "home"))[0].digest, path.stat()
    np.savez(tmp_path / "other.npz", x=x + 1, y=y)
    for put in (shutil.copy, shutil.move):  # into the same inode, and into a new one
        put(tmp_path / "other.npz", path)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
        after = open_dataset(wanted, at(tmp_path / "home"))[0]
        assert after.digest != before
        assert np.array_equal(np.concatenate([after.train.x, after.validation.x]).sum(0) > x.sum(0) + 149, [True] * 4)


def test_a_copy_that_was_changed_has_another_digest(tmp_path: Path) -> None:
    """The digest of a converted copy is not taken from a note about what the copy once was."""
    x, y = iris()
    np.savez(tmp_path / "mine.npz", x_train=x, y_train=y, x_val=x, y_val=y)
    wanted = spec("npz", path=str(tmp_path / "mine.npz"))
    before = open_dataset(wanted, at(tmp_path / "home"))[0].digest
    data.open_stored.cache_clear()
    (copy,) = (tmp_path / "home").glob("data/*/x.npy")
    stat, raw = copy.stat(), bytearray(copy.read_bytes())
    raw[-1] ^= 1
    copy.write_bytes(raw)
    os.utime(copy, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert open_dataset(wanted, at(tmp_path / "home"))[0].digest != before


def test_copies_of_data_are_their_owners_alone(tmp_path: Path) -> None:
    """Whatever the home and the umask are, other users of the machine cannot enter the folder of copies."""
    x, y = iris()
    np.savez(tmp_path / "mine.npz", x=x, y=y)
    before = os.umask(0)
    try:
        open_dataset(spec("npz", path=str(tmp_path / "mine.npz"), validation=30), at(tmp_path / "home"))
    finally:
        os.umask(before)
    folders = {path.parent for path in (tmp_path / "home").glob("data/*/x.npy")} | {tmp_path / "home" / "data"}
    assert len(folders) == 3
    assert {folder.stat().st_mode & 0o777 for folder in folders} == {0o700}


# Fetching ---------------------------------------------------------------------------------------------------------

MEMBERS = {"data_batch_1.bin": 12, "test_batch.bin": 3}


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for member, content in members:
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> Any:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, link
    return info, content


GOOD = (
    member("box", kind=tarfile.DIRTYPE),
    member("box/readme.html", b"hello"),
    member("box/data_batch_1.bin", b"0123456789ab"),
    member("box/test_batch.bin", b"abc"),
)


def box(raw: bytes, url: str = "http://127.0.0.1:9/box.tar.gz") -> Archive:
    return Archive(url, hashlib.sha256(raw).hexdigest(), "box", MEMBERS)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A web server on loopback: its folder and address."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder = tmp_path / "site"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_fetch_downloads_verifies_and_unpacks(site: tuple[Path, str], tmp_path: Path) -> None:
    """An archive with the right checksum leaves its wanted files and nothing else; a second fetch does nothing."""
    raw, here = tar_of(*GOOD), at(tmp_path / "home")
    (site[0] / "box.tar.gz").write_bytes(raw)
    folder = datasets.fetch("cifar10", here, box(raw, f"{site[1]}/box.tar.gz"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "data_batch_1.bin": b"0123456789ab",
        "test_batch.bin": b"abc",
    }
    assert [path.name for path in here.data_cache.iterdir()] == ["box"]
    assert datasets.fetch("cifar10", here, box(raw)) == folder


def test_fetch_refuses_another_archive(site: tuple[Path, str], tmp_path: Path) -> None:
    """Another checksum, a missing archive, a dead server and another name are errors that leave nothing behind."""
    here = at(tmp_path / "home")
    (site[0] / "box.tar.gz").write_bytes(tar_of(*GOOD[:2]))
    wrong = {
        "does not match the known hash": box(tar_of(*GOOD), f"{site[1]}/box.tar.gz"),
        "404": box(b"", f"{site[1]}/none.tar.gz"),
        "could not fetch http://127.0.0.1:9": box(b""),
    }
    for message, archive in wrong.items():
        with pytest.raises(DataError, match=message):
            datasets.fetch("cifar10", here, archive)
    with pytest.raises(DataError, match="only cifar10 is fetched"):
        datasets.fetch("digits", here)
    assert list(here.data_cache.iterdir()) == []


def sparse() -> bytes:
    """A tar.gz whose wanted member is a GNU sparse file of 10 GB without one byte of content."""
    info = tarfile.TarInfo("box/data_batch_1.bin")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    size = b"\x80" + (10**10).to_bytes(11, "big")
    header[483:495] = size  # the real size
    header[386:398], header[398:410] = size, b"%011o\0" % 0  # one empty piece at its end
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return gzip.compress(bytes(header) + bytes(1024))


BAD = {
    "climbs out": tar_of(*GOOD, member("box/../../evil", b"evil")),
    "absolute": tar_of(*GOOD, member("/tmp/evil", b"evil")),
    "symlink": tar_of(*GOOD[:2], member("box/data_batch_1.bin", kind=tarfile.SYMTYPE, link="/etc/passwd"), GOOD[3]),
    "hard link": tar_of(*GOOD[:3], member("box/test_batch.bin", kind=tarfile.LNKTYPE, link="box/data_batch_1.bin")),
    "device": tar_of(*GOOD[:3], member("box/test_batch.bin", kind=tarfile.CHRTYPE)),
    "folder is a link": tar_of(member("box", kind=tarfile.SYMTYPE, link="/tmp"), *GOOD[1:]),
    "another size": tar_of(*GOOD[:3], member("box/test_batch.bin", b"abcd")),
    "large readme": tar_of(*GOOD, member("box/readme.html", bytes(10**6))),
    "twice": tar_of(*GOOD, GOOD[2]),
    "sparse": sparse(),
    "missing": tar_of(*GOOD[:3]),
    "cut short": tar_of(*GOOD)[:-40],
    "no tar": gzip.compress(b"hello"),
    "no gzip": b"hello",
    "empty": b"",
}


@pytest.mark.parametrize("kind", BAD)
def test_crafted_archives_are_refused(kind: str, tmp_path: Path) -> None:
    """Links, devices, sparse or huge members, paths that climb out and damaged archives leave nothing behind."""
    path, into = tmp_path / "box.tar.gz", tmp_path / "a" / "b"
    path.write_bytes(BAD[kind])
    with pytest.raises(DataError, match=r"box\.tar\.gz: "):
        datasets.extract(path, box(BAD[kind]), into)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "a", into, path]


def test_the_sparse_archive_is_what_it_claims(tmp_path: Path) -> None:
    """The crafted sparse member is one: tarfile sees 10 GB."""
    with tarfile.open(fileobj=io.BytesIO(sparse())) as tar:
        only = tar.next()
    assert only is not None
    assert only.issparse()
    assert only.size == 10**10


def test_datasets_stays_light() -> None:
    """Importing search.datasets brings neither pooch nor scikit-learn along."""
    code = "import sys, search.datasets; sys.exit(bool({'pooch', 'sklearn', 'requests'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE, check=False).returncode == 0
