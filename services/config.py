"""Settings of the controller and the REST service."""

from pydantic import Field, model_validator

from shared.config import Config
from shared.errors import ConfigError
from shared.leases import MAX_REPLICAS
from shared.score_store import Retention


class AutoscaleConfig(Config):
    """As many scorers as keep 95 % of the scores' ages at `target_age_versions` or below (`services.autoscaler`).

    Changes are at least `cooldown_s` apart. Below `min_replicas` it goes for a paused training alone: to none. No
    target contradicts the staleness bound, which is twice as long as a pass of the scorers is found to be, at least 4.
    """

    enabled: bool = False
    target_age_versions: int = Field(default=4, ge=2, le=1024)  # a checkpoint comes while its block is scored: not 1
    min_replicas: int = Field(default=1, ge=1, le=MAX_REPLICAS)
    max_replicas: int = Field(default=4, ge=1, le=MAX_REPLICAS)
    cooldown_s: float = Field(default=30.0, ge=0)

    @model_validator(mode="after")
    def _has_room(self) -> "AutoscaleConfig":
        if self.min_replicas > self.max_replicas:
            raise ConfigError(
                f"controller.autoscale.min_replicas is {self.min_replicas}, above max_replicas, {self.max_replicas}",
                fix="set it to that or less",
                key="controller.autoscale.min_replicas",
            )
        return self


class ControllerConfig(Config):
    """Blocks, leases, commits, and which store versions stay readable (`shared.score_store.Retention`).

    `audit_share` of the samples, at least 128, are scored at every version to measure what staleness costs; 0: none.
    """

    block_size: int = Field(default=256, ge=1)
    lease_timeout_s: float = Field(default=60.0, gt=0)
    commit_interval_s: float = Field(default=0.2, gt=0)
    keep_last: int = Field(default=256, ge=0)
    keep_every: int = Field(default=0, ge=0)
    keep_all: bool = False
    permutation_seed: int = Field(default=0, ge=0)
    audit_share: float = Field(default=0.01, ge=0, le=1)
    autoscale: AutoscaleConfig = AutoscaleConfig()

    @property
    def retention(self) -> Retention:
        return Retention(self.keep_last, self.keep_every, self.keep_all)


class RestConfig(Config):
    """Where the REST service listens; port 0 picks a free one. `cors_origins` are web pages that may ask it."""

    host: str = "127.0.0.1"
    port: int = Field(default=7471, ge=0, le=65535)
    cors_origins: tuple[str, ...] = ()
