"""Curricula: every formula by hand, what is unknown or stale, guards and times."""

import itertools
import math
from typing import Any

import hypothesis
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from shared.errors import ConfigError
from shared.measures import MEASURES
from tests.raising import refuses
from trainer.config import CurriculumConfig
from trainer.curriculum import CURRICULA, GUARDS, ORDERS, PACINGS, SELF_PACED, Curriculum, Seen, find_policy, trust

LN2, LN10 = math.log(2), math.log(10)
NAN = math.nan
Q = [0.0, 0.25, 0.5, 1.0]
TEN = ((np.arange(10) + 0.5) / 10).tolist()
SHARES = {  # at t = 0, 1/2 and 1, from the share 0.2
    "linear": [0.2, 0.6, 1.0],
    "quadratic": [0.2, 0.4, 1.0],
    "root": [0.2, 0.2 + 0.8 / math.sqrt(2), 1.0],
    "step": [0.2, 0.2, 1.0],
    "exponential": [0.2, 0.2 + 0.8 / (math.exp(5) + 1), 1.0],  # (e^5 - 1) / (e^10 - 1)
    "logarithmic": [0.2, 0.2 + 0.8 * (1 + math.log(0.5 + math.exp(-10)) / 10), 1.0],
}


def seen(
    percentile: list[float] | None = None, loss: list[float] | None = None, trust: list[float] | float = 1.0
) -> Seen:
    """What is known of samples with these percentiles and losses (of none: a loss of ln 2), trusted alike."""
    size = len(percentile if percentile is not None else loss or [])
    loss_N = np.array(loss if loss is not None else [LN2] * size)
    percentile_N = np.array(percentile if percentile is not None else np.full(size, 0.5))
    margin_N = np.log(np.expm1(loss_N))  # loss = ln(1 + e^margin)
    return Seen(percentile_N, np.broadcast_to(np.asarray(trust, dtype=np.float64), size), margin_N)


def weights(what: Seen, progress: float = 0.0, **settings: Any) -> list[float]:
    plain = {"strength": 1.0, "guard": "none"}
    found: list[float] = Curriculum(CurriculumConfig(**plain | settings)).weights(what, progress).tolist()
    return found


# -- soft --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("progress", "b"),
    [(0.0, 1.5), (0.25, 0.75), (0.5, 0.0), (1.0, 0.0)],
    ids=["start", "half faded", "faded", "end"],
)
def test_soft_is_the_formula(progress: float, b: float) -> None:
    """exp(-2 b (place - 1/2)), b from 1.5 to 0 at half of the training."""
    expected = [math.exp(b), math.exp(b / 2), 1.0, math.exp(-b)]

    assert weights(seen(Q), progress, strength=1.5, fade_until=0.5) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("progress", "b"), [(0.0, 1.0), (0.4, 1.0), (0.5, 0.75), (0.7, 0.25), (0.8, 0.0), (0.9, 0.0)], ids=str
)
def test_soft_is_held_then_fades(progress: float, b: float) -> None:
    found = weights(seen([0.0]), progress, hold_until=0.4, fade_until=0.8)

    assert found == pytest.approx([math.exp(b)], rel=1e-12)


@pytest.mark.parametrize(("progress", "b"), [(0.0, 1.0), (0.5, 1.0), (0.5000001, 0.0)])
def test_soft_may_end_at_once(progress: float, b: float) -> None:
    """Held until it has faded: on or off."""
    at_most = weights(seen([0.0]), progress, hold_until=0.5000001, fade_until=0.5000001)

    assert at_most == pytest.approx([math.exp(b)], rel=1e-12)


def test_low_adm_is_drawn_first_while_the_curriculum_lasts() -> None:
    early, later = (np.array(weights(seen(TEN), progress)) for progress in (0.0, 0.5))

    assert (np.diff(early) < 0).all()
    assert (np.diff(later) < 0).all()
    assert early[0] > later[0] > 1 > later[-1] > early[-1]


def test_strength_zero_is_uniform() -> None:
    assert weights(seen(Q), strength=0) == [1, 1, 1, 1]


# -- orders, times, trust ----------------------------------------------------------------------------------------------


def test_high_first_is_low_first_the_other_way_round() -> None:
    assert weights(seen([*Q, NAN]), order="high") == pytest.approx([math.exp(-1), math.exp(-0.5), 1.0, math.e, 1.0])


