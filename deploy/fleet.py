"""The driver's fleet loop: carries out the controller's decisions on scorer actors, which the driver owns."""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import ray

from deploy.actors import Handle, RemoteFleet, ask
from deploy.placement import draining_nodes, missing, needs_of
from scorer.config import ScoringConfig
from services.controller import Decision, Drain, Start
from shared.errors import ServiceError
from shared.events import Events

logger = logging.getLogger(__name__)

TICK_S = 0.25
STATUS_INTERVAL_S = 1.0
DRAIN_TIMEOUT_S = 5.0  # of a scorer that hangs; one that lives goes after the batch at hand
LONGEST_BACKOFF_S = 30.0
LONGEST_START_S = 20.0  # a scorer that takes longer is reported


@dataclasses.dataclass
class _Scorer:
    handle: Handle
    ready: "ray.ObjectRef[tuple[int, str]]"
    done: "ray.ObjectRef[int]"
    launched: float  # monotonic
    node_id: str = ""  # once it is up
    drained_by: float | None = None  # monotonic deadline once it is told to go


class Fleet:
    """Starts, replaces and drains scorers in a thread; a controller that does not answer is asked again.

    `first_scorer` is set once a scorer waits for weights; `status` is the controller's last answer.

    Args:
        start: makes the actor of a scorer's id.
        scoring: what one scorer needs, and where it may go.
        say: told, once each, what went wrong, in words for people.
        on_change: called when the controller answers from another process.
    """

    def __init__(
        self,
        controller: Handle,
        start: Callable[[str], Handle],
        scoring: ScoringConfig,
        say: Callable[[str], None],
        events: Events,
    ) -> None:
        self._controller = controller
        self._start = start
        self._needs = needs_of(scoring)
        self._labels = (scoring.labels, *scoring.fallback_labels) if scoring.labels else ()
        self._say = say
        self._events = events
        self.on_change: Callable[[], None] = lambda: None
        self._said: set[str] = set()
        self._waiting = ""  # why scorers that were started are not up
        self._scorers: dict[str, _Scorer] = {}
        self._started = 0
        self._failures = 0  # of scorers that never scored, in a row
        self._not_before = 0.0
        self._status_due = 0.0
        self.first_scorer = threading.Event()
        self.status: dict[str, Any] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="fleet", daemon=True)
        self._thread.start()

    @property
    def controller_pid(self) -> int | None:
        return self.status.get("pid")

    def lacking(self) -> str | None:
        """What one scorer needs and no host of the cluster has at all; None when it could be placed."""
        return missing(self._needs, self._labels, ray.nodes())  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """Drain all scorers, then end those that do not go within the drain timeout. Twice is fine."""
        self._stop.set()
        self._thread.join()
        self._update_status()
        self._drain(tuple(self._scorers))
        while self._scorers:
            self._reap()

    def _loop(self) -> None:
        while not self._stop.is_set():
            try:
                self._tick()
            except Exception as error:
                logger.exception("the fleet loop failed and goes on")
                self._report(f"the fleet loop failed and goes on: {error}")
                self._stop.wait(STATUS_INTERVAL_S)

    def _tick(self) -> None:
        self._reap()
        self._carry_out()
        if time.monotonic() >= self._status_due:
            self._status_due = time.monotonic() + STATUS_INTERVAL_S
            self._update_status()
            self._leave_draining_nodes()
            self._report_waiting()
        if not self._scorers:
            self._stop.wait(TICK_S)

    def _reap(self) -> None:
        """Wait up to a tick for a scorer to become ready or to end, and see which did."""
        waiting: list[ray.ObjectRef[Any]] = [scorer.done for scorer in self._scorers.values()]
        waiting += [scorer.ready for scorer in self._scorers.values() if not scorer.node_id]
        if waiting:
            ray.wait(waiting, num_returns=1, timeout=TICK_S)
        for scorer_id, scorer in list(self._scorers.items()):
            if not scorer.node_id and _succeeded(scorer.ready):
                pid, scorer.node_id = ray.get(scorer.ready)
                self.first_scorer.set()
                self._events.append("scorer_up", scorer_id=scorer_id, pid=pid, node_id=scorer.node_id)
            overdue = scorer.drained_by is not None and time.monotonic() > scorer.drained_by
            if _is_done(scorer.done) or overdue:
                self._remove(scorer_id, scorer)

    def _remove(self, scorer_id: str, scorer: _Scorer) -> None:
        del self._scorers[scorer_id]
        ray.kill(scorer.handle)
        if scorer.drained_by is not None:
            if scorer.node_id:  # else it never was up
                self._events.append("scorer_down", scorer_id=scorer_id, reason="drained")
            return
        try:
            ray.get(scorer.done, timeout=0)
            reason = "it ended by itself"
        except Exception as error:  # whatever ended it is reported, and a new one started
            reason = str(error).strip().splitlines()[-1]
        self._failures = 0 if self._has_scored(scorer_id) else self._failures + 1
        wait_s = min(0.5 * 2 ** (self._failures - 1), LONGEST_BACKOFF_S) if self._failures else 0.0
        self._not_before = time.monotonic() + wait_s
        self._events.append("scorer_down", scorer_id=scorer_id, reason=reason, next_start_in_s=wait_s)
        self._report(f"{scorer_id} ended and is replaced: {reason}")

    def _has_scored(self, scorer_id: str) -> bool:
        self._update_status()  # it may have scored since, and the controller forgets it at its next decision
        return any(one["scorer_id"] == scorer_id and one["scored"] for one in self.status.get("scorers", []))

    def _carry_out(self) -> None:
        alive = tuple(i for i, scorer in self._scorers.items() if scorer.drained_by is None)
        try:
            decisions: list[Decision] = ask(self._controller.decide.remote(alive, self._waiting))
        except ServiceError as error:
            logger.debug("no decisions now: %s", error)
            return
        for decision in decisions:
            match decision:
                case Start(count) if time.monotonic() >= self._not_before:
                    for _ in range(count):
                        self._launch()
                case Drain(scorer_ids):
                    self._drain(scorer_ids)

    def _launch(self) -> None:
        self._started += 1
        scorer_id = f"scorer-{self._started}"
        handle = self._start(scorer_id)
        self._scorers[scorer_id] = _Scorer(handle, handle.ready.remote(), handle.run.remote(), time.monotonic())

    def _drain(self, scorer_ids: tuple[str, ...]) -> None:
        for scorer_id in scorer_ids:
            scorer = self._scorers[scorer_id]
            if scorer.drained_by is not None:
                continue
            if scorer.node_id:
                scorer.drained_by = time.monotonic() + DRAIN_TIMEOUT_S
                scorer.handle.drain.remote()
            else:  # it holds no lease yet, and would hear of it only once it is up
                scorer.drained_by = time.monotonic()
                ray.kill(scorer.handle)

    def _leave_draining_nodes(self) -> None:
        """Scorers of hosts that are about to go hand in what they have, and others start elsewhere."""
        going = draining_nodes()
        leaving = [i for i, one in self._scorers.items() if one.node_id in going and one.drained_by is None]
        if leaving:
            self._report(f"a host is about to go, its scorers leave it: {', '.join(leaving)}")
            self._drain(tuple(leaving))

    def _update_status(self) -> None:
        pid = self.controller_pid
        try:
            self.status = RemoteFleet(self._controller).status()
        except ServiceError as error:
            logger.debug("no status now: %s", error)
            self.status = self.status | {"samples_per_second": None}
        if self.status.get("trouble"):
            self._report(f"the controller cannot commit scores: {self.status['trouble']}")
        if pid is not None and pid != self.controller_pid:
            self._report(f"the controller ended and was restored from the score store (pid {self.controller_pid})")
            self.on_change()

    def _report_waiting(self) -> None:
        """Say when scorers wait for long, such as for resources that others hold; the controller tells who asks."""
        now = time.monotonic()
        waiting = [one for one in self._scorers.values() if not one.node_id and now - one.launched > LONGEST_START_S]
        self._waiting = ""
        if waiting:
            free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
            needs = ", ".join(f"{n:g} {name} ({free.get(name, 0):g} free)" for name, n in self._needs.items())
            lacking = self.lacking()
            who = "1 scorer waits" if len(waiting) == 1 else f"{len(waiting)} scorers wait"
            self._waiting = f"{who} to be placed or to start; one needs {lacking or needs or 'nothing'}"
            self._report(self._waiting, kind=who)

    def _report(self, problem: str, kind: str = "") -> None:
        if (kind or problem) not in self._said:  # a problem that stays is said once
            self._said.add(kind or problem)
            logger.warning(problem)
            self._say(problem)


def _succeeded(ref: "ray.ObjectRef[Any]") -> bool:
    try:
        ray.get(ref, timeout=0)
    except Exception:  # not there yet, or whatever went wrong
        return False
    return True


def _is_done(ref: "ray.ObjectRef[Any]") -> bool:
    return bool(ray.wait([ref], timeout=0)[0])
