"""The whole configuration of a run: one section per part, each defined beside its owner."""

from pydantic import Field

from scorer.config import ScoringConfig
from services.config import ControllerConfig, RestConfig
from shared.config import Config, DataConfig, ModelConfig
from trainer.config import TrainConfig


class RunSection(Config):
    """Where the run leaves its files: `folder`, or a new folder below `root` named after the time.

    `tensorboard` also writes curves for TensorBoard below the folder; it needs the package (`pip install tensorboard`).
    """

    root: str = "runs"
    folder: str | None = None
    progress_interval_s: float = Field(default=5.0, gt=0)
    tensorboard: bool = False


class RunConfig(Config):
    """What `steppe run` reads."""

    run: RunSection = RunSection()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    scoring: ScoringConfig = ScoringConfig()
    controller: ControllerConfig = ControllerConfig()
    rest: RestConfig = RestConfig()