def test_random_order_is_a_fixed_permutation_of_places() -> None:
    """By the seed, not by percentiles; strength 1/2 at the start, so that a weight is e^(1/2 - place)."""
    config = CurriculumConfig(order="random", strength=0.5)
    percentile = np.random.default_rng(0).random(10).tolist()
    one, again, other = (
        Curriculum(config, seed=seed).weights(seen(at), 0.0) for seed, at in ((3, TEN), (3, percentile), (4, TEN))
    )

    assert sorted(0.5 - np.log(one)) == pytest.approx(TEN, rel=1e-12)
    assert one.tolist() == again.tolist() != other.tolist()


def test_random_order_leaves_the_unknown_unknown() -> None:
    what = [0.5, NAN, 0.2, NAN]
    place_N = ORDERS["random"](np.array(what), 0)

    assert np.isnan(place_N).tolist() == [False, True, False, True]
    assert weights(seen(what), order="random")[1::2] == [1.0, 1.0]


@pytest.mark.parametrize("name", CURRICULA)
def test_before_begin_at_all_are_neutral_and_then_progress_runs_anew(name: str) -> None:
    """At 3/4 of all, half of what is left after 1/2."""
    what = seen(TEN, np.linspace(0.1, 2.0, 10).tolist())
    order = "low" if name == "self_paced" else "high"
    settings = {"name": name, "order": order, "guard": "cap", "guard_loss": 1.5, "guard_from": 0.5}

    assert weights(what, 0.49, begin_at=0.5, **settings) == [1.0] * 10
    assert weights(what, 0.5, begin_at=0.5, **settings) == weights(what, 0.0, **settings)
    assert weights(what, 0.75, begin_at=0.5, **settings) == pytest.approx(weights(what, 0.5, **settings))
    assert weights(what, 1.0, begin_at=0.5, **settings) == weights(what, 1.0, **settings)


@pytest.mark.parametrize(
    ("settings", "trusted"),
    [
        ({"name": "soft"}, [math.e, math.exp(-1)]),
        ({"name": "pacing"}, [1.0, 0.0]),
        ({"name": "self_paced", "regulariser": "hard", "start_share": 0.5}, [1.0, 0.0]),
        ({"name": "uniform", "guard": "aside", "guard_loss": 1.0, "guard_from": 0.0, "guard_floor": 0.0}, [1.0, 0.1]),
    ],
    ids=lambda value: value.get("name") if isinstance(value, dict) else "",
)
def test_a_weight_is_mixed_with_the_neutral_one_by_trust(settings: dict[str, Any], trusted: list[float]) -> None:
    """Four times the same two samples, trusted 1, 3/4, 1/4 and 0; without percentile, margin and trust all is 1."""
    share = [1.0, 1.0, 0.75, 0.75, 0.25, 0.25, 0.0, 0.0, 0.0]
    what = seen([0.0, 1.0] * 4 + [NAN], [0.1, 2.0] * 4 + [NAN], share)
    expected = [1 - t + t * v for t, v in zip(share[:-1], trusted * 4, strict=True)]

    assert weights(what, **settings) == pytest.approx([*expected, 1.0], rel=1e-12)


@pytest.mark.parametrize("name", CURRICULA)
def test_unscored_samples_are_neutral(name: str) -> None:
    nothing = Seen(np.full(3, NAN), np.zeros(3), np.full(3, NAN))

    assert weights(nothing, 0.5, name=name, guard="aside", guard_floor=0.0) == [1.0] * 3


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


def test_uniform_ignores_scores() -> None:
    assert weights(seen(Q, [0.1, 5.0, 5.0, 0.1]), 0.3, name="uniform") == [1, 1, 1, 1]


# -- pacing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PACINGS)
def test_pacing_function_by_hand(name: str) -> None:
    assert [PACINGS[name](t, 0.2) for t in (0.0, 0.5, 1.0)] == pytest.approx(SHARES[name], abs=1e-5)
    assert PACINGS[name](0.5, 0.2) == pytest.approx(SHARES[name][1], rel=1e-12)


@pytest.mark.parametrize("name", PACINGS)
def test_pacing_takes_the_first_share_of_the_samples(name: str) -> None:
    """Of 1,000, at t = 0, 1/2 and 1, which is 0.8 of the training; after it all stay."""
    percentile = (np.random.default_rng(0).permutation(1000) + 0.5) / 1000
    settings = {"name": "pacing", "pacing": name, "start_share": 0.2, "full_at": 0.8}
    for progress, share in zip((0.0, 0.4, 0.8, 1.0), [*SHARES[name], 1.0], strict=True):
        found = np.array(weights(seen(percentile.tolist()), progress, **settings))

        assert set(found) <= {0.0, 1.0}
        assert abs(found.sum() - 1000 * share) <= 1
        assert (found[percentile < share - 0.001] == 1).all()


