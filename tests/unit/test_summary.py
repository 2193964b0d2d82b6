"""How long it takes from a checkpoint to the first score that the sampler can see."""

import pytest

from deploy.summary import first_score_latency


@pytest.mark.parametrize(
    ("published_at", "first_seen", "expected"),
    [
        ({}, {}, (None, None)),
        ({1: 10.0}, {}, (None, None)),
        ({}, {1: 10.0}, (None, None)),
        ({1: 10.0}, {1: 10.5}, (0.5, 0.5)),
        ({1: 10.0}, {-1: 9.0, 0: 9.5, 1: 10.5}, (0.5, 0.5)),
        ({1: 10.0, 2: 20.0, 3: 30.0}, {1: 11.0, 2: 22.0, 3: 34.0}, (2.0, 3.8)),
        ({1: 10.0, 2: 20.0, 3: 30.0}, {3: 31.0}, (11.0, 20.0)),
        ({1: 10.0, 2: 20.0, 3: 30.0}, {2: 21.25, 1: 10.25}, (0.75, 1.2)),
        ({1: 10.0, 2: 20.0}, {1: 26.0, 2: 25.0}, (10.0, 14.5)),
        ({31: 10.0, 32: 20.0}, {30: 5.0, 31: 12.0}, (2.0, 2.0)),
        ({1: 0.0}, {1: 1.23456}, (1.235, 1.235)),
    ],
    ids=[
        "nothing at all",
        "nothing scored",
        "nothing published",
        "one",
        "views before the first score",
        "each version",
        "versions jumped over count until the next one scored",
        "versions that no score followed do not count",
        "the older version was seen after the newer one",
        "scores of an earlier attempt",
        "to the millisecond",
    ],
)
def test_first_score_latency(
    published_at: dict[int, float], first_seen: dict[int, float], expected: tuple[float | None, float | None]
) -> None:
    assert expected == first_score_latency(published_at, first_seen)
