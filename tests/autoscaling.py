"""A simulated run on a clock of its own: a trainer publishes, scorers come up, score and go, the autoscaler is the real
one. Blocks and audit are the real ones too, and the ages are counted from what was committed."""

import dataclasses
import functools
import heapq
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from services.audit import Audit
from services.autoscaler import Autoscaler, Scaling
from services.blocks import BlockTable
from services.config import AutoscaleConfig
from shared.checkpoints import Checkpoint
from shared.leases import AUDIT, Lease

BLOCK = 256
AUDIT_SHARE = 0.01
TICK_S = 0.25
LONG_S = 1e9
STARTUP_S = (5.0, 12.0)
COMMIT_S = (0.05, 0.3)
POLL_S = 0.05


@dataclasses.dataclass(frozen=True)
class Phase:
    """How it is for some seconds; `pattern` are factors of the interval in turn, without an interval none comes."""

    seconds: float
    samples: int = 20_000
    samples_per_second: float = 1000.0  # of one scorer
    interval_s: float | None = 4.0
    pattern: tuple[float, ...] = (1.0,)
    samples_per_second_of_all: float = math.inf


@dataclasses.dataclass(frozen=True)
class Tick:
    """A moment; `p95` is the age in versions that 95 % of the scored samples do not exceed."""

    time: float
    phase: int
    wanted: int
    p95: int


@dataclasses.dataclass
class _Scorer:
    scorer_id: str
    is_drained: bool = False
    coming: Lease | None = None


def checkpoint(version: int, published_at: float) -> Checkpoint:
    return Checkpoint(Path(), version, version * 10, published_at, "", 0, {})


