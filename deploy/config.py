"""The whole configuration of a run: one section per part, each defined beside its owner."""

from pydantic import Field, model_validator

from scorer.config import ScoringConfig
from services.config import ControllerConfig, RestConfig
from shared.config import Config, DataConfig, ModelConfig
from shared.errors import ConfigError
from trainer.config import TrainConfig, TrainerConfig


class RunSection(Config):
    """Where the run leaves its files: `folder`, or a new folder below `root` named after the time.

    `replay` is the folder of a run whose draws are trained on again, without scorers (scoring.mode "off").

    `tensorboard` also writes curves for TensorBoard below the folder; it needs the package (`pip install tensorboard`).
    """

    root: str = "runs"
    folder: str | None = None
    replay: str | None = None
    progress_interval_s: float = Field(default=5.0, gt=0)
    tensorboard: bool = False


class RunConfig(Config):
    """What `steppe run` reads."""

    run: RunSection = RunSection()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    trainer: TrainerConfig = TrainerConfig()
    scoring: ScoringConfig = ScoringConfig()
    controller: ControllerConfig = ControllerConfig()
    rest: RestConfig = RestConfig()

    @model_validator(mode="after")
    def _replays_without_scorers(self) -> "RunConfig":
        if self.run.replay is not None and self.scoring.mode != "off":
            raise ConfigError(
                f"run.replay is {self.run.replay!r}, whose draws are taken as they were, but scoring.mode is "
                f"{self.scoring.mode!r}",
                fix='set scoring.mode to "off"',
                key="scoring.mode",
            )
        return self

    @model_validator(mode="after")
    def _scores_inside_one_process(self) -> "RunConfig":
        if self.scoring.mode == "every_epoch" and self.trainer.num_workers:
            raise ConfigError(
                f"trainer.num_workers is {self.trainer.num_workers}, but scoring.mode every_epoch scores inside one "
                "process",
                fix='set trainer.num_workers to 0, or scoring.mode to "async"',
                key="trainer.num_workers",
            )
        return self

    @model_validator(mode="after")
    def _begins_within_its_limits(self) -> "RunConfig":
        limits, replicas = self.controller.autoscale, self.scoring.replicas
        is_used = limits.enabled and self.scoring.mode in ("async", "shadow")
        if is_used and not limits.min_replicas <= replicas <= limits.max_replicas:
            raise ConfigError(
                f"scoring.replicas is {replicas}, with which autoscaling begins, but controller.autoscale allows "
                f"{limits.min_replicas}..{limits.max_replicas}",
                fix="set it within, or min_replicas or max_replicas",
                key="scoring.replicas",
            )
        return self
