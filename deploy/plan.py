"""What a configuration would do on this machine: what it would start, how fast it would be, and what does not fit."""

import contextlib
import copy
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from deploy.config import RunConfig
from deploy.doctor import ray_cpus, why_unwritable
from deploy.progress import print_facts
from services.server import bind
from shared.datasets import Dataset, local_dataset
from shared.errors import ConfigError
from shared.freshness import DEFAULT_BOUND_PASSES, DEFAULT_BOUND_VERSIONS
from shared.storage import local_path
from trainer.config import CurriculumConfig, check_batch

if TYPE_CHECKING:
    import torch
    from torch import nn

MEASURE_S = 1.5


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was found out by building and running the parts of a run, each alone."""

    num_samples: int
    model_parameters: int
    samples_per_second: float  # of one scorer
    scorer_device: str
    steps_per_second: float
    trainer_device: str
    trainer_threads: int
    gpus: int
    misfits: list[ConfigError]


def plan(config: RunConfig) -> dict[str, Any]:
    """Measure scorer and trainer, each alone, and reckon from their rates. Starts nothing and writes nothing.

    In `would_start` cpus and gpus are what one asks of Ray; the trainer, which is not Ray's, counts its threads and the
    GPU that it trains on. `does_not_fit` has one text for each thing that would not be as it is asked for.

    Raises: DatasetMissing, DataError, ConfigError for a model that cannot be built.
    """
    measured = measure(config)
    facts = reckon(config, measured)
    texts = [str(misfit) for misfit in misfits(config, measured, facts)]
    return facts | {"would_start": would_start(config, measured), "does_not_fit": texts}


def misfits(config: RunConfig, measured: Measured, facts: dict[str, Any]) -> list[ConfigError]:
    """Find what would not be as it is asked for; `facts` are those of `reckon`."""
    found = [*measured.misfits]
    try:
        check_batches(config, measured.num_samples)
    except ConfigError as error:
        found.append(error)
    found += place_misfit(config)
    if _scores_beside(config):
        found += blocks_misfit(config, measured.num_samples)
        found += scorers_misfit(config, ray_cpus(), measured.gpus)
        found += freshness_misfit(config, facts)
    return found


def measure(config: RunConfig) -> Measured:
    """Load the data, build the model, and time both on copies of it."""
    with _undisturbed():
        import torch

        from shared.models import build_model

        torch.manual_seed(config.train.seed)
        dataset = local_dataset(config.data)
        model = build_model(config.model, dataset)
        trainer_device, misfits = _trainer_device(config)
        threads = config.train.threads or torch.get_num_threads()
        scorer_device, scorer_threads = trainer_device, threads
        if _scores_beside(config):
            on_gpu = config.scoring.gpus > 0 and torch.cuda.is_available()
            scorer_device, scorer_threads = torch.device("cuda" if on_gpu else "cpu"), config.scoring.threads
        return Measured(
            num_samples=len(dataset.train),
            model_parameters=sum(parameter.numel() for parameter in model.parameters()),
            samples_per_second=scorer_rate(config, dataset, copy.deepcopy(model), scorer_device, scorer_threads),
            scorer_device=scorer_device.type,
            steps_per_second=trainer_rate(config, dataset, copy.deepcopy(model), trainer_device, threads),
            trainer_device=trainer_device.type,
            trainer_threads=threads,
            gpus=torch.cuda.device_count(),
            misfits=misfits,
        )


def reckon(config: RunConfig, measured: Measured) -> dict[str, Any]:
    """The figures that follow from the rates. Inside the training a pass is a part of each epoch but the first."""
    num_samples, epochs = measured.num_samples, config.train.epochs
    epoch_steps = math.ceil(num_samples / config.train.batch_size)
    inside = _scores_inside(config)
    scorers = 1 if inside else config.scoring.replicas * _scores_beside(config)
    pass_seconds = num_samples / (measured.samples_per_second * scorers) if scorers else None
    training_seconds = epochs * epoch_steps / measured.steps_per_second
    between = config.train.publish_every_steps / measured.steps_per_second
    if inside and pass_seconds is not None:
        training_seconds += (epochs - 1) * pass_seconds
        between = epoch_steps / measured.steps_per_second + pass_seconds
    versions = None if pass_seconds is None else pass_seconds / between
    return {
        "data": config.data.name,
        "curriculum": _curriculum(config.train.curriculum),
        "num_samples": num_samples,
        "model_parameters": measured.model_parameters,
        "steps": epochs * epoch_steps,
        "blocks": math.ceil(num_samples / config.controller.block_size),
        "scorer_device": measured.scorer_device,
        "scorer_samples_per_second": measured.samples_per_second,
        "full_pass_seconds": pass_seconds,
        "trainer_device": measured.trainer_device,
        "trainer_steps_per_second": measured.steps_per_second,
        "training_seconds": training_seconds,
        "seconds_between_checkpoints": between,
        "versions_per_pass": versions,
        "staleness_bound": max(DEFAULT_BOUND_VERSIONS, DEFAULT_BOUND_PASSES * math.ceil(versions or 0)),
    }


def _curriculum(config: CurriculumConfig) -> str:
    """What of its settings counts."""
    by = {"uniform": "", "self_paced": f" by the loss, {config.regulariser}"}
    words = config.name + by.get(config.name, f" by {config.measure}, {config.order} first")
    guard = f"guard {config.guard} from {config.guard_from:.0%} on" if config.guard != "none" else "no guard"
    return f"{words}; {guard}; {config.form}"


def would_start(config: RunConfig, measured: Measured) -> list[dict[str, Any]]:
    """The processes of the run."""
    trainer = {"cpus": measured.trainer_threads, "gpus": int(measured.trainer_device == "cuda")}
    if _scores_inside(config):
        return [{"process": "trainer with scorer, controller and REST service (the driver)", "count": 1, **trainer}]
    if not _scores_beside(config):
        return [{"process": "trainer (the driver)", "count": 1, **trainer}]
    scoring = config.scoring
    return [
        {"process": "trainer (in the driver)", "count": 1, **trainer},
        {"process": "controller", "count": 1, "cpus": 0, "gpus": 0},
        {"process": "REST service", "count": 1, "cpus": 0, "gpus": 0},
        {"process": "scorer", "count": scoring.replicas, "cpus": scoring.cpus, "gpus": scoring.gpus},
    ]


def print_plan(plan: dict[str, Any]) -> None:
    """A plan as people read it, on stdout."""
    seconds = plan["full_pass_seconds"]
    full_pass = f"{_duration(seconds)}, {plan['versions_per_pass']:.1f} checkpoints long" if seconds else "no scorers"
    print_facts(
        {
            "data": f"{plan['data']}, {plan['num_samples']:,} samples in {plan['blocks']:,} blocks",
            "curriculum": plan["curriculum"],
            "model": f"{plan['model_parameters']:,} parameters",
            "scorer, measured alone": f"{plan['scorer_samples_per_second']:,.0f} samples/s on {plan['scorer_device']}",
            "trainer, measured alone": f"{plan['trainer_steps_per_second']:,.1f} steps/s on {plan['trainer_device']}",
            "training": f"{plan['steps']:,} steps in {_duration(plan['training_seconds'])}",
            "checkpoint every": _duration(plan["seconds_between_checkpoints"]),
            "full scoring pass": full_pass,
            "stale beyond": f"{plan['staleness_bound']} versions",
        }
    )
    write = sys.stdout.write
    write("\nEach rate was measured alone; on shared cores both are lower during a run.\n\nwould start\n")
    for part in plan["would_start"]:
        write(f"  {part['count']} x {part['process']}: {part['cpus']:g} CPUs, {part['gpus']:g} GPUs each\n")
    write("\ndoes not fit\n" if plan["does_not_fit"] else "\neverything fits\n")
    for text in plan["does_not_fit"]:
        write(f"  - {text}\n")


def scorer_rate(config: RunConfig, dataset: Dataset, model: "nn.Module", device: "torch.device", threads: int) -> float:
    """Samples per second of one scorer. A batch is never larger than a block."""
    import torch

    from scorer.adm import score_batch
    from scorer.worker import build_attack
    from shared.models import place

    torch.set_num_threads(threads)
    batches = _Batches(dataset, min(config.scoring.batch_size, config.controller.block_size), device)
    attack = build_attack(config.scoring.attack)
    place(model, device).eval()
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # as scorers do
    try:
        return batches.size / _median_seconds(lambda: score_batch(model, *batches.next(), attack), device)
    finally:
        torch.backends.cudnn.allow_tf32 = tf32


def trainer_rate(
    config: RunConfig, dataset: Dataset, model: "nn.Module", device: "torch.device", threads: int
) -> float:
    """SAM steps per second."""
    import torch
    from torch import nn

    from shared.models import place
    from trainer.loop import build_optimizer
    from trainer.sam import sam_step

    torch.set_num_threads(threads)
    batches = _Batches(dataset, config.train.batch_size, device)
    optimizer = build_optimizer(config.train, place(model, device).train())
    loss_fn = nn.CrossEntropyLoss()
    return 1 / _median_seconds(lambda: sam_step(model, optimizer, loss_fn, *batches.next()), device)


def check_batches(config: RunConfig, num_samples: int) -> None:
    """Raise ConfigError when the batches do not fit the data and the workers."""
    check_batch(config.train.batch_size, num_samples, max(config.trainer.num_workers, 1))


def blocks_misfit(config: RunConfig, num_samples: int) -> list[ConfigError]:
    """Scorers share the data block by block."""
    size = config.controller.block_size
    if size <= num_samples:
        return []
    wanted = max(num_samples // max(config.scoring.replicas, 1), 1)
    return [
        ConfigError(
            f"controller.block_size is {size}, but there are {num_samples} samples: they are one block, and one scorer "
            "works at a time",
            fix=f"set it to {wanted} or less",
            key="controller.block_size",
        )
    ]


def scorers_misfit(config: RunConfig, cpus: int, gpus: int) -> list[ConfigError]:
    """Scorers that Ray, which has these CPUs and GPUs, could not place; they would wait for ever."""
    scoring, misfits = config.scoring, []
    count, what = scoring.replicas, "scoring.replicas"
    if config.controller.autoscale.enabled:
        count, what = config.controller.autoscale.max_replicas, "controller.autoscale.max_replicas"
    for key, each, there in (("scoring.cpus", scoring.cpus, cpus), ("scoring.gpus", scoring.gpus, gpus)):
        if each <= 0:
            continue
        # A part of a GPU is of one GPU; CPUs are one pool.
        fit = there * int(1 / each + 1e-9) if key == "scoring.gpus" and each < 1 else int(there / each + 1e-9)
        if count > fit:
            unit = key.removeprefix("scoring.").upper()[:3]
            misfits.append(
                ConfigError(
                    f"{what} is {count} with {key} {each:g} each, but Ray has {there} {unit}s here: room for {fit}",
                    fix=f"set {what} to {fit} or {key} lower",
                    key=key,
                )
            )
    return misfits


def place_misfit(config: RunConfig) -> list[ConfigError]:
    """The run's folder and its port."""
    misfits = []
    folder = local_path(config.run.folder or config.run.root)
    if config.run.folder and (folder / "run.json").exists():
        misfits.append(
            ConfigError(
                f"run.folder {folder} already holds a run",
                fix="set another, or leave it out for a new one",
                key="run.folder",
            )
        )
    elif reason := why_unwritable(folder):
        key = "run.folder" if config.run.folder else "run.root"
        misfits.append(
            ConfigError(f"{key} is {folder}, but {reason}", fix="set it to a folder that you may write to", key=key)
        )
    try:
        bind(config.rest.host, config.rest.port).close()
    except ConfigError as error:
        misfits.append(error)
    return misfits


