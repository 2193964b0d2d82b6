"""The worker of a process that scores and does nothing else."""

import contextlib
import os
from typing import TYPE_CHECKING

import torch

from scorer.worker import LeaseSource, Worker, build_attack
from shared.catalogue import Run
from shared.datasets import load_dataset
from shared.models import build_model

if TYPE_CHECKING:
    from deploy.config import RunConfig


def build_worker(scorer_id: str, run_uri: str, config: "RunConfig", leases: LeaseSource) -> Worker:
    """With its data and network, in this process as scoring needs it: a CPU scorer steps behind everything else."""
    scoring = config.scoring
    on_gpu = scoring.gpus > 0
    if not on_gpu:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, scoring.nice)
        torch.set_num_threads(scoring.threads)
    torch.backends.cudnn.allow_tf32 = False  # scoring_id says float32
    dataset = load_dataset(config.data)
    Run(run_uri).check_dataset(dataset.fingerprint)
    return Worker(
        scorer_id,
        run_uri,
        leases,
        dataset.train.batch,
        build_model(config.model, dataset),
        build_attack(scoring.attack),
        batch_size=scoring.batch_size,
        poll_interval_s=scoring.poll_interval_s,
        device="cuda" if on_gpu else "cpu",
    )
