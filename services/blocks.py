"""Blocks and their leases: which part of the data is scored next, and by whom. No clock, no threads, no I/O."""

import dataclasses
import itertools
import math
import secrets
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from shared.errors import ConfigError
from shared.leases import Lease


@dataclasses.dataclass
class _Held:
    block: int
    scorer_id: str
    deadline: float  # of the caller's clock; infinite once the rows are in and only wait for their commit


class BlockTable:
    """Blocks of a fixed random permutation of the sample ids, each with the model_version of its last committed scores.

    Data sets are often sorted by class; a block of the permutation is a random sample of all classes, so that
    percentiles within one model_version mean something.

    Args:
        num_samples: N.
        block_size: samples per block; the last may be smaller.
        seed: of the permutation.
    """

    def __init__(self, num_samples: int, block_size: int, seed: int = 0) -> None:
        for name, size in (("num_samples", num_samples), ("block_size", block_size)):
            if size < 1:
                raise ConfigError(f"{name} is {size}, less than 1", fix="set it to 1 or more", key=name)
        self._order = np.random.default_rng(seed).permutation(num_samples)
        self._block_size = block_size
        self._block_of = np.empty(num_samples, dtype=np.int64)  # of each sample
        self._block_of[self._order] = np.arange(num_samples) // block_size
        self._version_of = np.zeros(math.ceil(num_samples / block_size), dtype=np.int64)
        self._held: dict[int, _Held] = {}
        self._busy: set[int] = set()
        # A scorer may hand in a lease that an earlier life of the controller gave it: ids of two lives never meet.
        self._lease_ids = itertools.count(secrets.randbits(62))
        self.expired = 0

    def __len__(self) -> int:
        return len(self._version_of)

    @property
    def oldest_version(self) -> int:
        """The lowest model_version among the blocks; 0 while one is unscored."""
        return int(self._version_of.min())

    @property
    def leased(self) -> int:
        return len(self._held)

    def ids(self, block: int) -> npt.NDArray[np.int64]:
        start = block * self._block_size
        return self._order[start : start + self._block_size]

    def restore(self, model_version_N: npt.NDArray[np.int64]) -> None:
        """Take over what a store holds: a block is as old as its oldest sample (unscored, -1, counts as 0)."""
        for block in range(len(self)):
            self._version_of[block] = max(int(model_version_N[self.ids(block)].min()), 0)

    def lease(self, scorer_id: str, model_version: int, now: float, timeout_s: float) -> Lease | None:
        """The free block scored longest ago, if that was before `model_version`; ties in order of block."""
        self._expire(now)
        if len(self._busy) == len(self):
            return None
        versions = self._version_of.copy()
        versions[list(self._busy)] = np.iinfo(np.int64).max
        block = int(versions.argmin())
        if versions[block] >= model_version:
            return None
        lease = Lease(next(self._lease_ids), block, self.ids(block))
        self._held[lease.lease_id] = _Held(block, scorer_id, now + timeout_s)
        self._busy.add(block)
        return lease

    def submitted(self, lease_id: int, block: int, scorer_id: str) -> None:
        """The rows of a whole block are in: until their commit nobody need score it, whatever became of the lease."""
        if lease_id in self._held or block not in self._busy:
            self._held[lease_id] = _Held(block, scorer_id, math.inf)
            self._busy.add(block)

    def committed(self, leases: Iterable[tuple[int, int, int]]) -> None:
        """Rows of (lease_id, block, model_version) became durable: the blocks are as new as these, the leases done."""
        for lease_id, block, version in leases:
            self._version_of[block] = max(self._version_of[block], version)
            self._drop(lease_id)

    def release(self, scorer_id: str) -> int:
        """Hand back a scorer's leases whose rows are not in; returns how many."""
        ids = [i for i, held in self._held.items() if held.scorer_id == scorer_id and held.deadline < math.inf]
        for lease_id in ids:
            self._drop(lease_id)
        return len(ids)

    def block_of(self, sample_ids: npt.NDArray[np.int64]) -> int | None:
        """The block that consists of these samples; None when they are not a whole block."""
        first = int(sample_ids[0]) if len(sample_ids) else -1
        block = int(self._block_of[first]) if 0 <= first < len(self._block_of) else -1
        if block < 0:
            return None
        ids = self.ids(block)  # the order in which a lease gives them, and scorers hand them in
        whole = np.array_equal(ids, sample_ids) or np.array_equal(np.sort(ids), np.sort(sample_ids))
        return block if whole else None

    def _expire(self, now: float) -> None:
        for lease_id in [i for i, held in self._held.items() if held.deadline < now]:
            self._drop(lease_id)
            self.expired += 1

    def _drop(self, lease_id: int) -> None:
        if held := self._held.pop(lease_id, None):
            self._busy.discard(held.block)
