"""steppe in your own training loop: what a script needs, under one name.

    import steppe

    run = steppe.open_run("runs/mine")                     # made by `steppe score mine.toml`, which scores beside
    sampler = steppe.CurriculumSampler(run.num_samples, run.scores, epochs=30)     # into any DataLoader
    publisher = steppe.CheckpointPublisher(run.path)       # publisher.publish(model, step) every so many steps
    optimizer = steppe.SAM(model.parameters(), torch.optim.SGD, lr=0.1)            # steppe.sam_step does a step

`steppe.lightning`, `steppe.transformers` and `steppe.accelerate` are for those frameworks; under torchrun give the
sampler `comm=steppe.Ranks()`. `steppe.score(CONFIG)` is a context manager that scores from the script itself. Without
scorers, scores that are there are read all the same; Ray is imported by `score` alone.
"""

from typing import TYPE_CHECKING, Any

from deploy.packages import check_packages

check_packages()  # before a trainer.py beside the user's script is run in place of ours

from shared import open_run
from shared.checkpoints import CheckpointPublisher
from shared.errors import SteppeError
from shared.run_scores import RunScores
from shared.score_store import ScoreReader
from trainer.comm import Ranks
from trainer.curriculum import find_policy
from trainer.feed import ScoreFeed
from trainer.loader import CurriculumLoader
from trainer.sam import SAM, sam_step
from trainer.sampler import CurriculumSampler

if TYPE_CHECKING:
    from deploy.score import score

__all__ = [
    "SAM",
    "CheckpointPublisher",
    "CurriculumLoader",
    "CurriculumSampler",
    "Ranks",
    "RunScores",
    "ScoreFeed",
    "ScoreReader",
    "SteppeError",
    "find_policy",
    "open_run",
    "sam_step",
    "score",
]


def __getattr__(name: str) -> Any:
    if name == "score":  # it brings Ray
        from deploy.score import score

        return score
    raise AttributeError(f"module 'steppe' has no attribute {name!r}")
