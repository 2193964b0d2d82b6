"""`steppe bench sampler`: what a batch of 256 draws costs the training, at 1, 10 and 50 million samples.

Every sample has a fresh score, and the soft curriculum plans each window of an eighth of an epoch by them: its time is
spread over the window's batches. Beside it, for information, `torch.multinomial` with replacement, which is what
`WeightedRandomSampler` draws by, for as many draws from the same weights; it refuses more than 2^24.
"""

import itertools
import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import numpy as np
import rich
from rich.table import Table

SIZES = (1_000_000, 10_000_000, 50_000_000)
WINDOWS_PER_EPOCH = 8
BATCH = 256
MULTINOMIAL_LIMIT = 2**24


def measure(repeats: int, sizes: tuple[int, ...] = SIZES) -> dict[str, Any]:
    """So many windows at each size; medians, in milliseconds per batch."""
    return {
        "what": f"batches of {BATCH} draws in windows of an eighth of an epoch, medians of {repeats} windows",
        "sizes": [_at(num_samples, repeats) for num_samples in sizes],
    }


def show(found: Mapping[str, Any]) -> None:
    rich.print(found["what"])
    table = Table("samples", "ms per batch", "of it planning", "torch.multinomial", "s per window", box=None)
    for one in found["sizes"]:
        theirs = one["multinomial_ms_per_batch"]
        table.add_row(
            f"{one['num_samples']:,}",
            f"{one['ms_per_batch']:.3f}",
            f"{one['planning_ms_per_batch']:.3f}",
            f"{theirs:.3f}" if theirs else "refused",
            f"{one['window_s']:.2f}",
        )
    rich.print(table)


class _Scored:
    """Random scores of one checkpoint, all fresh."""

    measure = "adm"

    def __init__(self, num_samples: int) -> None:
        from trainer.feed import ScoreView

        rng = np.random.default_rng(0)
        margin_N = rng.standard_normal(num_samples, dtype=np.float32)
        self._view = ScoreView(1, rng.random(num_samples), np.ones(num_samples, np.int64), 4, margin_N=margin_N)

    def view(self) -> Any:
        return self._view

    def newest_version(self) -> int:
        return 1


def _at(num_samples: int, repeats: int) -> dict[str, Any]:
    import torch

    from trainer.sampler import CurriculumSampler

    scores = _Scored(num_samples)
    sampler = CurriculumSampler(num_samples, scores, "soft", windows_per_epoch=WINDOWS_PER_EPOCH)
    draws = itertools.chain.from_iterable(itertools.repeat(sampler))
    window = num_samples // WINDOWS_PER_EPOCH
    whole, planning, theirs = [], [], []
    weights = torch.from_numpy(np.exp(0.5 - scores.view().percentile_N))
    for _ in range(repeats):
        began, planned = time.perf_counter(), sampler.seconds
        for _ in itertools.islice(draws, window):
            pass
        whole.append(time.perf_counter() - began)
        planning.append(sampler.seconds - planned)
        if num_samples <= MULTINOMIAL_LIMIT:
            began = time.perf_counter()
            torch.multinomial(weights, window, replacement=True).tolist()
            theirs.append(time.perf_counter() - began)
    to_ms_per_batch = 1e3 * BATCH / window
    return {
        "num_samples": num_samples,
        "ms_per_batch": round(median(whole) * to_ms_per_batch, 4),
        "planning_ms_per_batch": round(median(planning) * to_ms_per_batch, 4),
        "multinomial_ms_per_batch": round(median(theirs) * to_ms_per_batch, 4) if theirs else None,
        "window_s": round(median(planning), 3),
    }
