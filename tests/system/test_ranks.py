"""Training over several ranks: real processes, gloo between them, on a few digits."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shared.checkpoints import CheckpointPublisher, stable
from shared.config import DataConfig, ModelConfig
from shared.datasets import Dataset, load_dataset
from shared.errors import TrainingDiverged
from shared.models import build_model
from shared.samples import Samples
from shared.score_store import ScoreWriter
from tests.ranks import in_processes
from tests.rows import make_rows
from trainer.batchnorm import synchronised
from trainer.comm import ALONE, Comm
from trainer.config import CurriculumConfig, SamConfig, TrainConfig
from trainer.feed import NoScores, ScoreFeed
from trainer.loop import Progress, TrainResult, train
from trainer.state import StateSaver, load_newest_state

SAMPLES = 107  # 6 batches of 20 an epoch; the last has 7, which two ranks share 4 to 3


def make_config(**settings: Any) -> TrainConfig:
    return TrainConfig(**({"epochs": 2, "batch_size": 20, "device": "cpu", "threads": 1} | settings))


def plain_net() -> nn.Module:
    """Without BatchNorm: what ranks compute of parts of a batch adds up to what one computes of all."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10))


def digits_net(data: Dataset) -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelConfig(width=8), data)


class Recorded:
    """What one rank's training left behind."""

    def __init__(self) -> None:
        self.ids: list[list[int]] = []
        self.news: list[Progress] = []
        self.result: TrainResult | None = None
        self.weights = torch.zeros(0)

    @property
    def epoch_losses(self) -> list[float]:
        return [one.loss for one in self.news if one.evaluated]


class Watched:
    """Samples, written down as they are loaded; `spoil` is one whose image is not a number."""

    def __init__(self, samples: Samples, recorded: Recorded, spoil: int | None) -> None:
        self._samples, self._recorded, self._spoil = samples, recorded, spoil
        self.num_classes = samples.num_classes

    def __len__(self) -> int:
        return len(self._samples)

    def batch(self, ids: Any) -> tuple[Tensor, Tensor]:
        self._recorded.ids.append([int(i) for i in ids])
        x_BCHW, y_B = self._samples.batch(ids)
        x_BCHW[[i for i, sample_id in enumerate(ids) if sample_id == self._spoil]] = torch.nan
        return x_BCHW, y_B


def one_rank(
    comm: Comm,
    path: Path,
    config: TrainConfig,
    net: str = "plain",
    stop_at: dict[int, int] | None = None,
    spoil: int | None = None,
    attempt: int = 1,
) -> Recorded:
    """Train as one rank, from the last saved state on where there is one.

    Args:
        stop_at: the step at which a rank wants to stop.
        spoil: see `Watched`.
    """
    data = load_dataset(DataConfig(name="digits", subset=SAMPLES))
    model = plain_net() if net == "plain" else digits_net(data)
    recorded = Recorded()
    data = dataclasses.replace(data, train=Watched(data.train, recorded, spoil))
    wish = (stop_at or {}).get(comm.rank)
    stopped: Callable[[], bool] = lambda: wish is not None and len(recorded.ids) >= wish  # noqa: E731
    state = load_newest_state(path)
    comm.highest(0)  # before rank 0 saves another
    publisher = CheckpointPublisher(path, keep_last=99) if comm.rank == 0 else None
    feed = ScoreFeed(path, SAMPLES) if comm.rank == 0 else None
    if feed is not None:
        feed.close()
        feed.refresh()
    recorded.result = train(
        config,
        comm,
        model,
        data,
        publisher,
        feed or NoScores(SAMPLES),
        recorded.news.append,
        stopped,
        saver=StateSaver(path, attempt) if comm.rank == 0 else None,
        resumed=state,
    )
    if publisher is not None:
        publisher.close()
    recorded.weights = torch.cat([value.detach().flatten().double() for value in model.parameters()])
    return recorded


