"""Real images with stable ids: what trainer and scorers load, each for itself, and know by one fingerprint.

A data set is held as it ships (uint8 pixels); a batch is float32 in [0,1]. Sample ids are 0..N-1 over the training
split after `subset`; augmentation is the training loop's business and never touches what is scored.
"""

import dataclasses
import gzip
import hashlib
import math
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from shared.config import DataConfig
from shared.errors import DataError, DatasetMissing

if TYPE_CHECKING:
    import torch

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


@dataclasses.dataclass(frozen=True)
class Images:
    """N images: `pixels_NCHW` uint8, where `white` stands for 1.0, and `label_N` int64 in 0..num_classes-1."""

    pixels_NCHW: npt.NDArray[np.uint8]
    label_N: npt.NDArray[np.int64]
    white: int
    num_classes: int

    def __len__(self) -> int:
        return len(self.label_N)

    def batch(self, ids: npt.ArrayLike) -> "tuple[torch.Tensor, torch.Tensor]":
        """x_BCHW float32 in [0,1] and y_B int64 of `ids` (B,)."""
        import torch

        index = np.asarray(ids, dtype=np.int64)
        x_BCHW = torch.from_numpy(self.pixels_NCHW[index]).float().div_(self.white)
        return x_BCHW, torch.from_numpy(self.label_N[index])

    def head(self, count: int | None) -> "Images":
        return dataclasses.replace(self, pixels_NCHW=self.pixels_NCHW[:count], label_N=self.label_N[:count])


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A training split, whose ids steppe speaks of, and a test split."""

    name: str
    train: Images
    test: Images

    @property
    def fingerprint(self) -> str:
        """Hash of everything that gives an id its meaning: pixels, labels and their order, of the training split."""
        digest = hashlib.sha256(f"{self.name} {self.train.pixels_NCHW.shape} {self.train.white}".encode())
        digest.update(self.train.pixels_NCHW.tobytes())
        digest.update(self.train.label_N.tobytes())
        return digest.hexdigest()[:32]

    def pixel_statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation per channel of the training pixels in [0,1]."""
        pixels = self.train.pixels_NCHW
        mean = pixels.mean(axis=(0, 2, 3)) / self.train.white
        std = pixels.std(axis=(0, 2, 3)) / self.train.white
        return mean.tolist(), std.tolist()


def load_dataset(config: DataConfig) -> Dataset:
    """Load the data set of `config`. Raises DatasetMissing, saying how to get it, or DataError for broken files."""
    dataset = _DATASETS[config.name](config)
    if config.subset is not None:
        if config.subset > len(dataset.train):
            raise DataError(
                f"data.subset is {config.subset}; {config.name} has {len(dataset.train)} training images: set "
                "it to that or less, or leave it out"
            )
        dataset = dataclasses.replace(dataset, train=dataset.train.head(config.subset))
    return dataset


def _digits(config: DataConfig) -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8x8; a fixed fifth of them is the test split."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.ascontiguousarray(bunch.images[:, None].astype(np.uint8))
    order = np.random.default_rng(1797).permutation(len(pixels))
    test, train = order[:360], order[360:]
    labels = bunch.target.astype(np.int64)
    return Dataset("digits", *(Images(pixels[part], labels[part], white=16, num_classes=10) for part in (train, test)))


def _fashion_mnist(config: DataConfig) -> Dataset:
    """Fashion-MNIST, 60,000 + 10,000 images, 28x28, from IDX files (plain or .gz)."""
    folder = Path(config.root).expanduser() if config.root else DEBIAN_FASHION_MNIST
    if config.download:
        from torchvision.datasets import FashionMNIST

        root = folder if config.root else Path("~/.cache/steppe").expanduser()
        try:
            FashionMNIST(str(root), download=True)
        except (OSError, RuntimeError) as error:
            raise DatasetMissing(
                f"Fashion-MNIST cannot be fetched to {root}: {error}; check the network and that folder, or bring the "
                "files: data.download = false and data.root"
            ) from error
        folder = root / "FashionMNIST" / "raw"
    try:
        splits = [_read_idx_split(folder, part) for part in ("train", "t10k")]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DatasetMissing(
            f"Fashion-MNIST is not at {folder}: {error.filename} is missing. Either install Debian's package "
            "dataset-fashion-mnist, or set data.root to a folder with the four IDX files (plain or .gz), or set "
            "data.download = true to let torchvision fetch it"
        ) from None
    except OSError as error:
        raise DataError(
            f"cannot read {error.filename}: {error.strerror}; it must be a file that you may read"
        ) from error
    return Dataset("fashion_mnist", *splits)


def _read_idx_split(folder: Path, part: str) -> Images:
    image_file, label_file = folder / f"{part}-images-idx3-ubyte", folder / f"{part}-labels-idx1-ubyte"
    pixels, labels = _read_idx(image_file, 3), _read_idx(label_file, 1)
    if len(pixels) != len(labels):
        raise DataError(f"{image_file} has {len(pixels)} images, {label_file} {len(labels)} labels; fetch both again")
    if not len(labels):
        raise DataError(f"{image_file} has no images; fetch it again")
    if labels.max() > 9:
        raise DataError(f"{label_file} has the label {labels.max()}; Fashion-MNIST has 0..9; fetch it again")
    return Images(pixels[:, None], labels.astype(np.int64), white=255, num_classes=10)


def _read_idx(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """An IDX file of unsigned bytes, `path` or `path`.gz: two zeros, type 8, rank, sizes (big endian), values."""
    if path.exists():
        data = path.read_bytes()
    else:
        try:
            data = gzip.decompress(Path(f"{path}.gz").read_bytes())
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path}.gz is damaged: {error}; fetch it again") from error
    head = 4 + 4 * dimensions
    if len(data) < head or data[:4] != bytes([0, 0, 8, dimensions]):
        raise DataError(f"{path} is not an IDX file of bytes with {dimensions} dimensions; fetch it again")
    shape = struct.unpack(f">{dimensions}I", data[4:head])
    if len(data) != head + math.prod(shape):
        raise DataError(
            f"{path} has {len(data) - head} bytes of values, its header says {math.prod(shape)}; fetch it again"
        )
    return np.frombuffer(data, dtype=np.uint8, offset=head).reshape(shape)


_DATASETS: dict[str, Callable[[DataConfig], Dataset]] = {"digits": _digits, "fashion_mnist": _fashion_mnist}
