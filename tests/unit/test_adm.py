"""score_batch against an independent float64 computation, and what it must leave alone."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scorer.adm import log_softplus, score_batch
from scorer.attacks import Attack, Fgsm, Pgd
from shared.errors import DataError
from shared.schema import FLOAT_COLUMNS, MEASURED_COLUMNS
from tests.raising import refuses

FAR = 80.0
ATTACKS = {
    "fgsm linf": Fgsm(0.02),
    "fgsm linf weak": Fgsm(0.0005),
    "fgsm l2": Fgsm(0.1, "l2"),
    "pgd linf": Pgd(0.02, 4, 0.008),
    "pgd l2": Pgd(0.1, 4, 0.04, "l2"),
}


class Tokens(nn.Module):
    """A transformer over the rows of an image; its eval mode has a fast path without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.head(self.encoder(x_BCHW.flatten(1).view(len(x_BCHW), -1, 8)).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 3))


def conv() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), nn.Linear(288, 3))
    net[1].running_mean.uniform_(-0.5, 0.5)
    net[1].running_var.uniform_(0.5, 2.0)
    return net


NETS = {"mlp": mlp, "conv and batch norm": conv, "transformer": Tokens}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20)


def images(count: int = 24) -> tuple[Tensor, Tensor]:
    return torch.rand(count, 1, 8, 8), torch.arange(count) % 3


def far_apart(net: nn.Module, x: Tensor, y: Tensor) -> nn.Module:
    """The net with its last layer scaled until the margins at x reach beyond -80; beyond 80 they do too."""
    net.eval()
    with torch.no_grad():
        last = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
        last.bias -= net(x).mean(0)
        while score_batch(net, x, y, Fgsm(0.0))["margin"].min().item() > -FAR:
            last.weight *= 1.1
            last.bias *= 1.1
    return net


