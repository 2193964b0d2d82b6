"""A DataLoader over a curriculum sampler, whose state is that of the batches that were handed out, workers or not."""

import math
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from trainer.sampler import CurriculumSampler


class CurriculumLoader(DataLoader[Any]):
    """`DataLoader(dataset, batch_size, sampler=sampler, ...)` that can be stopped and gone on with in mid-epoch.

    A DataLoader with workers draws batches ahead; `state_dict` counts none of those that were not handed out. It is
    what Lightning, and whoever knows torchdata's StatefulDataLoader, asks for. Iterating goes through the rest of the
    sampler's epoch; `len` is the number of batches of a whole one.

    Args:
        batch_size: of one rank.
        sampler: sharded over the ranks, if there are several.
        kwargs: as for any DataLoader, but for `shuffle` and `batch_sampler`.
    """

    def __init__(self, dataset: Dataset[Any], batch_size: int, sampler: CurriculumSampler, **kwargs: Any) -> None:
        super().__init__(dataset, batch_size, sampler=sampler, **kwargs)
        self._sampler = sampler
        self._batch_draws = batch_size * sampler.dealt_to
        self._left_out = self._batch_draws if self.drop_last else 1  # fewer draws than that make no batch
        self._consumed: int | None = None  # draws of the epoch at hand, all ranks' together

    def __len__(self) -> int:
        draws = self._sampler.num_samples / self._sampler.dealt_to
        batches = draws / (self.batch_size or 1)
        return math.floor(batches) if self.drop_last else math.ceil(batches)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # its own is of a private type
        self._consumed = self._sampler.position
        for batch in super().__iter__():
            self._consumed += self._batch_draws
            yield batch
        self._consumed = None

    def state_dict(self) -> dict[str, Any]:
        """The sampler's, as of the last batch that was handed out."""
        if self._consumed is None:
            return self._sampler.state_dict()
        is_last = self._sampler.position == 0 and self._consumed + self._left_out > self._sampler.num_samples
        return self._sampler.state_dict(self._sampler.num_samples if is_last else self._consumed)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """For the next iteration. Raises StateError for a state of another sampler."""
        self._sampler.load_state_dict(state)
        self._consumed = None
