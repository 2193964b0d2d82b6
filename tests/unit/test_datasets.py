import dataclasses
import gzip
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.config import DataConfig
from shared.datasets import DEBIAN_FASHION_MNIST, Dataset, Images, load_dataset
from shared.errors import DataError, DatasetMissing


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset(DataConfig(name="digits"))


def test_digits_are_split_without_loss_or_overlap(digits: Dataset) -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    shipped = Counter(
        (image.astype(np.uint8).tobytes(), label)
        for image, label in zip(bunch.images, bunch.target.tolist(), strict=True)
    )
    split = Counter(
        (image.tobytes(), label)
        for images in (digits.train, digits.test)
        for image, label in zip(images.pixels_NCHW, images.label_N.tolist(), strict=True)
    )

    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert split == shipped
    assert np.bincount(digits.test.label_N).min() >= 25  # no class is left out of the test split


def test_batch_is_pixels_between_0_and_1_in_the_order_asked(digits: Dataset) -> None:
    x, y = digits.train.batch([5, 0, 5])
    everything, _ = digits.train.batch(np.arange(len(digits.train)))

    assert (everything.min(), everything.max()) == (0, 1)
    assert torch.equal(x[0], x[2])
    assert torch.equal(x * 16, torch.tensor(digits.train.pixels_NCHW[[5, 0, 5]], dtype=torch.float32))
    assert y.tolist() == digits.train.label_N[[5, 0, 5]].tolist()
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)


def test_batch_is_a_copy(digits: Dataset) -> None:
    before = digits.train.pixels_NCHW[3].copy()
    x, y = digits.train.batch([3])
    x.zero_()
    y.sub_(100)

    np.testing.assert_array_equal(digits.train.pixels_NCHW[3], before)
    assert digits.train.label_N[3] >= 0


def test_fingerprint_of_digits_never_changes(digits: Dataset) -> None:
    """It stands in the run.json of existing runs: another value orphans all of them."""
    assert digits.fingerprint == "c611d346cbb50c98fba0ae20994838b2"
    assert load_dataset(DataConfig(name="digits")).fingerprint == digits.fingerprint


def one_pixel(images: Images) -> np.ndarray:
    mask = np.zeros_like(images.pixels_NCHW)
    mask[700, 0, 3, 3] = 1
    return mask


@pytest.mark.parametrize(
    "change",
    [
        lambda train: train.head(len(train) - 1),
        lambda train: dataclasses.replace(train, label_N=np.append(train.label_N[:-1], (train.label_N[-1] + 1) % 10)),
        lambda train: dataclasses.replace(train, pixels_NCHW=train.pixels_NCHW ^ one_pixel(train)),
        lambda train: dataclasses.replace(train, pixels_NCHW=train.pixels_NCHW[::-1], label_N=train.label_N[::-1]),
        lambda train: dataclasses.replace(train, white=15),
    ],
    ids=["subset", "one label", "one pixel", "order", "scale"],
)
def test_fingerprint_sees(digits: Dataset, change: Callable[[Images], Images]) -> None:
    assert dataclasses.replace(digits, train=change(digits.train)).fingerprint != digits.fingerprint


def test_fingerprint_is_of_the_training_split_alone(digits: Dataset) -> None:
    assert dataclasses.replace(digits, test=digits.test.head(10)).fingerprint == digits.fingerprint


def test_subset_keeps_the_first_ids_and_the_test_split(digits: Dataset) -> None:
    subset = load_dataset(DataConfig(name="digits", subset=100))

    np.testing.assert_array_equal(subset.train.pixels_NCHW, digits.train.pixels_NCHW[:100])
    np.testing.assert_array_equal(subset.train.label_N, digits.train.label_N[:100])
    assert len(subset.test) == 360
    assert subset.fingerprint != digits.fingerprint
    with pytest.raises(DataError, match=r"data\.subset is 1438; digits has 1437"):
        load_dataset(DataConfig(name="digits", subset=1438))


def test_pixel_statistics_by_hand() -> None:
    """Two channels of two 1x2 images: 0 1 / 3 4 and 2 2 / 2 2, where white is 4."""
    pixels = np.array([[[[0, 1]], [[2, 2]]], [[[3, 4]], [[2, 2]]]], dtype=np.uint8)
    images = Images(pixels, np.array([0, 1]), white=4, num_classes=2)
    mean, std = Dataset("hand", images, images).pixel_statistics()

    assert mean == pytest.approx([0.5, 0.5])
    assert std == pytest.approx([np.sqrt(2.5) / 4, 0.0])


