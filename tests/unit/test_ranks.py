"""The curriculum over several ranks: positions, weights and state. Ranks are threads here."""

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ConfigError
from tests.raising import refuses
from tests.ranks import in_threads
from trainer.comm import Comm, Ranks
from trainer.config import check_batch
from trainer.feed import NoScores, ScoreView
from trainer.sampler import CurriculumSampler


class Known:
    """Scores of one version: sample i is at place i / N."""

    def __init__(self, num_samples: int) -> None:
        place_N = (np.arange(num_samples) + 0.5) / num_samples
        self._view = ScoreView(1, place_N, np.ones(num_samples, dtype=np.int64), 4).frozen()

    def view(self) -> ScoreView:
        return self._view

    def newest_version(self) -> int:
        return 1


def sampler(num_samples: int, comm: Comm, **settings: Any) -> CurriculumSampler:
    """Of rank 0 with scores, as the trainer's; the others know none."""
    scores = NoScores(num_samples) if comm.rank else Known(num_samples)
    return CurriculumSampler(num_samples, scores, "soft", seed=5, epochs=4, comm=comm, **settings)


def draws_of(num_samples: int, world_size: int, epochs: int = 2, **settings: Any) -> list[list[int]]:
    """Of each rank, all epochs one after another."""

    def work(comm: Comm) -> list[int]:
        mine = sampler(num_samples, comm, **settings)
        return [i for _ in range(epochs) for i in mine]

    return in_threads(world_size, work)


def dealt(ids: list[int], num_samples: int, world_size: int) -> list[list[int]]:
    """As cards are dealt, anew at the beginning of each epoch."""
    epochs = [ids[start : start + num_samples] for start in range(0, len(ids), num_samples)]
    return [[i for epoch in epochs for i in epoch[rank::world_size]] for rank in range(world_size)]


@settings(max_examples=25, deadline=None)
@given(num_samples=st.integers(1, 40), world_size=st.integers(1, 5), windows=st.integers(1, 9))
def test_every_position_goes_to_exactly_one_rank(num_samples: int, world_size: int, windows: int) -> None:
    """Also where windows are no multiple of the ranks, and where a sample is drawn twice in one window."""
    alone = draws_of(num_samples, 1, windows_per_epoch=windows)[0]

    assert draws_of(num_samples, world_size, windows_per_epoch=windows) == dealt(alone, num_samples, world_size)


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (2, 3), (4, 2), (1, 4)], ids=str)
def test_another_number_of_ranks_draws_the_remaining_positions(before: int, after: int) -> None:
    """12 draws, in the middle of a window of 8, then on from rank 0's state: twice, 12 and 12 draws."""
    alone = draws_of(64, 1)[0]

    def first(comm: Comm) -> dict[str, Any]:
        mine = sampler(64, comm)
        draws = iter(mine)
        for _ in range(12 // before):
            next(draws)
        return mine.state_dict()

    def second(comm: Comm) -> tuple[list[int], dict[str, Any]]:
        mine = sampler(64, comm)
        mine.load_state_dict(state)
        draws = iter(mine)
        return [next(draws) for _ in range(12 // after)], mine.state_dict()

    state = in_threads(before, first)[0]
    drawn = in_threads(after, second)
    state = drawn[0][1]
    again = in_threads(before, lambda comm: sampler_of(state, comm))

    assert [ids for ids, _ in drawn] == dealt(alone[12:24], 12, after)
    assert again == dealt(alone[24:64], 40, before)


def sampler_of(state: dict[str, Any], comm: Comm) -> list[int]:
    """The rest of the epoch from `state`."""
    mine = sampler(64, comm)
    mine.load_state_dict(state)
    return list(mine)


def test_each_rank_knows_how_many_draws_are_left() -> None:
    def work(comm: Comm) -> tuple[list[int], int]:
        mine = sampler(11, comm)
        return [len(mine), *(len(mine) for _ in mine)], mine.epoch

    # After the last draw of an epoch the next one's are left; of it rank 2 has none.
    assert in_threads(3, work) == [([4, 3, 2, 1, 4], 1), ([4, 3, 2, 1, 4], 1), ([3, 2, 1, 0], 1)]


def test_loss_weights_reach_every_rank() -> None:
    """In the weighting form rank 0 alone sees the scores."""

    def work(comm: Comm) -> list[float]:
        mine = sampler(30, comm, form="weighting", windows_per_epoch=3)
        weights = [mine.loss_weights([i]) for i in mine]
        return [float(weight[0]) for weight in weights if weight is not None]

    alone = in_threads(1, work)[0]

    assert len(set(alone)) > 10
    assert in_threads(2, work) == [alone[0::2], alone[1::2]]


def test_what_draws_were_worth_is_counted_once() -> None:
    def work(comm: Comm) -> int:
        mine = sampler(30, comm)
        list(mine)
        return mine.draws.total

    assert in_threads(3, work) == [30, 0, 0]


@pytest.mark.parametrize(
    ("batch_size", "num_samples", "world_size", "expected"),
    [
        (20, 100, 2, None),
        (20, 107, 2, None),
        (20, 104, 2, None),
        (20, 103, 2, "20 leaves 3 of 103"),
        (20, 101, 1, "20 leaves one of 101"),
        (20, 103, 1, None),
        (21, 105, 2, "21, which 2 workers"),
        (4, 100, 4, "4, which 4 workers"),
        (200, 100, 2, "200, but there are 100"),
    ],
    ids=str,
)
def test_batches_that_ranks_cannot_share_are_refused(
    batch_size: int, num_samples: int, world_size: int, expected: str | None
) -> None:
    with nullcontext() if expected is None else refuses(ConfigError, "train.batch_size", expected):
        check_batch(batch_size, num_samples, world_size)


def test_ranks_need_a_process_group() -> None:
    with refuses(ConfigError, value="process group"):
        Ranks()
