"""What the driver's settings mean for the training."""

from deploy.config import RunConfig
from deploy.training import train_config


def test_shadow_mode_draws_every_sample_alike_and_leaves_the_rest() -> None:
    given = RunConfig.model_validate({"scoring": {"mode": "shadow"}, "train": {"curriculum": {"strength": 100.0}}})
    asynchronous = RunConfig.model_validate({"train": {"curriculum": {"strength": 100.0}}})
    found = train_config(given)

    assert (found.curriculum.name, found.curriculum.guard) == ("uniform", "none")
    assert found.model_copy(update={"curriculum": given.train.curriculum}) == given.train
    assert train_config(asynchronous) == asynchronous.train
