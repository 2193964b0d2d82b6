"""The autoscaler: how many scorers keep the scores as young as they should be, a pure function of what was measured."""

import dataclasses
import itertools
import math
import os
import statistics
from collections import deque
from collections.abc import Iterable
from typing import Any

from services.config import AutoscaleConfig
from shared.checkpoints import Checkpoint, stable

LOOK_INTERVAL_S = 1.0
SHARE = 0.95  # of the scores that shall be within the target
MARGIN = 1.25  # so much more than needed must be left before a scorer goes
SLACK = 1.1  # so much more than there is may be needed before one comes: rates are noisy, and the need is reckoned high
INTERVALS = 6  # the last ones, of which the median counts; even, so that long and short ones in turn give their mean
MIN_INTERVALS = 3
PAUSE_INTERVALS, MIN_PAUSE_S = 10, 30.0  # without a checkpoint for so long the training is paused
HALF_LIFE_S = 10.0  # of a scorer's measured speed, in seconds of its work
LEAST_MEMORY = 0.75  # however long a block took, what was known before counts so much
MIN_BLOCKS = 3


@dataclasses.dataclass(frozen=True)
class Observation:
    """What is known now.

    Args:
        now: seconds of any clock that does not go back.
        wanted: scorers so far.
        samples: N.
        block_size: samples that one scorer takes at once.
        audited: samples that are scored at every version besides.
        samples_per_second: of one scorer at work; None while unknown.
        publish_interval_s: between two checkpoints, as a rule; None while unknown.
        silence_s: since the last checkpoint came.
        is_all_scored: every block has scores of the newest checkpoint.
    """

    now: float
    wanted: int
    samples: int
    block_size: int
    audited: int
    samples_per_second: float | None
    publish_interval_s: float | None
    silence_s: float
    is_all_scored: bool


@dataclasses.dataclass(frozen=True)
class State:
    """What one decision leaves for the next: when the number last changed, since when fewer would have done without a
    break, and while the training is paused the number before."""

    changed_at: float = -math.inf
    low_since: float | None = None
    before_pause: int | None = None


@dataclasses.dataclass(frozen=True)
class Scaling:
    """A decision: the number of scorers from now on, and why. `needed` is before limits and margins; None: unknown."""

    wanted: int
    needed: float | None
    reason: str
    state: State


def scorers_needed(observed: Observation, target_age_versions: int) -> float | None:
    """How many scorers keep the 95th percentile of the scores' ages within K versions; None while a rate is unknown.

    A checkpoint comes every P seconds, and A samples of the audit are scored at each. n scorers of R samples/s then go
    round the N samples in L = N / (n R - A / P) seconds. What was scored longest ago comes next, so the times since
    the blocks' weights were taken are spread evenly from l to l + L, where l = B / R is how long a block of B samples
    takes; 95 % of them are below 0.95 L + l. In a time t at most t / P + 1 checkpoints come, so these are within K if

        0.95 L / P <= K - 1 - l / P =: V    that is    n >= (0.95 N / V + A) / (R P)

    Scorers that are through before the next checkpoint wait for it, and their scores are one version old at most. More
    scorers than blocks are of no use, and where V is not positive no number is enough.
    """
    rate, interval = observed.samples_per_second, observed.publish_interval_s
    if rate is None or interval is None:
        return None
    per_version = rate * interval  # what one scorer scores between two checkpoints
    blocks = math.ceil(observed.samples / observed.block_size)
    versions = target_age_versions - 1 - observed.block_size / per_version
    if versions <= 0:
        return float(blocks)
    return min((SHARE * observed.samples / versions + observed.audited) / per_version, float(blocks))


def autoscale(observed: Observation, config: AutoscaleConfig, state: State) -> Scaling:
    """The number of scorers from now on.

    None while the training is paused, that is when no checkpoint came for long and nothing is left to score; with the
    next one as many as before. What is not known changes nothing.
    """
    before = state.before_pause
    if _is_paused(observed, is_known=before is not None):
        reason = (
            f"the training is paused: no checkpoint for {observed.silence_s:.0f} s, where one came every "
            f"{observed.publish_interval_s:.3g} s, and all samples have scores of the newest"
        )
        falls_asleep = State(observed.now, before_pause=observed.wanted)
        return Scaling(0, 0.0, reason, falls_asleep if before is None else state)
    needed = scorers_needed(observed, config.target_age_versions)
    if before is not None:
        return Scaling(_within(before, config), needed, "the training goes on after a pause", State(observed.now))
    return _follow(observed, config, state, needed)


