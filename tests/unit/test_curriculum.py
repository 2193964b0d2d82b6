"""Curriculum policies: weights by hand, orderings, trust."""

import math

import numpy as np
import pytest

from shared.errors import ConfigError
from trainer.curriculum import POLICIES, LowAdmFirst, find_policy, trust

Q = np.array([0.0, 0.25, 0.5, 1.0])


@pytest.mark.parametrize(
    ("progress", "b"),
    [(0.0, 1.5), (0.25, 0.75), (0.5, 0.0), (1.0, 0.0)],
    ids=["start", "half faded", "faded", "end"],
)
def test_low_adm_first_is_the_formula(progress: float, b: float) -> None:
    """exp(-2 b (q - 1/2)), b from 1.5 to 0 at half of the training."""
    expected = [math.exp(b), math.exp(b / 2), 1.0, math.exp(-b)]

    found = LowAdmFirst(strength=1.5, fade_until=0.5).weights(Q, np.ones(4), progress)

    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_low_adm_is_drawn_first_while_the_curriculum_lasts() -> None:
    q = np.linspace(0, 1, 11)
    policy = LowAdmFirst()

    early, later = (policy.weights(q, np.ones(11), progress) for progress in (0.0, 0.5))

    assert (np.diff(early) < 0).all()
    assert (np.diff(later) < 0).all()
    assert early[0] > later[0] > 1 > later[-1] > early[-1]


def test_unscored_is_neutral_and_stale_fades_to_it() -> None:
    q = np.array([np.nan, 0.0, 0.0, 0.0, 1.0])
    trust_N = np.array([0.0, 1.0, 0.5, 0.0, 0.5])

    found = LowAdmFirst(strength=1.0).weights(q, trust_N, 0.0)

    assert found.tolist() == pytest.approx([1.0, math.e, math.exp(0.5), 1.0, math.exp(-0.5)])


def test_uniform_ignores_scores() -> None:
    assert find_policy("uniform").weights(Q, np.ones(4), 0.3).tolist() == [1, 1, 1, 1]


def test_strength_zero_is_uniform() -> None:
    assert LowAdmFirst(strength=0).weights(Q, np.ones(4), 0.0).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("age", "bound", "expected"),
    [
        (-1, 4, 0.0),
        (0, 4, 1.0),
        (4, 4, 1.0),
        (5, 4, 0.75),
        (6, 4, 0.5),
        (8, 4, 0.0),
        (100, 4, 0.0),
        (-1, 0, 0.0),
        (0, 0, 1.0),
        (1, 0, 0.0),
        (1, 1, 1.0),
        (2, 1, 0.0),
    ],
)
def test_trust(age: int, bound: int, expected: float) -> None:
    assert trust(np.array([age]), bound).tolist() == [expected]


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        find_policy("hard_first")

    assert "'hard_first'" in str(caught.value)
    assert all(name in str(caught.value) for name in POLICIES)


@pytest.mark.parametrize(
    "settings",
    [{"strength": -1.0}, {"strength": math.nan}, {"fade_until": 0.0}, {"fade_until": 1.1}, {"fade_until": math.nan}],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        LowAdmFirst(**settings)


@pytest.mark.parametrize("strength", [1000.0, math.inf])
def test_strength_whose_weights_are_no_numbers_is_refused(strength: float) -> None:
    """exp(1000) is inf and its share of the sum NaN: all draws would be one id."""
    with pytest.raises(ConfigError, match="strength"):
        LowAdmFirst(strength)
