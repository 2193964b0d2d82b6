"""SAM against hand-computed steps, its base optimizer and pytorch_optimizer's SAM."""

import contextlib
import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_optimizer
import torch
from torch import Tensor, nn

from shared.checkpoints import CheckpointPublisher, load, newest
from shared.errors import ConfigError, PerturbedWeights, StateError
from tests.raising import refuses
from trainer.sam import SAM, running_statistics_kept, sam_step

SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
ADAMW = {"base_optimizer": torch.optim.AdamW, "lr": 0.01, "weight_decay": 0.1}
BASES = pytest.mark.parametrize("base", [SGD, ADAMW], ids=["sgd", "adamw"])
ADAPTIVE = pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def make_batches(count: int) -> list[tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(1)
    return [(torch.randn(7, 5, generator=rng), torch.randint(3, (7,), generator=rng)) for _ in range(count)]


def backward(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    net.zero_grad()
    loss = nn.functional.cross_entropy(net(batch[0]), batch[1])
    loss.backward()
    return loss


def two_passes(net: nn.Module, optimizer: Any, batch: tuple[Tensor, Tensor]) -> None:
    backward(net, batch)
    optimizer.first_step(zero_grad=True)
    backward(net, batch)
    optimizer.second_step(zero_grad=True)


def weights(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def assert_same(left: list[Tensor], right: list[Tensor]) -> None:
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


def vector(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


@pytest.mark.parametrize(
    ("adaptive", "expected_e"),
    [(False, (0.6, -0.8)), (True, (27 / 337**0.5, -64 / 337**0.5))],
    ids=["plain", "adaptive"],
)
def test_step_by_hand(adaptive: bool, expected_e: tuple[float, float]) -> None:
    """Loss |w|^2 / 2 at w = (3, -4): g = w, so ||g|| = 5 and || |w| g || = ||(9, -16)|| = sqrt(337)."""
    w = vector(3, -4)
    optimizer = SAM([w], torch.optim.SGD, rho=1.0, adaptive=adaptive, lr=0.5)
    e = torch.tensor(expected_e, dtype=torch.float64)
    start = w.detach().clone()

    (w.square().sum() / 2).backward()
    optimizer.first_step(zero_grad=True)

    assert torch.allclose(w, start + e, rtol=1e-12)

    (w.square().sum() / 2).backward()
    optimizer.second_step()

    assert torch.allclose(w, start - 0.5 * (start + e), rtol=1e-12)


@BASES
@ADAPTIVE
def test_rho_zero_is_the_base_optimizer_bit_for_bit(base: dict[str, Any], adaptive: bool) -> None:
    net, plain = make_net(), make_net()
    optimizer = SAM(net.parameters(), rho=0.0, adaptive=adaptive, **base)
    settings = dict(base)
    reference = settings.pop("base_optimizer")(plain.parameters(), **settings)

    for batch in make_batches(6):
        sam_step(net, optimizer, nn.functional.cross_entropy, *batch)
        backward(plain, batch)
        reference.step()

        assert_same(weights(net), weights(plain))


@BASES
def test_rho_zero_is_one_forward_pass_of_the_base_optimizer(base: dict[str, Any]) -> None:
    """With dropout and BatchNorm, whose second passes would leave other random numbers and statistics."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))
    plain = copy.deepcopy(net)
    settings = dict(base)
    reference = settings.pop("base_optimizer")(plain.parameters(), **settings)
    optimizer = SAM(net.parameters(), rho=0.0, **base)
    passes: list[bool] = []
    net.register_forward_hook(lambda module, *_: passes.append(module.training))

    for step, batch in enumerate(make_batches(4), 1):
        torch.manual_seed(step)
        loss = sam_step(net, optimizer, nn.functional.cross_entropy, *batch)
        torch.manual_seed(step)
        expected = backward(plain, batch)
        reference.step()

        assert len(passes) == step
        assert torch.equal(loss, expected)
        assert not loss.requires_grad
        assert_same(list(net.state_dict().values()), list(plain.state_dict().values()))
    assert all(p.grad is None for p in net.parameters())


def test_rho_in_one_group_alone_needs_both_passes() -> None:
    """The loss a^2 / 2 + b^2 / 2 at (3, 4): only b moves, by 5 * 4 / 5, before the gradient is taken."""
    a, b = vector(3), vector(4)
    optimizer = SAM([{"params": [a]}, {"params": [b], "rho": 5.0}], torch.optim.SGD, rho=0.0, lr=0.1)
    model = _Parts(a, b)

    sam_step(model, optimizer, lambda out, _: out.square().sum() / 2, torch.zeros(0), torch.zeros(0))

    assert a.tolist() == pytest.approx([3 - 0.1 * 3])
    assert b.tolist() == pytest.approx([4 - 0.1 * 8])


class _Parts(nn.Module):
    """A model whose output is its parameters, whatever comes in."""

    def __init__(self, *parts: nn.Parameter) -> None:
        super().__init__()
        self.parts = nn.ParameterList(parts)

    def forward(self, _: Tensor) -> Tensor:
        return torch.cat(list(self.parts))


def _weighted(v_B: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda out_BK, y_B: (v_B * nn.functional.cross_entropy(out_BK, y_B, reduction="none")).mean()


@pytest.mark.parametrize("passes", ["both", "second"])
def test_weighted_step_by_hand(passes: str) -> None:
    """Logistic regression in two classes, written out: p = softmax(W x), gradient sum_i v_i (p_i - y_i) x_i^T / B."""
    rng = torch.Generator().manual_seed(2)
    x_BD, v_B = torch.randn(6, 4, generator=rng).double(), torch.tensor([2.0, 0.0, 0.5, 1.5, 1.0, 1.0]).double()
    y_B = torch.tensor([0, 1, 1, 0, 1, 0])
    net = nn.Linear(4, 2, bias=False).double()
    w_KD = net.weight.detach().clone()

    def gradient(at_KD: Tensor, weight_B: Tensor) -> Tensor:
        error_BK = (x_BD @ at_KD.T).softmax(1) - nn.functional.one_hot(y_B, 2)
        return (weight_B[:, None] * error_BK).T @ x_BD / 6

    first_KD = gradient(w_KD, v_B if passes == "both" else torch.ones(6).double())
    second_KD = gradient(w_KD + 0.7 * first_KD / first_KD.norm(), v_B)
    optimizer = SAM(net.parameters(), torch.optim.SGD, rho=0.7, lr=0.3)
    first = _weighted(v_B) if passes == "both" else nn.functional.cross_entropy
    at_w = first(x_BD @ w_KD.T, y_B)

    loss = sam_step(net, optimizer, first, x_BD, y_B, _weighted(v_B))

    torch.testing.assert_close(net.weight.detach(), w_KD - 0.3 * second_KD, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss, at_w, rtol=1e-12, atol=0.0)


def test_rho_zero_takes_the_second_loss() -> None:
    """The only pass is the one whose gradient moves the weights."""
    net, twin, (x, y) = make_net(), make_net(), make_batches(1)[0]
    v_B = torch.linspace(0, 2, 7)
    sam_step(net, SAM(net.parameters(), rho=0.0, **SGD), nn.functional.cross_entropy, x, y, _weighted(v_B))
    sam_step(twin, SAM(twin.parameters(), rho=0.0, **SGD), _weighted(v_B), x, y)

    assert_same(weights(net), weights(twin))


@BASES
@ADAPTIVE
def test_matches_pytorch_optimizer_step_for_step(base: dict[str, Any], adaptive: bool) -> None:
    """Its definition is ours in both forms (norm over all parameters jointly, of |w| g when adaptive)."""
    net, other = make_net(), make_net()
    ours = SAM(net.parameters(), rho=0.5, adaptive=adaptive, **base)
    theirs = pytorch_optimizer.SAM(other.parameters(), rho=0.5, adaptive=adaptive, **base)

    for batch in make_batches(8):
        two_passes(net, ours, batch)
        two_passes(other, theirs, batch)

        for a, b in zip(weights(net), weights(other), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rho", [0.05, 3.0])
@ADAPTIVE
def test_perturbation_has_length_rho_and_is_taken_back_bit_for_bit(rho: float, adaptive: bool) -> None:
    """The adaptive e(w) has length rho after division by |w|."""
    net = make_net().double()
    optimizer = SAM(net.parameters(), torch.optim.SGD, rho=rho, adaptive=adaptive, lr=0.0)
    before = weights(net)
    x, y = make_batches(1)[0]

    backward(net, (x.double(), y))
    optimizer.first_step()
    parts = [(p.detach() - w) / (w.abs() if adaptive else 1) for p, w in zip(net.parameters(), before, strict=True)]

    assert optimizer.perturbed
    assert torch.cat([part.flatten() for part in parts]).norm().item() == pytest.approx(rho, rel=1e-9)

    backward(net, (x.double(), y))
    optimizer.second_step()

    assert not optimizer.perturbed
    assert_same(weights(net), before)


def test_float32_weights_come_back_where_subtraction_would_not() -> None:
    """0.001 + e - e differs from 0.001 in float32 for an e of a thousand."""
    w = nn.Parameter(torch.full((64,), 1e-3))
    before = w.detach().clone()
    optimizer = SAM([w], torch.optim.SGD, rho=1e4, lr=0.0)
    w.grad = torch.randn(64, generator=torch.Generator().manual_seed(0))

    optimizer.first_step()
    optimizer.second_step()

    assert torch.equal(w, before)


def test_weight_decay_acts_once_and_at_w() -> None:
    """A linear loss has the gradient c everywhere: w <- w - lr (c + decay w), whatever e(w) was."""
    w, c = vector(2, -1), torch.tensor([3.0, 4.0], dtype=torch.float64)
    optimizer = SAM([w], torch.optim.SGD, rho=10.0, lr=0.1, weight_decay=0.5)

    optimizer.step(lambda: _backward_of((w * c).sum(), optimizer))

    assert w.tolist() == pytest.approx([2 - 0.1 * (3 + 1.0), -1 - 0.1 * (4 - 0.5)])


def _backward_of(loss: Tensor, optimizer: SAM) -> Tensor:
    optimizer.zero_grad()
    loss.backward()
    return loss


NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm2d(4),
    "batch, cumulative": lambda: nn.BatchNorm2d(4, momentum=None),
    "batch, untracked": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "batch, frozen": lambda: nn.BatchNorm2d(4).eval(),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "instance, frozen": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True).eval(),
}


@pytest.mark.parametrize("kind", NORMS)
def test_running_statistics_are_those_of_one_forward_pass(kind: str) -> None:
    """And the weights those of two full passes: the second normalises as the first did."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), NORMS[kind](), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))
    norm = net[1]
    mode = norm.training
    twice = copy.deepcopy(net)
    optimizer = SAM(net.parameters(), rho=0.5, **SGD)
    two_pass_optimizer = SAM(twice.parameters(), rho=0.5, **SGD)

    for size in (7, 5, 3):
        batch = torch.randn(size, 2, 6, 6) + 1, torch.randint(3, (size,))
        once = copy.deepcopy(net)
        once(batch[0])
        before = copy.deepcopy(norm.state_dict())
        settings = norm.momentum, norm.track_running_stats
        twice.load_state_dict(net.state_dict())

        sam_step(net, optimizer, nn.functional.cross_entropy, *batch)
        two_passes(twice, two_pass_optimizer, batch)

        assert (norm.momentum, norm.track_running_stats, norm.training) == (*settings, mode)
        assert_same(weights(net), weights(twice))
        for name, buffer in norm.named_buffers():
            assert torch.equal(buffer, dict(once[1].named_buffers())[name]), (name, size)
            if "frozen" in kind:
                assert torch.equal(buffer, before[name])
        if kind.startswith("batch") and norm.running_mean is not None and mode:
            assert norm.num_batches_tracked == before["num_batches_tracked"] + 1
            assert not torch.equal(norm.running_mean, before["running_mean"])


def test_statistics_are_tracked_again_after_an_error_in_the_second_pass() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=True))

    with pytest.raises(RuntimeError, match="out of memory"), running_statistics_kept(net):
        raise RuntimeError("out of memory")

    assert [(m.track_running_stats, m.momentum) for m in net] == [(True, 0.1), (True, 0.1)]


@BASES
def test_resumed_run_equals_the_uninterrupted_one(base: dict[str, Any]) -> None:
    net, batches = make_net(), make_batches(5)
    optimizer = SAM(net.parameters(), rho=0.1, **base)
    for batch in batches[:3]:
        sam_step(net, optimizer, nn.functional.cross_entropy, *batch)
    file = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict()), file)

    file.seek(0)
    saved_net, saved_optimizer = torch.load(file)
    fresh = make_net()
    resumed = SAM(fresh.parameters(), rho=9.0, **(base | {"lr": 5.0}))
    fresh.load_state_dict(saved_net)
    resumed.load_state_dict(saved_optimizer)
    for batch in batches[3:]:
        sam_step(net, optimizer, nn.functional.cross_entropy, *batch)
        sam_step(fresh, resumed, nn.functional.cross_entropy, *batch)

        assert_same(weights(fresh), weights(net))

    assert resumed.param_groups is resumed.base_optimizer.param_groups
    assert resumed.param_groups[0]["rho"] == 0.1


