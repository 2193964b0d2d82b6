"""The autoscaler: its formula and decisions by hand, and the whole loop simulated; then in a real controller."""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import services.controller
from services.autoscaler import (
    INTERVALS,
    LOOK_INTERVAL_S,
    MIN_PAUSE_S,
    PAUSE_INTERVALS,
    Autoscaler,
    Observation,
    State,
    autoscale,
    checkpoints_after,
    scorers_needed,
)
from services.config import AutoscaleConfig, ControllerConfig
from services.controller import Controller, Drain, Start
from shared.attempts import begin
from shared.config import make_config
from shared.errors import ConfigError
from shared.events import read_events
from shared.score_store import ScoreReader
from tests.autoscaling import Phase, Simulation, checkpoint
from tests.raising import refuses
from tests.rows import make_rows
from tests.waiting import LIMIT_S

# One scorer scores 100 * 10 = 1,000 samples between two checkpoints, a block in 0.15 of that time. Of 4 versions 2.85
# are left for a pass, so 0.95 * 6000 / 2.85 / 1000 = 2 scorers are needed.
USUAL = Observation(
    now=1000.0,
    wanted=2,
    samples=6000,
    block_size=150,
    audited=0,
    samples_per_second=100.0,
    publish_interval_s=10.0,
    silence_s=3.0,
    is_all_scored=False,
)
CONFIG = AutoscaleConfig(enabled=True, max_replicas=8, cooldown_s=30.0)
LONG_AGO = State(changed_at=0.0)
LOW_FOR_LONG = State(changed_at=0.0, low_since=0.0)


# -- the formula -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("known", "target", "needed"),
    [
        ({}, 4, 2.0),
        ({"samples": 60_000}, 4, 20.0),
        ({"samples_per_second": 50.0}, 4, 5700 / 2.7 / 500),
        ({"publish_interval_s": 2.0}, 4, 5700 / 2.25 / 200),
        ({"audited": 500}, 4, 2.5),  # half a scorer's time between two checkpoints
        ({}, 2, 5700 / 0.85 / 1000),
        ({}, 20, 5700 / 18.85 / 1000),
        ({"block_size": 1000}, 4, 5700 / 2 / 1000),
        ({"block_size": 2000}, 4, 3.0),  # 5.7, but there are three blocks
        ({"block_size": 3000}, 4, 2.0),  # no number is enough: all that have something to do
        ({"block_size": 9000}, 4, 1.0),
        ({"samples": 1}, 4, 1 / 3000),
        ({"samples_per_second": None}, 4, None),
        ({"publish_interval_s": None}, 4, None),
    ],
    ids=str,
)
def test_scorers_needed_by_hand(known: dict[str, Any], target: int, needed: float | None) -> None:
    assert pytest.approx(needed) == scorers_needed(dataclasses.replace(USUAL, **known), target)


