"""Ranks for tests: as threads, which only talk, and as processes of a real process group."""

import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.comm import Comm, Ranks

T = TypeVar("T")
TIMEOUT_S = 120.0


class _Thread:
    """One of several ranks in this process; gradients are not averaged."""

    def __init__(self, rank: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world_size = rank, len(slots)
        self._slots, self._barrier = slots, barrier

    def _exchange(self, value: T) -> list[T]:
        self._slots[self.rank] = value
        self._barrier.wait(TIMEOUT_S)
        values = list(self._slots)
        self._barrier.wait(TIMEOUT_S)
        return values

    def parallel(self, model: nn.Module) -> nn.Module:
        return model

    def broadcast(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(self._exchange(tensor.clone())[0])

    def highest(self, value: int) -> int:
        return max(self._exchange(value))

    def total(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._exchange(tensor)).sum(0)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        return self._exchange(tensor)


def in_threads(world_size: int, work: Callable[[Comm], T]) -> list[T]:
    """What `work` returns at each rank."""
    slots, barrier = [None] * world_size, threading.Barrier(world_size)
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(lambda rank: work(_Thread(rank, slots, barrier)), range(world_size)))


def in_processes(world_size: int, folder: Path, work: Callable[..., T], *args: Any) -> list[T]:
    """What `work(comm, *args)` returns at each rank of a gloo process group, which meets in a new file in `folder`."""
    meeting = folder / f"ranks-{len(list(folder.glob('ranks-*')))}"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ranks"])  # torch is imported once for all of them
    with ProcessPoolExecutor(world_size, mp_context=context) as pool:
        given = [(rank, world_size, meeting, work, args) for rank in range(world_size)]
        return list(pool.map(_as_rank, given, timeout=TIMEOUT_S))


def _as_rank(given: tuple[int, int, Path, Callable[..., T], tuple[Any, ...]]) -> T:
    rank, world_size, meeting, work, args = given
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size, timeout=timedelta(seconds=TIMEOUT_S)
    )
    try:
        return work(Ranks(), *args)
    finally:
        dist.destroy_process_group()