def test_state_dict_of_the_bare_base_optimizer_is_refused() -> None:
    net = make_net()
    optimizer = SAM(net.parameters(), **SGD)
    foreign = torch.optim.SGD(make_net().parameters(), lr=0.1).state_dict()

    with refuses(StateError, "param_groups", ["adaptive", "rho"]):
        optimizer.load_state_dict(foreign)


def test_steps_out_of_order_are_refused() -> None:
    net, batch = make_net(), make_batches(1)[0]
    optimizer = SAM(net.parameters(), **SGD)
    state = optimizer.state_dict()
    with refuses(StateError, "second_step"):
        optimizer.second_step()
    with refuses(StateError, "params"):
        optimizer.first_step()
    with refuses(StateError, "closure"):
        optimizer.step()

    backward(net, batch)
    optimizer.first_step()
    perturbed = weights(net)

    with refuses(StateError, "first_step"):
        optimizer.first_step()
    with refuses(StateError, "base_step"):
        optimizer.base_step()
    with refuses(StateError, "state_dict"):
        optimizer.state_dict()
    with refuses(StateError, "load_state_dict"):
        optimizer.load_state_dict(state)
    assert_same(weights(net), perturbed)


@pytest.mark.parametrize("rho", [-0.1, float("nan"), float("inf")])
def test_rho_that_cannot_work_is_refused(rho: float) -> None:
    """As the argument, as a group's own, and in a group added later."""
    group = {"params": [vector(1)], "rho": rho}
    optimizer = SAM([vector(2)], torch.optim.SGD, lr=0.1)
    for attempt in (
        lambda: SAM([vector(1)], torch.optim.SGD, rho=rho, lr=0.1),
        lambda: SAM([dict(group)], torch.optim.SGD, lr=0.1),
        lambda: optimizer.add_param_group(dict(group)),
    ):
        with refuses(ConfigError, "rho", rho):
            attempt()


