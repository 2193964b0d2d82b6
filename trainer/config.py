"""Settings of the training."""

import functools
from typing import Literal

from pydantic import Field, field_validator, model_validator

from shared.config import Config
from shared.errors import ConfigError
from shared.measures import find_measure
from trainer.curriculum import find_curriculum


class SamConfig(Config):
    """Sharpness-aware minimisation; rho of the adaptive form (ASAM) is about ten times that of the plain one.

    With several workers each ascends by the gradient of its own part of the batch; with `sync_first` all by the same.
    """

    rho: float = Field(default=0.05, ge=0, allow_inf_nan=False)
    adaptive: bool = False
    sync_first: bool = False


class CurriculumConfig(Config):
    """Which samples count more, when, and how: `trainer.curriculum` has the formulas.

    `measure` and `order` (low, high or random first) put the samples in a row; `name` says what weight each place has:
    soft (`strength` b, held until `hold_until`, 0 from `fade_until` on), pacing (the first g(t) of all, by the function
    `pacing` from `start_share` to all at `full_at`), self_paced (losses below the quantile g(t), by `regulariser`), or
    uniform. These times are shares of the training after `begin_at`; before it all samples count alike.

    `guard` is for samples whose label is less likely than chance (or whose loss is above `guard_loss`): none, hardest,
    neutral, cap (never above 1) or aside (weight `guard_weight`, to the end). It sets in by the noise that the run
    sees: not while their share is below `guard_floor`, in full from twice that; 0 is always. It waits for `guard_from`.
    The uniform curriculum has none unless one is asked for.

    `form`: weights are chances of being drawn (sampling), or multiply the loss (weighting), there in both passes of SAM
    or in its second one only. `memory` averages percentiles over a sample's scorings.
    """

    name: str = "soft"
    measure: str = "adm"
    memory: float | None = Field(default=None, ge=0, lt=1)
    order: Literal["low", "high", "random"] = "low"
    strength: float = Field(default=0.5, ge=0, le=100)  # beyond, weights leave float64
    begin_at: float = Field(default=0.0, ge=0, lt=1)
    hold_until: float = Field(default=0.0, ge=0, le=1)
    fade_until: float = Field(default=0.7, gt=0, le=1)
    pacing: Literal["linear", "quadratic", "root", "step", "exponential", "logarithmic"] = "linear"
    start_share: float = Field(default=0.3, gt=0, le=1)
    full_at: float = Field(default=0.7, gt=0, le=1)
    regulariser: Literal["hard", "linear", "logistic"] = "linear"
    guard: Literal["none", "hardest", "neutral", "cap", "aside"] = "aside"
    guard_loss: float | None = Field(default=None, gt=0)
    guard_weight: float = Field(default=0.1, ge=0, le=1)
    guard_floor: float = Field(default=0.07, ge=0, le=1)
    guard_from: float = Field(default=0.2, ge=0, lt=1)
    form: Literal["sampling", "weighting"] = "sampling"
    passes: Literal["both", "second"] = "both"
    windows_per_epoch: int = Field(default=8, ge=1)
    refresh_interval_s: float = Field(default=0.5, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _uniform_is_uniform(cls, given: object) -> object:
        """Without a guard, unless one is asked for."""
        return {"guard": "none"} | given if isinstance(given, dict) and given.get("name") == "uniform" else given

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        find_curriculum(name)
        return name

    @field_validator("measure")
    @classmethod
    def _can_be_measured(cls, measure: str) -> str:
        find_measure(measure)
        return measure

    @model_validator(mode="after")
    def _fits_together(self) -> "CurriculumConfig":
        if self.hold_until > self.fade_until:
            raise ConfigError(
                f"train.curriculum.hold_until is {self.hold_until}, after fade_until, {self.fade_until}",
                fix="set it to that or less",
                key="train.curriculum.hold_until",
            )
        if self.name == "self_paced" and self.order != "low":
            raise ConfigError(
                f"train.curriculum.order is {self.order!r}, but self_paced goes by the loss, low first",
                fix='set order = "low", or name = "pacing"',
                key="train.curriculum.order",
            )
        if self.passes == "second" and self.form == "sampling":
            raise ConfigError(
                "train.curriculum.passes is 'second', which only weights of the loss can be",
                fix='set form = "weighting"',
                key="train.curriculum.passes",
            )
        return self


class TrainConfig(Config):
    """SGD with momentum under SAM, cosine learning rate. `threads` are torch's; None leaves them as they are.

    `augment` changes what is trained on, never what is scored: none, flip, crop or crop_flip. The accuracy is measured
    every `evaluate_every_epochs` and at the end.

    The state that `--resume` goes on from is saved at the end of an epoch, at most every `save_interval_s`, at the end
    of all, when interrupted, and every `save_every_steps` where set.
    """

    epochs: int = Field(default=30, ge=1, le=1_000_000)
    batch_size: int = Field(default=64, ge=2)
    learning_rate: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    seed: int = Field(default=0, ge=0, lt=2**63)
    device: str = "auto"
    threads: int | None = Field(default=None, ge=1)
    warmup_steps: int = Field(default=20, ge=1)
    publish_every_steps: int = Field(default=20, ge=1)
    keep_checkpoints: int = Field(default=4, ge=1)
    save_interval_s: float = Field(default=5.0, ge=0)
    save_every_steps: int | None = Field(default=None, ge=1)
    startup_wait_s: float = Field(default=60.0, ge=0)
    evaluate_every_epochs: int = Field(default=1, ge=1)
    augment: Literal["none", "flip", "crop", "crop_flip"] = "none"
    sam: SamConfig = SamConfig()
    curriculum: CurriculumConfig = CurriculumConfig()


class TrainerConfig(Config):
    """The trainer's processes: 0 workers are the driver's own process, without Ray Train; else Ray Train's.

    Each worker asks Ray for `cpus` and `gpus`; with GPUs they speak by NCCL, else by gloo. `train.batch_size` is that
    of all workers together. When one is lost, all begin again from the last saved state, up to `max_failures` times
    (-1: always); what is lost to an announced preemption does not count. BatchNorm sees the whole batch, unless
    `sync_batchnorm` is off.
    """

    num_workers: int = Field(default=0, ge=0, le=4096)
    cpus: float = Field(default=1, gt=0)
    gpus: float = Field(default=0, ge=0)
    max_failures: int = Field(default=3, ge=-1)
    sync_batchnorm: bool = True


def check_batch(batch_size: int, num_samples: int, world_size: int) -> None:
    """Raise ConfigError when `train.batch_size` does not fit so many samples and ranks."""
    misfit = functools.partial(ConfigError, key="train.batch_size")
    if batch_size > num_samples:
        raise misfit(
            f"train.batch_size is {batch_size}, but there are {num_samples} samples",
            fix=f"set it to {num_samples} or less",
        )
    if batch_size % world_size or batch_size < 2 * world_size:
        raise misfit(
            f"train.batch_size is {batch_size}, which {world_size} workers cannot share alike, 2 or more each",
            fix=f"set it to a multiple of {world_size} from {2 * world_size} up, or trainer.num_workers to another",
        )
    if (rest := num_samples % batch_size) == 1:
        raise misfit(
            f"train.batch_size {batch_size} leaves one of {num_samples} samples for the last batch, where BatchNorm "
            "has no variance",
            fix="choose another",
        )
    if 0 < rest < 2 * world_size:
        raise misfit(
            f"train.batch_size {batch_size} leaves {rest} of {num_samples} samples for the last batch, fewer than 2 "
            f"for each of {world_size} workers",
            fix="choose another",
        )
