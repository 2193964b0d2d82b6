"""Fifty million samples: beyond what torch.multinomial takes, and where sums in float32 leave samples unreachable."""

import numpy as np
import pytest
from scipy.stats import chi2

from trainer.sampler import draw

pytestmark = pytest.mark.slow
N, BINS = 50_000_000, 1000


def test_every_sample_is_drawn_by_its_weight() -> None:
    rng = np.random.default_rng(0)
    p_N = 0.5 + rng.random(N)
    window, credit_N = draw(p_N, np.zeros(N), N // 2, rng)
    drawn_N = np.bincount(window, minlength=N)
    expected_N = p_N * (N / p_N.sum())

    # One window: the chance of each sample is its weight, along the ids and from the lightest to the heaviest.
    for order in (slice(None), np.argsort(p_N)):
        counts, expected = (each[order].reshape(BINS, -1).sum(1) for each in (drawn_N, expected_N / 2))
        assert ((counts - expected) ** 2 / expected).sum() < chi2.ppf(0.999, BINS - 1)

    # An epoch: what is due once or more was drawn, and nothing more than once too often.
    window, _ = draw(p_N, credit_N, N // 2, rng)
    drawn_N += np.bincount(window, minlength=N)
    assert drawn_N.sum() == N
    assert (drawn_N >= np.floor(expected_N - 1e-6)).all()
    assert (drawn_N <= np.ceil(expected_N + 1e-6)).all()
