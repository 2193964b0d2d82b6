"""A folder of image files, one folder per class, decoded when they are asked for.

root/train/CLASS/any.png
root/test/CLASS/any.png        or root/val/CLASS/...
"""

import dataclasses
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from shared.errors import DataError, DatasetMissing
from shared.samples import Keys, Labels, Pixels, Samples

DECODERS = 4  # threads of one batch
LAYOUT = "needed are root/train/CLASS/FILE and root/test/CLASS/FILE, or val instead of test"


@dataclasses.dataclass(frozen=True)
class ImageFiles(Samples):
    """Image files below `root`, whose keys are their paths there; RGB, the centre of each, image_size x image_size."""

    root: Path
    key_N: Keys
    label_N: Labels
    num_classes: int
    image_size: int
    clean_label_N: Labels | None = None
    white: int = 255
    statistics_over: ClassVar[int | None] = 1000

    @property
    def channels(self) -> int:
        return 3

    def pixels(self, index: npt.ArrayLike) -> Pixels:
        paths = [self.root / key for key in self.key_N[np.asarray(index, dtype=np.int64)].tolist()]
        x_BCHW = np.empty((len(paths), 3, self.image_size, self.image_size), dtype=np.uint8)
        with ThreadPoolExecutor(DECODERS, "decoder") as pool:
            for place, image_HWC in enumerate(pool.map(self._decode, paths)):
                x_BCHW[place] = image_HWC.transpose(2, 0, 1)
        return x_BCHW

    def _decode(self, path: Path) -> Pixels:
        """uint8 (H, W, 3): the shorter side becomes image_size, what is left of the longer one is cut off evenly."""
        from PIL import Image, ImageOps

        try:
            with Image.open(path) as image:
                mode, size = image.mode, (self.image_size, self.image_size)
                image_HWC = np.asarray(ImageOps.fit(image.convert("RGB"), size, Image.Resampling.BILINEAR))
        except MemoryError:
            raise
        except Exception as error:  # of a broken file decoders raise anything
            raise DataError(f"cannot decode {path}: {error}", fix="repair or remove it", key=str(path)) from error
        if mode.startswith(("I", "F")):  # Pillow cuts them off at 255 without a word
            wrong = f"{path} has more than 8 bits per channel (mode {mode})"
            raise DataError(wrong, fix="save it with 8", key=str(path))
        return image_HWC

    def content(self) -> Iterator[bytes]:
        """Paths and sizes of the files stand for what is in them."""
        yield f"{self.image_size}".encode()
        for key in self.key_N.tolist():
            try:
                yield f"\0{key}\0{os.path.getsize(self.root / key)}".encode()
            except OSError as error:
                path = str(self.root / key)
                raise DataError(f"cannot read {path}: {error.strerror}", fix="bring it back", key=path) from error


def read_image_folder(root: Path, image_size: int) -> tuple[ImageFiles, ImageFiles]:
    """Training and test split, each in a fixed random order, since folders are sorted by class.

    Raises DatasetMissing, saying which folder is missing, or DataError for folders that do not fit each other.
    """
    test = next((name for name in ("test", "val") if (root / name).is_dir()), "test")
    for part in ("train", test):
        if not (root / part).is_dir():
            raise DatasetMissing(f"there is no folder {root / part}", fix=f"set data.root: {LAYOUT}", key="data.root")
    (train_files, class_ids), (test_files, test_class_ids) = (_scan(root / part) for part in ("train", test))
    if unknown := sorted(test_class_ids.keys() - class_ids.keys()):
        wrong = f"{root / test} has the classes {unknown}, which {root / 'train'} has not"
        raise DataError(wrong, fix="remove them, or add training images of them", key=str(root / test))
    names = list(test_class_ids)
    test_files = [(path, class_ids[names[label]]) for path, label in test_files]
    num_classes = len(class_ids)
    train = _in_random_order(root, train_files, num_classes, image_size)
    return train, _in_random_order(root, test_files, num_classes, image_size)


def _scan(folder: Path) -> tuple[list[tuple[str, int]], dict[str, int]]:
    """(path, label) of each image below `folder`, and the label of each class, in the order of the labels."""
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(str(folder))
    except FileNotFoundError as error:  # a class without images, or no class
        fix = f"put images there: {LAYOUT}"
        raise DataError(f"{folder} cannot be used: {error}", fix=fix, key=str(folder)) from error
    except OSError as error:
        wrong, fix = f"cannot read {error.filename}: {error.strerror}", "make it a folder that you may read"
        raise DataError(wrong, fix=fix, key=str(error.filename)) from error
    return found.samples, found.class_to_idx


def _in_random_order(root: Path, files: list[tuple[str, int]], num_classes: int, image_size: int) -> ImageFiles:
    order = np.random.default_rng(len(files)).permutation(len(files))
    try:
        key_N = np.array([Path(path).relative_to(root).as_posix() for path, _ in files], np.dtypes.StringDType())
    except UnicodeEncodeError as error:
        wrong = f"the file name {error.object!r} below {root} is not UTF-8"
        raise DataError(wrong, fix="rename it", key=repr(error.object)) from error
    label_N = np.array([label for _, label in files], dtype=np.int64)
    return ImageFiles(root, key_N[order], label_N[order], num_classes, image_size)
