"""core.data: reading, checking, splitting and sharing datasets."""

import hashlib
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core import data
from core import train as training
from core.data import Dataset, Source

HERE = Path(__file__).resolve().parents[1]
CIFAR = Path(os.environ.get("SIEVE_DATA_DIR", HERE.parent / "shared" / "cifar10"))
PYTHON_FOLDER = CIFAR if (CIFAR / "data_batch_1").is_file() else CIFAR / "cifar-10-batches-py"
needs_cifar = pytest.mark.skipif(
    not (PYTHON_FOLDER / "data_batch_1").is_file(), reason=f"no CIFAR-10 in {CIFAR}; set SIEVE_DATA_DIR"
)
Change = Callable[[dict[bytes, Any]], object]


def python_batch(change: Change = lambda batch: None, protocol: int = 3) -> bytes:
    """A file of the python version, with random pixels."""
    rng = np.random.default_rng(1)
    batch: dict[bytes, Any] = {
        b"batch_label": b"training batch 1 of 5",
        b"labels": rng.integers(0, 10, 10_000).tolist(),
        b"data": np.frombuffer(rng.bytes(30_720_000), np.uint8).reshape(10_000, 3072),
        b"filenames": [b"%05d.png" % i for i in range(10_000)],
    }
    change(batch)
    return pickle.dumps(batch, protocol)


PYTHON_BATCH = python_batch()
PIXELS = PYTHON_BATCH.index(b"data"), PYTHON_BATCH.index(b"filenames")  # the pixels lie between


def arrays(n: int = 6, d: int = 4, top: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n)
    return rng.integers(0, 256, (n, d), dtype=np.uint8), np.arange(n) % top


def shuffled(batch: dict[bytes, Any]) -> None:
    batch[b"data"] = np.asfortranarray(batch[b"data"])


# Digits and arrays --------------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn_in_the_documented_order() -> None:
    """The digits equal scikit-learn's own, permuted by the fixed seed, and scikit-learn is not imported."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(1797).permutation(1797)
    source = data.read_digits()
    assert source.x.dtype == np.uint8
    assert np.array_equal(source.x, x[order])
    assert np.array_equal(source.y, y[order])
    code = "import sys, core.data; core.data.read_digits(); sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE, check=False).returncode == 0


@pytest.mark.parametrize("normalise", ["none", "mean", "standard"])
@pytest.mark.parametrize("kind", [np.uint8, np.float64])
def test_statistics_come_from_the_training_split_alone(kind: type, normalise: str) -> None:
    """The normalised training split has the promised mean and deviation, whatever the other splits hold."""
    x, y = arrays(5_000)
    x[:, 2] = 7
    dataset = Dataset.from_arrays((x.astype(kind), y), (255 - x.astype(kind), y), normalise=normalise)
    z = (dataset.train.x - dataset.mean.astype(np.float64)) * dataset.scale
    assert dataset.train.x.dtype == (np.uint8 if kind is np.uint8 else np.float32)
    assert dataset.mean.dtype == dataset.scale.dtype == np.float32
    if normalise == "none":
        assert np.array_equal(z, x)
        return
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-5)
    deviation = [1, 1, 0, 1] if normalise == "standard" else x.std(axis=0)
    np.testing.assert_allclose(z.std(axis=0), deviation, rtol=1e-6)
    assert dataset.scale[2] == 1


@given(st.integers(1, 2**32), st.sampled_from([1, 2, data.CHUNK - 1, data.CHUNK, data.CHUNK + 1]))
@settings(max_examples=20, deadline=None)
def test_statistics_of_bytes_are_exact(seed: int, n: int) -> None:
    """Mean and deviation of uint8 pixels agree with Python's whole numbers to the last bit but one."""
    x = np.random.default_rng(seed).integers(0, 256, (n, 2), dtype=np.uint8)
    mean, deviation = data.statistics(x)
    for j, column in enumerate(x.T.tolist()):
        total, squares = sum(column), sum(value * value for value in column)
        assert mean[j] == total / n
        assert deviation[j] == pytest.approx((n * squares - total * total) ** 0.5 / n, rel=4e-16)


def test_a_constant_float_pixel_does_not_blow_up() -> None:
    """A float pixel that never varies keeps scale 1 though its mean cannot be summed exactly."""
    x = np.full((999, 2), 0.1, np.float32)
    dataset = Dataset.from_arrays((x, np.arange(999) % 2), (x, np.arange(999) % 2), normalise="standard")
    assert dataset.scale.tolist() == [1, 1]
    assert ((x - dataset.mean) * dataset.scale).any() == np.False_