class Oracle:
    """The definitions in float64: l = -log softmax(z)_y, and attacks that climb l itself."""

    def __init__(self, net: nn.Module, x: Tensor, y: Tensor, attack: Attack) -> None:
        self.net, self.y = copy.deepcopy(net).double().eval(), y
        self.attack, self.x = attack, x.double()
        self.settled = torch.ones(len(y), dtype=torch.bool)  # no pixel gradient is of rounding size
        z, grad = self.loss_gradient(self.x)
        z_adversarial = self.net(self.climb(grad)).detach()
        self.log_loss, self.log_loss_adversarial = self.log_of_loss(z), self.log_of_loss(z_adversarial)
        minus_log_softmax = F.cross_entropy(z, y, reduction="none")
        torch.testing.assert_close(self.log_loss.exp(), minus_log_softmax, rtol=1e-6, atol=1e-12)
        self.columns = {
            "margin": self.log_of_others(z),
            "adversarial_margin": self.log_of_others(z_adversarial),
            "log_ratio": self.log_loss_adversarial - self.log_loss,
            "grad_norm": grad.flatten(1).square().sum(1).sqrt(),
            "el2n": self.softmax_minus_onehot(z).square().sum(1).sqrt(),
            "predicted": z.argmax(1),
            "correct": z.argmax(1) == y,
            "robust": z_adversarial.argmax(1) == y,
        }

    def others(self, z: Tensor) -> Tensor:
        """exp(z_j - z_y) of the classes j other than y."""
        return (z - z.gather(1, self.y[:, None])).exp().scatter(1, self.y[:, None], 0.0)

    def log_of_others(self, z: Tensor) -> Tensor:
        return self.others(z).sum(1).log()

    def log_of_loss(self, z: Tensor) -> Tensor:
        return self.others(z).sum(1).log1p().log()

    def softmax_minus_onehot(self, z: Tensor) -> Tensor:
        """Its entry at the label is minus the sum of the others: 1 - p_y cancels."""
        p = F.softmax(z, 1).scatter(1, self.y[:, None], 0.0)
        return p.scatter(1, self.y[:, None], -p.sum(1, keepdim=True))

    def loss_gradient(self, at: Tensor) -> tuple[Tensor, Tensor]:
        leaf = at.detach().requires_grad_()
        z = self.net(leaf)
        (grad,) = torch.autograd.grad((self.softmax_minus_onehot(z).detach() * z).sum(), leaf)
        if self.attack.norm == "linf":
            size = grad.abs().flatten(1)
            self.settled &= size.amin(1) > 1e-5 * size.amax(1)
        return z.detach(), grad

    def climb(self, grad: Tensor) -> Tensor:
        a, at = self.attack, self.x
        steps, size = (a.steps, a.step_size) if isinstance(a, Pgd) else (1, a.epsilon)
        for step in range(steps):
            grad = self.loss_gradient(at)[1] if step else grad
            length = grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            delta = at + size * (grad.sign() if a.norm == "linf" else grad / length) - self.x
            if a.norm == "linf":
                delta = delta.clamp(-a.epsilon, a.epsilon)
            else:
                delta = delta * (a.epsilon / delta.flatten(1).norm(dim=1)).clamp(max=1).view(-1, 1, 1, 1)
            at = (self.x + delta).clamp(*a.clamp)
        return at


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_every_column_agrees_with_float64_at_margins_up_to_80(make, attack):
    x, y = images(300)
    net = far_apart(make(), x, y)
    oracle = Oracle(net, x, y, attack)
    found = score_batch(net, x, y, attack)
    at = oracle.settled
    want = {name: column[at].double() for name, column in oracle.columns.items()}
    have = {name: found[name][at].double() for name in MEASURED_COLUMNS}

    assert at.float().mean().item() > 0.8
    assert want["margin"].min().item() < -FAR
    assert want["margin"].max().item() > FAR
    large = want["log_ratio"].abs() >= 0.01
    relative = (have["log_ratio"] / want["log_ratio"] - 1).abs()[large]

    assert large.float().mean().item() > 0.5
    assert relative.max().item() < 1e-3
    torch.testing.assert_close(have["margin"], want["margin"], rtol=1e-5, atol=1e-4)
    # An attack's path may pass a ReLU's kink at rounding size, and which side it takes depends on the processor.
    off = ~torch.isclose(have["adversarial_margin"], want["adversarial_margin"], rtol=1e-5, atol=1e-4)
    assert off.float().mean().item() < 0.01
    torch.testing.assert_close(have["adversarial_margin"], want["adversarial_margin"], rtol=1e-3, atol=1e-3)
    for name in ("grad_norm", "el2n"):
        torch.testing.assert_close(have[name], want[name], rtol=1e-3, atol=1e-37)
    for name in ("predicted", "correct", "robust"):
        assert torch.equal(have[name], want[name])
    assert 0 < have["robust"].sum() < have["correct"].sum() < at.sum()


def test_a_linear_net_gives_hand_computed_columns():
    """z = (2x, 0): at x = 0.5 and label 0 the margin is -1; epsilon 0.25 takes it to -0.5."""
    net = nn.Linear(1, 2, bias=False)
    net.weight.data = torch.tensor([[2.0], [0.0]])
    row = score_batch(net, torch.tensor([[0.5]]), torch.tensor([0]), Fgsm(0.25))
    p = 1 / (1 + math.exp(1.0))  # of the other class; the loss's gradient is -2p

    expected = {
        "margin": -1.0,
        "adversarial_margin": -0.5,
        "log_ratio": math.log(math.log1p(math.exp(-0.5)) / math.log1p(math.exp(-1.0))),
        "grad_norm": 2 * p,
        "el2n": math.sqrt(2) * p,
        "predicted": 0,
        "correct": True,
        "robust": True,
    }
    assert pytest.approx(expected, rel=1e-6) == {name: column.item() for name, column in row.items()}
    assert list(MEASURED_COLUMNS) == list(row)
    dtypes = [torch.float32] * 5 + [torch.int32, torch.bool, torch.bool]
    assert dtypes == [column.dtype for column in row.values()]


@pytest.mark.parametrize("m", [-700.0, -100.0, -10.001, -10.0, -9.999, -1.0, 0.0, 15.0, 25.0, 700.0])
def test_log_softplus(m):
    exact = math.log(math.log1p(math.exp(m))) if m < 30 else math.log(m)

    assert pytest.approx(exact, rel=1e-9) == log_softplus(torch.tensor([m], dtype=torch.float64)).item()


