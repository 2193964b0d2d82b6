"""The training loop: SAM over the curriculum's draws, publishing checkpoints as it goes.

It reads scores through the sampler and writes checkpoints through the publisher; it waits for neither. With several
ranks every one of them runs this loop on its part of each batch; rank 0 alone reads scores, publishes, saves and tells.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import BatchSampler

from shared.checkpoints import CheckpointPublisher
from shared.datasets import Dataset
from shared.errors import ConfigError, StateError, TrainingDiverged
from shared.models import logits, place
from shared.samples import Samples
from trainer.augment import augment
from trainer.comm import ALONE, Comm
from trainer.config import TrainConfig, check_batch
from trainer.curriculum import Curriculum
from trainer.draws import DrawLog, Recorded
from trainer.feed import Scores
from trainer.sam import SAM, sam_step
from trainer.sampler import CurriculumSampler, DrawCounts
from trainer.state import SavedState, StateSaver

LossFn = Callable[[Any, Tensor], Tensor]

EVALUATION_BATCH = 1024
NEWS_INTERVAL_S = 0.2
GO, STOP, DIVERGED = range(3)  # what the ranks agree on after each step: the highest counts


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where the training is. `loss` is rank 0's mean since the last news, `accuracy` the last evaluation's.

    `evaluated`: an epoch has just ended, and `accuracy` and `loss`, the mean of all its draws, are its.
    """

    step: int
    steps: int
    epoch: int
    loss: float
    accuracy: float | None
    evaluated: bool = False


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What came of it; `finished` unless it was stopped before.

    Seconds are the trainer's wall clock: in all, in `publish`, in planning draws, in saving, in the epoch scorer.
    `forward_equivalents` is what the steps cost in forward passes of one sample, a backward pass being two: 6 per draw
    for SAM, 3 at rho 0. `test_accuracy` is None when it was stopped before the first evaluation, and
    without samples to evaluate on.
    """

    steps: int
    finished: bool
    test_accuracy: float | None
    forward_equivalents: int
    seconds: float
    seconds_in_publish: float
    seconds_in_sampler: float
    seconds_in_save: float
    seconds_in_scoring: float
    states_failed: int
    draws: DrawCounts


class EpochScorer(Protocol):
    """Scoring as a part of the training: the trainer waits for it, and its draws follow from the seed alone."""

    def rescore(self, model: nn.Module, step: int) -> None:
        """Publish the weights and score all samples with them."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def train(
    config: TrainConfig,
    comm: Comm,
    model: nn.Module,
    dataset: Dataset,
    publisher: CheckpointPublisher | None,
    scores: Scores,
    on_progress: Callable[[Progress], None],
    stopped: Callable[[], bool] = lambda: False,
    *,
    epoch_scorer: EpochScorer | None = None,
    saver: StateSaver | None = None,
    resumed: SavedState | None = None,
    draw_log: DrawLog | None = None,
    recorded: Recorded | None = None,
) -> TrainResult:
    """Train `model` on `dataset`, as it is for training, and evaluate it on the test split; or until `stopped`.

    The first checkpoint is published after `warmup_steps`, then every `publish_every_steps`, and the last at the end.
    What ends the training at one rank, `stopped` or a loss that is not finite, ends it at all.

    Args:
        comm: the ranks; `train.batch_size` is that of all of them together.
        publisher: rank 0's; None at the others.
        scores: where rank 0 finds them; `trainer.feed.NoScores` at the others.
        epoch_scorer: scores at the beginning of each epoch but the first; then only it and the end publish.
        saver: is given the state as `TrainConfig` says; rank 0's.
        resumed: the state to go on from, of a run with the same settings; its weights are published already.
        draw_log: is told of what is drawn; rank 0's.
        recorded: draws of another run to train on again; rank 0's.

    Raises: TrainingDiverged when the loss is not finite, ConfigError for settings that cannot work.
    """
    sampler = _build_sampler(
        config, dataset.train, scores, comm, draw_log, recorded, ages_within_windows=epoch_scorer is None
    )
    training = _Training(config, comm, model, dataset, publisher, sampler, epoch_scorer, saver)
    if resumed is not None:
        training.load_state_dict(resumed.content)
    batches = BatchSampler(sampler, config.batch_size // comm.world_size, drop_last=False)
    began = last_news = time.perf_counter()

    def tell(progress: Progress) -> None:
        if not training.has_diverged:
            on_progress(progress)

    halted = training.halted(stopped)
    while sampler.epoch < config.epochs and not halted:
        epoch = sampler.epoch
        if epoch > 0 and sampler.position == 0:
            training.rescore()
            if training.halted(stopped):
                break  # perhaps in the middle of it
        for ids in batches:
            training.advance(ids)
            if time.perf_counter() - last_news > NEWS_INTERVAL_S:
                last_news = time.perf_counter()
                tell(training.progress(epoch))
            if halted := training.halted(stopped):
                break
        if sampler.epoch > epoch and not halted:
            due = sampler.epoch % config.evaluate_every_epochs == 0 or sampler.epoch == config.epochs
            evaluated = due and training.evaluate(stopped)
            tell(training.epoch_progress(epoch, evaluated=evaluated))
            halted = training.halted(stopped)
            training.save_if_due()
    training.save_last()
    training.finish(stopped)
    tell(training.progress(sampler.epoch if sampler.position else max(sampler.epoch - 1, 0)))
    training.halted(stopped)
    return TrainResult(
        steps=training.step,
        finished=training.is_finished,
        test_accuracy=training.accuracy,
        forward_equivalents=(sampler.epoch * sampler.num_samples + sampler.position) * (6 if config.sam.rho else 3),
        seconds=time.perf_counter() - began,
        seconds_in_publish=publisher.seconds if publisher is not None else 0.0,
        seconds_in_sampler=sampler.seconds,
        seconds_in_save=training.seconds_in_save,
        seconds_in_scoring=training.seconds_in_scoring,
        states_failed=saver.failed if saver is not None else 0,
        draws=sampler.draws,
    )


class _Training:
    """Model, optimizer, schedule and sampler on their way through the steps, and how they are saved."""

    def __init__(
        self,
        config: TrainConfig,
        comm: Comm,
        model: nn.Module,
        dataset: Dataset,
        publisher: CheckpointPublisher | None,
        sampler: CurriculumSampler,
        epoch_scorer: EpochScorer | None,
        saver: StateSaver | None,
    ) -> None:
        num_samples = len(dataset.train)
        check_batch(config.batch_size, num_samples, comm.world_size)
        self.device = pick_device(config.device)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.model = place(model, self.device).train()
        self._parallel = comm.parallel(self.model)
        if comm.rank:
            torch.manual_seed(config.seed + comm.rank)
        self.steps = config.epochs * math.ceil(num_samples / config.batch_size)
        self.step = 0
        self.accuracy: float | None = None
        self.sampler = sampler
        self.has_diverged = False  # by the losses of this rank
        self._config, self._comm = config, comm
        self._train, self._test = dataset.train, dataset.test
        self._publisher = publisher
        self._epoch_scorer = epoch_scorer
        self._saver = saver
        self._last_save = time.perf_counter()
        self.seconds_in_save = self.seconds_in_scoring = 0.0
        self._optimizer = build_optimizer(config, model)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, T_max=self.steps)
        self._losses: list[torch.Tensor] = []  # since the last news
        self._epoch_loss = torch.zeros(2, dtype=torch.float64, device=self.device)  # of this rank: sum, draws
        self._loss = math.nan
        self._published_step = self._evaluated_step = -1

    def rescore(self) -> None:
        """Have the epoch scorer, where there is one, score all samples."""
        if self._epoch_scorer is not None:
            began = time.perf_counter()
            self._epoch_scorer.rescore(self.model, self.step)
            self.seconds_in_scoring += time.perf_counter() - began

    def advance(self, ids: list[int]) -> None:
        """One step, and the checkpoint and the state that are due after it. `ids` are this rank's of the batch."""
        x_BCHW, y_B = (part.to(self.device) for part in self._train.batch(ids))
        x_BCHW = augment(x_BCHW, self._config.augment)
        share = self._comm.world_size * len(ids) / self._batch_draws()
        first, second = self._loss_fns(ids, share)
        sync_first = self._config.sam.sync_first
        loss = sam_step(self._parallel, self._optimizer, first, x_BCHW, y_B, second, sync_first=sync_first) / share
        self._losses.append(loss)
        self._epoch_loss += torch.stack([loss * len(ids), torch.full_like(loss, len(ids))])
        self._schedule.step()
        self.step += 1
        since_first = self.step - self._config.warmup_steps
        if self._epoch_scorer is None and since_first >= 0 and since_first % self._config.publish_every_steps == 0:
            self._publish()
        if self._config.save_every_steps and self.step % self._config.save_every_steps == 0:
            self._save()

    def halted(self, stopped: Callable[[], bool]) -> bool:
        """Whether any rank is to stop here. Raises TrainingDiverged, at all of them, when one's loss is not finite."""
        wish = self._comm.highest(DIVERGED if self.has_diverged else STOP if stopped() else GO)
        if wish == DIVERGED:
            raise TrainingDiverged(
                f"the loss is not finite at step {self.step}",
                fix=f"lower train.learning_rate ({self._config.learning_rate:g}) or train.sam.rho "
                f"({self._config.sam.rho:g})",
                key="train.learning_rate",
            )
        return wish == STOP

    def save_if_due(self) -> None:
        """At the end of an epoch: save the state when rank 0's last one is `save_interval_s` old."""
        if self._comm.highest(
            self._saver is not None and time.perf_counter() - self._last_save >= self._config.save_interval_s
        ):
            self._save()

    def save_last(self) -> None:
        state = self.state()
        if self._saver is not None and state is not None:
            self._saver.close(state)

    def progress(self, epoch: int) -> Progress:
        """Where this rank is, with the loss since the last one; notes when that was not finite."""
        if self._losses:
            self._loss = float(torch.stack(self._losses).mean())
            self._losses.clear()
            self.has_diverged = self.has_diverged or not math.isfinite(self._loss)
        return Progress(self.step, self.steps, epoch, self._loss, self.accuracy)

    def epoch_progress(self, epoch: int, *, evaluated: bool) -> Progress:
        """Where all ranks are at the end of `epoch`, with its mean loss."""
        last = self.progress(epoch)
        loss, draws = self._comm.total(self._epoch_loss.cpu()).tolist()
        self._epoch_loss.zero_()
        return dataclasses.replace(last, loss=loss / draws, evaluated=evaluated)

    def evaluate(self, stopped: Callable[[], bool]) -> bool:
        """Whether it is done; not when `stopped` on the way. Without samples to evaluate on there is no accuracy."""
        if len(self._test):
            accuracy = evaluate(self.model, self._test, self.device, stopped, self._comm)
            if accuracy is None:
                return False
            self.accuracy = accuracy
        self._evaluated_step = self.step
        return True

    @property
    def is_finished(self) -> bool:
        """All steps are done and the result is known."""
        return self.step == self.steps and self._evaluated_step == self.step

    def finish(self, stopped: Callable[[], bool]) -> None:
        """The last checkpoint and, unless stopped, the last accuracy, where they are not there already."""
        if self.step != self._published_step:
            self._publish()
        if self._evaluated_step != self.step:
            self.evaluate(stopped)

    def state(self) -> SavedState | None:
        """At rank 0; the others give it their random numbers."""
        on_gpu = self.device.type == "cuda"
        rng = self._comm.gather(torch.get_rng_state())
        device_rng = self._comm.gather(torch.cuda.get_rng_state(self.device)) if on_gpu else None
        if self._publisher is None:
            return None
        content = self._state_dict() | {"rng": rng, "device_rng": device_rng}
        return SavedState(self.step, self._publisher.newest_version, content)

    def _state_dict(self) -> dict[str, Any]:
        """What else decides the coming steps, but the samples and, where they come from outside, the scores."""
        return {
            "step": self.step,
            "accuracy": self.accuracy,
            "evaluated_step": self._evaluated_step,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "sampler": self.sampler.state_dict(),
            "epoch_scorer": self._epoch_scorer.state_dict() if self._epoch_scorer else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises StateError for unknown or missing fields, by name."""
        if unlike := sorted(state.keys() ^ (self._state_dict().keys() | {"rng", "device_rng"})):
            raise StateError(
                f"not a state of this training: the fields {unlike} are unknown or missing",
                fix="resume with the version of steppe that saved it",
                key=unlike[0],
            )
        self.step, self.accuracy, self._evaluated_step = state["step"], state["accuracy"], state["evaluated_step"]
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self.sampler.load_state_dict(state["sampler"])
        if (self._epoch_scorer is None) != (state["epoch_scorer"] is None):
            raise StateError(
                "the state was saved under another scoring.mode", fix="resume with the same", key="scoring.mode"
            )
        if self._epoch_scorer is not None:
            self._epoch_scorer.load_state_dict(state["epoch_scorer"])
        else:
            self._published_step = self.step
        rank = self._comm.rank
        if rank < len(state["rng"]):  # else a worker more than there were, with random numbers of its own
            torch.set_rng_state(state["rng"][rank])
        if state["device_rng"] is not None and self.device.type == "cuda" and rank < len(state["device_rng"]):
            torch.cuda.set_rng_state(state["device_rng"][rank], self.device)

    def _batch_draws(self) -> int:
        """Draws of the batch at hand, all ranks' together; the last one of an epoch may be smaller."""
        end = self.sampler.position or self.sampler.num_samples
        return (end - 1) % self._config.batch_size + 1

    def _loss_fns(self, ids: list[int], share: float) -> tuple[LossFn, LossFn]:
        """Of SAM's two passes over the samples `ids`: sum_i v_i l_i / B in the weighting form, else the mean.

        `share` is what the mean counts among the ranks, 1 on average, so that theirs is the mean of the whole batch.
        """
        weight_B = self.sampler.loss_weights(ids)

        def plain(output: Any, y_B: Tensor) -> Tensor:
            return F.cross_entropy(logits(output), y_B) * share

        if weight_B is None:
            return plain, plain
        v_B = torch.tensor(weight_B, dtype=torch.float32, device=self.device)

        def weighted(output: Any, y_B: Tensor) -> Tensor:
            return (v_B * F.cross_entropy(logits(output), y_B, reduction="none")).mean() * share

        return (plain if self._config.curriculum.passes == "second" else weighted), weighted

    def _save(self) -> None:
        began = time.perf_counter()
        state = self.state()
        if self._saver is not None and state is not None and self._saver.save(state):
            self._last_save = began
        self.seconds_in_save += time.perf_counter() - began

    def _publish(self) -> None:
        if self._publisher is not None:
            self._publisher.publish(self.model, self.step)
        self._published_step = self.step


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: Samples,
    device: torch.device,
    stopped: Callable[[], bool] = lambda: False,
    comm: Comm = ALONE,
) -> float | None:
    """Accuracy on `images`, in eval mode; None when `stopped` on the way. The model is in train mode afterwards.

    The ranks share the images, with rank 0's running statistics.
    """
    model.eval()
    if comm.world_size > 1:
        for buffer in model.buffers():
            buffer.copy_(comm.broadcast(buffer.cpu()))
    right = torch.zeros(1, dtype=torch.int64)
    for first in range(0, len(images), EVALUATION_BATCH * comm.world_size):
        if comm.highest(stopped()):
            model.train()
            return None
        start = first + EVALUATION_BATCH * comm.rank
        if ids := range(start, min(start + EVALUATION_BATCH, len(images))):
            x_BCHW, y_B = images.batch(np.asarray(ids))
            right += (logits(model(x_BCHW.to(device))).argmax(1).cpu() == y_B).sum()
    model.train()
    return int(comm.total(right)) / len(images)


