"""steppe in Lightning: `Trainer(use_distributed_sampler=False, callbacks=[PublishCheckpoints(publisher)])`, with a
`steppe.CurriculumLoader` as the train loader. Lightning saves and restores the loader's state with its checkpoints."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch import nn

from shared.checkpoints import CheckpointPublisher


class PublishCheckpoints(pl.Callback):
    """Publishes the network's weights every so many optimizer steps, at rank 0.

    Args:
        publisher: rank 0's; None at the others will do.
        model: the network that scorers know, given the LightningModule; by default its attribute `model`.
    """

    def __init__(
        self,
        publisher: CheckpointPublisher | None,
        every_steps: int = 20,
        model: Callable[[Any], nn.Module] = lambda module: module.model,
    ) -> None:
        self._publisher, self._every_steps, self._model = publisher, every_steps, model
        self._published_step = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        is_due = step % self._every_steps == 0 and step != self._published_step  # not again while gradients accumulate
        if is_due and trainer.is_global_zero and self._publisher is not None:
            self._publisher.publish(self._model(pl_module), step)
        self._published_step = step if is_due else self._published_step