@pytest.mark.parametrize(("gradient", "expected"), [(0.0, 0.0), (6e4, 0.5)])
def test_float16_gradients_neither_overflow_the_norm_nor_vanish_in_it(gradient: float, expected: float) -> None:
    """The norm of four times 6e4 is 1.2e5, beyond float16, and 1e-12 is 0 there."""
    w = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    optimizer = SAM([w], torch.optim.SGD, rho=1.0, lr=0.1)
    w.grad = torch.full_like(w, gradient)

    optimizer.first_step()

    assert w.tolist() == pytest.approx([expected] * 4, rel=1e-3)


@pytest.mark.parametrize("how", ["two steps", "closure"])
def test_scheduler_drives_the_base_optimizer_without_a_warning(how: str) -> None:
    """Linear loss: each step is lr * c. Warnings are errors here."""
    w = vector(0.0)
    optimizer = SAM([w], torch.optim.SGD, lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    path = [0.0]
    for _ in range(3):
        if how == "closure":
            optimizer.step(lambda: _backward_of(-w.sum(), optimizer))
        else:
            w.grad = -torch.ones_like(w)
            optimizer.first_step()
            optimizer.second_step()
        schedule.step()
        path.append(w.item())

    assert path == pytest.approx([0.0, 1.0, 1.1, 1.11])
    assert optimizer.base_optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)