def test_pacing_counts_places_however_narrow_the_percentiles() -> None:
    """Means over a sample's scorings lie near 1/2: the first 0.3 of ten are the lowest three, wherever they lie."""
    percentile = [0.51, 0.45, 0.47, 0.5, 0.46, 0.48, 0.55, 0.52, 0.53, 0.54, NAN]

    assert weights(seen(percentile), name="pacing") == [0, 1, 1, 0, 1, 0, 0, 0, 0, 0, 1]


def test_pacing_high_first_takes_the_other_end() -> None:
    assert weights(seen(TEN), name="pacing", order="high") == [0] * 7 + [1] * 3


# -- self-paced --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("regulariser", "expected"),
    [
        ("hard", [1.0, 1.0, 0.0, 0.0, 0.0]),
        ("linear", [2 / 3, 1 / 3, 0.0, 0.0, 0.0]),
        ("logistic", [(1 + math.exp(-3)) / (1 + math.exp(loss - 3)) for loss in (1, 2, 3, 4, 5)]),
    ],
)
def test_self_paced_by_hand(regulariser: str, expected: list[float]) -> None:
    """Half of the losses 1 to 5 lie up to lambda = 3; the unscored one counts for nothing and is neutral."""
    what = seen(loss=[1.0, 2.0, 3.0, 4.0, 5.0, NAN])
    found = weights(what, name="self_paced", regulariser=regulariser, start_share=0.5)

    assert found == pytest.approx([*expected, 1.0], rel=1e-9)


@pytest.mark.parametrize("regulariser", SELF_PACED)
def test_self_paced_takes_more_and_more_and_in_the_end_all(regulariser: str) -> None:
    what = seen(loss=np.linspace(0.1, 8.0, 40).tolist())
    settings = {"name": "self_paced", "regulariser": regulariser, "start_share": 0.2, "full_at": 0.9}
    found = [weights(what, progress, **settings) for progress in (0.0, 0.3, 0.6, 0.9, 1.0)]

    assert found[3] == found[4] == [1.0] * 40
    for early, late in itertools.pairwise(found):
        assert all(a <= b for a, b in zip(early, late, strict=True))
        assert sum(early) < sum(late) or late == [1.0] * 40
    assert all(early >= late for early, late in itertools.pairwise(found[0]))


def test_self_paced_follows_the_pacing_function() -> None:
    """At t = 1/2 the quadratic share is 0.4 and the linear one 0.6."""
    what = seen(loss=np.linspace(1.0, 2.0, 101).tolist())
    settings = {"name": "self_paced", "regulariser": "hard", "start_share": 0.2, "full_at": 1.0}

    assert sum(weights(what, 0.5, pacing="quadratic", **settings)) == pytest.approx(40, abs=1)
    assert sum(weights(what, 0.5, pacing="linear", **settings)) == pytest.approx(60, abs=1)


def test_logistic_weights_of_large_losses_overflow_nothing() -> None:
    found = SELF_PACED["logistic"](np.array([0.0, 1e4, 1e9]), 2.0)

    assert found.tolist() == [1.0, 0.0, 0.0]
    assert SELF_PACED["logistic"](np.array([0.0, 5e3, 1e9]), 1e4) == pytest.approx([1.0, 1.0, 0.0])


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "self_paced", "regulariser": "hard"},
        {"name": "self_paced", "regulariser": "linear"},
        {"name": "pacing", "guard": "aside", "guard_weight": 0.0, "guard_loss": 0.1, "guard_from": 0, "guard_floor": 0},
    ],
    ids=["hard", "linear", "all aside"],
)
def test_where_nothing_has_a_weight_all_are_neutral(settings: dict[str, Any]) -> None:
    """Equal losses: none lies below their quantile. Nothing could be drawn by zeros alone."""
    assert weights(seen([0.25, 0.75], [1.0, 1.0]), **settings) == [1.0, 1.0]


def test_a_sample_of_no_score_does_not_take_the_whole_window() -> None:
    assert (
        weights(seen([0.25, 0.75, NAN], [1.0, 1.0, NAN], [1, 1, 0]), name="self_paced", regulariser="hard") == [1.0] * 3
    )


# -- guards ------------------------------------------------------------------------------------------------------------


