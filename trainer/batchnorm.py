"""BatchNorm over the whole batch of a training with several ranks, as one rank would compute it."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def synchronised(model: nn.Module, group: dist.ProcessGroup | None) -> nn.Module:
    """`model` with its BatchNorms over all ranks; parameters, buffers and their names stay as they are.

    On GPUs torch's own SyncBatchNorm, by the default process group; it knows no CPU, where `group` is asked.
    """
    if any(parameter.is_cuda for parameter in model.parameters()):
        convert: Any = nn.SyncBatchNorm.convert_sync_batchnorm
        converted: nn.Module = convert(model)
        return converted
    for name, child in list(model.named_children()):
        setattr(model, name, synchronised(child, group))
    return BatchNormOfRanks(model, group) if isinstance(model, _BatchNorm) else model


class BatchNormOfRanks(_BatchNorm):
    """`norm`, whose mean and variance while training are those of all ranks' inputs together (B..., C, ...)."""

    def __init__(self, norm: _BatchNorm, group: dist.ProcessGroup | None) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self._parameters, self._buffers = norm._parameters, norm._buffers
        self._group = group
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            evaluated: Tensor = super().forward(x)
            return evaluated
        dims = [dim for dim in range(x.dim()) if dim != 1]
        variance_C, mean_C = torch.var_mean(x, dims, correction=0)
        count = x.new_full((1,), x.numel() / self.num_features, dtype=torch.float64)
        mean_C, variance_C = mean_C.double(), variance_C.double()
        sums = torch.cat([count, count * mean_C, count * (variance_C + mean_C.square())])
        total: Tensor = _Sum.apply(sums, self._group)
        count, mean_C, squares_C = torch.split(total, [1, self.num_features, self.num_features])
        mean_C, squares_C = mean_C / count, squares_C / count
        variance_C = squares_C - mean_C.square()
        self._remember(mean_C.detach(), variance_C.detach() * (count / (count - 1).clamp_min(1)))
        shape = [1, -1] + [1] * (x.dim() - 2)
        scale_C = (variance_C + self.eps).rsqrt().to(x.dtype)
        scale_C = scale_C if self.weight is None else scale_C * self.weight
        y: Tensor = (x - mean_C.to(x.dtype).view(shape)) * scale_C.view(shape)
        return y if self.bias is None else y + self.bias.view(shape)

    @torch.no_grad()
    def _remember(self, mean_C: Tensor, variance_C: Tensor) -> None:
        """Running statistics, where they are kept: the variance unbiased, as torch's own BatchNorm does."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        for running_C, new_C in ((self.running_mean, mean_C), (self.running_var, variance_C)):
            running_C.lerp_(new_C.to(running_C.dtype), momentum)

    def _check_input_dim(self, x: Tensor) -> None: ...


class _Sum(torch.autograd.Function):
    """The sum over the ranks; so is its gradient's."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
