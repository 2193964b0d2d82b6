"""steppe in Hugging Face's Trainer: `CurriculumTrainer` in place of `Trainer`, with a `steppe.CurriculumSampler`."""

import math
import os
from typing import Any

import torch
import transformers
from transformers.trainer_utils import get_last_checkpoint

from shared.checkpoints import CheckpointPublisher
from shared.errors import ConfigError
from trainer.sampler import CurriculumSampler

STATE_FILE = "curriculum.pt"  # in each of the Trainer's checkpoints


class CurriculumTrainer(transformers.Trainer):
    """A Trainer whose batches are the sampler's draws, also after `train(resume_from_checkpoint=...)`.

    Args:
        sampler: of all ranks (`is_sharded=False`): the Trainer deals the batches out itself.
        publisher: publishes the weights every `publish_every_steps` optimizer steps, at rank 0.

    Raises: ConfigError for a sampler that is sharded over several ranks.
    """

    def __init__(
        self,
        *args: Any,
        sampler: CurriculumSampler,
        publisher: CheckpointPublisher | None = None,
        publish_every_steps: int = 20,
        **kwargs: Any,
    ) -> None:
        if sampler.dealt_to > 1:
            raise ConfigError(
                f"the sampler is sharded over {sampler.dealt_to} ranks, and the Trainer would deal its draws out again",
                fix="make it with is_sharded=False",
                key="sampler",
            )
        self._sampler = sampler
        super().__init__(*args, **kwargs)
        self.add_callback(_Follow(sampler, publisher, publish_every_steps))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's. Raises ConfigError for a checkpoint that was not made by a CurriculumTrainer."""
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)  # type: ignore[no-untyped-call]
        if folder:
            path = os.path.join(str(folder), STATE_FILE)
            if not os.path.exists(path):
                raise ConfigError(
                    f"{path} is missing: that checkpoint is not of a CurriculumTrainer", fix="begin anew", key=path
                )
            self._sampler.load_state_dict(torch.load(path, weights_only=True))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> CurriculumSampler:
        return self._sampler


class _Follow(transformers.TrainerCallback):
    """Publishes, and saves where the sampler is: in mid-epoch as it began, since the Trainer passes over batches."""

    def __init__(self, sampler: CurriculumSampler, publisher: CheckpointPublisher | None, every_steps: int) -> None:
        self._sampler, self._publisher, self._every_steps = sampler, publisher, every_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._publisher is not None and state.is_world_process_zero and state.global_step % self._every_steps == 0:
            self._publisher.publish(kwargs["model"], state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        batches = self._sampler.num_samples / (args.train_batch_size * args.world_size)
        whole_batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
        is_between_epochs = state.global_step % math.ceil(whole_batches / args.gradient_accumulation_steps) == 0
        content = self._sampler.state_dict() if is_between_epochs else self._sampler.state_dict(consumed=0)
        torch.save(content, os.path.join(args.output_dir, f"checkpoint-{state.global_step}", STATE_FILE))