X, Y = arrays()
BAD = {
    "flatten each image to a row": {"train": (np.zeros((2, 2, 2), np.uint8), [0, 1])},
    "train x: expected images as rows": {"train": (np.zeros((0, 4), np.uint8), [])},
    "validation y: expected one label per image": {"validation": (X, Y[:-1])},
    "train y: expected whole numbers from 0 up, got float64": {"train": (X, Y + 0.0)},
    "train y: expected whole numbers from 0 up, got -1": {"train": (X, Y - 1)},
    "test x: expected finite float32 numbers, image 3": {"test": (np.where(np.arange(6)[:, None] == 3, np.nan, X), Y)},
    "train x: expected finite float32": {"train": (X * 1e40, Y)},
    "got <U1": {"train": (np.full((6, 4), "a"), Y)},
    "complex128": {"train": (X * 1j, Y)},
    "the same number of pixels": {"validation": (X[:, :3], Y)},
    "expected labels below 2, the number of classes, got 2": {"classes": ("no", "yes")},
    "image_shape: expected 4 pixels": {"image_shape": (3, 3)},
    "normalise: expected one of none, mean, standard, got 'z'": {"normalise": "z"},
}


@pytest.mark.parametrize("message", BAD)
def test_arrays_that_cannot_be_trained_on_are_refused(message: str) -> None:
    """Wrong shapes, types, labels and numbers are refused with the array's name."""
    with pytest.raises(ValueError, match=message):
        Dataset.from_arrays(**({"train": (X, Y), "validation": (X, Y)} | BAD[message]))


def test_a_dataset_of_arrays_travels_by_value() -> None:
    """Pickling a dataset of arrays in memory keeps its content, and its digest depends on the content."""
    dataset = Dataset.from_arrays((X, Y), (X, Y), (X, Y), normalise="standard", image_shape=(2, 2))
    again = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(again.test.x, X)
    assert (again.digest, again.classes, again.image_shape) == (dataset.digest, ("0", "1", "2"), (2, 2))
    assert Dataset.from_arrays((X, Y), (X, Y), (255 - X, Y)).digest != dataset.digest
    with pytest.raises(ValueError, match="read-only"):
        dataset.train.x[0, 0] = 1


# Features far from 0 ------------------------------------------------------------------------------------------

NOISE = np.random.default_rng(3)
SIGNAL = NOISE.integers(0, 1_000, (400, 3))  # whole numbers; the first two decide the class
CLASS = (SIGNAL[:, 0] + SIGNAL[:, 1] > 1_000).astype(np.int64)
FAR: dict[str, tuple[Any, float]] = {  # the same, where people have it; and how much of it float64 itself keeps
    "seconds since 1970": (SIGNAL + 1.7e9, 1e-9),
    "milliseconds, as whole numbers": (SIGNAL + 1_700_000_000_000, 1e-9),
    "nanoseconds since 1970": (SIGNAL * 1_000_000 + 1_700_000_000_000_000_000, 1e-4),
    "numbers of 64 bits": (SIGNAL.astype(np.uint64) + np.uint64(2**64 - 2_000), 1.0),
    "negative numbers": (SIGNAL - 10**9, 1e-9),
    "above 2**24": ((SIGNAL + 2**30).astype(np.int32), 1e-9),
    "coordinates": (SIGNAL / 1e6 + np.array([5_000_000.0, 500_000.0, 0.0]), 1e-4),
    "with an outlier": (np.where(np.arange(400)[:, None] == 5, 0.0, SIGNAL + 1e12), 1e-2),
    "big-endian": ((SIGNAL + 1.7e9).astype(">f8"), 1e-9),
}


def learnt(dataset: Dataset) -> float:
    """The share of the training examples that a line tells apart after twenty epochs."""
    config = training.TrainConfig.from_params(
        {"hidden_sizes": [], "eta": 0.1, "momentum": 0.9, "batch_size": 20, "epochs": 20}
    )
    (state,), (progress,) = training.advance([training.start(config, dataset, (0,))], dataset, 20)
    assert state.finished
    return progress.evaluations[-1].metrics["accuracy/val"]


