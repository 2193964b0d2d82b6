"""Gradient attacks on one batch, in pixel units: FGSM (arXiv 1412.6572) and PGD (arXiv 1706.06083).

An attack raises the margin m = logsumexp_{j != y}(z_j) - z_y. The loss is softplus(m), its gradient a positive
multiple of the margin's, so the attack is the same; but the margin's gradient does not vanish where the loss is flat.
No random start: the same weights and pixels give the same adversarial example.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

from shared.errors import ConfigError

Norm = Literal["linf", "l2"]
Clamp = tuple[float, float] | None


class Attack(Protocol):
    """Makes adversarial inputs; FGSM and PGD differ in how often they look at the gradient."""

    @property
    def clamp(self) -> Clamp:
        """The range of valid pixels; None for inputs without one."""
        ...

    def __call__(self, x_BCHW: Tensor, grad_BCHW: Tensor, gradient: Callable[[Tensor], Tensor]) -> Tensor:
        """x' from x, the margin's gradient at x, and a function that gives the gradient elsewhere."""
        ...


@dataclasses.dataclass(frozen=True)
class Fgsm:
    """x' = clamp(x + epsilon * direction(gradient)): one step. Raises ConfigError for settings that make no attack."""

    epsilon: float
    norm: Norm = "linf"
    clamp: Clamp = (0.0, 1.0)

    def __post_init__(self) -> None:
        _check(self.epsilon, self.norm, self.clamp)

    def __call__(self, x_BCHW: Tensor, grad_BCHW: Tensor, gradient: Callable[[Tensor], Tensor]) -> Tensor:
        return _clamp(x_BCHW.add(_direction(grad_BCHW, self.norm), alpha=self.epsilon), self.clamp)


@dataclasses.dataclass(frozen=True)
class Pgd:
    """`steps` times: step by `step_size` along the direction, project onto the ball around x, clamp; the last iterate.

    Raises ConfigError for settings that make no attack.
    """

    epsilon: float
    steps: int
    step_size: float
    norm: Norm = "linf"
    clamp: Clamp = (0.0, 1.0)

    def __post_init__(self) -> None:
        _check(self.epsilon, self.norm, self.clamp)
        if self.steps < 1:
            raise ConfigError(
                f"steps is {self.steps}, and PGD needs at least 1", fix="set it to 1 or more", key="steps"
            )
        if not (math.isfinite(self.step_size) and self.step_size >= 0):
            raise ConfigError(
                f"step_size is {self.step_size}",
                fix="set it to a finite number from 0 up, such as epsilon / 4",
                key="step_size",
            )

    def __call__(self, x_BCHW: Tensor, grad_BCHW: Tensor, gradient: Callable[[Tensor], Tensor]) -> Tensor:
        adversarial_BCHW = x_BCHW
        for step in range(self.steps):
            if step:
                grad_BCHW = gradient(adversarial_BCHW)
            moved_BCHW = adversarial_BCHW.add(_direction(grad_BCHW, self.norm), alpha=self.step_size)
            delta_BCHW = _project(moved_BCHW.sub_(x_BCHW), self.epsilon, self.norm)
            adversarial_BCHW = _clamp(delta_BCHW.add_(x_BCHW), self.clamp)
        return adversarial_BCHW


def _direction(grad_BCHW: Tensor, norm: Norm) -> Tensor:
    """The steepest step of unit norm, a new tensor: sign(g) for L-infinity, g / ||g||_2 for L2; 0 where g is 0."""
    if norm == "linf":
        return grad_BCHW.sign()
    # Scaled by the largest entry first: squares of tiny or huge gradients leave float32.
    scaled_BCHW = grad_BCHW / _per_sample(grad_BCHW.abs().flatten(1).amax(1), grad_BCHW)
    return scaled_BCHW / _per_sample(torch.linalg.vector_norm(scaled_BCHW.flatten(1), dim=1), grad_BCHW)


def _project(delta_BCHW: Tensor, epsilon: float, norm: Norm) -> Tensor:
    """The nearest point of the ball of radius epsilon; works in place."""
    if norm == "linf":
        return delta_BCHW.clamp_(-epsilon, epsilon)
    length_B = torch.linalg.vector_norm(delta_BCHW.flatten(1), dim=1)
    factor_B: Tensor = (epsilon / length_B.clamp_min(torch.finfo(length_B.dtype).tiny)).clamp_max(1.0)
    return delta_BCHW.mul_(factor_B.view(-1, *[1] * (delta_BCHW.dim() - 1)))


def _per_sample(value_B: Tensor, like_BCHW: Tensor) -> Tensor:
    """`value_B` shaped to divide `like_BCHW`, with 1 for 0."""
    return torch.where(value_B > 0, value_B, 1.0).view(-1, *[1] * (like_BCHW.dim() - 1))


def _clamp(x_BCHW: Tensor, clamp: Clamp) -> Tensor:
    """In place."""
    return x_BCHW if clamp is None else x_BCHW.clamp_(*clamp)


def _check(epsilon: float, norm: str, clamp: Clamp) -> None:
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise ConfigError(
            f"epsilon is {epsilon}",
            fix="set it to a finite number from 0 up, in pixel units (8/255 = 0.031)",
            key="epsilon",
        )
    if norm not in ("linf", "l2"):
        raise ConfigError(f"norm is {norm!r}", fix="set it to 'linf' or 'l2'", key="norm")
    if clamp is not None and not clamp[0] < clamp[1]:
        raise ConfigError(
            f"clamp is {clamp}", fix="set it to (low, high), low below high, or to None for no range", key="clamp"
        )