@pytest.mark.parametrize("attack", [Fgsm(0.0), Fgsm(0.0, "l2"), Pgd(0.0, 3, 0.1), Pgd(0.0, 3, 0.1, "l2")], ids=str)
@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_without_a_perturbation_the_log_ratio_is_exactly_zero(make, attack):
    x, y = images()
    row = score_batch(make(), x, y, attack)

    assert [0.0] * len(y) == row["log_ratio"].tolist()
    assert torch.equal(row["margin"], row["adversarial_margin"])
    assert torch.equal(row["correct"], row["robust"])


class Counting(nn.Module):
    """Counts calls in a buffer, also in eval mode, and drops out by function; optionally raises at a call."""

    def __init__(self, count: str, fail_at: int = 0) -> None:
        super().__init__()
        self.count, self.fail_at = count, fail_at
        self.failures = itertools.count(1)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("hidden_calls", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.count == "in place":
            self.calls += 1
            self.hidden_calls.add_(1)
        elif self.count == "replaced":
            self.calls = self.calls + 1
        elif self.count == "through data":
            self.calls.data.add_(1)
        if next(self.failures) == self.fail_at:
            raise RuntimeError("the model fails")
        return F.dropout(x, 0.1)


def busy_net(count: str = "in place", fail_at: int = 0) -> nn.Module:
    """Mixed modes, mixed requires_grad, gradients on some parameters, three kinds of state."""
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.Dropout(0.5),
        nn.Flatten(),
        Counting(count, fail_at),
        nn.Linear(144, 3),
    )
    net.train()
    net[2].eval()
    net[0].weight.requires_grad_(False)
    net[5].weight.grad = torch.ones_like(net[5].weight)
    return net


def state_of(net: nn.Module) -> dict[str, object]:
    tensors = [*net.named_parameters(), *net.named_buffers()]
    return {
        "values": {name: tensor.detach().clone().tolist() for name, tensor in tensors},
        "gradients": {name: None if p.grad is None else p.grad.tolist() for name, p in net.named_parameters()},
        "requires_grad": [p.requires_grad for p in net.parameters()],
        "modes": [module.training for module in net.modules()],
        "rng": torch.get_rng_state().tolist(),
    }


@pytest.mark.parametrize("guard", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("fail_at", [0, 1, 2], ids=["succeeds", "fails at first", "fails at second"])
@pytest.mark.parametrize("count", ["in place", "replaced", "through data"])
def test_the_model_and_the_rng_are_left_as_they_were(count, fail_at, guard):
    net, (x, y) = busy_net(count, fail_at), images()
    pixels, before = x.clone(), state_of(net)
    with guard():
        if fail_at:
            with pytest.raises(RuntimeError, match="the model fails"):
                score_batch(net, x, y, Fgsm(0.1))
        else:
            score_batch(net, x, y, Fgsm(0.1))

    assert before == state_of(net)
    assert torch.equal(pixels, x)


def test_the_model_still_trains_after_being_scored_in_inference_mode():
    net, (x, y) = busy_net(), images()
    with torch.inference_mode():
        score_batch(net, x, y, Fgsm(0.1))
    F.cross_entropy(net(x), y).backward()

    assert net[5].weight.grad.abs().sum().item() > 0


def test_a_backward_pass_in_flight_still_works():
    """Batch norm in eval mode keeps its buffers for backward: they may not be written, not even with what they hold."""
    net, (x, y) = conv().eval(), images()
    loss = F.cross_entropy(net(x), y)
    score_batch(net, x, y, Fgsm(0.1))
    loss.backward()

    assert net[0].weight.grad.abs().sum().item() > 0


def test_a_refusal_leaves_the_model_too():
    net, (x, _) = busy_net(), images()
    before = state_of(net)
    with refuses(DataError, "y_B", "label 3"):
        score_batch(net, x, torch.full((len(x),), 3), Fgsm(0.1))

    assert before == state_of(net)


def test_scores_are_those_of_eval_mode():
    net, (x, y) = conv(), images()
    expected = score_batch(net.eval(), x, y, Fgsm(0.1))
    found = score_batch(net.train(), x, y, Fgsm(0.1))

    assert all(torch.equal(expected[name], found[name]) for name in MEASURED_COLUMNS)


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_the_numbers_do_not_depend_on_the_grad_mode_outside(guard, attack):
    """Also for pixels and labels that were made in inference mode."""
    net, (x, y) = conv(), images()
    expected = score_batch(net, x, y, attack)
    with guard():
        for pixels, labels in ((x, y), (x.clone(), y.clone())):
            found = score_batch(net, pixels, labels, attack)

            assert all(torch.equal(expected[name], found[name]) for name in MEASURED_COLUMNS)
            assert not any(column.is_inference() for column in found.values()) or guard is torch.inference_mode


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_a_sample_does_not_depend_on_the_rest_of_the_batch(make):
    net, (x, y) = make(), images(7)
    together = score_batch(net, x, y, Fgsm(0.05, "l2"))
    for i in range(len(y)):
        alone = score_batch(net, x[i : i + 1], y[i : i + 1], Fgsm(0.05, "l2"))
        for name in FLOAT_COLUMNS:
            torch.testing.assert_close(alone[name], together[name][i : i + 1], rtol=1e-3, atol=1e-6)
        assert together["predicted"][i].item() == alone["predicted"].item()


def test_channels_last_gives_the_same_numbers():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(288, 3))
    x, y = torch.rand(9, 3, 8, 8), torch.arange(9) % 3
    for attack in (Fgsm(0.05, "l2"), Pgd(0.05, 3, 0.02, "l2")):
        expected = score_batch(net, x, y, attack)
        found = score_batch(net, x.to(memory_format=torch.channels_last), y, attack)
        for name in FLOAT_COLUMNS:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-6)