def test_groups_have_their_own_rho_and_share_the_norm() -> None:
    """g = (3, 0, 4) over both groups has norm 5; the frozen group stays, and so does what has no gradient."""
    a, b, unused, added = vector(1, 1), vector(1), vector(7), vector(1)
    optimizer = SAM(
        [{"params": [a]}, {"params": [b], "rho": 2.0}, {"params": [unused]}],
        torch.optim.SGD,
        rho=1.0,
        lr=0.1,
        momentum=0.9,
        weight_decay=0.1,
    )

    def gradients(first: float) -> None:
        a.grad = torch.tensor([first, 0.0], dtype=torch.float64)
        b.grad = torch.tensor([4.0], dtype=torch.float64)

    gradients(3.0)
    optimizer.first_step()

    assert a.tolist() == pytest.approx([1 + 3 / 5, 1])
    assert b.tolist() == pytest.approx([1 + 2 * 4 / 5])
    assert unused.tolist() == [7]

    optimizer.second_step()
    optimizer.add_param_group({"params": [added], "rho": 26.0, "lr": 1.0})
    gradients(3.0)
    added.grad = torch.tensor([12.0], dtype=torch.float64)
    optimizer.first_step()

    assert added.tolist() == pytest.approx([1 + 26 * 12 / 13])

    optimizer.second_step()

    assert added.tolist() == pytest.approx([1 - (12 + 0.1)])
    assert unused.tolist() == [7]
    assert optimizer.base_optimizer.param_groups[-1]["momentum"] == 0.9


