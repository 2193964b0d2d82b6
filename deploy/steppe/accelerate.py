"""steppe under Accelerate: for the loader that `accelerator.prepare` made of a DataLoader with a CurriculumSampler.

Accelerate runs the whole sampler at each rank and takes every so manieth batch: make it with `is_sharded=False`.
"""

from collections.abc import Iterator
from typing import Any

from shared.errors import ConfigError
from trainer.sampler import CurriculumSampler


class Curriculum:
    """Iterates over a prepared loader, and is saved and restored by `accelerator.save_state` and `load_state`.

        curriculum = Curriculum(accelerator, sampler)
        while sampler.epoch < epochs:
            for batch in curriculum.batches(loader):
                ...

    Raises: ConfigError for a sampler that is sharded over several ranks.
    """

    def __init__(self, accelerator: Any, sampler: CurriculumSampler) -> None:
        if sampler.dealt_to > 1:
            raise ConfigError(
                f"the sampler is sharded over {sampler.dealt_to} ranks, but Accelerate deals draws out itself",
                fix="make it with is_sharded=False",
                key="sampler",
            )
        self._sampler = sampler
        self._consumed: int | None = None  # draws of the epoch at hand, all ranks' together
        accelerator.register_for_checkpointing(self)

    def batches(self, loader: Any) -> Iterator[Any]:
        """The batches of this rank in the rest of the sampler's epoch."""
        loader.set_epoch(self._sampler.epoch)
        self._consumed = self._sampler.position
        for batch in loader:
            self._consumed = min(self._consumed + loader.total_batch_size, self._sampler.num_samples)
            yield batch
        self._consumed = None

    def state_dict(self) -> dict[str, Any]:
        """The sampler's, as of the last batch that was handed out."""
        return self._sampler.state_dict(self._consumed)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sampler.load_state_dict(state)
        self._consumed = None
