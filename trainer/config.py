"""Settings of the training."""

from pydantic import Field, field_validator

from shared.config import Config
from trainer.curriculum import find_policy


class SamConfig(Config):
    """Sharpness-aware minimisation; rho of the adaptive form (ASAM) is about ten times that of the plain one."""

    rho: float = Field(default=0.05, ge=0, allow_inf_nan=False)
    adaptive: bool = False


class CurriculumConfig(Config):
    """Which samples are drawn more often. `strength` is b, `fade_until` the share of training at which it reaches 0."""

    name: str = "low_adm_first"
    strength: float = Field(default=1.0, ge=0, le=100)
    fade_until: float = Field(default=0.7, gt=0, le=1)
    windows_per_epoch: int = Field(default=8, ge=1)
    refresh_interval_s: float = Field(default=0.5, gt=0)

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        find_policy(name)
        return name


class TrainConfig(Config):
    """SGD with momentum under SAM, cosine learning rate. `threads` are torch's; None leaves them as they are.

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
    sam: SamConfig = SamConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
