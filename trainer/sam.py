"""Sharpness-Aware Minimisation (Foret et al., arXiv 2010.01412) and its adaptive form ASAM (arXiv 2102.11600)."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from shared.checkpoints import PERTURBED_FLAG
from shared.errors import ConfigError, StateError

EPSILON = 1e-12


class SAM(Optimizer):
    """Wraps a base optimizer: ascend to w + e(w), take the gradient there, step from w.

        e(w) = rho * g / (||g||_2 + 1e-12)                 norm over all parameters jointly (eq. 2 with p = 2)
        e(w) = rho * w^2 g / (|| |w| g ||_2 + 1e-12)       adaptive: T = |w|, all parameters, no eta

    The param groups and the state are the base optimizer's own, so schedulers work and `state_dict` holds its momentum.
    w is kept as a copy and restored bit for bit. Weight decay acts once, in the base step.

    Args:
        params: as for any optimizer.
        base_optimizer: its class, such as `torch.optim.SGD`; `kwargs` are its arguments.
        rho: radius of the neighbourhood, from 0 up; at 0 the steps are the base optimizer's.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, {"rho": rho, "adaptive": adaptive, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        if clash := {"rho", "adaptive"} & self.base_optimizer.defaults.keys():
            raise ConfigError(
                f"{type(self.base_optimizer).__name__} has settings of its own named {sorted(clash)}",
                fix="wrap an optimizer without them",
                key="base_optimizer",
            )
        self.defaults |= self.base_optimizer.defaults
        self._weights: dict[nn.Parameter, Tensor] = {}  # w, while the parameters hold w + e(w)
        self._share()

    @property
    def perturbed(self) -> bool:
        """Whether the parameters hold w + e(w)."""
        return bool(self._weights)

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """w <- w + e(w), from the gradients at w. Raises StateError when called twice."""
        if self.perturbed:
            raise _perturbed("first_step")
        norm = self._gradient_norm()
        for group in self.param_groups:
            scale = group["rho"] / (norm + EPSILON)
            for p in group["params"]:
                self._weights[p] = p.detach().clone()
                setattr(p, PERTURBED_FLAG, True)
                if p.grad is None:
                    continue
                direction = p.square() * p.grad if group["adaptive"] else p.grad
                p.add_(direction * scale.to(p.device))
        torch.clear_autocast_cache()  # it holds low-precision copies of w, which the second pass would use
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Back to w, then the base optimizer's step with the gradients of w + e(w). StateError without first_step."""
        if not self.perturbed:
            raise StateError("second_step without first_step", fix="call first_step before it", key="second_step")
        self.restore()
        self.base_step(zero_grad)

    @torch.no_grad()
    def base_step(self, zero_grad: bool = False) -> None:
        """The base optimizer's step with the gradients that are there: at rho 0 all there is to do.

        Raises StateError after first_step.
        """
        if self.perturbed:
            raise _perturbed("base_step")
        self.base_optimizer.step()
        self._opt_called = True  # schedulers look here for a step, and warn without
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Both steps. `closure` clears the gradients, computes the loss, calls backward and returns the loss.

        When gradients other than 0 are there already they are taken as those at w, and the closure runs only at
        w + e(w); else it runs twice. Gradients are cleared at the end. Returns the closure's first loss.
        BatchNorm statistics see every call of the closure; `sam_step` spares them the second pass.
        """
        if closure is None:
            raise StateError(
                "SAM.step has no closure",
                fix="give it one, or call first_step and second_step, or trainer.sam.sam_step",
                key="closure",
            )
        evaluate = torch.enable_grad()(closure)
        first = None
        gradients = (p.grad for group in self.param_groups for p in group["params"] if p.grad is not None)
        if not any(bool(g.any()) for g in gradients):
            first = evaluate()
        self.first_step(zero_grad=True)
        with self.restored_on_failure():
            second = evaluate()
        self.second_step(zero_grad=True)
        return second if first is None else first

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state and the param groups, rho included. StateError between the two steps."""
        if self.perturbed:
            raise _perturbed("state_dict")
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.perturbed:
            raise _perturbed("load_state_dict")
        for group in state_dict.get("param_groups", []):
            if missing := {"rho", "adaptive"} - group.keys():
                raise StateError(
                    f"not a state dict of SAM: its param groups lack {sorted(missing)}",
                    fix="load that of a SAM, not of its base optimizer",
                    key="param_groups",
                )
        self.base_optimizer.load_state_dict(state_dict)
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for any optimizer; the base optimizer sees the group too, since the list is shared."""
        rho = param_group.get("rho", self.defaults["rho"])
        if not 0 <= rho < float("inf"):
            raise ConfigError(f"rho is {rho}", fix="set it to a finite number from 0 up, such as 0.05", key="rho")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: torch's own leaves out what it does not know."""
        if self.perturbed:
            raise _perturbed("copying SAM")
        state: dict[str, Any] = super().__getstate__()
        return state | {"base_optimizer": self.base_optimizer, "_weights": {}}

    def _share(self) -> None:
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state

    @contextlib.contextmanager
    def restored_on_failure(self) -> Iterator[None]:
        """Whatever is raised inside leaves the parameters at w."""
        try:
            yield
        except BaseException:
            self.restore()
            raise

    @torch.no_grad()
    def restore(self) -> None:
        """Back to w without a step, such as after a failure at w + e(w)."""
        for p, w in self._weights.items():
            p.copy_(w)
            delattr(p, PERTURBED_FLAG)
        self._weights.clear()
        torch.clear_autocast_cache()

    def _gradient_norm(self) -> Tensor:
        scaled = [
            p.grad * p.abs() if group["adaptive"] else p.grad
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        if not scaled:
            raise StateError("SAM has no gradients", fix="call loss.backward() before first_step", key="params")
        device = scaled[0].device
        # At least float32: in float16 a norm can overflow and 1e-12 is 0.
        norms = [
            torch.linalg.vector_norm(g.detach(), dtype=torch.promote_types(g.dtype, torch.float32)).to(device)
            for g in scaled
        ]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm


def _perturbed(what: str) -> StateError:
    """Of a call that needs w."""
    return StateError(
        f"{what}: the parameters hold w + e(w), not w", fix="call second_step first, it returns to w", key=what
    )


def sam_step(
    model: nn.Module,
    optimizer: SAM,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    second_loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    *,
    sync_first: bool = False,
) -> Tensor:
    """One SAM step on one batch: two passes over the same inputs, running statistics from the first only.

    Where rho is 0 everywhere the second pass would only repeat the first, and is left out. For low precision use
    bfloat16 autocast; a GradScaler does not fit two passes.

    Args:
        loss_fn: (logits, y) -> scalar loss.
        second_loss_fn: of the pass at w + e(w), where it is another, such as one with weights v_i.
        sync_first: under DistributedDataParallel, average the gradients of the first pass too: one e(w) for all ranks,
            at the price of a second synchronisation; else each rank ascends by its own part of the batch, the paper's
            m-sharpness.

    Returns: the loss at w, detached.
    """
    optimizer.zero_grad()
    second_loss_fn = second_loss_fn or loss_fn
    if all(group["rho"] == 0 for group in optimizer.param_groups):
        loss = second_loss_fn(model(x), y)
        torch.autograd.backward(loss)
        optimizer.base_step(zero_grad=True)
        return loss.detach()
    with contextlib.nullcontext() if sync_first else getattr(model, "no_sync", contextlib.nullcontext)():
        loss = loss_fn(model(x), y)
        torch.autograd.backward(loss)
    optimizer.first_step(zero_grad=True)
    with optimizer.restored_on_failure(), running_statistics_kept(model):
        torch.autograd.backward(second_loss_fn(model(x), y))
    optimizer.second_step(zero_grad=True)
    return loss.detach()


@contextlib.contextmanager
def running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Batch and instance norms in train mode normalise by the batch as before, and touch no running statistics."""
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    kept = [(m.running_mean, m.running_var) for m in norms]
    for m in norms:
        m.track_running_stats = False
        m.running_mean = m.running_var = None
    try:
        yield
    finally:
        for m, (mean, var) in zip(norms, kept, strict=True):
            m.track_running_stats, m.running_mean, m.running_var = True, mean, var
