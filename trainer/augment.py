"""Augmentation of a batch: what the training loop does to images before a step; scorers see them as they are.

Random numbers come from the CPU, by default torch's global generator: a saved RNG state replays them on any device.
Shapes: B samples, C channels, H x W pixels.
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from shared.errors import ConfigError

LARGE_SIDE, LARGE_PADDING, SMALL_PADDING = 32, 4, 2


def augment(x_BCHW: Tensor, kind: str, generator: Generator | None = None) -> Tensor:
    """x_BCHW, of the same shape, type and device, changed at random sample by sample.

    `kind` is "none", "flip" (left and right, every other sample), "crop" (shifted by up to 4 pixels, small images up to
    2, over zeros), or "crop_flip". `generator` is one of the CPU. Raises ConfigError for an unknown kind.
    """
    if kind not in AUGMENTATIONS:
        raise ConfigError(f"no augmentation {kind!r}", fix=f"choose one of {', '.join(AUGMENTATIONS)}", key="kind")
    return AUGMENTATIONS[kind](x_BCHW, generator)


def _none(x_BCHW: Tensor, generator: Generator | None) -> Tensor:
    return x_BCHW


def _flip(x_BCHW: Tensor, generator: Generator | None) -> Tensor:
    flipped_B = (torch.rand(len(x_BCHW), generator=generator) < 0.5).to(x_BCHW.device)
    return torch.where(flipped_B[:, None, None, None], x_BCHW.flip(-1), x_BCHW)


def _crop(x_BCHW: Tensor, generator: Generator | None) -> Tensor:
    """Pad with zeros on all sides, then cut the old size out anywhere."""
    size, channels, height, width = x_BCHW.shape
    padding = LARGE_PADDING if min(height, width) >= LARGE_SIDE else SMALL_PADDING
    offset_2B = torch.randint(2 * padding + 1, (2, size), generator=generator).to(x_BCHW.device)
    ranges = (torch.arange(count, device=x_BCHW.device) for count in (size, channels, height, width))
    sample_B, channel_C, row_H, column_W = ranges
    row_BH, column_BW = offset_2B[0, :, None] + row_H, offset_2B[1, :, None] + column_W
    return F.pad(x_BCHW, (padding,) * 4)[
        sample_B[:, None, None, None], channel_C[:, None, None], row_BH[:, None, :, None], column_BW[:, None, None, :]
    ]


def _crop_flip(x_BCHW: Tensor, generator: Generator | None) -> Tensor:
    return _flip(_crop(x_BCHW, generator), generator)


AUGMENTATIONS: dict[str, Callable[[Tensor, Generator | None], Tensor]] = {
    "none": _none,
    "flip": _flip,
    "crop": _crop,
    "crop_flip": _crop_flip,
}
