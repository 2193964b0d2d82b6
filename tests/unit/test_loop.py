"""The training loop on a few digits, with a real publisher and a real feed."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler

import trainer.loop
from shared.checkpoints import CheckpointPublisher, load, stable
from shared.config import DataConfig, ModelConfig
from shared.datasets import Dataset, load_dataset
from shared.errors import ConfigError
from shared.models import build_model
from shared.score_store import ScoreWriter
from tests.raising import refuses
from tests.rows import make_rows
from trainer.comm import ALONE
from trainer.config import CurriculumConfig, TrainConfig
from trainer.curriculum import Curriculum
from trainer.feed import ScoreFeed
from trainer.loop import Progress, TrainResult, evaluate, pick_device, train
from trainer.sam import SAM, running_statistics_kept
from trainer.sampler import CurriculumSampler

SAMPLES = 120
CPU = torch.device("cpu")


@functools.cache
def digits() -> Dataset:
    return load_dataset(DataConfig(name="digits", subset=SAMPLES))


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelConfig(width=8), digits())


def make_config(**settings: Any) -> TrainConfig:
    """6 steps an epoch, on one thread: nets this small only lose by more."""
    return TrainConfig(**({"epochs": 2, "batch_size": 20, "device": "cpu", "threads": 1} | settings))


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(
    path: Path, config: TrainConfig, stopped: Callable[[], bool] = lambda: False, model: nn.Module | None = None
) -> tuple[TrainResult, nn.Module, list[Progress]]:
    model, news = model or make_model(), []
    with CheckpointPublisher(path, keep_last=99, max_pending=99) as publisher:
        feed = ScoreFeed(path, SAMPLES, newest_version=lambda: publisher.newest_version)
        feed.close()
        feed.refresh()
        result = train(config, ALONE, model, digits(), publisher, feed, news.append, stopped)
    return result, model, news


def weights(model: nn.Module) -> Tensor:
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


def published_steps(path: Path) -> list[int]:
    return [checkpoint.step for checkpoint in stable(path)][::-1]


def train_loss(model: nn.Module) -> float:
    x_BCHW, y_B = digits().train.batch(np.arange(SAMPLES))
    with torch.no_grad():
        return nn.functional.cross_entropy(model.eval()(x_BCHW), y_B).item()


def score_everything(path: Path) -> None:
    with ScoreWriter(path / "scores", SAMPLES) as writer:
        writer.append(make_rows(np.arange(SAMPLES), log_ratio=np.arange(float(SAMPLES))))


def test_training_learns_and_says_where_it_is(tmp_path: Path) -> None:
    result, model, news = run(tmp_path, make_config(epochs=10))

    assert result.steps == 60
    assert train_loss(model) < 0.5 * train_loss(make_model())
    assert result.test_accuracy == evaluate(model, digits().test, CPU) > 0.4
    assert (news[-1].step, news[-1].steps, news[-1].accuracy) == (60, 60, result.test_accuracy)
    assert [one.step for one in news] == sorted(one.step for one in news)
    assert model.training


@pytest.mark.parametrize(
    ("warmup", "every", "expected"),
    [(5, 4, [5, 9, 12]), (1, 1, [*range(1, 13)]), (5, 7, [5, 12]), (12, 1, [12]), (13, 1, [12]), (3, 100, [3, 12])],
    ids=str,
)
def test_versions_are_published_at_the_documented_steps(
    tmp_path: Path, warmup: int, every: int, expected: list[int]
) -> None:
    """After the warm-up, then every so many of the 12 steps, and at the end; no step twice."""
    _, model, _ = run(tmp_path, make_config(warmup_steps=warmup, publish_every_steps=every))

    assert published_steps(tmp_path) == expected
    last = load(next(stable(tmp_path)))
    assert all(torch.equal(last[name], value) for name, value in model.state_dict().items())


def test_learning_rate_follows_the_cosine_to_its_end(tmp_path: Path) -> None:
    """From 0.1 to 0.0017 in 12 steps: without momentum the last step is far shorter than the first ones."""
    run(tmp_path, make_config(warmup_steps=1, publish_every_steps=1, momentum=0.0))
    learnt = [name for name, _ in make_model().named_parameters()]
    published = {one.step: load(one) for one in stable(tmp_path)}
    w = {step: torch.cat([published[step][name].flatten() for name in learnt]) for step in (1, 2, 11, 12)}

    assert (w[12] - w[11]).norm() < 0.1 * (w[2] - w[1]).norm()


@pytest.mark.parametrize("scored", [False, True], ids=["no scores", "scores"])
def test_seed_decides_the_weights(tmp_path: Path, scored: bool) -> None:
    found = []
    for index, seed in enumerate((1, 1, 2)):
        if scored:
            score_everything(tmp_path / str(index))
        found.append(weights(run(tmp_path / str(index), make_config(seed=seed))[1]))

    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_curriculum_without_scores_trains_as_the_uniform_one_and_with_scores_otherwise(tmp_path: Path) -> None:
    uniform = make_config(curriculum=CurriculumConfig(name="uniform"))
    without, plain = run(tmp_path / "a", make_config())[1], run(tmp_path / "b", uniform)[1]
    score_everything(tmp_path / "c")
    result, with_scores, _ = run(tmp_path / "c", make_config())

    assert torch.equal(weights(without), weights(plain))
    assert not torch.equal(weights(with_scores), weights(plain))
    assert (result.draws.fresh, result.draws.total) == (2 * SAMPLES, 2 * SAMPLES)


def test_no_scores_at_all_runs_to_the_end(tmp_path: Path) -> None:
    result, _, _ = run(tmp_path, make_config())

    assert result.steps == 12
    assert (result.draws.unscored, result.draws.total) == (2 * SAMPLES, 2 * SAMPLES)


@pytest.mark.parametrize("name", ["sam.rho", "sam.adaptive", "learning_rate", "momentum", "weight_decay"])
def test_every_setting_of_the_optimizer_arrives(tmp_path: Path, name: str) -> None:
    changed = {
        "sam.rho": {"sam": {"rho": 0.5}},
        "sam.adaptive": {"sam": {"adaptive": True}},
        "learning_rate": {"learning_rate": 0.05},
        "momentum": {"momentum": 0.5},
        "weight_decay": {"weight_decay": 0.1},
    }[name]
    model = run(tmp_path / "a", make_config(epochs=1))[1]
    other = run(tmp_path / "b", make_config(epochs=1, **changed))[1]

    assert not torch.equal(weights(model), weights(other))


def test_batch_of_one_is_refused_before_anything_happens(tmp_path: Path) -> None:
    """120 = 7 * 17 + 1."""
    with refuses(ConfigError, "train.batch_size", "17 leaves one of 120"):
        run(tmp_path, make_config(batch_size=17))

    assert published_steps(tmp_path) == []


@pytest.mark.parametrize("after", [0, 1, 5, 8])
def test_stopped_ends_it_with_a_last_checkpoint(tmp_path: Path, after: int) -> None:
    """6 steps an epoch, two passes a step. The user waits: nothing is evaluated any more."""
    passes: list[int] = []
    model = make_model()
    model.register_forward_hook(lambda module, *_: passes.append(module.training))
    result, model, news = run(tmp_path, make_config(epochs=3), lambda: sum(passes) >= 2 * after, model=model)

    assert result.steps == after
    assert published_steps(tmp_path)[-1:] == [after]
    assert (result.test_accuracy is None) == (after < 6)
    assert (news[-1].step, news[-1].steps) == (after, 18)


@pytest.mark.parametrize("name", ["cuda:99", "abacus"])
def test_device_that_is_not_here_is_refused(name: str) -> None:
    with refuses(ConfigError, "train.device", f"'{name}'"):
        pick_device(name)


def test_evaluate_counts_in_eval_mode_over_several_batches() -> None:
    """A model that says class 3 for all is right where the label is 3; BatchNorm buffers stay."""
    images = digits().train
    many = np.resize(np.arange(SAMPLES), 2500)
    images = type(images)(images.pixels_NCHW[many], images.label_N[many], images.white, images.num_classes)
    head = nn.Linear(64, 10)
    with torch.no_grad():
        head.bias[3] = 1e6
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), head).train()
    before = model[0].running_mean.clone()

    accuracy = evaluate(model, images, CPU)

    assert accuracy == (images.label_N == 3).mean()
    assert torch.equal(model[0].running_mean, before)
    assert model.training


# -- weights of the loss, passes, evaluations --------------------------------------------------------------------------


@pytest.mark.parametrize("passes", ["both", "second"])
@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_weighting_form_is_sam_with_weighted_losses(tmp_path: Path, passes: str, rho: float) -> None:
    """Written out with the two steps of SAM; the draws and weights are those of a sampler of its own."""
    curriculum = CurriculumConfig(strength=3.0, fade_until=1.0, form="weighting", passes=passes)
    config = make_config(epochs=1, sam={"rho": rho}, curriculum=curriculum, learning_rate=0.05)
    score_everything(tmp_path)
    _, found, _ = run(tmp_path, config)

    model = make_model().train()
    sampler = CurriculumSampler(
        SAMPLES, tmp_path / "scores", Curriculum(curriculum), config.seed, epochs=1, form="weighting"
    )
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=rho, lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)
    for ids in BatchSampler(sampler, 20, drop_last=False):
        x_BCHW, y_B = digits().train.batch(ids)
        v_B = torch.tensor(sampler.loss_weights(ids), dtype=torch.float32)

        def backward(pass_B: Tensor, x_BCHW: Tensor = x_BCHW, y_B: Tensor = y_B) -> None:
            losses_B = nn.functional.cross_entropy(model(x_BCHW), y_B, reduction="none")
            ((pass_B * losses_B).sum() / 20).backward()

        if rho:
            backward(v_B if passes == "both" else torch.ones(20))
            optimizer.first_step(zero_grad=True)
            with running_statistics_kept(model):
                backward(v_B)
            optimizer.second_step(zero_grad=True)
        else:
            backward(v_B)
            optimizer.base_step(zero_grad=True)
        schedule.step()

    assert (sampler.loss_weights(range(SAMPLES)) != 1).all()
    torch.testing.assert_close(weights(found), weights(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rho", "per_step"), [(0.05, 2), (0.0, 1)])
@pytest.mark.parametrize("after", [3, 8, 12])
def test_forward_equivalents_are_what_the_steps_cost(tmp_path: Path, rho: float, per_step: int, after: int) -> None:
    """A pass forward and back is 3; of the steps that were done, not of the draws that were planned."""
    passes: list[int] = []
    model = make_model()
    model.register_forward_hook(lambda module, *_: passes.append(module.training))
    config = make_config(sam={"rho": rho})
    result, _, _ = run(tmp_path, config, lambda: sum(passes) >= per_step * after, model=model)

    assert result.steps == after
    assert sum(passes) == per_step * after
    assert result.forward_equivalents == 3 * 20 * sum(passes)


@pytest.mark.parametrize(("every", "evaluated"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (9, [5])])
def test_accuracy_is_measured_every_so_many_epochs_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, evaluated: list[int]
) -> None:
    epochs: list[float] = []

    def measure(*_: object) -> float:
        epochs.append(len(epochs) + 1.0)
        return epochs[-1]

    monkeypatch.setattr(trainer.loop, "evaluate", measure)
    result, _, news = run(tmp_path, make_config(epochs=5, evaluate_every_epochs=every))

    assert [one.step // 6 for one in news if one.evaluated] == evaluated
    assert [one.accuracy for one in news if one.evaluated] == epochs == [*map(float, range(1, len(evaluated) + 1))]
    assert result.test_accuracy == epochs[-1]


def test_augmented_is_what_is_trained_on_alike_in_both_passes(tmp_path: Path) -> None:
    """Every image is one of the data set's or its mirror image, and both occur."""
    seen: list[Tensor] = []
    model = make_model()
    model.register_forward_hook(lambda module, args, _: seen.append(args[0].clone()) if module.training else None)
    run(tmp_path / "a", make_config(epochs=1, augment="flip"), model=model)
    x_NCHW, _ = digits().train.batch(np.arange(SAMPLES))
    known, mirrored = ({image.numpy().tobytes() for image in x.contiguous()} for x in (x_NCHW, x_NCHW.flip(-1)))
    images = [image.numpy().tobytes() for x_BCHW in seen[::2] for image in x_BCHW]

    assert all(torch.equal(first, second) for first, second in zip(seen[::2], seen[1::2], strict=True))
    assert len(images) == SAMPLES
    assert set(images) <= known | mirrored
    assert 30 < sum(image in mirrored - known for image in images) < 90


def test_seed_of_torch_decides_the_augmentation(tmp_path: Path) -> None:
    models = []
    for index, seed in enumerate((0, 0, 1)):
        model = make_model()
        torch.manual_seed(seed)
        models.append(weights(run(tmp_path / str(index), make_config(augment="crop_flip"), model=model)[1]))

    assert torch.equal(models[0], models[1])
    assert not torch.equal(models[0], models[2])
