"""`steppe bench scorers`: one and two scorers, beside the same loop without Ray, while nothing trains.

All three follow the checkpoints of one run folder, a new one every quarter of a second, so that there is always a block
to score. The scorers are the actors of a run and lease from its controller's actor, which commits what they hand in.
The loop without Ray is the same `scorer.worker.Worker`, with the same niceness and threads, in a process of its own:
its leases, the same blocks, are there at once, and what it hands in is dropped. So what controller, commits and calls
cost counts against the scorers. Processes that are not measured are stopped by SIGSTOP meanwhile.
"""

import contextlib
import dataclasses
import itertools
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import psutil
import pyarrow as pa
import rich
from rich.table import Table

from deploy.cluster import end_processes, local_cluster, new_ray_folder
from deploy.config import RunConfig
from deploy.interrupts import interrupts
from services.blocks import BlockTable
from shared.catalogue import Run
from shared.checkpoints import CheckpointPublisher
from shared.datasets import load_dataset
from shared.errors import ServiceError
from shared.leases import Lease

if TYPE_CHECKING:
    from torch import nn

CONFIG = RunConfig.model_validate({"data": {"name": "digits"}, "model": {"name": "small_cnn", "width": 96}})
SECONDS = 5.0  # of one measurement
SETTLE_S = 0.5
MOST_PERIODS = 60
PUBLISH_INTERVAL_S = 0.25
START_TIMEOUT_S = 120.0

Rate = dict[str, float]


def measure(repeats: int) -> dict[str, Any]:
    """`repeats` rounds, each of the loop without Ray, one scorer and two, first in this order, then the other way."""
    with tempfile.TemporaryDirectory(prefix="steppe-bench-") as place:
        return compare(Path(place) / "run", repeats)


def compare(folder: Path, rounds: int, config: RunConfig = CONFIG, seconds: float = SECONDS) -> dict[str, Any]:
    """As `measure`, with a run in `folder`."""
    import torch

    from shared.models import build_model

    dataset = load_dataset(config.data)
    run = Run.create(
        folder,
        dataset_fingerprint=dataset.fingerprint,
        train=dataset.train,
        config=config.model_dump(mode="json"),
        scoring_id=config.scoring.scoring_id,
    )
    torch.manual_seed(0)
    model = build_model(config.model, dataset)
    with interrupts() as interrupted, local_cluster(new_ray_folder(), run.path, "bench"), _Feed(run, model) as feed:
        interrupted.at_once = partial(_end, run.path)
        with _plain(run, config) as plain, _scorers(run, config) as (first, second):
            arms = {"plain": [plain], "one": [first], "two": [first, second]}
            feed.publish_for(2 * SETTLE_S)  # all are warm
            for one in (plain, first, second):
                one.process.suspend()
            found: list[dict[str, Rate]] = []
            for number in range(rounds):
                order = list(arms)[:: -1 if number % 2 else 1]
                rates = {name: _rate(arms[name], feed, seconds) for name in order}
                found.append({name: rates[name] for name in arms})
                sys.stderr.write(", ".join(f"{name} {rates[name]['per_s']:,.0f}/s" for name in arms) + "\n")
    return {
        "what": f"samples a second of {config.data.name}, {config.model.name}, width {config.model.width}, blocks of "
        f"{config.controller.block_size}; medians of {rounds} rounds of {seconds:g} s",
        "samples_per_s": {name: round(median(one[name]["per_s"] for one in found)) for name in arms},
        "cores": {name: round(median(one[name]["cores"] for one in found), 3) for name in arms},
        "one_to_plain": _ratio(found, "one", "plain"),
        "two_to_one": _ratio(found, "two", "one"),
    }


def _end(run_folder: Path) -> None:
    end_processes(run_folder, 0)


def show(found: Mapping[str, Any]) -> None:
    """A table of the rates, and the ratios of each round."""
    rich.print(found["what"])
    table = Table("", "samples/s", "cores", box=None)
    for name, title in {"plain": "without Ray", "one": "one scorer", "two": "two scorers"}.items():
        table.add_row(title, f"{found['samples_per_s'][name]:,}", f"{found['cores'][name]:.2f}")
    rich.print(table)
    for name in ("one_to_plain", "two_to_one"):
        low, middle, high = (f"{found[name][key]:.3f}" for key in ("min", "median", "max"))
        rich.print(f"{name.replace('_', ' '):14} {middle}  ({low} to {high})")


def _ratio(found: list[dict[str, Rate]], name: str, other: str) -> dict[str, float]:
    """Of each round its own."""
    ratios = [one[name]["per_s"] / one[other]["per_s"] for one in found]
    return {"median": round(median(ratios), 3), "min": round(min(ratios), 3), "max": round(max(ratios), 3)}