def score_everything(path: Path) -> None:
    with ScoreWriter(path / "scores", SAMPLES) as writer:
        writer.append(make_rows(np.arange(SAMPLES), log_ratio=np.arange(float(SAMPLES))))


@pytest.fixture
def scored(tmp_path: Path) -> Callable[[str], Path]:
    """Folders with the same scores."""

    def make(name: str) -> Path:
        score_everything(tmp_path / name)
        return tmp_path / name

    return make


@pytest.mark.parametrize(("form", "net"), [("sampling", "plain"), ("weighting", "plain"), ("sampling", "digits")])
def test_two_ranks_compute_what_one_does(scored: Callable[[str], Path], tmp_path: Path, form: str, net: str) -> None:
    """With a common e(w), to rounding: positions, losses, weights; with BatchNorm and uneven last batches."""
    curriculum = CurriculumConfig(form=form, strength=2.0)  # type: ignore[arg-type]
    config = make_config(sam=SamConfig(sync_first=True), curriculum=curriculum, warmup_steps=4, publish_every_steps=4)
    alone = one_rank(ALONE, scored("alone"), config, net)
    ranks = in_processes(2, tmp_path, one_rank, scored("ranks"), config, net)

    assert [ids[0::2] for ids in alone.ids if ids] == ranks[0].ids
    assert [ids[1::2] for ids in alone.ids if ids] == ranks[1].ids
    assert ranks[0].epoch_losses == pytest.approx(alone.epoch_losses, rel=1e-5 if net == "plain" else 1e-3)
    assert ranks[1].epoch_losses == ranks[0].epoch_losses
    torch.testing.assert_close(ranks[0].weights, alone.weights, rtol=1e-3, atol=1e-5)
    assert torch.equal(ranks[0].weights, ranks[1].weights)
    assert ranks[0].result.test_accuracy == pytest.approx(alone.result.test_accuracy, abs=0.01)
    assert [one.step for one in stable(tmp_path / "ranks")] == [one.step for one in stable(tmp_path / "alone")]
    assert (ranks[0].result.draws.total, ranks[1].result.draws.total) == (2 * SAMPLES, 0)


@pytest.mark.parametrize("momentum", [0.1, None], ids=str)
def test_batchnorm_over_ranks_is_that_of_the_whole_batch(tmp_path: Path, momentum: float | None) -> None:
    """Outputs, gradients and running statistics, in training and in evaluation; the ranks have 5 and 3 inputs."""
    torch.manual_seed(0)
    x_BCHW, weight_BCHW = 3 + 2 * torch.randn(8, 4, 3, 3), torch.randn(8, 4, 3, 3)
    norm = nn.BatchNorm2d(4, momentum=momentum)
    whole = normalised(norm, x_BCHW, weight_BCHW)
    parts = in_processes(2, tmp_path, normalised_part, x_BCHW, weight_BCHW, momentum)

    for name, expected in whole.items():
        each = [part[name] for part in parts]
        found = torch.cat(each) if expected.dim() == 4 else sum(each) if name.startswith("grad") else each[1]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=name)


def normalised(norm: nn.Module, x_BCHW: Tensor, weight_BCHW: Tensor) -> dict[str, Tensor]:
    """Of two passes: the second output, its gradients, the statistics, and what is evaluated with them."""
    norm(x_BCHW + 1)
    x_BCHW = x_BCHW.clone().requires_grad_()
    y_BCHW = norm(x_BCHW)
    (weight_BCHW * y_BCHW.square()).sum().backward()
    found = {"output": y_BCHW.detach(), "input's gradient": x_BCHW.grad}
    found |= {f"grad of {name}": parameter.grad for name, parameter in norm.named_parameters()}
    found |= {name: buffer.clone().double() for name, buffer in norm.named_buffers()}
    evaluated = {"evaluated": norm.eval()(x_BCHW).detach()}
    return {name: value for name, value in (found | evaluated).items() if value is not None}


