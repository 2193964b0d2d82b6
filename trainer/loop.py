"""The training loop: SAM over the curriculum's draws, publishing checkpoints as it goes.

It reads scores through the sampler and writes checkpoints through the publisher; it waits for neither.
"""

import dataclasses
import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.utils.data import BatchSampler

from shared.checkpoints import CheckpointPublisher
from shared.datasets import Dataset, Images
from shared.errors import ConfigError
from trainer.config import TrainConfig
from trainer.curriculum import find_policy
from trainer.feed import Scores
from trainer.sam import SAM, sam_step
from trainer.sampler import CurriculumSampler

EVALUATION_BATCH = 1024
NEWS_INTERVAL_S = 0.2


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where the training is. `loss` is the mean since the last news, `accuracy` the last evaluation's."""

    step: int
    steps: int
    epoch: int
    loss: float
    accuracy: float | None


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What came of it. Seconds are the trainer's wall clock: in all, in `publish`, in planning draws."""

    steps: int
    test_accuracy: float
    seconds: float
    seconds_in_publish: float
    seconds_in_sampler: float
    sampler: CurriculumSampler


def train(
    config: TrainConfig,
    model: nn.Module,
    dataset: Dataset,
    publisher: CheckpointPublisher,
    scores: Scores,
    on_progress: Callable[[Progress], None],
    stopped: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Train `model` on `dataset` to the end of its epochs, or until `stopped`, and evaluate it on the test split.

    The first checkpoint is published after `warmup_steps`, then every `publish_every_steps`, and the last at the end.
    """
    device = pick_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    num_samples = len(dataset.train)
    if num_samples % config.batch_size == 1:
        raise ConfigError(
            f"train.batch_size {config.batch_size} leaves one of {num_samples} samples for the last batch, where "
            "BatchNorm has no variance; choose another"
        )
    steps = config.epochs * math.ceil(num_samples / config.batch_size)
    sampler = _build_sampler(config, num_samples, scores)
    batches = BatchSampler(sampler, config.batch_size, drop_last=False)
    model.to(device).train()
    optimizer = _build_optimizer(config, model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    loss_fn = nn.CrossEntropyLoss()

    began = last_news = time.perf_counter()
    step, epoch, published = 0, 0, -1
    loss, accuracy = math.nan, None
    losses: list[torch.Tensor] = []
    for epoch in range(config.epochs):
        for ids in batches:
            if stopped():
                break
            x_BCHW, y_B = (part.to(device) for part in dataset.train.batch(ids))
            losses.append(sam_step(model, optimizer, loss_fn, x_BCHW, y_B))
            schedule.step()
            step += 1
            if step == config.warmup_steps or (
                step > config.warmup_steps and (step - config.warmup_steps) % config.publish_every_steps == 0
            ):
                publisher.publish(model, step)
                published = step
            if time.perf_counter() - last_news > NEWS_INTERVAL_S:
                last_news = time.perf_counter()
                loss = float(torch.stack(losses).mean())
                losses.clear()
                on_progress(Progress(step, steps, epoch, loss, accuracy))
        if stopped():
            break
        accuracy = evaluate(model, dataset.test, device)
    if step != published:
        publisher.publish(model, step)
    final = evaluate(model, dataset.test, device) if accuracy is None or stopped() else accuracy
    on_progress(Progress(step, steps, epoch, float(torch.stack(losses).mean()) if losses else loss, final))
    seconds = time.perf_counter() - began
    return TrainResult(step, final, seconds, publisher.seconds, sampler.seconds, sampler)


@torch.no_grad()
def evaluate(model: nn.Module, images: Images, device: torch.device) -> float:
    """Accuracy on `images`, in eval mode; the model is in train mode afterwards."""
    model.eval()
    right = 0
    for start in range(0, len(images), EVALUATION_BATCH):
        x_BCHW, y_B = images.batch(np.arange(start, min(start + EVALUATION_BATCH, len(images))))
        right += int((model(x_BCHW.to(device)).argmax(1).cpu() == y_B).sum())
    model.train()
    return right / len(images)


def pick_device(name: str) -> torch.device:
    """`auto` is the last GPU, since Ray gives scorers the first ones, else the CPU. ConfigError for one not here."""
    if name == "auto":
        return torch.device("cuda", torch.cuda.device_count() - 1) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"train.device is {name!r}: {str(error).splitlines()[0]}; use auto, cpu or cuda:0") from error
    return device


def _build_sampler(config: TrainConfig, num_samples: int, scores: Scores) -> CurriculumSampler:
    curriculum = config.curriculum
    return CurriculumSampler(
        num_samples,
        scores,
        find_policy(curriculum.name, strength=curriculum.strength, fade_until=curriculum.fade_until),
        config.seed,
        epochs=config.epochs,
        windows_per_epoch=curriculum.windows_per_epoch,
        lookahead_versions=_lookahead(config, num_samples),
    )


def _build_optimizer(config: TrainConfig, model: nn.Module) -> SAM:
    return SAM(
        model.parameters(),
        torch.optim.SGD,
        rho=config.sam.rho,
        adaptive=config.sam.adaptive,
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )


def _lookahead(config: TrainConfig, num_samples: int) -> int:
    """How many versions may be published while one window is used."""
    window_steps = math.ceil(num_samples / config.curriculum.windows_per_epoch / config.batch_size) + 1
    return math.ceil(window_steps / config.publish_every_steps)
