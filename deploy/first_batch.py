"""One scored batch before anything is started: do a network and data of the user's own fit steppe, and each other?"""

import numpy as np

from deploy.config import RunConfig
from shared.datasets import Dataset
from shared.errors import ConfigError, DataError

SIZE = 8


def check_first_batch(config: RunConfig, dataset: Dataset) -> None:
    """Score up to eight samples with the untrained network, on the CPU; where nothing is the user's own, do nothing.

    Raises: ConfigError or DataError that says which function gave what, and what is needed.
    """
    if not (config.data.is_own or config.model.is_own):
        return
    import torch

    from scorer.adm import score_batch
    from scorer.worker import build_attack
    from shared.models import build_model

    ids = np.unique(np.linspace(0, len(dataset.train) - 1, SIZE).astype(np.int64))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        model = build_model(config.model, dataset)
        x_B, y_B = dataset.train.batch(ids)
        again_B, _ = dataset.train.batch(ids)
        drawn_B, _ = dataset.train.for_training().batch(ids)
    if not torch.equal(x_B.nan_to_num(), again_B.nan_to_num()):  # NaN is told below
        raise ConfigError(
            f"data.name is {config.data.name!r}, whose samples are others each time in the role score",
            fix="augment in the role train alone",
            key="data.name",
        )
    if drawn_B.shape != x_B.shape:
        raise ConfigError(
            f"data.name is {config.data.name!r}, whose samples are {tuple(drawn_B.shape[1:])} in the role train and "
            f"{tuple(x_B.shape[1:])} in the role score",
            fix="let both have one shape",
            key="data.name",
        )
    try:
        columns = score_batch(model, x_B, y_B, build_attack(config.scoring.attack))
    except DataError as error:
        error.problem = f"{config.model.name} and {config.data.name}: {error.problem}"
        settings = {
            "x_BCHW": "scoring.attack.clamp" if torch.isfinite(x_B).all() else "data.name",
            "y_B": "model.name" if x_B.dim() > 1 else "data.name",  # too few classes, or samples without a shape
            "model": "model.name",
        }
        error.key = settings.get(error.key, error.key)
        raise
    except Exception as error:  # it is the user's network
        first = (str(error).splitlines() or [""])[0]
        raise ConfigError(
            f"model.name is {config.model.name!r}, which cannot score a batch {tuple(x_B.shape)} of "
            f"{config.data.name}: {type(error).__name__}: {first}",
            fix="let the network take such a batch",
            key="model.name",
        ) from error
    if wrong := [name for name, column_B in columns.items() if not torch.isfinite(column_B.float()).all()]:
        raise ConfigError(
            f"model.name is {config.model.name!r}, which gives scores that are not finite ({', '.join(wrong)}) for a "
            f"batch of {config.data.name}",
            fix="let the network give finite logits for its first weights, or scale the data",
            key="model.name",
        )