PIXELS = {"train": np.arange(7 * 28 * 28, dtype=np.int64).reshape(7, 28, 28) % 256, "t10k": np.full((3, 28, 28), 9)}
LABELS = {"train": np.array([3, 1, 4, 1, 5, 9, 2]), "t10k": np.array([6, 5, 3])}


def idx(values: np.ndarray) -> bytes:
    return (
        bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.astype("u1").tobytes()
    )


def write_idx(folder: Path, *, compressed: bool = False, **other: bytes) -> DataConfig:
    """Four IDX files in `folder`; `other` replaces the content of one, such as train_labels=b'...'."""
    for part in ("train", "t10k"):
        for kind, values, rank in (("images", PIXELS[part], 3), ("labels", LABELS[part], 1)):
            data = other.get(f"{part}_{kind}", idx(values))
            name = f"{part}-{kind}-idx{rank}-ubyte"
            (folder / (f"{name}.gz" if compressed else name)).write_bytes(gzip.compress(data) if compressed else data)
    return DataConfig(name="fashion_mnist", root=str(folder))


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gz"])
def test_fashion_mnist_from_idx_files(tmp_path: Path, compressed: bool) -> None:
    dataset = load_dataset(write_idx(tmp_path, compressed=compressed))

    for part, images in (("train", dataset.train), ("t10k", dataset.test)):
        np.testing.assert_array_equal(images.pixels_NCHW[:, 0], PIXELS[part])
        np.testing.assert_array_equal(images.label_N, LABELS[part])
    assert dataset.train.batch([0])[0].max() == 1
    assert dataset.train.batch([0])[1].tolist() == [3]


def test_missing_fashion_mnist_names_the_file_and_the_three_ways_to_get_it(tmp_path: Path) -> None:
    config = write_idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()

    with pytest.raises(DatasetMissing) as caught:
        load_dataset(config)
    for part in (tmp_path, "t10k-labels-idx1-ubyte", "dataset-fashion-mnist", "data.root", "data.download = true"):
        assert str(part) in str(caught.value)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"train_images": idx(PIXELS["train"])[:-1]}, "train-images.* has 5487 bytes of values, its header says 5488"),
        ({"train_images": idx(PIXELS["train"])[:11]}, "train-images.* is not an IDX file"),
        ({"t10k_labels": idx(PIXELS["t10k"])}, "t10k-labels.* is not an IDX file .* 1 dimensions"),
        ({"t10k_images": b"<html>not found</html>"}, "t10k-images.* is not an IDX file"),
        ({"train_labels": idx(LABELS["train"][:6])}, "train"),  # 7 images, 6 labels
        ({"train_labels": idx(np.array([3, 1, 4, 1, 5, 9, 12]))}, "12"),  # of 10 classes
    ],
    ids=["short values", "short header", "wrong rank", "web page", "fewer labels than images", "label out of range"],
)
def test_broken_idx_file(tmp_path: Path, broken: dict[str, bytes], message: str) -> None:
    config = write_idx(tmp_path, **broken)

    with pytest.raises(DataError, match=message):
        load_dataset(config)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-20],
        lambda data: b"no gzip" + data,
        lambda data: data[:10] + b"\x07" + data[11:],  # a deflate block of a kind that does not exist
        lambda data: data[:-8] + bytes(4) + data[-4:],
    ],
    ids=["truncated", "not gzip", "damaged stream", "wrong checksum"],
)
def test_broken_gzip_file(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    config = write_idx(tmp_path, compressed=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))

    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz"):
        load_dataset(config)


def test_the_real_fashion_mnist() -> None:
    if not DEBIAN_FASHION_MNIST.exists():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    dataset = load_dataset(DataConfig(name="fashion_mnist"))
    mean, std = dataset.pixel_statistics()

    assert np.bincount(dataset.train.label_N).tolist() == [6000] * 10
    assert np.bincount(dataset.test.label_N).tolist() == [1000] * 10
    assert (mean, std) == (pytest.approx([0.2860], abs=1e-4), pytest.approx([0.3530], abs=1e-4))


@pytest.mark.parametrize("error", [OSError(113, "No route to host"), RuntimeError("Error downloading the file")])
def test_images_that_cannot_be_fetched_are_told_with_another_way(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", fail)

    with pytest.raises(DatasetMissing, match=rf"cannot be fetched to {tmp_path}: .*; check the network .*data\.root"):
        load_dataset(DataConfig(name="fashion_mnist", root=str(tmp_path), download=True))
