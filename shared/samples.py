"""One split of a data set: images with labels, told apart by their place 0..N-1 and by a key that says where from.

Shapes: N samples, B of a batch, C channels, H x W pixels.
"""

import abc
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

STATISTICS_CHUNK = 250

Keys = npt.NDArray[Any]  # of numpy's StringDType: one text per sample
Labels = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]
Selection = slice | npt.NDArray[np.int64]


class Samples(abc.ABC):
    """What trainer, scorers and catalogue ask of N samples, wherever they are.

    `label_N` int64 in 0..num_classes-1; `clean_label_N` holds the labels before noise, None where there is none;
    `key_N` says where each image comes from; a pixel of `white` stands for 1.0.
    """

    label_N: Labels
    num_classes: int
    white: int
    key_N: Keys
    clean_label_N: Labels | None
    per_sample: ClassVar[tuple[str, ...]] = ()  # its own arrays of one entry per sample
    statistics_over: ClassVar[int | None] = None  # the statistics are of so many of the first images; None: of all

    @property
    @abc.abstractmethod
    def channels(self) -> int: ...

    @abc.abstractmethod
    def pixels(self, index: npt.ArrayLike) -> Pixels:
        """uint8 (B, C, H, W) of the samples `index` (B,), a copy. Raises DataError for what cannot be decoded."""

    def for_training(self) -> Self:
        """The samples as they are trained on; these are as they are scored."""
        return self

    def select(self, index: Selection) -> Self:
        """These samples alone, in this order."""
        arrays = {name: getattr(self, name) for name in ("label_N", "key_N", "clean_label_N", *self.per_sample)}
        return self._replaced({name: array[index] for name, array in arrays.items() if array is not None})

    def relabelled(self, label_N: Labels) -> Self:
        """The same images with noisy labels; those that they had become `clean_label_N`."""
        return self._replaced({"label_N": label_N, "clean_label_N": self.label_N})

    def _replaced(self, fields: dict[str, Any]) -> Self:
        """This one, which is a dataclass, with other fields."""
        other: Self = dataclasses.replace(self, **fields)  # type: ignore[type-var]
        return other

    @abc.abstractmethod
    def content(self) -> Iterator[bytes]:
        """What gives an id its meaning, but for the label: the images and their order."""

    def __len__(self) -> int:
        return len(self.label_N)

    def batch(self, ids: npt.ArrayLike) -> "tuple[torch.Tensor, torch.Tensor]":
        """x_BCHW float32, pixels in [0,1], and y_B int64 of `ids` (B,). DataError for what cannot be decoded."""
        import torch

        index = np.asarray(ids, dtype=np.int64)
        x_BCHW = torch.from_numpy(self.pixels(index)).float().div_(self.white)
        return x_BCHW, torch.from_numpy(self.label_N[index])

    def pixel_statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation per channel of the pixels in [0,1]; sums of whole numbers, so exact ones."""
        count = min(len(self), self.statistics_over or len(self))
        total_C, squares_C, pixels = np.zeros(self.channels), np.zeros(self.channels), 0
        for start in range(0, count, STATISTICS_CHUNK):
            x_BCHW = self.pixels(np.arange(start, min(start + STATISTICS_CHUNK, count))).astype(np.float64)
            total_C += x_BCHW.sum(axis=(0, 2, 3))
            squares_C += np.square(x_BCHW).sum(axis=(0, 2, 3))
            pixels += x_BCHW[:, 0].size
        mean_C = total_C / pixels
        variance_C = np.maximum(squares_C / pixels - mean_C**2, 0)
        return (mean_C / self.white).tolist(), (np.sqrt(variance_C) / self.white).tolist()


@dataclasses.dataclass(frozen=True)
class Images(Samples):
    """Images in memory: `pixels_NCHW` uint8. Without keys they get their places, "0", "1" and so on."""

    pixels_NCHW: Pixels
    label_N: Labels
    white: int
    num_classes: int
    key_N: Keys = dataclasses.field(default_factory=lambda: keys("", ()))
    clean_label_N: Labels | None = None
    per_sample: ClassVar[tuple[str, ...]] = ("pixels_NCHW",)

    def __post_init__(self) -> None:
        if not len(self.key_N):
            object.__setattr__(self, "key_N", keys("", range(len(self))))

    @property
    def channels(self) -> int:
        return int(self.pixels_NCHW.shape[1])

    def pixels(self, index: npt.ArrayLike) -> Pixels:
        return self.pixels_NCHW[np.asarray(index, dtype=np.int64)]

    def content(self) -> Iterator[bytes]:
        yield f"{self.pixels_NCHW.shape} {self.white}".encode()
        yield self.pixels_NCHW.tobytes()


def keys(origin: str, index: npt.ArrayLike) -> Keys:
    """Such as "train/0", "train/1" for the origin "train/"."""
    return np.array([f"{origin}{i}" for i in np.asarray(index, dtype=np.int64).tolist()], np.dtypes.StringDType())