def test_shares_and_thresholds_are_those_of_the_samples_that_are_not_guarded() -> None:
    """Mislabelled samples have the lowest ADM: the easiest half of all would be they alone."""
    what = seen([0.1, 0.2, 0.7, 0.8], [9.0, 9.0, 0.3, 0.2])
    guard = {"guard": "aside", "guard_weight": 0.125, "guard_from": 0.0, "guard_floor": 0.0}
    half = {"pacing": "step", "start_share": 0.5}

    assert weights(what, name="pacing", **half) == [1, 1, 0, 0]
    assert weights(what, name="pacing", **half, **guard) == [0.125, 0.125, 1, 0]
    assert weights(what, name="pacing", **half, **guard | {"guard": "hardest"}) == [0, 0, 1, 0]
    assert weights(what, name="self_paced", regulariser="hard", **half, **guard) == [0, 0, 0, 1]  # aside raises nothing


@pytest.mark.parametrize(
    ("guard", "expected"),
    [
        ("none", [math.e, 1.0, math.exp(-1), math.e, math.exp(-0.5), 1.0]),
        ("hardest", [math.e, 1.0, math.exp(-1), math.exp(-1), math.exp(-1), 1.0]),
        ("neutral", [math.e, 1.0, math.exp(-1), 1.0, 1.0, 1.0]),
        ("cap", [math.e, 1.0, math.exp(-1), 1.0, math.exp(-0.5), 1.0]),
        ("aside", [math.e, 1.0, math.exp(-1), 0.25, 0.25, 1.0]),
    ],
)
def test_guard_by_hand(guard: str, expected: list[float]) -> None:
    """The fourth and fifth sample look mislabelled: losses above ln 10. The last is unscored."""
    what = seen([0.0, 0.5, 1.0, 0.0, 0.75, NAN], [0.1, 2.3, 0.1, 2.31, 9.0, NAN], [1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    settings = {"guard": guard, "guard_weight": 0.25, "guard_from": 0.0, "guard_floor": 0.0}

    assert weights(what, **settings) == pytest.approx(expected, rel=1e-12)
    assert set(GUARDS) == {"none", "hardest", "neutral", "cap", "aside"}


@pytest.mark.parametrize(
    ("bad", "floor", "strength"),
    [(5, 0.1, 0.0), (10, 0.1, 0.0), (12, 0.1, 0.2), (15, 0.1, 0.5), (20, 0.1, 1.0), (60, 0.1, 1.0), (0, 0.1, 0.0)],
)
def test_guard_sets_in_between_its_floor_and_twice_that(bad: int, floor: float, strength: float) -> None:
    """Of 100 scored samples so many look mislabelled; 100 unscored ones count for nothing."""
    loss = [5.0] * bad + [0.1] * (100 - bad) + [NAN] * 100
    what = seen([0.0] * 200, loss)
    found = weights(what, name="uniform", guard="aside", guard_weight=0.0, guard_from=0.0, guard_floor=floor)

    assert found == pytest.approx([1 - strength] * bad + [1.0] * (200 - bad), abs=1e-12)


def test_guard_without_a_floor_is_always_in_force() -> None:
    what = seen(loss=[5.0] + [0.1] * 999)
    found = weights(what, name="uniform", guard="aside", guard_from=0.0, guard_floor=0.0)

    assert found == [0.1] + [1.0] * 999


def test_guard_waits_for_its_time() -> None:
    what = seen(loss=[5.0, 0.1])
    settings = {"name": "uniform", "guard": "aside", "guard_from": 0.3, "guard_floor": 0.0}

    assert weights(what, 0.29, **settings) == [1.0, 1.0]
    assert weights(what, 0.3, **settings) == [0.1, 1.0]
    assert weights(what, 1.0, **settings) == [0.1, 1.0]  # and has no end


@pytest.mark.parametrize(
    ("num_classes", "guard_loss", "guarded"),
    [(10, None, [False, False, True]), (3, None, [False, True, True]), (10, 3.0, [False, False, False])],
    ids=["ln 10", "ln 3", "3"],
)
def test_guarded_are_losses_above_chance_or_a_limit(
    num_classes: int, guard_loss: float | None, guarded: list[bool]
) -> None:
    config = CurriculumConfig(name="uniform", guard="aside", guard_loss=guard_loss, guard_from=0, guard_floor=0)
    found = Curriculum(config, num_classes=num_classes).weights(seen(loss=[1.0, 1.2, 2.4]), 0.0)

    assert (found < 1).tolist() == guarded


def test_guard_in_between_mixes_the_weights() -> None:
    """Three quarters of the way from the floor 0.4 to 0.8: noise 0.7."""
    what = seen([0.0] * 10, [5.0] * 7 + [0.1] * 3)
    found = weights(what, guard="neutral", guard_from=0.0, guard_floor=0.4)

    assert found == pytest.approx([0.25 * math.e + 0.75] * 7 + [math.e] * 3)


# -- all of them -------------------------------------------------------------------------------------------------------


def columns(size: int) -> st.SearchStrategy[tuple[npt.NDArray[np.float64], ...]]:
    unit = st.floats(0, 1, width=32)
    return st.tuples(
        arrays.arrays(np.float64, size, elements=st.one_of(unit, st.just(NAN))),
        arrays.arrays(np.float64, size, elements=unit),
        arrays.arrays(np.float32, size, elements=st.one_of(st.floats(-1000, 1000, width=32), st.just(NAN))),
    )


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(
    known=st.integers(1, 12).flatmap(columns),
    progress=st.floats(0, 1),
    settings=st.fixed_dictionaries(
        {
            "name": st.sampled_from(sorted(CURRICULA)),
            "order": st.sampled_from(sorted(ORDERS)),
            "pacing": st.sampled_from(sorted(PACINGS)),
            "regulariser": st.sampled_from(sorted(SELF_PACED)),
            "guard": st.sampled_from(sorted(GUARDS)),
            "guard_weight": st.floats(0, 1),
            "guard_floor": st.sampled_from([0.0, 0.05, 0.3, 1.0]),
            "begin_at": st.sampled_from([0.0, 0.3]),
            "strength": st.floats(0, 100),
            "start_share": st.floats(0.001, 1),
        }
    ).filter(lambda settings: settings["name"] != "self_paced" or settings["order"] == "low"),
)
def test_weights_can_always_be_drawn_by(
    known: tuple[npt.NDArray[Any], ...], progress: float, settings: dict[str, Any]
) -> None:
    """Finite, from 0 up, not all 0; and neutral where nothing is trusted."""
    percentile_N, trust_N, margin_N = known
    found = Curriculum(CurriculumConfig(**settings)).weights(Seen(percentile_N, trust_N, margin_N), progress)

    assert np.isfinite(found).all()
    assert (found >= 0).all()
    assert found.any()
    assert (found[trust_N == 0] == 1).all()
    assert (found[np.isnan(percentile_N) & np.isnan(margin_N)] == 1).all()


def test_settings_find_their_way_by_name() -> None:
    by_name = find_policy("pacing", measure="loss", memory=0.5, order="high", start_share=0.5)

    assert (by_name.measure, by_name.memory) == ("loss", 0.5)
    assert by_name.weights(seen(TEN), 0.0).tolist() == [0] * 5 + [1] * 5


@pytest.mark.parametrize(
    ("settings", "key", "value", "limit"),
    [
        ({"name": "hard_first"}, "name", "'hard_first'", ", ".join(CURRICULA)),
        ({"measure": "admm"}, "measure", "'admm'", ", ".join(MEASURES)),
        ({"strength": -1.0}, "strength", -1.0, "0"),
        ({"strength": 1000.0}, "strength", 1000.0, "100"),
        ({"strength": math.inf}, "strength", math.inf, "finite"),
        ({"strength": NAN}, "strength", NAN, "finite"),
        ({"fade_until": 0.0}, "fade_until", 0.0, "more than 0"),
        ({"fade_until": 1.1}, "fade_until", 1.1, "1"),
        ({"begin_at": 1.0}, "begin_at", 1.0, "less than 1"),
        ({"start_share": 0.0}, "start_share", 0.0, "more than 0"),
        ({"full_at": 0.0}, "full_at", 0.0, "more than 0"),
        ({"memory": 1.0}, "memory", 1.0, "less than 1"),
        ({"order": "up"}, "order", "'up'", "'low', 'high' or 'random'"),
        ({"pacing": "cubic"}, "pacing", "'cubic'", "'linear'"),
        ({"guard": "police"}, "guard", "'police'", "'none'"),
        ({"hold_until": 0.8, "fade_until": 0.6}, "train.curriculum.hold_until", "0.8, after fade_until, 0.6", ""),
        ({"passes": "second"}, "train.curriculum.passes", "'second'", "weighting"),
        ({"name": "self_paced", "order": "high"}, "train.curriculum.order", "'high'", "low"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], key: str, value: object, limit: str) -> None:
    with refuses(ConfigError, key, value) as caught:
        find_policy(**({"name": "soft"} | settings))
    assert limit in caught.value.fix


def test_every_name_that_a_setting_allows_is_there() -> None:
    """The settings' own lists and the tables of functions cannot drift apart."""
    allowed = {
        name: set(field.annotation.__args__)
        for name, field in CurriculumConfig.model_fields.items()
        if name in ("order", "pacing", "regulariser", "guard")
    }

    assert allowed == {
        "order": set(ORDERS),
        "pacing": set(PACINGS),
        "regulariser": set(SELF_PACED),
        "guard": set(GUARDS),
    }