@pytest.mark.parametrize("kind", FAR)
def test_features_far_from_zero_train_as_centred_ones_do(kind: str) -> None:
    """Times, ids and coordinates lose nothing by where they lie: training is as good as on the same near 0."""
    x, _ = FAR[kind]
    near = SIGNAL.astype(np.float32)
    keep = np.arange(400) != 5 if "outlier" in kind else np.ones(400, bool)
    near_by = Dataset.from_arrays((near, CLASS), (near[keep], CLASS[keep]), normalise="standard")
    far_off = Dataset.from_arrays((x, CLASS), (x[keep], CLASS[keep]), normalise="standard")
    assert learnt(near_by) > 0.97
    if "outlier" not in kind:  # which moves mean and deviation of its feature
        assert learnt(far_off) > 0.97
    assert far_off.train.x.dtype == np.float32
    assert [len(np.unique(column)) for column in far_off.train.x[keep].T] == [len(np.unique(c)) for c in near[keep].T]


@pytest.mark.parametrize("normalise", ["none", "mean", "standard"])
@pytest.mark.parametrize("kind", [kind for kind in FAR if "64 bits" not in kind])  # float64 has no room for these
def test_mean_and_scale_apply_to_what_was_given(kind: str, normalise: str) -> None:
    """(x - mean) * scale of the raw numbers in float64 is what the network is trained on."""
    x, lost = FAR[kind]
    dataset = Dataset.from_arrays((x, CLASS), (x, CLASS), normalise=normalise)
    trained = (dataset.train.x.astype(np.float64) - dataset.shift) * dataset.scale
    given = (x.astype(np.float64) - dataset.mean) * dataset.scale
    size = np.abs(given).max() if normalise == "none" else max(1.0, trained.std())
    np.testing.assert_allclose(trained, given, atol=size * max(lost, 1e-6))
    if normalise == "standard":
        np.testing.assert_allclose(given.mean(axis=0), 0, atol=max(lost, 1e-6))
        np.testing.assert_allclose(given.std(axis=0), 1, rtol=1e-4)


@given(st.integers(0, 2**32), st.sampled_from([np.uint8, np.float32, np.float16, np.int16]))
@settings(max_examples=20, deadline=None)
def test_numbers_that_float32_holds_stay_as_they_are(seed: int, kind: type) -> None:
    """uint8 and float32, and all that float32 holds exactly, are trained on bit for bit as they were given."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(50, 3)) * 100 + 1000 * rng.normal(size=3)).astype(kind)
    dataset = Dataset.from_arrays((x, np.arange(50) % 2), (x, np.arange(50) % 2), normalise="standard")
    assert np.array_equal(dataset.train.x, x.astype(np.float32))
    assert dataset.mean is dataset.shift or np.array_equal(dataset.mean, dataset.shift)
    assert dataset.mean.dtype == np.float32
    small = np.arange(150, dtype=np.int64).reshape(50, 3)
    assert np.array_equal(Dataset.from_arrays((small, np.arange(50) % 2), (small, np.arange(50) % 2)).train.x, small)


def test_an_offset_survives_storing_and_is_part_of_the_digest(tmp_path: Path) -> None:
    """A stored copy of features far from 0 has the mean, the scale and the digest of the arrays it was made of."""
    x, _ = FAR["seconds since 1970"]
    np.savez(tmp_path / "far.npz", x_train=x, y_train=CLASS, x_val=x[:100], y_val=CLASS[:100])
    source = data.read_npz(tmp_path / "far.npz")
    data.store(source, tmp_path / "copy")
    stored = data.open_stored(tmp_path / "copy", (0, 400), (400, 500), None, "standard")
    in_memory = Dataset.from_arrays((x, CLASS), (x[:100], CLASS[:100]), normalise="standard")
    assert stored.digest == in_memory.digest
    assert np.array_equal(stored.mean, in_memory.mean)
    assert np.array_equal(pickle.loads(pickle.dumps(stored)).shift, in_memory.shift)
    later = Dataset.from_arrays((x + 4096, CLASS), (x[:100] + 4096, CLASS[:100]), normalise="standard")
    assert np.array_equal(later.train.x, in_memory.train.x)
    assert later.digest != in_memory.digest
    np.testing.assert_allclose(stored.mean, x.mean(axis=0), rtol=1e-12)


MEET = {
    "two clusters": (np.where(np.arange(200)[:, None] % 2, 1.7e9, 0.0) + np.arange(200)[:, None], 0),
    "too small": (np.column_stack([np.arange(200.0), np.arange(200) * 1e-60]), 1),
    "whole numbers of 64 bits": (np.column_stack([np.arange(200), np.r_[0:100, 2**60 : 2**60 + 100]]), 1),
}


@pytest.mark.parametrize("kind", MEET)
def test_values_that_fall_together_are_told(kind: str, tmp_path: Path) -> None:
    """Distinct values of a feature that float32 cannot tell apart are a finding that names the feature."""
    x, feature = MEET[kind]
    np.savez(tmp_path / "x.npz", x=x, y=np.arange(200) % 3)
    finding = data.read_npz(tmp_path / "x.npz").findings[0]
    assert "distinct values fall together in float32, the precision of training" in finding
    assert f": feature {feature} (" in finding
    assert finding.startswith(f"{tmp_path}/x.npz: ")


@pytest.mark.parametrize("kind", ["seconds since 1970", "nanoseconds since 1970", "coordinates"])
def test_values_that_stay_apart_are_not_told(kind: str, tmp_path: Path) -> None:
    """Features that keep their values, and ordinary random ones, are no finding."""
    np.savez(tmp_path / "x.npz", x=FAR[kind][0], y=CLASS)
    assert data.read_npz(tmp_path / "x.npz").findings == ()
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).random((30_000, 3)), y=np.arange(30_000) % 2)
    assert data.read_npz(tmp_path / "x.npz").findings == ()


def test_numbers_that_float64_cannot_tell_apart_are_told(tmp_path: Path) -> None:
    """Whole numbers beyond float64's precision are trained on exactly, but whoever predicts from them is warned."""
    np.savez(tmp_path / "x.npz", x=FAR["numbers of 64 bits"][0], y=CLASS)
    (finding,) = data.read_npz(tmp_path / "x.npz").findings
    assert "in float64, the precision of prediction; subtract something first: feature 0 (" in finding