def pick_device(name: str) -> torch.device:
    """`auto` is the last GPU, since Ray gives scorers the first ones, else the CPU. ConfigError for one not here."""
    if name == "auto":
        return torch.device("cuda", torch.cuda.device_count() - 1) if torch.cuda.is_available() else torch.device("cpu")
    fix = "use auto, cpu or cuda:0"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"train.device is {name!r}, which torch does not know", fix=fix, key="train.device"
        ) from error
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ConfigError(f"train.device is {name!r}: {reason}", fix=fix, key="train.device") from error
    return device


def _build_sampler(
    config: TrainConfig,
    train: Samples,
    scores: Scores,
    comm: Comm,
    draw_log: DrawLog | None,
    recorded: Recorded | None,
    *,
    ages_within_windows: bool,
) -> CurriculumSampler:
    curriculum = config.curriculum
    return CurriculumSampler(
        len(train),
        scores,
        Curriculum(curriculum, seed=config.seed, num_classes=train.num_classes),
        config.seed,
        epochs=config.epochs,
        windows_per_epoch=curriculum.windows_per_epoch,
        lookahead_versions=_lookahead(config, len(train)) if ages_within_windows else 0,
        form=curriculum.form,
        comm=comm,
        recorder=draw_log,
        recorded=recorded,
    )


def build_optimizer(config: TrainConfig, model: nn.Module) -> SAM:
    """SAM over SGD with momentum, as `config` says."""
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
