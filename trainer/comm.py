"""The ranks of one training, and what they say to each other besides gradients."""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shared.errors import ConfigError
from trainer.batchnorm import synchronised


class Comm(Protocol):
    """One rank's line to the others, so that the same loop trains alone, under Ray Train and under torchrun.

    All ranks make the same calls in the same order, and each call waits for all of them. Tensors are on the CPU.
    """

    rank: int
    world_size: int

    def parallel(self, model: nn.Module) -> nn.Module:
        """`model`, beginning with rank 0's weights, whose backward pass averages the gradients over the ranks."""
        ...

    def broadcast(self, tensor: Tensor) -> Tensor:
        """`tensor`, filled with rank 0's; it has the same shape everywhere."""
        ...

    def highest(self, value: int) -> int:
        """The highest of all ranks' values."""
        ...

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of all ranks' tensors."""
        ...

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """All ranks' tensors, in the order of the ranks; they have one shape."""
        ...


class Alone:
    """A training of one process."""

    rank, world_size = 0, 1

    def parallel(self, model: nn.Module) -> nn.Module:
        return model

    def broadcast(self, tensor: Tensor) -> Tensor:
        return tensor

    def highest(self, value: int) -> int:
        return value

    def total(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]


ALONE = Alone()


class Ranks:
    """The ranks of torch.distributed's default process group, which must be there.

    Gradients go by its backend, everything else by gloo, so that indices and flags do not wait for a GPU.

    Args:
        sync_batchnorm: BatchNorm sees the whole batch, as with one rank; else each rank's part.

    Raises: ConfigError without a process group.
    """

    def __init__(self, *, sync_batchnorm: bool = True) -> None:
        if not dist.is_initialized():
            raise ConfigError("there is no process group", fix="call torch.distributed.init_process_group() first")
        self._sync_batchnorm = sync_batchnorm
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._group: dist.ProcessGroup | None = None
        if dist.get_backend() != "gloo" and isinstance(beside := dist.new_group(backend="gloo"), dist.ProcessGroup):
            self._group = beside

    def parallel(self, model: nn.Module) -> nn.Module:
        return DistributedDataParallel(synchronised(model, self._group) if self._sync_batchnorm else model)

    def broadcast(self, tensor: Tensor) -> Tensor:
        dist.broadcast(tensor, src=0, group=self._group)
        return tensor

    def highest(self, value: int) -> int:
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)
        return int(tensor)

    def total(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, group=self._group)
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        tensors = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(tensors, tensor, group=self._group)
        return tensors