def _follow(observed: Observation, config: AutoscaleConfig, state: State, needed: float | None) -> Scaling:
    """More at once when more than a little is lacking; fewer when a margin too has been enough for a cooldown, and for
    as many checkpoints as their interval is measured by; either at the earliest a cooldown after the last change."""
    now, wanted = observed.now, observed.wanted
    enough = fewer = _within(wanted, config)
    if needed is not None:
        enough, fewer = (_within(_whole(needed * factor), config) for factor in (1.0, MARGIN))
        if needed <= SLACK * wanted:
            enough = _within(min(enough, wanted), config)
    low_since = (now if state.low_since is None else state.low_since) if fewer < wanted else None
    hold_s = max(config.cooldown_s, INTERVALS * (observed.publish_interval_s or 0.0))
    is_cool = now - state.changed_at >= config.cooldown_s
    target, reason = wanted, _explain(observed, config, needed)
    if wanted != _within(wanted, config) or (is_cool and enough > wanted):
        target = enough
    elif not is_cool and (enough > wanted or fewer < wanted):
        reason += f"; the last change was {now - state.changed_at:.0f} s ago, cooldown_s is {config.cooldown_s:g}"
    elif low_since is not None and now - low_since >= hold_s:
        target = fewer
    elif low_since is not None:
        reason += f"; down to {fewer} when that has been enough for {hold_s:.0f} s"
    left = State(now) if target != wanted else dataclasses.replace(state, low_since=low_since)
    return Scaling(target, needed, reason, left)


def _is_paused(observed: Observation, *, is_known: bool) -> bool:
    if observed.publish_interval_s is None:
        return False
    is_silent = observed.silence_s >= max(PAUSE_INTERVALS * observed.publish_interval_s, MIN_PAUSE_S)
    return is_silent and (is_known or observed.is_all_scored)


def _whole(needed: float) -> int:
    return math.ceil(needed - 1e-9)


def _within(replicas: int, config: AutoscaleConfig) -> int:
    return min(max(replicas, config.min_replicas), config.max_replicas)


def _explain(observed: Observation, config: AutoscaleConfig, needed: float | None) -> str:
    """Why so many are needed, for people."""
    rate, interval = observed.samples_per_second, observed.publish_interval_s
    if interval is None:
        return "how often checkpoints come is not known yet"
    if rate is None or needed is None:
        return "how fast a scorer is is not known yet"
    reason = (
        f"{needed:.1f} scorers are needed for a p95 age of {config.target_age_versions} versions: "
        f"{observed.samples:,} samples, {rate:,.0f} a second each, a checkpoint every {interval:.3g} s"
    )
    if observed.block_size / rate >= (config.target_age_versions - 1) * interval:
        return f"{reason}; no number is enough, since a block takes too long: set controller.block_size lower"
    if _whole(needed) > config.max_replicas:
        return f"{reason}; max_replicas is {config.max_replicas}"
    if _whole(needed) < config.min_replicas:
        return f"{reason}; min_replicas is {config.min_replicas}"
    return reason


def checkpoints_after(uri: str | os.PathLike[str], model_version: int) -> list[Checkpoint]:
    """The stable checkpoints of the run folder `uri` that are newer than `model_version`, oldest first."""
    return list(itertools.takewhile(lambda one: one.model_version > model_version, stable(uri)))[::-1]