# Labels -----------------------------------------------------------------------------------------------------------

TEN = np.arange(300) % 10
LABELS = {
    "millions": (np.where(np.arange(300) == 17, 5_000_000, TEN), "got 5000000 in row 17"),
    "hundreds of millions": (np.where(np.arange(300) == 17, 300_000_000, TEN), "got 300000000 in row 17"),
    "10**12": (np.where(np.arange(300) == 17, 10**12, TEN), "got 1000000000000 in row 17"),
    "unsigned that would wrap": (np.where(np.arange(300) == 3, 2**64 - 1, TEN.astype("u8")), "got 1844.* in row 3"),
    "unsigned that would wrap to a class": (TEN.astype(np.uint64) + np.uint64(2**63), "got 92233720368547758"),
    "unsigned of 32 bits": (np.where(np.arange(300) == 9, 2**32 - 1, TEN).astype(np.uint32), "got 4294967295 in row 9"),
    "255 as ignore": (np.where(np.arange(300) == 8, 255, TEN), "label 255 in row 8 makes 256 classes, 245 of them"),
    "255 in bytes": (np.where(np.arange(300) == 8, 255, TEN).astype(np.uint8), "label 255 in row 8 makes 256 classes"),
    "the first class too many": (np.where(np.arange(300) == 8, data.MOST_CLASSES, TEN), "at most 4,096 classes"),
    "-1 as ignore": (np.where(np.arange(300) == 8, -1, TEN).astype(np.int8), "got -1 in row 8"),
    "the least of all": (np.where(np.arange(300) == 8, -(2**63), TEN), "got -9223372036854775808 in row 8"),
    "nan": (np.where(np.arange(300) == 8, np.nan, TEN), "got float64 with nan in row 8"),
    "infinite": (np.where(np.arange(300) == 8, np.inf, TEN), "got float64 with inf in row 8"),
    "dates": (TEN.astype("M8[s]"), r"got datetime64\[s\]"),
}  # fmt: skip


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", LABELS)
def test_labels_that_number_no_classes_are_refused_early(kind: str, tmp_path: Path) -> None:
    """Labels are judged in their own type; the label, its row and what to do are said before anything is planned."""
    y, message = LABELS[kind]
    x = np.zeros((300, 2), np.float32)
    with pytest.raises(ValueError, match=f"train y: .*{message}"):
        Dataset.from_arrays((x, y), (x, TEN))
    if "dates" not in kind:
        np.savez(tmp_path / "x.npz", x=x, y=y)
        with pytest.raises(ValueError, match=f"x.npz: train y: .*{message}"):
            data.read_npz(tmp_path / "x.npz")
    if "classes" not in message:
        with pytest.raises(ValueError, match=f"validation y: .*{message}"):
            Dataset.from_arrays((x, TEN), (x, y))


