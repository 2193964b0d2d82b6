"""What the driver's settings mean for the training."""

from deploy.config import RunConfig
from deploy.training import train_config
from shared.config import make_config
from shared.errors import ConfigError
from tests.raising import refuses


def test_shadow_mode_draws_every_sample_alike_and_leaves_the_rest() -> None:
    given = RunConfig.model_validate({"scoring": {"mode": "shadow"}, "train": {"curriculum": {"strength": 100.0}}})
    asynchronous = RunConfig.model_validate({"train": {"curriculum": {"strength": 100.0}}})
    found = train_config(given)

    assert (found.curriculum.name, found.curriculum.guard) == ("uniform", "none")
    assert found.model_copy(update={"curriculum": given.train.curriculum}) == given.train
    assert train_config(asynchronous) == asynchronous.train


def test_scoring_inside_the_training_needs_one_process() -> None:
    with refuses(ConfigError, "trainer.num_workers", 2):
        make_config(RunConfig, {"trainer": {"num_workers": 2}, "scoring": {"mode": "every_epoch"}})