def freshness_misfit(config: RunConfig, facts: dict[str, Any]) -> list[ConfigError]:
    """Scores that would come too late for the training to draw by them."""
    misfits = []
    first, steps = config.train.warmup_steps, facts["steps"]
    if first >= steps:
        misfits.append(
            ConfigError(
                f"train.warmup_steps is {first}, but the training has {steps} steps: scorers get their first "
                "checkpoint at its end",
                fix="set it lower, or train.epochs higher",
                key="train.warmup_steps",
            )
        )
    pass_seconds, training_seconds = facts["full_pass_seconds"], facts["training_seconds"]
    if pass_seconds is not None and pass_seconds > training_seconds:
        misfits.append(
            ConfigError(
                f"a full scoring pass takes {_duration(pass_seconds)}, the whole training "
                f"{_duration(training_seconds)}: most samples never have a fresh score",
                fix="set scoring.replicas or scoring.gpus higher, or train longer",
                key="scoring.replicas",
            )
        )
    return misfits


class _Batches:
    """Batches of the training split one after another, from its start again at its end."""

    def __init__(self, dataset: Dataset, size: int, device: "torch.device") -> None:
        self._images = dataset.train
        self._device = device
        self._start = 0
        self.size = min(size, len(dataset.train))

    def next(self) -> "tuple[torch.Tensor, torch.Tensor]":
        ids = [(self._start + i) % len(self._images) for i in range(self.size)]
        self._start += self.size
        x_BCHW, y_B = self._images.batch(ids)
        return x_BCHW.to(self._device), y_B.to(self._device)


def _median_seconds(work: Callable[[], object], device: "torch.device") -> float:
    """The median time of one call, after a first one that is not counted unless it alone takes all the time."""
    import torch

    def timed() -> float:
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    first = timed()
    if device.type == "cpu" and first > MEASURE_S:
        return first
    seconds: list[float] = []
    while sum(seconds) < MEASURE_S:
        seconds.append(timed())
    return statistics.median(seconds)


def _scores_inside(config: RunConfig) -> bool:
    """Whether the trainer itself scores."""
    return config.scoring.mode == "every_epoch"


def _scores_beside(config: RunConfig) -> bool:
    """Whether scorers of their own do; else there is no Ray."""
    return config.scoring.mode in ("async", "shadow")


def _trainer_device(config: RunConfig) -> "tuple[torch.device, list[ConfigError]]":
    """The device to train on; one that is not here is said, and the CPU measured instead."""
    import torch

    from trainer.loop import pick_device

    try:
        return pick_device(config.train.device), []
    except ConfigError as error:
        return torch.device("cpu"), [error]


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Afterwards torch's threads and random numbers are as they were."""
    import torch

    threads = torch.get_num_threads()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