def test_without_a_clamp_range_inputs_may_lie_anywhere():
    """z = (x, 0) at x = -7: the margin of label 0 is 7, half a unit further down 7.5."""
    net = nn.Linear(1, 2, bias=False)
    net.weight.data = torch.tensor([[1.0], [0.0]])
    row = score_batch(net, torch.tensor([[-7.0]]), torch.tensor([0]), Fgsm(0.5, clamp=None))

    assert [row["margin"].item(), row["adversarial_margin"].item()] == [7.0, 7.5]


X, Y = torch.full((2, 1, 8, 8), 0.5), torch.tensor([0, 1])
REFUSED = {
    "label below 0": (X, torch.tensor([0, -1]), "y_B", "label -1"),
    "label too high": (X, torch.tensor([0, 3]), "y_B", "label 3"),
    "float labels": (X, Y.float(), "y_B", torch.float32),
    "bool labels": (X, Y.bool(), "y_B", torch.bool),
    "integer images": ((X * 255).to(torch.uint8), Y, "x_BCHW", torch.uint8),
    "pixel above the range": (X + 33 / 64, Y, "x_BCHW", 1 + 1 / 64),
    "pixel below the range": (X - 33 / 64, Y, "x_BCHW", -1 / 64),
    "one NaN pixel": (X.index_fill(0, torch.tensor([1]), math.nan), Y, "x_BCHW", math.nan),
    "more labels": (X, torch.tensor([0, 1, 2]), "y_B", "labels of shape (3,)"),
    "fewer labels": (X, torch.tensor([0]), "y_B", "labels of shape (1,)"),
    "labels as one-hot": (X, torch.eye(2, dtype=torch.int64), "y_B", "labels of shape (2, 2)"),
}


@pytest.mark.parametrize(("x", "y", "key", "value"), REFUSED.values(), ids=REFUSED)
def test_inputs_that_cannot_be_scored_are_refused(x, y, key, value):
    with refuses(DataError, key, value):
        score_batch(mlp(), x, y, Fgsm(0.1))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_pixels_that_are_not_finite_are_refused_without_a_clamp_range_too(value):
    with refuses(DataError, "x_BCHW", value):
        score_batch(mlp(), X.index_fill(0, torch.tensor([1]), value), Y, Fgsm(0.1, clamp=None))


@pytest.mark.parametrize(
    "net", [nn.Flatten(0), nn.Sequential(nn.Flatten(), nn.Linear(64, 1))], ids=["(B*64,)", "K = 1"]
)
def test_logits_of_another_shape_are_refused(net):
    with refuses(DataError, "model", tuple(net(X).shape)):
        score_batch(net, X, torch.zeros(2, dtype=torch.int64), Fgsm(0.1))
