"""FGSM and PGD against values computed by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scorer.attacks import Attack, Fgsm, Pgd
from shared.errors import ConfigError
from tests.raising import refuses

NORMS = ["linf", "l2"]


def never(_: Tensor) -> Tensor:
    raise AssertionError("one step asks for no further gradient")


def test_fgsm_moves_each_pixel_by_epsilon_and_clamps():
    x = torch.tensor([[0.5, 0.98, 0.01, 0.3]])

    moved = Fgsm(0.05)(x, torch.tensor([[2.0, 3.0, -1.0, 0.0]]), never)

    torch.testing.assert_close(moved, torch.tensor([[0.55, 1.0, 0.0, 0.3]]))


def test_fgsm_l2_goes_along_the_gradient():
    x = torch.full((1, 2), 0.1)

    moved = Fgsm(0.5, "l2")(x, torch.tensor([[3.0, 4.0]]), never)

    torch.testing.assert_close(moved, torch.tensor([[0.4, 0.5]]))


def test_each_sample_has_its_own_l2_length():
    grad = torch.tensor([[3.0, 4.0], [0.0, -1e-3]])

    moved = Fgsm(1.0, "l2", clamp=None)(torch.zeros(2, 2), grad, never)

    torch.testing.assert_close(moved, torch.tensor([[0.6, 0.8], [0.0, -1.0]]))


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1.0, 1e30, 1e38])
def test_l2_step_has_length_epsilon_for_tiny_and_huge_gradients(scale):
    grad = torch.tensor([[[[3.0, 0.0], [0.0, -4.0]]]]) / 4 * scale

    moved = Fgsm(1.0, "l2", clamp=None)(torch.zeros(1, 1, 2, 2), grad, never)

    torch.testing.assert_close(moved, torch.tensor([[[[0.6, 0.0], [0.0, -0.8]]]]), rtol=1e-2, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_zero_gradient_leaves_the_input(norm):
    x = torch.rand(2, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    for attack in (Fgsm(0.1, norm), Pgd(0.1, 3, 0.05, norm)):
        assert torch.equal(x, attack(x, torch.zeros_like(x), torch.zeros_like))


def test_pgd_gives_the_last_iterate():
    """The gradient points to 0.58, a step is 0.1: from 0.5 up, down, up."""
    x = torch.full((1, 1), 0.5)

    found = [Pgd(0.25, steps, 0.1)(x, 0.58 - x, lambda at: 0.58 - at).item() for steps in (1, 2, 3)]

    assert pytest.approx([0.6, 0.5, 0.6]) == found


@pytest.mark.parametrize(
    ("norm", "expected"), [("linf", [[0.8, 0.8]]), ("l2", [[0.5 + 0.3 * 0.6, 0.5 + 0.3 * 0.8]])], ids=NORMS
)
def test_pgd_projects_onto_the_ball_around_the_clean_input(norm, expected):
    x, grad = torch.full((1, 2), 0.5), torch.tensor([[3.0, 4.0]])

    moved = Pgd(0.3, 4, 0.2, norm)(x, grad, lambda _: grad)

    torch.testing.assert_close(moved, torch.tensor(expected))


def test_pgd_clamps_every_iterate():
    """Unclamped, the first iterate would be 1.2 and the second step down from there would end at 0.9."""
    moved = Pgd(0.5, 2, 0.3)(torch.full((1, 1), 0.9), torch.ones(1, 1), lambda _: -torch.ones(1, 1))

    torch.testing.assert_close(moved, torch.full((1, 1), 0.7))


@pytest.mark.parametrize("step_size", [0.1, 0.7])
def test_pgd_with_one_long_step_is_fgsm(step_size):
    generator = torch.Generator().manual_seed(1)
    x, grad = torch.rand(8, 1, 4, 4, generator=generator), torch.randn(8, 1, 4, 4, generator=generator)

    torch.testing.assert_close(Pgd(0.1, 1, step_size)(x, grad, never), Fgsm(0.1)(x, grad, never))


@pytest.mark.parametrize("clamp", [(0.0, 1.0), None], ids=["pixels", "no clamp"])
@pytest.mark.parametrize("norm", NORMS)
def test_perturbation_stays_in_the_ball_and_the_clamp_range(norm, clamp):
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(64, 3, 5, 5, generator=generator)

    def noise(at: Tensor) -> Tensor:
        return torch.randn(at.shape, generator=generator)

    for epsilon in (0.0, 1e-3, 0.4):
        for attack in (Fgsm(epsilon, norm, clamp), Pgd(epsilon, 5, max(epsilon, 0.1), norm, clamp)):
            moved = attack(x, noise(x), noise)
            order = math.inf if norm == "linf" else 2
            lengths = torch.linalg.vector_norm((moved - x).double().flatten(1), ord=order, dim=1)

            assert lengths.max().item() <= epsilon * (1 + 1e-4) + 1e-6
            assert epsilon == 0 or lengths.min().item() > 0
            assert clamp is None or (moved.min().item() >= 0.0 and moved.max().item() <= 1.0)


@pytest.mark.parametrize("norm", NORMS)
def test_pgd_raises_the_margin_at_least_as_much_as_fgsm(norm):
    """On average, where the margin bends; and FGSM raises it above the clean one."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4)).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3)
    x, y = torch.rand(200, 16, dtype=torch.float64), torch.arange(200) % 4
    epsilon = 0.15 if norm == "linf" else 0.6

    def margin(at: Tensor) -> Tensor:
        logits = net(at)
        others = logits[F.one_hot(y, 4) == 0].view(-1, 3)
        return others.logsumexp(1) - logits[torch.arange(200), y]

    def gradient(at: Tensor) -> Tensor:
        leaf = at.detach().requires_grad_()
        return torch.autograd.grad(margin(leaf).sum(), leaf)[0]

    def mean_margin(attack: Attack) -> float:
        return margin(attack(x, gradient(x), gradient)).mean().item()

    clean, fgsm = mean_margin(Fgsm(0.0, norm)), mean_margin(Fgsm(epsilon, norm))
    pgd = mean_margin(Pgd(epsilon, 10, epsilon / 4, norm))

    assert clean < fgsm < pgd


@pytest.mark.parametrize(
    ("make", "key", "value"),
    [
        (lambda: Fgsm(-0.1), "epsilon", -0.1),
        (lambda: Fgsm(math.nan), "epsilon", math.nan),
        (lambda: Fgsm(math.inf), "epsilon", math.inf),
        (lambda: Fgsm(0.1, "l1"), "norm", "'l1'"),  # type: ignore[arg-type]
        (lambda: Fgsm(0.1, clamp=(1.0, 0.0)), "clamp", (1.0, 0.0)),
        (lambda: Fgsm(0.1, clamp=(0.0, math.nan)), "clamp", (0.0, math.nan)),
        (lambda: Pgd(-1.0, 3, 0.1), "epsilon", -1.0),
        (lambda: Pgd(0.1, 3, 0.1, "max"), "norm", "'max'"),  # type: ignore[arg-type]
        (lambda: Pgd(0.1, 0, 0.1), "steps", 0),
        (lambda: Pgd(0.1, 3, -0.1), "step_size", -0.1),
        (lambda: Pgd(0.1, 3, math.inf), "step_size", math.inf),
        (lambda: Pgd(0.1, 3, math.nan), "step_size", math.nan),
    ],
)
def test_settings_that_make_no_attack_are_refused(make, key, value):
    with refuses(ConfigError, key, value):
        make()
