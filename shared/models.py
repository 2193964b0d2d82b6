"""Networks for small images. They take pixels in [0,1] and normalise inside, so that an attack works in pixel units."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shared.config import ModelConfig
from shared.datasets import Dataset
from shared.own import own_model


class Normalize(nn.Module):
    """(x - mean) / std per channel; both are buffers and travel with the weights."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1).clamp_min(1e-6))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return (x_BCHW - self.mean) / self.std


def build_model(config: ModelConfig, dataset: Dataset) -> nn.Module:
    """The network of `config` for the images and classes of `dataset`, freshly initialised from torch's global RNG."""
    if config.is_own:
        return own_model(config)
    body = _MODELS[config.name](dataset.train.channels, dataset.train.num_classes, config.width)
    return nn.Sequential(Normalize(*dataset.pixel_statistics()), body)


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` on `device`; on a CPU with channels last in memory, where convolutions are 1.2 to 1.7 times as fast."""
    model = model.to(device)
    is_flat = all(parameter.dim() < 5 for parameter in model.parameters())  # there are no channels last in 3 dimensions
    return model.to(memory_format=torch.channels_last) if device.type == "cpu" and is_flat else model


def logits(output: Any) -> Tensor:
    """(B, K) of what a network returned: itself, or the `logits` of an output object, as Hugging Face's have them."""
    found: Tensor = output if isinstance(output, Tensor) else output.logits
    return found


def small_cnn(channels: int, num_classes: int, width: int | None) -> nn.Module:
    """Three 3x3 convolutions with BatchNorm, one pooling in between, global average, linear."""
    width = width or 32
    return nn.Sequential(
        _convolution(channels, width),
        _convolution(width, 2 * width),
        nn.MaxPool2d(2),
        _convolution(2 * width, 2 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, num_classes),
    )


def tiny_cnn(channels: int, num_classes: int, width: int | None) -> nn.Module:
    """small_cnn with a pooling after its first convolution too: at equal width about a quarter of its cost."""
    width = width or 16
    return nn.Sequential(
        _convolution(channels, width),
        nn.MaxPool2d(2),
        _convolution(width, 2 * width),
        nn.MaxPool2d(2),
        _convolution(2 * width, 2 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, num_classes),
    )


def _convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


def resnet18(channels: int, num_classes: int, width: int | None) -> nn.Module:
    """torchvision's ResNet-18 with the usual stem for small images: 3x3, stride 1, no pooling; 64 wide, as ever."""
    from torchvision.models import resnet18 as torchvision_resnet18

    net: nn.Module = torchvision_resnet18(num_classes=num_classes)
    net.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    return net


_MODELS: dict[str, Callable[[int, int, int | None], nn.Module]] = {
    "small_cnn": small_cnn,
    "tiny_cnn": tiny_cnn,
    "resnet18": resnet18,
}
