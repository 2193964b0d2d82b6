"""One small training in four frameworks, each as its users write it, for torchrun:

    torchrun --nproc-per-node 2 -m tests.own_loops FRAMEWORK FOLDER

Each rank trains to the end at once, and then again in three pieces, stopped twice in the middle of an epoch; it leaves
what it drew and the last weights in FOLDER.
"""

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

import steppe

N, CLASSES, BATCH, EPOCHS = 90, 3, 5, 3
STEPS = EPOCHS * N // (2 * BATCH)  # of two ranks
STOPS = (4, 13, None)
PUBLISH_EVERY = 6


class Points(Dataset[Any]):
    """Points in four dimensions; a sample is a dictionary that also says its id."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x, self.y = torch.rand(N, 4, generator=generator), torch.arange(N) % CLASSES

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"x": self.x[i], "labels": self.y[i], "sample_id": i}


class Net(nn.Module):
    """Gives the loss when it is told the labels, as Hugging Face's networks do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.linear = nn.Linear(4, CLASSES)
        self.seen: list[list[int]] = []

    def forward(self, x: Tensor, labels: Tensor | None = None, sample_id: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.linear(x)
        if labels is None or sample_id is None:
            return {"logits": logits}
        self.seen.append(sample_id.tolist())
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def sampler_of(*, is_sharded: bool) -> steppe.CurriculumSampler:
    return steppe.CurriculumSampler(N, None, "uniform", seed=3, comm=steppe.Ranks(), is_sharded=is_sharded)


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def publisher_of(folder: Path) -> steppe.CheckpointPublisher | None:
    return steppe.CheckpointPublisher(folder / "run", keep_last=100) if dist.get_rank() == 0 else None


def plain(folder: Path, stop_at: int | None) -> Net:
    """DistributedDataParallel, workers that load ahead, states by hand."""
    state = folder / f"plain-{dist.get_rank()}.pt"
    net, sampler, publisher = Net(), sampler_of(is_sharded=True), publisher_of(folder)
    loader = steppe.CurriculumLoader(Points(), BATCH, sampler, num_workers=1, prefetch_factor=3)
    parallel, optimizer, step = DistributedDataParallel(net), optimizer_of(net), 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        loader.load_state_dict(saved["loader"])
        step = saved["step"]
    while sampler.epoch < EPOCHS and step != stop_at:
        sampler.set_epoch(sampler.epoch)
        for batch in loader:
            optimizer.zero_grad()
            parallel(**batch)["loss"].backward()
            optimizer.step()
            step += 1
            if publisher and step % PUBLISH_EVERY == 0:
                publisher.publish(net, step)
            if step == stop_at:
                break
    content = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "loader": loader.state_dict()}
    torch.save(content | {"step": step}, state)
    if publisher:
        publisher.close()
    return net


def accelerate(folder: Path, stop_at: int | None) -> Net:
    from accelerate import Accelerator

    from steppe.accelerate import Curriculum

    accelerator = Accelerator(cpu=True)
    net, sampler, publisher = Net(), sampler_of(is_sharded=False), publisher_of(folder)
    parallel, optimizer, loader = accelerator.prepare(
        net, optimizer_of(net), DataLoader(Points(), BATCH, sampler=sampler)
    )
    curriculum = Curriculum(accelerator, sampler)
    state, step = folder / "accelerate", 0
    if state.exists():
        accelerator.load_state(str(state))
        step = json.loads((state / "step.json").read_text())
    while sampler.epoch < EPOCHS and step != stop_at:
        for batch in curriculum.batches(loader):
            optimizer.zero_grad()
            accelerator.backward(parallel(**batch)["loss"])
            optimizer.step()
            step += 1
            if publisher and step % PUBLISH_EVERY == 0:
                publisher.publish(accelerator.unwrap_model(parallel), step)
            if step == stop_at:
                break
    dist.barrier()
    accelerator.save_state(str(state))
    (state / "step.json").write_text(json.dumps(step))
    dist.barrier()
    if publisher:
        publisher.close()
    return net


def lightning(folder: Path, stop_at: int | None) -> Net:
    import lightning.pytorch as pl

    from steppe.lightning import PublishCheckpoints

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Net()

        def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
            loss: Tensor = self.model(**batch)["loss"]
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self.model)

    class Stop(pl.Callback):
        """Saves and stops in mid-epoch, like a preempted job."""

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == stop_at:
                trainer.save_checkpoint(state)
                trainer.should_stop = True

    state = folder / "lightning.ckpt"
    module, publisher = Module(), publisher_of(folder)
    loader = steppe.CurriculumLoader(Points(), BATCH, sampler_of(is_sharded=True), num_workers=1, prefetch_factor=3)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=EPOCHS,
        use_distributed_sampler=False,
        callbacks=[PublishCheckpoints(publisher, PUBLISH_EVERY), Stop()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, loader, ckpt_path=state if state.exists() else None)
    if publisher:
        publisher.close()
    return module.model


def transformers(folder: Path, stop_at: int | None) -> Net:
    from transformers import TrainerCallback, TrainingArguments

    from steppe.transformers import CurriculumTrainer

    class Preempted(Exception): ...

    class Stop(TrainerCallback):
        """Has it saved, and dies in the step after that."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            control.should_save = state.global_step == stop_at
            return control

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == stop_at:
                raise Preempted

    arguments = TrainingArguments(
        output_dir=str(folder / "transformers"),
        per_device_train_batch_size=BATCH,
        num_train_epochs=EPOCHS,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=1e9,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        ddp_backend="gloo",
        remove_unused_columns=False,
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_num_workers=1,
        dataloader_prefetch_factor=3,
    )
    net, publisher = Net(), publisher_of(folder)
    trainer = CurriculumTrainer(
        net,
        arguments,
        train_dataset=Points(),
        sampler=sampler_of(is_sharded=False),
        publisher=publisher,
        publish_every_steps=PUBLISH_EVERY,
        callbacks=[Stop()],
    )
    with contextlib.suppress(Preempted):
        trainer.train(resume_from_checkpoint=any((folder / "transformers").glob("checkpoint-*")))
    if publisher:
        publisher.close()
    return net


FRAMEWORKS: dict[str, Callable[[Path, int | None], Net]] = {
    "plain": plain,
    "accelerate": accelerate,
    "lightning": lightning,
    "transformers": transformers,
}


def main(name: str, folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, train = dist.get_rank(), FRAMEWORKS[name]
    places = {"whole": folder / "whole", "pieces": folder / "pieces"}
    for place in places.values():
        (place / "run").mkdir(parents=True, exist_ok=True)
    dist.barrier()
    whole = train(places["whole"], None)
    dist.barrier()
    pieces = [train(places["pieces"], stop_at) for stop_at in STOPS]
    found = {
        "whole": whole.seen,
        "pieces": [net.seen for net in pieces],
        "weights": [whole.linear.weight.tolist(), pieces[-1].linear.weight.tolist()],
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # what the frameworks leave behind need not end in order


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