def normalised_part(comm: Comm, x_BCHW: Tensor, weight_BCHW: Tensor, momentum: float | None) -> dict[str, Tensor]:
    mine = slice(0, 5) if comm.rank == 0 else slice(5, 8)
    norm = synchronised(nn.BatchNorm2d(4, momentum=momentum), None)
    return normalised(norm, x_BCHW[mine], weight_BCHW[mine])


def test_ranks_ascend_each_by_its_own_part_unless_told_to_synchronise(tmp_path: Path) -> None:
    """Other e(w), and so other weights; the same at both ranks all the same."""
    config = make_config(sam=SamConfig(rho=0.5))
    own = in_processes(2, tmp_path, one_rank, tmp_path / "own", config)
    common = in_processes(
        2, tmp_path, one_rank, tmp_path / "common", make_config(sam=SamConfig(rho=0.5, sync_first=True))
    )

    assert torch.equal(own[0].weights, own[1].weights)
    assert not torch.allclose(own[0].weights, common[0].weights, rtol=1e-3, atol=1e-5)


def test_a_training_stopped_twice_in_the_middle_of_epochs_goes_on_bit_for_bit(
    scored: Callable[[str], Path], tmp_path: Path
) -> None:
    """Two ranks, a network with BatchNorm, augmentation, scores. One rank's wish stops both."""
    config = make_config(epochs=3, augment="crop_flip", save_interval_s=0.0)
    whole = in_processes(2, tmp_path, one_rank, scored("whole"), config, "digits")
    path = scored("stopped")
    lives = [
        in_processes(2, tmp_path, one_rank, path, config, "digits", {1: 4}, None, 1),
        in_processes(2, tmp_path, one_rank, path, config, "digits", {0: 5}, None, 2),
        in_processes(2, tmp_path, one_rank, path, config, "digits", None, None, 3),
    ]

    assert [life[0].result.finished for life in lives] == [False, False, True]
    assert [[life[rank].result.steps for life in lives] for rank in (0, 1)] == [[4, 9, 18]] * 2
    for rank in (0, 1):
        assert [ids for life in lives for ids in life[rank].ids] == whole[rank].ids
        assert torch.equal(lives[2][rank].weights, whole[rank].weights)
    assert lives[2][0].result.test_accuracy == whole[0].result.test_accuracy
    assert lives[2][0].result.draws.total == whole[0].result.draws.total == 3 * SAMPLES


@pytest.mark.parametrize(
    ("before", "after"),
    [pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(1, 2, marks=pytest.mark.slow), (2, 3)],
    ids=["2 to 1", "1 to 2", "2 to 3"],
)
def test_another_number_of_ranks_trains_on_the_remaining_positions(tmp_path: Path, before: int, after: int) -> None:
    """Batches of 12, stopped in the middle of the first epoch."""
    config = make_config(batch_size=12, sam=SamConfig(sync_first=True))
    whole = one_rank(ALONE, tmp_path / "whole", config)
    first = in_processes(before, tmp_path, one_rank, tmp_path / "run", config, "plain", {0: 4})
    second = in_processes(after, tmp_path, one_rank, tmp_path / "run", config, "plain", None, None, 2)

    for ranks, expected in ((first, whole.ids[:4]), (second, whole.ids[4:])):
        for rank, one in enumerate(ranks):
            assert one.ids == [ids[rank :: len(ranks)] for ids in expected]
    torch.testing.assert_close(second[0].weights, whole.weights, rtol=1e-3, atol=1e-5)


def test_a_loss_that_is_not_finite_at_one_rank_ends_all(tmp_path: Path) -> None:
    found = in_processes(2, tmp_path, ended_by, tmp_path / "run", make_config())

    assert found == [found[0]] * 2
    assert found[0].startswith("the loss is not finite at step ")


def ended_by(comm: Comm, path: Path, config: TrainConfig) -> str:
    try:
        one_rank(comm, path, config, spoil=3)
    except TrainingDiverged as error:
        return str(error)
    return ""
