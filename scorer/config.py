"""Settings of the scorers."""

import hashlib
import json
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from shared.config import Config
from shared.errors import ConfigError
from shared.leases import MAX_REPLICAS


class AttackConfig(Config):
    """The attack, in pixel units. `steps` and `step_size` are PGD's; step_size defaults to 2.5 epsilon / steps.

    `clamp` is the range of valid inputs, which the attack does not leave: [0, 1] of pixels, or none, such as for inputs
    that are normalised already; epsilon is in units of these.
    """

    name: Literal["fgsm", "pgd"] = "fgsm"
    epsilon: float = Field(default=8 / 255, ge=0, allow_inf_nan=False)
    norm: Literal["linf", "l2"] = "linf"
    steps: int = Field(default=7, ge=1)
    step_size: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    clamp: tuple[float, float] | Literal["none"] = (0.0, 1.0)

    @field_validator("clamp", mode="before")
    @classmethod
    def _is_a_range(cls, given: object) -> object:
        if given == "none" or (isinstance(given, list | tuple) and len(given) == 2 and given[0] < given[1]):
            return given
        raise ConfigError(
            f"scoring.attack.clamp is {given!r}",
            fix='set it to [low, high], such as [0, 1], or to "none"',
            key="scoring.attack.clamp",
        )

    @property
    def valid(self) -> tuple[float, float] | None:
        """`clamp` as attacks take it."""
        return None if self.clamp == "none" else self.clamp

    @property
    def forward_equivalents(self) -> int:
        """What scoring one sample costs in forward passes: one of each kind per step, and one at the end."""
        return 2 * (1 if self.name == "fgsm" else self.steps) + 1


class ScoringConfig(Config):
    """When and how samples are scored, how many scorers run and what each may use.

    `mode`: "async" scores beside the training, which never waits; "every_epoch" scores inside it, before each epoch but
    the first, so that draws follow from the seed alone; "shadow" scores beside it and trains uniformly; "off" scores
    nothing. A scorer without a GPU gives way to other processes by `nice` (0 to 19; 0 for a host that only scores) and
    asks Ray for `cpus`, a fraction of a CPU; `gpus` may be a fraction too. On a cluster it goes to a host with these
    `labels` (Ray's label selectors), else to one with the first of `fallback_labels` that is there ({} is any host);
    `resources` are custom ones. `delay_versions` is for experiments in the mode every_epoch: draws follow scores that
    are so many versions old.
    """

    mode: Literal["async", "every_epoch", "shadow", "off"] = "async"
    delay_versions: int = Field(default=0, ge=0, le=1024)
    replicas: int = Field(default=1, ge=0, le=MAX_REPLICAS)
    cpus: float = Field(default=0.25, ge=0)
    gpus: float = Field(default=0, ge=0)
    labels: dict[str, str] = Field(default_factory=dict)
    fallback_labels: tuple[dict[str, str], ...] = ()
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    nice: int = Field(default=19, ge=0, le=19)
    threads: int = Field(default=1, ge=1)
    batch_size: int = Field(default=256, ge=1)
    poll_interval_s: float = Field(default=0.05, gt=0)
    attack: AttackConfig = AttackConfig()

    @model_validator(mode="after")
    def _delays_what_it_can(self) -> "ScoringConfig":
        if self.delay_versions and self.mode != "every_epoch":
            raise ConfigError(
                f"scoring.delay_versions is {self.delay_versions} in the mode {self.mode}, but only every_epoch can "
                "delay",
                fix="set scoring.mode to that, or leave it out",
                key="scoring.delay_versions",
            )
        return self

    @model_validator(mode="after")
    def _falls_back_from_something(self) -> "ScoringConfig":
        if self.fallback_labels and not self.labels:
            raise ConfigError(
                f"scoring.fallback_labels is {list(self.fallback_labels)}, but scoring.labels, which come first, "
                "are not set",
                fix="set them, or leave both out",
                key="scoring.fallback_labels",
            )
        return self

    @property
    def scoring_id(self) -> str:
        """Hash of what makes rows comparable: attack, precision, kind of weights."""
        unused = {"steps", "step_size"} if self.attack.name == "fgsm" else set()
        if self.attack.clamp == AttackConfig().clamp:
            unused |= {"clamp"}
        what = {"attack": self.attack.model_dump(exclude=unused), "precision": "float32", "weights": "raw", "rows": 1}
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