class _Feed:
    """The run's checkpoints, in place of a trainer."""

    def __init__(self, run: Run, model: "nn.Module") -> None:
        self._publisher, self._model, self._steps = CheckpointPublisher(run.path), model, itertools.count(1)

    def publish_for(self, seconds: float) -> None:
        """A checkpoint now, and one after each interval."""
        ends_at = time.monotonic() + seconds
        while (left := ends_at - time.monotonic()) > 0:
            self._publisher.publish(self._model, next(self._steps))
            time.sleep(min(PUBLISH_INTERVAL_S, left))

    def __enter__(self) -> "_Feed":
        return self

    def __exit__(self, *exc: object) -> None:
        self._publisher.close()


@dataclasses.dataclass(frozen=True)
class _Scorer:
    """A process that scores, and how to ask how many samples by now."""

    process: psutil.Process
    scored: Callable[[], int]

    def cpu_seconds(self) -> float:
        times = self.process.cpu_times()
        return times.user + times.system


def _rate(scorers: list[_Scorer], feed: _Feed, seconds: float) -> Rate:
    """Of these together, the others being stopped; and how many cores they got."""

    def look() -> tuple[int, float, float]:
        return sum(one.scored() for one in scorers), sum(one.cpu_seconds() for one in scorers), time.perf_counter()

    for one in scorers:
        one.process.resume()
    feed.publish_for(SETTLE_S)
    before = look()
    for _ in range(MOST_PERIODS):  # one on a machine that has a core for the scorers
        feed.publish_for(seconds)
        samples, cpu_seconds, took = (now - then for now, then in zip(look(), before, strict=True))
        if samples:
            break
    for one in scorers:
        one.process.suspend()
    if not samples:
        who = ", ".join(str(one.process) for one in scorers)
        raise ServiceError(f"nothing was scored in {took:.0f} s by {who}", fix="measure again on a quiet machine")
    return {"per_s": samples / took, "cores": cpu_seconds / took}


# -- without Ray -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _plain(run: Run, config: RunConfig) -> Iterator[_Scorer]:
    processes = multiprocessing.get_context("spawn")
    ours, theirs = processes.Pipe()
    process = processes.Process(target=_score, args=(theirs, str(run.path), config), daemon=True)
    process.start()
    theirs.close()

    def scored() -> int:
        ours.send("scored?")
        return int(ours.recv())

    scored()  # it is up
    plain = _Scorer(psutil.Process(process.pid), scored)
    try:
        yield plain
    finally:
        plain.process.resume()
        ours.close()
        process.join()


def _score(pipe: Connection, run_uri: str, config: RunConfig) -> None:
    """Score until the other end is closed, and say how many samples by now when asked."""
    from deploy.worker import build_worker

    blocks = BlockTable(Run(run_uri).num_samples, config.controller.block_size, config.controller.permutation_seed)
    worker = build_worker("plain", run_uri, config, _Leases(blocks))
    thread = threading.Thread(target=worker.run)
    thread.start()
    with contextlib.suppress(EOFError):
        while pipe.recv():
            pipe.send(worker.scored)
    worker.stop()
    thread.join()


class _Leases:
    """One block after the other, for ever, at once (`scorer.worker.LeaseSource`)."""

    def __init__(self, blocks: BlockTable) -> None:
        self._blocks, self._numbers = blocks, itertools.count()

    def lease(self, scorer_id: str, model_version: int) -> "Future[Lease | None]":
        number = next(self._numbers)
        block = number % len(self._blocks)
        return _answered(Lease(number, block, self._blocks.ids(block)))

    def submit(self, scorer_id: str, lease_id: int, rows: pa.Table, failed: Mapping[int, str]) -> "Future[None]":
        return _answered(None)

    def release(self, scorer_id: str) -> "Future[None]":
        return _answered(None)

    def report(self, scorer_id: str, event: str, detail: str) -> "Future[None]":
        return _answered(None)


def _answered(value: Any) -> "Future[Any]":
    answer: Future[Any] = Future()
    answer.set_result(value)
    return answer


# -- the actors of a run -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _scorers(run: Run, config: RunConfig) -> Iterator[list[_Scorer]]:
    """Two, that score for the run's controller."""
    import ray

    from deploy.actors import ControllerActor, ScorerActor, ask

    uri, scoring, names = str(run.path), config.scoring, ["scorer-1", "scorer-2"]
    remote: Any = ray.remote  # its stubs do not know every option
    controller = remote(num_cpus=0, max_restarts=-1)(ControllerActor).remote(
        uri, run.num_samples, scoring.scoring_id, config.controller, wanted=len(names)
    )
    actor = remote(num_cpus=scoring.cpus, num_gpus=scoring.gpus, max_concurrency=3)(ScorerActor)
    handles = [actor.remote(name, uri, config, controller) for name in names]
    pids = [ask(handle.ready.remote(), START_TIMEOUT_S)[0] for handle in handles]

    def scored(name: str) -> int:
        status = ask(controller.status.remote(), START_TIMEOUT_S)
        return sum(one["scored"] for one in status["scorers"] if one["scorer_id"] == name)

    for handle in handles:
        handle.run.remote()
    scorers = [_Scorer(psutil.Process(pid), partial(scored, name)) for pid, name in zip(pids, names, strict=True)]
    try:
        yield scorers
    finally:
        for one in scorers:
            one.process.resume()
