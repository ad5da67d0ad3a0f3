"""search.datasets: from a study's dataset section to arrays, and `sieve data`."""

import functools
import gzip
import hashlib
import io
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core import data
from core.data import BATCHES
from search import datasets
from search.datasets import Archive, choose, open_dataset
from search.errors import DataError
from search.settings import Settings
from search.study import DatasetSpec

HERE = Path(__file__).resolve().parents[1]
CIFAR = Path(os.environ.get("SIEVE_DATA_DIR", HERE.parent / "shared" / "cifar10"))
FILES = tuple(f"{name}.bin" for name in BATCHES)
PARTS = {name: (10_000 * i, 10_000 * (i + 1)) for i, name in enumerate(BATCHES)}


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
    assert [None if rows is None else rows.tolist() for rows in choose(spec(**given), PARTS)] == expected


def test_rows_that_are_not_neighbours_keep_their_order() -> None:
    """Training batches come in the order they are named, and validation from what they leave."""
    train, validation, _ = choose(spec(train=["data_batch_4", "data_batch_2"], validation=15_000), PARTS)
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
        ({"train": 1e-9}, "dataset.train: expected 1 to 45,000 images, got 0"),
    ],
)
def test_more_images_than_there_are(given: Any, message: str) -> None:
    """Counts that the data cannot give are refused with what it can."""
    with pytest.raises(DataError, match=message):
        choose(spec(**given), PARTS)


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
    dataset, findings = open_dataset(spec(), at(home, batches.parent))
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
    again, same = open_dataset(spec(), at(home, batches))
    assert again is dataset
    assert same == findings
    assert len(pickle.dumps({"data": dataset})) < 2_000


def test_batches_that_are_not_neighbours_get_a_copy_of_their_own(batches: Path, home: Path) -> None:
    """Training on batches 4 and 2 maps exactly these images, in this order, and the copy is made once."""
    wanted = spec(train=["data_batch_4", "data_batch_2"], validation="data_batch_1", test=10)
    dataset, _ = open_dataset(wanted, at(home, batches))
    assert dataset.test is not None
    assert np.array_equal(dataset.train.x, images(batches, 3, 1))
    assert np.array_equal(dataset.validation.x, images(batches, 0))
    assert np.array_equal(dataset.test.x, images(batches, 5)[:10])
    copies = {path: path.stat().st_mtime_ns for path in home.glob("data/*/x.npy")}
    data.open_stored.cache_clear()
    assert open_dataset(wanted, at(home, batches))[0].digest == dataset.digest
    assert {path: path.stat().st_mtime_ns for path in home.glob("data/*/x.npy")} == copies


def _open_there(home: Path, folder: Path) -> str:
    return open_dataset(spec(subset=100), at(home, folder))[0].digest


def test_two_processes_may_open_new_data_at_once(linked: Path, tmp_path: Path) -> None:
    """Processes that convert the same files at the same time both succeed, with the same data."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        digests = list(pool.map(_open_there, [tmp_path / "home"] * 2, [linked] * 2))
    assert digests[0] == digests[1]
    assert len(list(tmp_path.glob("home/data/*/x.npy"))) == 1


def test_changed_files_are_noticed(linked: Path, tmp_path: Path) -> None:
    """When a source file changes, the next opening reads it again; a copy that was cut short is made again."""
    here = at(tmp_path / "home", linked)
    before, _ = open_dataset(spec(), here)
    raw = bytearray((linked / FILES[0]).read_bytes())
    raw[1] ^= 255
    overwrite(linked / FILES[0], bytes(raw))
    after, _ = open_dataset(spec(), here)
    assert after.train.x[0, 0] == before.train.x[0, 0] ^ 255
    assert after.digest != before.digest
    data.open_stored.cache_clear()
    copies = list(tmp_path.glob("home/data/*/x.npy"))
    for copy in copies:
        os.truncate(copy, 1_000_000)
    assert {row.state for row in datasets.check("cifar10", here)} == {"unknown", "damaged copy"}
    assert np.array_equal(open_dataset(spec(), here)[0].train.x[:10_000], images(linked, 0))


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
    dataset, findings = open_dataset(spec(validation=5_000, normalise="mean"), at(tmp_path, CIFAR))
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
    assert findings == ["npz: no example to train on of 2 classes: 3, 4"]
    plain = spec("npz", path=str(tmp_path / "plain.npz"), validation=5, test=10)
    dataset, findings = open_dataset(plain, at(tmp_path))
    assert dataset.test is not None
    assert np.array_equal(dataset.test.x, x[40:].astype(np.float32))
    assert np.array_equal(dataset.validation.x, x[35:40].astype(np.float32))
    assert len(pickle.dumps(dataset)) < 2_000
    with pytest.raises(DataError, match="expected a count or a fraction"):
        open_dataset(spec("npz", path=str(tmp_path / "plain.npz")), at(tmp_path))
    with pytest.raises(DataError, match=r"none\.npz: no such file"):
        open_dataset(spec("npz", path=str(tmp_path / "none.npz")), at(tmp_path))


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