@pytest.mark.parametrize(
    ("phase", "target", "needed", "scorers"),
    [
        (Phase(200, samples=28_000), 2, 7.18, 8),  # (0.95 * 28000 / 0.936 + 280) / 4000
        (Phase(200, samples=80_000), 4, 6.67, 7),
        (Phase(200, samples=180_000), 8, 6.62, 7),
        (Phase(200, samples=10_000, samples_per_second=50, interval_s=2.0), 8, 22.7, 23),  # 2.56 intervals for a block
    ],
    ids=["2 versions", "4 versions", "8 versions", "long blocks"],
)
def test_so_many_are_enough_and_a_third_of_them_is_not(phase: Phase, target: int, needed: float, scorers: int) -> None:
    """In the simulation, which counts ages and does not reckon them: at every moment, and at most moments."""
    rate, interval = phase.samples_per_second, phase.interval_s
    audited = max(128, phase.samples // 100)
    known = dataclasses.replace(
        USUAL,
        samples=phase.samples,
        block_size=256,
        audited=audited,
        samples_per_second=rate,
        publish_interval_s=interval,
    )
    assert pytest.approx(needed, rel=0.01) == scorers_needed(known, target)

    def ages(number: int) -> list[int]:
        fixed = AutoscaleConfig(enabled=True, min_replicas=number, max_replicas=number)
        ticks = Simulation(fixed, [phase], replicas=number, noise=0.02).ticks
        return [tick.p95 for tick in ticks if tick.time > 100]

    assert max(ages(scorers)) <= target
    assert sum(age > target for age in ages(scorers // 3)) > 300  # of 400


# -- decisions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("known", "state", "wanted", "reason"),
    [
        ({}, LONG_AGO, 2, r"^2\.0 scorers are needed for a p95 age of 4 versions: 6,000 samples, 100 a second each, a"),
        ({"wanted": 1}, LONG_AGO, 2, r"a checkpoint every 10 s$"),
        ({"wanted": 1}, State(), 2, ""),  # nothing changed before
        ({"wanted": 1}, State(970.0), 2, ""),
        ({"wanted": 1}, State(970.1), 1, r"the last change was 30 s ago, cooldown_s is 30$"),
        ({"wanted": 3}, LOW_FOR_LONG, 3, ""),  # 2 * 1.25 = 2.5: with the margin two are too few
        ({"wanted": 8}, LOW_FOR_LONG, 3, ""),
        ({"wanted": 8}, State(0.0, low_since=940.0), 3, ""),  # six intervals of 10 s are longer than the cooldown
        ({"wanted": 8}, State(0.0, low_since=940.1), 8, r"; down to 3 when that has been enough for 60 s$"),
        ({"wanted": 8}, LONG_AGO, 8, "down to 3"),
        ({"wanted": 8, "publish_interval_s": 4.0}, State(0.0, low_since=970.0), 7, ""),  # 5700 / 2.625 / 400 * 1.25
        ({"wanted": 8, "publish_interval_s": 4.0}, State(970.1, low_since=900.0), 8, "cooldown_s"),
        ({"wanted": 2, "samples": 600_000}, LONG_AGO, 8, r"^200\.0 scorers .*; max_replicas is 8$"),
        ({"wanted": 8, "samples": 600_000}, LONG_AGO, 8, "max_replicas is 8"),
        ({"wanted": 2, "block_size": 4000, "samples": 20_000}, LONG_AGO, 5, r"no number is enough, .*block_size lower"),
        ({"samples_per_second": None}, LONG_AGO, 2, r"^how fast a scorer is is not known yet$"),
        ({"publish_interval_s": None}, LONG_AGO, 2, r"^how often checkpoints come is not known yet$"),
        ({"publish_interval_s": None, "silence_s": math.inf, "is_all_scored": True}, LONG_AGO, 2, "not known yet"),
        ({"wanted": 0, "samples_per_second": None}, State(999.0), 1, ""),  # limits do not wait for a cooldown
        ({"wanted": 99, "samples_per_second": None}, State(999.0), 8, ""),
        (
            {"silence_s": 100.0, "is_all_scored": True},
            State(999.0),
            0,
            r"^the training is paused: no checkpoint for 100",
        ),
        ({"silence_s": 99.9, "is_all_scored": True}, LONG_AGO, 2, "needed"),
        ({"silence_s": 100.0}, LONG_AGO, 2, "needed"),  # there is work left
        ({"silence_s": 29.9, "publish_interval_s": 1.0, "is_all_scored": True, "wanted": 8}, LONG_AGO, 8, ""),
        ({"silence_s": 30.0, "publish_interval_s": 1.0, "is_all_scored": True, "wanted": 8}, LONG_AGO, 0, "paused"),
        ({"silence_s": 500.0, "wanted": 0}, State(990.0, before_pause=5), 0, "paused"),  # also when blocks are behind
        ({"silence_s": 0.5, "wanted": 0}, State(999.0, before_pause=5), 5, r"^the training goes on after a pause$"),
        ({"silence_s": 0.5, "wanted": 0}, State(999.0, before_pause=0), 1, "goes on"),
        ({"silence_s": 0.5, "wanted": 0}, State(999.0, before_pause=99), 8, "goes on"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None,
)
def test_decisions(known: dict[str, Any], state: State, wanted: int, reason: str) -> None:
    observed = dataclasses.replace(USUAL, **known)
    decided = autoscale(observed, CONFIG, state)

    assert wanted == decided.wanted
    assert re.search(reason, decided.reason), decided.reason
    assert (decided.state.changed_at == observed.now) == (wanted != observed.wanted)


def test_fewer_must_do_without_a_break() -> None:
    """What is needed goes up and down faster than the cooldown: nothing follows it down."""
    state, now = LONG_AGO, 1000.0
    for number in range(100):
        now += 10.0
        interval_s = 10.0 if number % 4 else 4.0
        observed = dataclasses.replace(USUAL, now=now, wanted=6, publish_interval_s=interval_s)
        decided = autoscale(observed, CONFIG, state)
        state = decided.state

        assert decided.wanted == 6


observations = st.builds(
    Observation,
    now=st.just(0.0),
    wanted=st.just(0),
    samples=st.integers(1, 10**7),
    block_size=st.integers(1, 10**4),
    audited=st.integers(0, 10**5),
    samples_per_second=st.none() | st.floats(1e-3, 1e6),
    publish_interval_s=st.none() | st.floats(1e-3, 1e4),
    silence_s=st.floats(0, 1e5),
    is_all_scored=st.booleans(),
)


@given(
    st.lists(st.tuples(st.floats(0.1, 100.0), observations), max_size=40),
    st.tuples(st.integers(1, 40), st.integers(1, 40)).map(sorted),
    st.integers(0, 60),
    st.floats(0, 200.0),
    st.integers(2, 20),
)
@settings(deadline=None, max_examples=200)
def test_whatever_is_measured_limits_and_cooldown_hold(
    course: list[tuple[float, Observation]], limits: list[int], wanted: int, cooldown_s: float, target: int
) -> None:
    config = AutoscaleConfig(
        enabled=True,
        min_replicas=limits[0],
        max_replicas=limits[1],
        cooldown_s=cooldown_s,
        target_age_versions=target,
    )
    state, now, changed_at, is_first = State(), 0.0, -math.inf, True
    for seconds, known in course:
        now += seconds
        observed = dataclasses.replace(known, now=now, wanted=wanted)
        before_pause = state.before_pause
        decided = autoscale(observed, config, state)

        is_paused = decided.state.before_pause is not None
        assert decided.reason
        assert decided.needed is None or 0 <= decided.needed <= math.ceil(observed.samples / observed.block_size)
        assert decided.wanted == 0 if is_paused else limits[0] <= decided.wanted <= limits[1]
        if is_paused:
            interval_s = observed.publish_interval_s
            assert interval_s is not None
            assert observed.silence_s >= max(PAUSE_INTERVALS * interval_s, MIN_PAUSE_S)
            assert decided.state.before_pause == (wanted if before_pause is None else before_pause)
        elif before_pause is not None:
            assert decided.wanted == min(max(before_pause, limits[0]), limits[1])
        elif decided.wanted != wanted and not is_first:
            assert now - changed_at >= cooldown_s
        if decided.wanted != wanted:
            changed_at = now
        wanted, state, is_first = decided.wanted, decided.state, False


# -- the whole loop, simulated -----------------------------------------------------------------------------------------

LOOP = AutoscaleConfig(enabled=True, max_replicas=12, cooldown_s=15.0)
USUALLY = Phase(300)  # (0.95 * 20000 / 2.94 + 200) / 4000 = 1.7 are needed; with the margin at most 2.1
COURSES = {
    "dataset": ([USUALLY, Phase(300, samples=80_000), USUALLY], [{2, 3}, {7, 8, 9}, {2, 3}]),  # 6.7, with margin 8.3
    "speed": ([USUALLY, Phase(300, samples_per_second=300), USUALLY], [{2, 3}, {6, 7}, {2, 3}]),  # 5.7, 7.2
    "publish rate": ([USUALLY, Phase(300, interval_s=1.0), USUALLY], [{2, 3}, {7, 8, 9, 10}, {2, 3}]),  # 7.2, 9.0
    "all at once": (
        [Phase(300, 40_000, 500, 2.0), Phase(300, 20_000, 1000, 8.0), Phase(300, 40_000, 1000, 2.0)],
        [{12}, {1, 2}, {7, 8, 9}],  # 15.1; 0.84, 1.05; 7.05, 8.8
    ),
}


def changes(simulation: Simulation) -> list[tuple[float, int]]:
    """When the wanted number changed, and by how many."""
    return [(b.time, b.wanted - a.wanted) for a, b in itertools.pairwise(simulation.ticks) if a.wanted != b.wanted]


@pytest.mark.parametrize(("name", "seed"), [(name, seed) for seed, name in enumerate(COURSES)])
def test_it_settles_after_each_step_and_does_not_oscillate(name: str, seed: int) -> None:
    """Every block and interval is 15 % longer or shorter than the next; scorers take 5 to 12 s to come up."""
    phases, expected = COURSES[name]
    loop = Simulation(LOOP, phases, seed=seed)
    changed = changes(loop)

    assert all(1 <= tick.wanted <= 12 for tick in loop.ticks)
    assert all(second - first >= LOOP.cooldown_s for (first, _), (second, _) in itertools.pairwise(changed))
    assert len(changed) == len(loop.scalings)
    for number, allowed in enumerate(expected):
        ticks = loop.of_phase(number)
        began, settled = ticks[0].time, ticks[2 * len(ticks) // 3 :]
        steps = [by for time, by in changed if began < time <= ticks[-1].time]

        assert len({by > 0 for by in steps}) <= 1, "one direction for one step"
        assert sum(time >= settled[0].time for time, _ in changed if time <= ticks[-1].time) <= 1, "it is settled"
        assert {tick.wanted for tick in settled} <= allowed
        if settled[0].wanted < LOOP.max_replicas:
            assert max(tick.p95 for tick in settled) <= LOOP.target_age_versions


def test_noise_alone_moves_nothing() -> None:
    """Twenty minutes of it, after the first."""
    loop = Simulation(LOOP, [Phase(1260, samples=40_000)], seed=4)

    assert [by for time, by in changes(loop) if time > 60.0] == []


@pytest.mark.parametrize(
    "pattern", [(0.5, 1.5), (0.5, 0.5, 1.5, 1.5), (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 4.0)], ids=str
)
def test_intervals_that_are_long_and_short_in_turn_move_nothing(pattern: tuple[float, ...]) -> None:
    """As where the trainer evaluates in between; the cooldown is shorter than any of them."""
    quick = LOOP.model_copy(update={"cooldown_s": 1.0})
    loop = Simulation(quick, [Phase(600, samples=100_000, interval_s=10.0, pattern=pattern)], noise=0.05)

    assert [by for time, by in changes(loop) if time > 120.0] == []
    assert max(tick.p95 for tick in loop.ticks if tick.time > 120.0) <= 4


def test_scorers_that_share_what_there_is_end_at_the_maximum() -> None:
    """More of them make each slower, so that more are needed; that must not swing."""
    crowded = Phase(400, samples=80_000, samples_per_second_of_all=3000)
    loop = Simulation(LOOP, [crowded])

    assert all(by > 0 for _, by in changes(loop))
    assert {tick.wanted for tick in loop.ticks if tick.time > 120.0} == {12}


def test_paused_training_has_no_scorers_and_gets_them_back_with_the_next_checkpoint() -> None:
    course = [Phase(150, 40_000), Phase(200, 40_000, interval_s=None), Phase(150, 40_000)]
    loop = Simulation(LOOP, course)
    before = loop.of_phase(0)[-1].wanted
    last = max(time for time in loop.published if time < 200.0)
    resumed = min(time for time in loop.published if time > 300.0)
    (slept, sleep), (woke, wake) = [(time, scaling) for time, scaling in loop.scalings if time > 150.0][:2]

    assert sleep.wanted == 0
    assert wake.wanted == before > 1
    assert 35.0 <= slept - last <= 50.0  # ten intervals of about 4 s
    assert resumed <= woke <= resumed + LOOK_INTERVAL_S + 0.25
    assert {tick.wanted for tick in loop.ticks if slept < tick.time < resumed} == {0}
    assert max(tick.p95 for tick in loop.ticks if tick.time > 450.0) <= 4


def test_much_slower_publishing_is_taken_for_a_pause_a_few_times_at_most() -> None:
    """Until the median has followed."""
    loop = Simulation(LOOP, [Phase(100, interval_s=2.0), Phase(700, interval_s=40.0)])

    assert 1 <= sum(scaling.wanted == 0 for _, scaling in loop.scalings) <= INTERVALS // 2
    assert [tick.wanted for tick in loop.ticks][-1] == 1


# -- what is measured --------------------------------------------------------------------------------------------------


def make_autoscaler(**settings: Any) -> Autoscaler:
    return Autoscaler(AutoscaleConfig(enabled=True, **settings), num_samples=6000, block_size=100, audited=0)


def test_speed_is_that_of_scorers_at_work() -> None:
    """The next lease comes while the one before is being scored; where there was none, waiting does not count."""
    autoscaler = make_autoscaler()
    for number, (leased, submitted) in enumerate([(0, 90), (10, 92), (90, 94), (92, 96), (500, 502), (900, 902)]):
        autoscaler.leased("a", number, leased)
        autoscaler.submitted("a", number, 100, submitted)

    assert autoscaler.samples_per_second == pytest.approx(50.0)  # two seconds each; the first, of 90 s, is warming up


def test_speed_is_known_from_three_blocks_and_outlives_the_scorers() -> None:
    autoscaler = make_autoscaler()
    known = []
    for number in range(4):
        autoscaler.leased("a", number, number)
        autoscaler.submitted("a", number, 100, number + 1)
        known.append(autoscaler.samples_per_second)
    autoscaler.forget("a")
    autoscaler.submitted("a", 99, 100, 1000)  # a drained one hands in its last
    autoscaler.leased("b", 7, 2000)
    autoscaler.submitted("b", 7, 100, 2100)  # the next one warms up
    autoscaler.submitted("b", 8, 100, 2200)  # a lease of an earlier life of the controller

    assert known == [None, None, None, pytest.approx(100.0)]
    assert autoscaler.samples_per_second == pytest.approx(100.0)


def test_speed_follows_a_change_in_about_half_a_minute_of_work() -> None:
    """At 100 samples/s, then at 25; three half-lives of 10 s leave an eighth of the time that was known before."""
    autoscaler, now = make_autoscaler(), 0.0
    for number in range(200):
        autoscaler.leased("a", number, now)
        now += 1.0 if number < 170 else 4.0
        autoscaler.submitted("a", number, 100, now)
        if number == 177:  # 32 s
            assert autoscaler.samples_per_second == pytest.approx(25.0 + 75.0 / 8, rel=0.2)

    assert autoscaler.samples_per_second == pytest.approx(25.0, rel=0.01)


def test_one_long_block_does_not_outweigh_what_was_known() -> None:
    autoscaler, now = make_autoscaler(), 0.0
    for number in range(100):
        autoscaler.leased("a", number, now)
        now += 1.0
        autoscaler.submitted("a", number, 100, now)
    autoscaler.leased("a", 100, now)
    autoscaler.submitted("a", 100, 100, now + 20.0)

    assert 30.0 < autoscaler.samples_per_second < 50.0  # not 5; what was known were about 15 s


@pytest.mark.parametrize(
    ("published", "interval_s"),
    [
        ([], None),
        ([(1, 0.0), (2, 5.0), (3, 10.0)], None),
        ([(1, 0.0), (2, 5.0), (3, 10.0), (4, 15.0)], 5.0),
        ([(1, 0.0), (2, 5.0), (3, 10.0), (4, 3615.0)], 5.0),  # an hour's pause
        ([(1, 0.0), (2, 5.0), (3, 3610.0), (4, 3615.0), (5, 7220.0), (6, 7225.0), (7, 7230.0)], 5.0),
        ([(1, 0.0), (2, 5.0), (4, 15.0), (7, 30.0)], 5.0),  # skipped versions count in ages
        ([(version, 5.0 * version) for version in range(50)] + [(50 + n, 250 + 2.0 * n) for n in range(7)], 2.0),
        ([(1, 100.0), (2, 50.0), (3, 0.0), (4, -50.0)], None),  # a clock that goes back
    ],
    ids=["none", "three", "four", "one gap", "two gaps", "skipped", "quicker", "clock"],
)
def test_publish_interval_is_the_median_of_the_last(
    published: list[tuple[int, float]], interval_s: float | None
) -> None:
    autoscaler = make_autoscaler()
    autoscaler.published([checkpoint(*one) for one in published], now=0.0)

    assert autoscaler.publish_interval_s == interval_s
    assert autoscaler.newest_version == (published[-1][0] if published else 0)


# -- in the controller -------------------------------------------------------------------------------------------------

SAMPLES, BLOCK = 600, 10


class Clock:
    """In place of the controller's `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(services.controller, "time", clock)
    return clock


@contextmanager
def controller_of(run: Path, *, wanted: int = 1, enabled: bool = True) -> Iterator[Controller]:
    config = ControllerConfig(
        block_size=BLOCK,
        commit_interval_s=0.001,
        lease_timeout_s=1e9,
        audit_share=0,
        autoscale=AutoscaleConfig(enabled=enabled),
    )
    controller = Controller(str(run), SAMPLES, "id", config, wanted=wanted)
    try:
        yield controller
    finally:
        controller.close()


def publish(run: Path, version: int, published_at: float) -> None:
    folder = run / "checkpoints" / f"v{version:08d}"
    folder.mkdir(parents=True)
    meta = {"step": version, "published_at": published_at, "sha256": "", "bytes": 0, "tied": {}}
    (folder / "meta.json").write_text(json.dumps(meta))
    (folder / "STABLE").write_text("")


def publish_four(run: Path) -> None:
    """One every ten seconds."""
    for version in range(1, 5):
        publish(run, version, 10.0 * version)


def score(controller: Controller, clock: Clock, version: int, blocks: int, seconds: float = 1.0) -> None:
    """One scorer scores blocks one after another."""
    for _ in range(blocks):
        lease = controller.lease("a", version)
        assert lease is not None
        clock.now += seconds
        controller.submit("a", lease.lease_id, make_rows(lease.sample_ids, version))


def scaled(run: Path) -> list[tuple[int, int, str]]:
    events = [event for event in read_events(run) if event["event"] == "scaled"]
    return [(event["before"], event["wanted"], event["reason"]) for event in events]


def test_controller_starts_what_its_measurements_ask_for(tmp_path: Path, clock: Clock) -> None:
    """10 samples/s, a checkpoint every 10 s: (0.95 * 600 / 2.9) / 100 = 1.97."""
    with controller_of(tmp_path) as controller:
        first = controller.decide(()), controller.status()["autoscaler"]
        publish_four(tmp_path)
        score(controller, clock, 4, 5)
        decided, status = controller.decide(("a",)), controller.status()

    assert first[0] == [Start(1)]
    assert first[1] == {
        "enabled": True,
        "needed": None,
        "reason": "how often checkpoints come is not known yet",
        "target_age_versions": 4,
        "scorer_samples_per_second": None,
        "publish_interval_s": None,
    }
    assert decided == [Start(1)]
    assert (status["wanted"], status["autoscaler"]["enabled"]) == (2, True)
    assert status["autoscaler"]["needed"] == pytest.approx(570 / 2.9 / 100)
    assert status["autoscaler"]["scorer_samples_per_second"] == pytest.approx(10.0)
    assert status["autoscaler"]["publish_interval_s"] == 10.0
    assert scaled(tmp_path) == [(1, 2, status["autoscaler"]["reason"])]
    assert "2.0 scorers are needed for a p95 age of 4 versions: 600 samples, 10 a second each" in scaled(tmp_path)[0][2]
    assert ScoreReader(tmp_path / "scores").metadata["wanted"] == 2


def test_controller_looks_for_checkpoints_once_a_second(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[float] = []

    def look(run: Path, version: int) -> list[Any]:
        looks.append(clock.now)
        return checkpoints_after(run, version)

    monkeypatch.setattr(services.controller, "checkpoints_after", look)
    with controller_of(tmp_path) as controller:
        for _ in range(12):  # three seconds of the driver's ticks
            controller.decide(("a",))
            clock.now += 0.25

    assert looks == [1000.0, 1001.0, 1002.0]


def test_without_autoscaling_no_file_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services.controller, "checkpoints_after", None)
    with controller_of(tmp_path, enabled=False) as controller:
        assert controller.decide(()) == [Start(1)]
        controller.set_wanted(2)
        status = controller.status()["autoscaler"]

    assert (status["enabled"], status["needed"], status["reason"]) == (False, None, None)


def test_files_are_looked_at_without_the_lock(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scorers and REST go on while a disk hangs."""
    answered = []

    def hang(run: Path, version: int) -> list[Any]:
        with ThreadPoolExecutor(1) as other:
            answered.append(other.submit(controller.status).result(timeout=LIMIT_S))
        return []

    monkeypatch.setattr(services.controller, "checkpoints_after", hang)
    with controller_of(tmp_path) as controller:
        controller.decide(())

    assert len(answered) == 1


def test_checkpoints_that_cannot_be_listed_change_nothing(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with controller_of(tmp_path, wanted=2) as controller:
        publish_four(tmp_path)
        score(controller, clock, 4, SAMPLES // BLOCK)
        controller.decide(("a", "b"))
        (tmp_path / "checkpoints").rename(tmp_path / "away")
        (tmp_path / "checkpoints").write_text("a file")
        clock.now += 1000.0
        away = controller.decide(("a", "b"))
        (tmp_path / "checkpoints").unlink()
        (tmp_path / "away").rename(tmp_path / "checkpoints")
        publish(tmp_path, 5, 50.0)
        clock.now += 1.0
        back = controller.decide(("a", "b"))

    assert (away, back) == ([], [])
    assert "the checkpoints cannot be listed, and 2 scorers stay wanted" in caplog.text
    assert scaled(tmp_path) == []


def test_controller_drains_all_while_the_training_is_paused_and_starts_them_again(tmp_path: Path, clock: Clock) -> None:
    with controller_of(tmp_path, wanted=2) as controller:
        publish_four(tmp_path)
        score(controller, clock, 4, SAMPLES // BLOCK)
        controller.flush()
        controller.decide(("a", "b"))
        clock.now += 99.0
        waits = controller.decide(("a", "b"))
        clock.now += 1.0
        pauses = controller.decide(("a", "b"))
        controller.flush()
        noted = ScoreReader(tmp_path / "scores").metadata["wanted"]
        needed = controller.status()["autoscaler"]["needed"]
        publish(tmp_path, 5, 140.0)
        clock.now += 1.0
        goes_on = controller.decide(())

    assert (waits, pauses, goes_on) == ([], [Drain(("a", "b"))], [Start(2)])
    assert (noted, needed) == (2, 0.0)  # a controller restarted meanwhile begins with two
    assert [(before, wanted) for before, wanted, _ in scaled(tmp_path)] == [(2, 0), (0, 2)]
    assert "the training is paused: no checkpoint for 100 s, where one came every 10 s" in scaled(tmp_path)[0][2]


def test_wish_ends_autoscaling_until_the_next_attempt(tmp_path: Path, clock: Clock) -> None:
    """Also in a controller that is restarted meanwhile."""
    begin(tmp_path, fork_step=0, last_valid_version=0, first_version=1)
    publish_four(tmp_path)
    with controller_of(tmp_path) as controller:
        controller.set_wanted(3)
        score(controller, clock, 4, 5)
        first = controller.decide(("a",)), controller.status()["autoscaler"]
    with controller_of(tmp_path) as controller:
        score(controller, clock, 4, 5)
        restarted = controller.decide(("a",)), controller.status()["autoscaler"]
    begin(tmp_path, fork_step=4, last_valid_version=4, first_version=5)
    with controller_of(tmp_path) as controller:
        resumed = controller.decide(("a",)), controller.status()["autoscaler"]

    for decided, status in (first, restarted):
        assert decided == [Start(2)]
        assert (status["enabled"], status["needed"]) == (False, None)
        assert status["reason"] == (
            "3 were asked for, by steppe scale or PATCH /v1/scorers: autoscaling is off until this attempt ends"
        )
    assert resumed[0] == []
    assert (resumed[1]["enabled"], resumed[1]["reason"]) == (True, "how fast a scorer is is not known yet")
    assert scaled(tmp_path) == [(1, 3, "asked for")]


def test_wish_during_a_look_at_the_files_holds(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    with controller_of(tmp_path) as controller:
        publish_four(tmp_path)
        score(controller, clock, 4, 5)

        def look(run: Path, version: int) -> list[Any]:
            controller.set_wanted(4)
            return checkpoints_after(run, version)

        monkeypatch.setattr(services.controller, "checkpoints_after", look)

        assert controller.decide(("a",)) == [Start(3)]
        assert controller.status()["wanted"] == 4


# -- settings ----------------------------------------------------------------------------------------------------------


def test_limits_that_leave_no_room_are_refused() -> None:
    with refuses(ConfigError, "controller.autoscale.min_replicas", "5, above max_replicas, 4"):
        make_config(AutoscaleConfig, {"min_replicas": 5})
    assert make_config(AutoscaleConfig, {"min_replicas": 4}).min_replicas == 4
