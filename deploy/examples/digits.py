"""A network and a data set of one's own, as scorers and training both import them: see own_loop.toml."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset


class Digits(Dataset[tuple[Tensor, int]]):
    """scikit-learn's digits, pixels in [0, 1]; in the role `train` shifted by up to a pixel at random."""

    def __init__(self, role: str) -> None:
        bunch = load_digits()
        self.x = torch.tensor(bunch.images / 16, dtype=torch.float32)[:, None]
        self.targets = [int(label) for label in bunch.target]
        self.is_shifted = role == "train"

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        x = self.x[i]
        if self.is_shifted:
            x = x.roll(tuple(torch.randint(-1, 2, (2,)).tolist()), (1, 2))
        return x, self.targets[i]


def dataset(role: str) -> Digits:
    """Called with "train" for what is trained on, with "score" for what is scored: the same samples, not augmented."""
    return Digits(role)


def network() -> nn.Module:
    """Takes what the data set gives; what it normalises, it normalises inside."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 10),
    )