@pytest.mark.parametrize("there", [True, False], ids=["gradients there", "no gradients"])
def test_closure_runs_as_often_as_gradients_are_needed(there: bool) -> None:
    net, reference, batch = make_net(), make_net(), make_batches(1)[0]
    optimizer = SAM(net.parameters(), rho=0.3, **SGD)
    losses = []

    def closure() -> float:
        losses.append(backward(net, batch).item())
        return losses[-1]

    if there:
        backward(net, batch)
    returned = optimizer.step(closure)
    at_w = sam_step(reference, SAM(reference.parameters(), rho=0.3, **SGD), nn.functional.cross_entropy, *batch)

    assert len(losses) == (1 if there else 2)
    assert returned == losses[0]
    assert (losses[0] == at_w.item()) is not there
    assert_same(weights(net), weights(reference))
    assert all(p.grad is None for p in net.parameters())


def test_publishing_between_the_steps_is_refused(tmp_path: Path) -> None:
    net, batch = make_net(), make_batches(1)[0]
    optimizer = SAM(net.parameters(), **SGD)
    with CheckpointPublisher(tmp_path) as publisher:
        backward(net, batch)
        optimizer.first_step(zero_grad=True)
        with pytest.raises(PerturbedWeights):
            publisher.publish(net, 1)
        backward(net, batch)
        optimizer.second_step()
        publisher.publish(net, 1)

    checkpoint = newest(tmp_path)
    assert checkpoint is not None
    published = load(checkpoint)
    assert_same([published[name] for name in net.state_dict()], weights(net))


def test_second_pass_sees_perturbed_weights_under_autocast() -> None:
    """Autocast keeps low-precision copies of the weights; a copy of w must not serve the pass at w + e(w)."""
    net, (x, y) = make_net(), make_batches(1)[0]
    losses: list[float] = []

    def loss_fn(logits: Tensor, labels: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(logits.float(), labels)
        losses.append(loss.item())
        return loss

    with torch.autocast("cpu", torch.bfloat16):
        sam_step(net, SAM(net.parameters(), torch.optim.SGD, rho=0.5, lr=0.1), loss_fn, x, y)

    assert losses[1] > losses[0] + 0.1


def test_only_the_second_pass_synchronises() -> None:
    """As DistributedDataParallel offers it: `no_sync` around the first forward and backward."""
    passes: list[bool] = []

    class Net(nn.Linear):
        synced = True

        @contextlib.contextmanager
        def no_sync(self) -> Iterator[None]:
            self.synced = False
            yield
            self.synced = True

        def forward(self, x: Tensor) -> Tensor:
            passes.append(self.synced)
            return super().forward(x)

    net, (x, y) = Net(5, 3), make_batches(1)[0]
    sam_step(net, SAM(net.parameters(), torch.optim.SGD, lr=0.1), nn.functional.cross_entropy, x, y)

    assert passes == [False, True]


def test_closure_that_fails_at_the_perturbed_weights_leaves_w() -> None:
    net, batch = make_net(), make_batches(1)[0]
    before = copy.deepcopy(net.state_dict())
    optimizer = SAM(net.parameters(), torch.optim.SGD, lr=0.1)
    backward(net, batch)

    def closure() -> Tensor:
        raise MemoryError

    with pytest.raises(MemoryError):
        optimizer.step(closure)
    assert not optimizer.perturbed
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_gradients_that_are_zero_do_not_count_as_those_at_w() -> None:
    """`zero_grad(set_to_none=False)` before a step whose closure does everything."""
    nets = [make_net(), make_net()]
    batch = make_batches(1)[0]
    for net, to_none in zip(nets, (True, False), strict=True):
        optimizer = SAM(net.parameters(), torch.optim.SGD, lr=0.1, rho=0.5)
        backward(net, batch)
        optimizer.zero_grad(set_to_none=to_none)
        optimizer.step(lambda net=net: backward(net, batch))

    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one, other)