class Simulation:
    """Run at once, to the end; `ticks`, the `scalings` that changed something, and the times of checkpoints.

    Args:
        noise: standard deviation of the logarithm of how long a block takes, and of the time between checkpoints.
    """

    def __init__(
        self, config: AutoscaleConfig, phases: list[Phase], *, replicas: int = 1, seed: int = 0, noise: float = 0.15
    ) -> None:
        self.ticks: list[Tick] = []
        self.scalings: list[tuple[float, Scaling]] = []
        self.published: list[float] = []
        self._chance, self._noise = np.random.default_rng(seed), noise
        self._now, self._events, self._order = 0.0, list[tuple[float, int, Callable[[], object]]](), itertools.count()
        self._phases, self._phase = phases, 0
        self._set_data(phases[0].samples)
        self._autoscaler = Autoscaler(config, phases[0].samples, BLOCK, len(self._audit))
        self._news: list[Checkpoint] = []
        self._wanted = replicas
        self._scorers: dict[str, _Scorer] = {}
        self._started, self._working = itertools.count(1), 0
        self._idle: list[_Scorer] = []
        end = sum(phase.seconds for phase in phases)
        for number, began in enumerate(itertools.accumulate((phase.seconds for phase in phases[:-1]), initial=0.0)):
            self._at(began, functools.partial(self._begin, number))
        self._at(0.0, self._tick)
        while self._events[0][0] < end:
            self._now, _, happens = heapq.heappop(self._events)
            happens()

    def of_phase(self, number: int) -> list[Tick]:
        return [tick for tick in self.ticks if tick.phase == number]

    def _at(self, time: float, happens: Callable[[], object]) -> None:
        heapq.heappush(self._events, (time, next(self._order), happens))

    def _noisy(self, seconds: float) -> float:
        return seconds * math.exp(self._chance.normal(-(self._noise**2) / 2, self._noise))

    # -- trainer ---------------------------------------------------------------------------------------------------

    def _begin(self, number: int) -> None:
        before, self._phase = self._phases[self._phase], number
        phase = self._phases[number]
        if phase.samples != before.samples:
            self._set_data(phase.samples)
            self._autoscaler.num_samples, self._autoscaler.audited = phase.samples, len(self._audit)
        if phase.interval_s is not None and (number == 0 or before.interval_s is None):
            self._at(self._now + phase.interval_s, self._publish)

    def _set_data(self, samples: int) -> None:
        """Other data: nothing of it is scored, and what is being scored is of no use any more."""
        self._blocks, self._audit = BlockTable(samples, BLOCK), Audit(samples, AUDIT_SHARE)
        self._version_of = np.zeros(len(self._blocks), dtype=np.int64)

    def _publish(self) -> None:
        phase = self._phases[self._phase]
        if phase.interval_s is None:
            return
        self.published.append(self._now)
        self._news.append(checkpoint(len(self.published), self._now))
        factor = phase.pattern[len(self.published) % len(phase.pattern)]
        self._at(self._now + self._noisy(phase.interval_s * factor), self._publish)
        self._wake()

    # -- scorers ---------------------------------------------------------------------------------------------------

    def _work(self, scorer: _Scorer) -> None:
        if scorer.is_drained:
            self._blocks.release(scorer.scorer_id)
            self._audit.release(scorer.scorer_id)
            return
        lease, scorer.coming = scorer.coming or self._lease(scorer), None
        if lease is None:
            self._idle.append(scorer)
            return
        scorer.coming = self._lease(scorer)
        self._working += 1
        phase = self._phases[self._phase]
        rate = min(phase.samples_per_second, phase.samples_per_second_of_all / self._working)
        done = functools.partial(self._done, scorer, lease, self._blocks, len(self.published))
        self._at(self._now + self._noisy(len(lease.sample_ids) / rate), done)

    def _wake(self) -> None:
        """There may be something to score for who has nothing to do."""
        idle, self._idle = self._idle, []
        for scorer in idle:
            self._at(self._now + POLL_S, functools.partial(self._work, scorer))

    def _lease(self, scorer: _Scorer) -> Lease | None:
        version = len(self.published)
        lease = self._audit.lease(scorer.scorer_id, version, self._now, LONG_S)
        lease = lease or self._blocks.lease(scorer.scorer_id, version, self._now, LONG_S)
        if lease is not None:
            self._autoscaler.leased(scorer.scorer_id, lease.lease_id, self._now)
        return lease

    def _done(self, scorer: _Scorer, lease: Lease, blocks: BlockTable, version: int) -> None:
        self._working -= 1
        self._autoscaler.submitted(scorer.scorer_id, lease.lease_id, len(lease.sample_ids), self._now)
        if blocks is not self._blocks:
            scorer.coming = None
        elif lease.block == AUDIT:
            self._audit.submitted(lease.lease_id, lease.sample_ids, version, is_block=False)
        else:
            blocks.submitted(lease.lease_id, lease.block, scorer.scorer_id)
            commit = functools.partial(self._commit, lease, blocks, version)
            self._at(self._now + self._chance.uniform(*COMMIT_S), commit)
        self._work(scorer)

    def _commit(self, lease: Lease, blocks: BlockTable, version: int) -> None:
        if blocks is self._blocks:
            blocks.committed([(lease.lease_id, lease.block, version)])
            self._version_of[lease.block] = version
            self._wake()

    # -- controller and driver -------------------------------------------------------------------------------------

    def _tick(self) -> None:
        if self._autoscaler.is_due(self._now):
            self._autoscaler.published(self._news, self._now)
            self._news.clear()
            scaling = self._autoscaler.decide(self._wanted, self._blocks.oldest_version, self._now)
            if scaling.wanted != self._wanted:
                self.scalings.append((self._now, scaling))
            self._wanted = scaling.wanted
        for _ in range(self._wanted - len(self._scorers)):
            scorer = _Scorer(f"scorer-{next(self._started)}")
            self._scorers[scorer.scorer_id] = scorer
            self._at(self._now + self._chance.uniform(*STARTUP_S), functools.partial(self._work, scorer))
        for scorer_id in list(self._scorers)[self._wanted :]:
            scorer = self._scorers.pop(scorer_id)
            scorer.is_drained = True
            self._autoscaler.forget(scorer_id)
            if scorer in self._idle:
                self._idle.remove(scorer)
        scored = self._version_of[self._version_of > 0]
        ages = len(self.published) - scored
        p95 = int(np.quantile(ages, 0.95, method="inverted_cdf")) if len(ages) else 0
        self.ticks.append(Tick(self._now, self._phase, self._wanted, p95))
        self._at(self._now + TICK_S, self._tick)