class Autoscaler:
    """Makes observations of what a controller hears, and keeps the last decision. No clock, no threads, no I/O.

    Args:
        num_samples: N.
        block_size: samples of a block.
        audited: samples that are scored at every version besides.
        wish: the number that somebody asked for in this attempt: it holds, and nothing is decided here.
    """

    def __init__(
        self, config: AutoscaleConfig, num_samples: int, block_size: int, audited: int, wish: int | None = None
    ) -> None:
        self._config = config
        self.num_samples, self.block_size, self.audited = num_samples, block_size, audited
        self.is_on = config.enabled
        self._looked_at = self._heard_at = -math.inf
        self._newest: Checkpoint | None = None
        self._intervals_s: deque[float] = deque(maxlen=INTERVALS)
        self._granted: dict[str, dict[int, float]] = {}  # when, by scorer and lease
        self._submitted: dict[str, float] = {}  # when last, by scorer
        self._blocks, self._rows, self._busy_s = 0, 0.0, 0.0  # the latter two fade
        self._last = Scaling(0, None, "", State())
        if wish is not None:
            self.wish(wish)

    # -- what is heard ---------------------------------------------------------------------------------------------

    def leased(self, scorer_id: str, lease_id: int, now: float) -> None:
        self._granted.setdefault(scorer_id, {})[lease_id] = now

    def submitted(self, scorer_id: str, lease_id: int, rows: int, now: float) -> None:
        """A scorer handed in a lease. It worked at it since it got it, or since it handed in the one before.

        Its first one does not count, with which it warms up; nor one of an earlier life of the controller, nor what
        comes after it is gone.
        """
        if (leases := self._granted.get(scorer_id)) is None:
            return
        granted, before = leases.pop(lease_id, None), self._submitted.get(scorer_id)
        self._submitted[scorer_id] = now
        if granted is None or before is None or not rows:
            return
        busy_s = now - max(granted, before)
        keep = max(0.5 ** (busy_s / (HALF_LIFE_S * len(self._submitted))), LEAST_MEMORY)
        self._blocks += 1
        self._rows = self._rows * keep + rows
        self._busy_s = self._busy_s * keep + busy_s

    def forget(self, scorer_id: str) -> None:
        """A scorer is gone; what it showed of a scorer's speed stays."""
        self._granted.pop(scorer_id, None)
        self._submitted.pop(scorer_id, None)

    def published(self, checkpoints: Iterable[Checkpoint], now: float) -> None:
        """New ones, oldest first. Versions that were skipped count, since ages do so too."""
        for one in checkpoints:
            if self._newest is not None:
                versions = one.model_version - self._newest.model_version
                self._intervals_s.append((one.published_at - self._newest.published_at) / versions)
            self._newest, self._heard_at = one, now

    def wish(self, replicas: int) -> None:
        """Somebody asked for so many: that holds from now on."""
        if self.is_on:
            self.is_on = False
            reason = "were asked for, by steppe scale or PATCH /v1/scorers: autoscaling is off until this attempt ends"
            self._last = Scaling(replicas, None, f"{replicas} {reason}", State())

    # -- what is decided -------------------------------------------------------------------------------------------

    @property
    def newest_version(self) -> int:
        return self._newest.model_version if self._newest else 0

    @property
    def samples_per_second(self) -> float | None:
        """Of one scorer at work."""
        return self._rows / self._busy_s if self._blocks >= MIN_BLOCKS and self._busy_s > 0 else None

    @property
    def publish_interval_s(self) -> float | None:
        """The median of the last few."""
        interval_s = statistics.median(self._intervals_s) if len(self._intervals_s) >= MIN_INTERVALS else 0.0
        return interval_s if interval_s > 0 else None  # clocks may go back

    def is_due(self, now: float) -> bool:
        return self.is_on and now - self._looked_at >= LOOK_INTERVAL_S

    def decide(self, wanted: int, oldest_block_version: int, now: float) -> Scaling:
        self._looked_at = now
        observed = Observation(
            now=now,
            wanted=wanted,
            samples=self.num_samples,
            block_size=self.block_size,
            audited=self.audited,
            samples_per_second=self.samples_per_second,
            publish_interval_s=self.publish_interval_s,
            silence_s=now - self._heard_at,
            is_all_scored=oldest_block_version >= self.newest_version,
        )
        self._last = autoscale(observed, self._config, self._last.state)
        return self._last

    # -- what is told ----------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """For people and REST."""
        return {
            "enabled": self.is_on,
            "needed": self._last.needed,
            "reason": self._last.reason or None,
            "target_age_versions": self._config.target_age_versions,
            "scorer_samples_per_second": self.samples_per_second,
            "publish_interval_s": self.publish_interval_s,
        }

    def notes(self, wanted: int) -> dict[str, Any]:
        """For the store: with how many scorers a restarted controller begins, and whether that is somebody's wish.

        It hears anew whether the training is paused, so it begins with as many as before the pause.
        """
        before = self._last.state.before_pause if self.is_on else None
        return {"wanted": wanted if before is None else before, "wished": self._config.enabled and not self.is_on}