def test_labels_with_few_gaps_are_taken() -> None:
    """Labels that begin at 1, and classes that only one part has, are no reason to refuse the data."""
    x = np.zeros((300, 2), np.float32)
    assert len(Dataset.from_arrays((x, TEN + 1), (x, TEN + 1)).classes) == 11
    assert len(Dataset.from_arrays((x, TEN % 2), (x, TEN)).classes) == 10
    assert Dataset.from_arrays((x, TEN.astype(np.uint64)), (x, TEN)).train.y.dtype == np.int64
    named = Dataset.from_arrays((x, TEN * 10), (x, TEN), classes=[str(i) for i in range(100)])
    assert len(named.classes) == 100


# npz ------------------------------------------------------------------------------------------------------------


def test_npz_parts_are_found(tmp_path: Path) -> None:
    """An npz of parts, or of x and y alone, is read with its parts in order."""
    np.savez(tmp_path / "parts.npz", x_train=X, y_train=Y, x_test=X[:2], y_test=Y[:2])
    np.savez(tmp_path / "plain.npz", x=X / 3, y=Y)
    source = data.read_npz(tmp_path / "parts.npz")
    assert source.parts == {"train": (0, 6), "test": (6, 8)}
    assert np.array_equal(source.x, np.concatenate([X, X[:2]]))
    plain = data.read_npz(tmp_path / "plain.npz")
    assert plain.parts == {"train": (0, 6)}
    assert plain.x.dtype == np.float32


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": X}, "no array 'y' among"),
        ({"x_train": X, "y_train": Y, "y_val": Y}, "no array 'x_val' among"),
        ({"x": np.array([{}], object), "y": Y}, "x.npy: expected numbers, got Python objects"),
        ({"x": X[0], "y": Y}, "expected images as rows"),
        ({"x_train": X, "y_train": Y, "x_test": X / 3, "y_test": Y}, "one width and type"),
    ],
)
def test_npz_files_of_another_kind_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    """Missing arrays, object arrays and odd shapes are refused with the file's name."""
    path = tmp_path / "mine.npz"
    np.savez(path, **content)
    with pytest.raises(ValueError, match=message) as caught:
        data.read_npz(path)
    assert str(path) in str(caught.value)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_damaged_npz_is_never_accepted(tmp_path_factory: pytest.TempPathFactory, draw: st.DataObject) -> None:
    """An npz cut short is refused, and so is one with a flipped bit unless its arrays are unharmed."""
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    np.savez_compressed(path, x=X, y=Y)
    raw = bytearray(path.read_bytes())
    if draw.draw(st.booleans(), "cut"):
        raw = raw[: draw.draw(st.integers(0, len(raw) - 1))]
    else:
        raw[draw.draw(st.integers(0, len(raw) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    path.write_bytes(raw)
    refusal = ""
    try:
        source = data.read_npz(path)
    except ValueError as error:
        refusal = str(error)
    assert refusal.startswith(f"{path}: ") or (np.array_equal(source.x, X) and np.array_equal(source.y, Y))


# CIFAR-10 ---------------------------------------------------------------------------------------------------------


@needs_cifar
def test_cifar10_is_read_as_plain_pickle_reads_it() -> None:
    """On trusted files, all images and labels equal what pickle.load gives, and the checksums are reported."""
    source = data.read_cifar10(PYTHON_FOLDER)
    for name, (start, stop) in source.parts.items():
        with (PYTHON_FOLDER / name).open("rb") as file:
            trusted = pickle.load(file, encoding="bytes")
        assert np.array_equal(source.x[start:stop], trusted[b"data"])
        assert source.y[start:stop].tolist() == trusted[b"labels"]
    official = hashlib.md5((PYTHON_FOLDER / "data_batch_1").read_bytes()).hexdigest()
    assert bool(source.findings) == (official != "c99cafc152244af753f735de768cd75f")
    assert source.classes[source.y[0]] == "frog"  # the first training image, as everyone knows


def test_binary_records_are_read_as_struct_reads_them() -> None:
    """A binary batch gives the label and pixels that struct unpacks from each record."""
    raw = bytearray(np.random.default_rng(2).bytes(30_730_000))
    raw[::3073] = bytes(i % 10 for i in range(10_000))
    x, y = data.parse_batch(Path("data_batch_1.bin"), bytes(raw))
    for i in (0, 1, 9_999):
        label, *pixels = struct.unpack_from("3073B", raw, 3073 * i)
        assert (y[i], x[i].tolist()) == (label, pixels)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_a_batch_in_any_protocol_of_python_3_is_read(protocol: int) -> None:
    """A batch that was pickled again by Python 3 is read like the original."""
    raw = python_batch(protocol=protocol)
    x, y = data.parse_batch(Path("data_batch_1"), raw)
    trusted = pickle.loads(raw)
    assert np.array_equal(x, trusted[b"data"])
    assert y == trusted[b"labels"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: batch[b"labels"].__setitem__(17, 10), "expected labels 0 to 9, image 17 has 10"),
        (lambda batch: batch[b"labels"].__setitem__(17, 1.0), "image 17 has 1.0"),
        (lambda batch: batch[b"labels"].__setitem__(17, -(2**70)), "image 17 has -1180591620717411303424"),
        (lambda batch: batch[b"labels"].pop(), "a list of 10,000 labels"),
        (lambda batch: batch.update({b"data": batch[b"data"].reshape(5_000, 6_144)}), r"expected uint8 \[10000"),
        (lambda batch: batch.update({b"data": batch[b"data"].view(np.int8)}), "'i1'"),
        (shuffled, "True"),
        (lambda batch: batch.pop(b"data"), "not a batch of CIFAR-10: KeyError: 'data'"),
        (lambda batch: batch.update({b"batch_label": b"training batch 2 of 5"}), "the wrong file: it calls itself"),
    ],
)
def test_a_batch_that_is_not_one_is_refused(change: Change, message: str) -> None:
    """Labels above 9, other shapes and types, and misnamed batches are refused with the file's name."""
    with pytest.raises(ValueError, match=f"data_batch_1: .*{message}"):
        data.parse_batch(Path("data_batch_1"), python_batch(change))


def test_a_label_above_nine_in_a_binary_batch_is_refused() -> None:
    """A record of the binary version with label 10 is named."""
    raw = bytearray(30_730_000)
    raw[3073 * 5] = 10
    with pytest.raises(ValueError, match=r"test_batch\.bin: expected labels 0 to 9, image 5 has 10"):
        data.parse_batch(Path("test_batch.bin"), bytes(raw))


class Evil:
    """Unpickled, it runs a command."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def test_a_malicious_pickle_runs_nothing(tmp_path: Path) -> None:
    """A batch whose pickle runs a command is refused by the command's name; pickle.loads would have run it."""
    canary, path = tmp_path / "canary", tmp_path / "data_batch_1"
    path.write_bytes(python_batch(lambda batch: batch.update({b"extra": Evil(canary)})))
    with pytest.raises(ValueError, match=r"data_batch_1: refused: it asks for posix\.system"):
        data.parse_batch(path, data.read_batch(path))
    assert not canary.exists()
    pickle.loads(path.read_bytes())
    assert canary.exists()


@given(st.integers(0, len(PYTHON_BATCH) - 1))
@settings(max_examples=25, deadline=None)
def test_a_truncated_batch_is_refused(length: int) -> None:
    """A batch cut short anywhere is refused in either layout."""
    for name in ("data_batch_1", "data_batch_1.bin"):
        with pytest.raises(ValueError, match=f"{name}: "):
            data.parse_batch(Path(name), PYTHON_BATCH[:length])


@given(st.integers(0, 8 * len(PYTHON_BATCH) - 1))
@settings(max_examples=25, deadline=None)
def test_a_flipped_bit_never_passes_a_known_checksum(bit: int) -> None:
    """With a checksum promised, a batch with any one bit flipped is refused with both checksums."""
    raw, path = bytearray(PYTHON_BATCH), Path("data_batch_1")
    raw[bit // 8] ^= 1 << bit % 8
    promised = {path.name: hashlib.sha256(PYTHON_BATCH).hexdigest()}
    assert data.vouch(path, PYTHON_BATCH, promised)[1] == "as in SHA256SUMS"
    with pytest.raises(ValueError, match=f"expected sha256 {promised[path.name]} as in SHA256SUMS, got [0-9a-f]"):
        data.vouch(path, bytes(raw), promised)


@given(st.integers(0, PIXELS[0] + 200) | st.integers(PIXELS[1] - 200, len(PYTHON_BATCH) - 1), st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_a_flipped_bit_without_a_checksum_is_a_clear_error_or_a_batch(at: int, bit: int) -> None:
    """Damage outside the pixels of a file nobody vouches for gives an error or a batch with valid labels."""
    raw = bytearray(PYTHON_BATCH)
    raw[at] ^= 1 << bit
    refusal = ""
    try:
        x, y = data.parse_batch(Path("data_batch_1"), bytes(raw))
    except ValueError as error:
        refusal = str(error)
    assert refusal.startswith("data_batch_1: ") or (x.shape == (10_000, 3072) and set(y) <= set(range(10)))


# One copy per machine ---------------------------------------------------------------------------------------------


def small_source(n: int = 300) -> Source:
    x, y = arrays(n, 12, 5)
    return Source("small", x, y, tuple("abcde"), (2, 2, 3), {"train": (0, n)})


LOOK = """
import mmap, pickle, sys
dataset = pickle.load(sys.stdin.buffer)
assert pickle.loads(pickle.dumps(dataset)) is dataset
for array in (dataset.train.x, dataset.validation.x, dataset.test.y):
    owner = array
    while not isinstance(owner, mmap.mmap):
        owner = owner.base
print(dataset.train.x.sum(), dataset.mean.sum())
"""


def test_a_stored_dataset_travels_by_reference_and_is_mapped(tmp_path: Path) -> None:
    """A dataset opened from a stored copy pickles small; in another process its arrays are memory maps."""
    source = small_source()
    data.store(source, tmp_path)
    dataset = data.open_stored(tmp_path, (0, 200), (200, 250), (250, 300), "standard")
    assert np.array_equal(dataset.validation.x, source.x[200:250])
    assert (dataset.classes, dataset.image_shape) == (source.classes, (2, 2, 3))
    in_memory = Dataset.from_arrays(
        (source.x[:200], source.y[:200]),
        (source.x[200:250], source.y[200:250]),
        (source.x[250:], source.y[250:]),
        normalise="standard",
    )
    assert dataset.digest == in_memory.digest
    assert np.array_equal(dataset.scale, in_memory.scale)
    sent = pickle.dumps(dataset)
    assert len(sent) < 2_000
    done = subprocess.run([sys.executable, "-c", LOOK], input=sent, capture_output=True, cwd=HERE, check=True)
    assert done.stdout.decode().split() == [str(dataset.train.x.sum()), str(dataset.mean.sum())]


def test_a_reference_without_its_copy_is_an_error(tmp_path: Path) -> None:
    """A machine that lacks the copy, or has another one, says so."""
    data.store(small_source(), tmp_path / "a")
    data.store(small_source(299), tmp_path / "b")
    arguments = data.open_stored(tmp_path / "a", (0, 9), (9, 20)).reference
    assert arguments is not None
    with pytest.raises(FileNotFoundError, match="this machine has no copy of the dataset"):
        data._reopen(str(tmp_path / "c"), *arguments[1:])
    with pytest.raises(ValueError, match="the data changed"):
        data._reopen(str(tmp_path / "b"), *arguments[1:])


def _store_and_open(folder: Path) -> str:
    data.store(small_source(20_000), folder)
    return data.open_stored(folder, (0, 9_000), (9_000, 20_000), None, "mean").digest


def test_two_processes_may_store_at_once(tmp_path: Path) -> None:
    """Processes that create one copy at the same time all succeed and leave nothing unfinished."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        assert len(set(pool.map(_store_and_open, [tmp_path / "copy"] * 8))) == 1
    assert sorted(path.suffix for path in (tmp_path / "copy").iterdir()) == [".json", ".npy", ".npy", ".npz"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    """A write that fails half-way keeps what was there and removes its unfinished file."""

    def fail(file: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    data.write_atomically(tmp_path / "a", lambda file: file.write(b"old"))
    with pytest.raises(OSError, match="disk full"):
        data.write_atomically(tmp_path / "a", fail)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


def test_a_pipe_that_is_written_to_stays_one(tmp_path: Path) -> None:
    """What is no ordinary file takes the content and is not replaced by a file: root would lose its /dev/null."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        data.write_whole(pipe, b"all of it")
        assert os.read(reader, 100) == b"all of it"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]
