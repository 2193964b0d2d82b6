import dataclasses
import socket
from pathlib import Path

import pytest
import torch

from deploy import plan as plans
from deploy.config import RunConfig
from deploy.plan import Measured, freshness_misfit, place_misfit, plan, print_plan, reckon, would_start
from scorer.config import AttackConfig
from scorer.worker import build_attack
from shared.config import DataConfig
from shared.datasets import local_dataset
from shared.errors import DatasetMissing
from tests.raising import refuses

MEASURED = Measured(
    num_samples=1000,
    model_parameters=5,
    samples_per_second=100.0,
    scorer_device="cpu",
    steps_per_second=40.0,
    trainer_device="cpu",
    trainer_threads=1,
    gpus=0,
    misfits=[],
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "MEASURE_S", 0.05)


def config(**sections: dict[str, object]) -> RunConfig:
    small = {"data": {"subset": 200}, "model": {"width": 4}, "train": {"threads": 1}, "rest": {"port": 0}}
    small |= {"controller": {"block_size": 100}}
    return RunConfig.model_validate(
        {name: small.get(name, {}) | sections.get(name, {}) for name in {*small, *sections}}
    )


def test_figures_follow_from_the_rates() -> None:
    asked = config(
        train={"epochs": 4, "batch_size": 64, "publish_every_steps": 20},
        scoring={"replicas": 2},
        controller={"block_size": 256},
    )
    facts = reckon(asked, MEASURED)

    assert (facts["steps"], facts["blocks"]) == (64, 4)  # 16 steps an epoch; 3 whole blocks and a rest
    assert facts["full_pass_seconds"] == 5.0  # 1000 / (100 * 2)
    assert facts["training_seconds"] == 1.6
    assert facts["seconds_between_checkpoints"] == 0.5
    assert (facts["versions_per_pass"], facts["staleness_bound"]) == (10.0, 20)


def test_without_scorers_there_is_no_pass() -> None:
    facts = reckon(config(scoring={"replicas": 0}), MEASURED)

    assert (facts["full_pass_seconds"], facts["versions_per_pass"], facts["staleness_bound"]) == (None, None, 4)


def test_scoring_inside_the_training_takes_its_time_and_no_processes() -> None:
    asked = config(scoring={"mode": "every_epoch", "replicas": 3}, train={"epochs": 4, "batch_size": 50})
    facts = reckon(asked, MEASURED)

    assert facts["full_pass_seconds"] == 10.0
    assert facts["training_seconds"] == 4 * 20 / 40 + 3 * 10.0
    assert facts["seconds_between_checkpoints"] == 20 / 40 + 10.0
    assert [(part["count"], part["cpus"]) for part in would_start(asked, MEASURED)] == [(1, 1)]


def test_would_start_what_is_configured() -> None:
    asked = config(scoring={"replicas": 3, "cpus": 0.5, "gpus": 1})
    parts = would_start(asked, dataclasses.replace(MEASURED, trainer_threads=2, trainer_device="cuda"))

    assert [(part["count"], part["cpus"], part["gpus"]) for part in parts] == [
        (1, 2, 1),
        (1, 0, 0),
        (1, 0, 0),
        (3, 0.5, 1),
    ]


def test_plan_measures_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    threads, random = torch.get_num_threads(), torch.get_rng_state()
    made = plan(config(train={"threads": threads + 1}, scoring={"threads": threads + 2}))

    assert (torch.get_num_threads(), list(tmp_path.iterdir())) == (threads, [])
    assert torch.equal(torch.get_rng_state(), random)
    assert (made["data"], made["num_samples"], made["steps"], made["blocks"]) == ("digits", 200, 30 * 4, 2)
    # Convolutions 1-4-8-8 of 3x3, BatchNorm of 4, 8 and 8 channels, linear 8 to 10.
    assert made["model_parameters"] == 9 * (4 + 32 + 64) + 2 * 20 + 90
    assert made["full_pass_seconds"] == 200 / made["scorer_samples_per_second"]
    assert made["seconds_between_checkpoints"] == 20 / made["trainer_steps_per_second"]


@pytest.fixture
def fast_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates that are not measured: how fast this machine is must not be among what does not fit."""
    monkeypatch.setattr(plans, "scorer_rate", lambda *_: 1e6)
    monkeypatch.setattr(plans, "trainer_rate", lambda *_: 10.0)


def test_scoring_is_measured_with_the_attack_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[AttackConfig] = []
    monkeypatch.setattr("scorer.worker.build_attack", lambda given: built.append(given) or build_attack(given))
    rate = plans.measure(config(scoring={"attack": {"name": "pgd", "steps": 3}})).samples_per_second

    assert rate > 0
    assert [(one.name, one.steps) for one in built] == [("pgd", 3)]


@pytest.mark.parametrize(
    ("sections", "key", "value", "fix"),
    [
        ({"train": {"batch_size": 201}}, "train.batch_size", 201, "200 or less"),
        ({"train": {"batch_size": 199}}, "train.batch_size", 199, "another"),
        ({"train": {"device": "cuda:77"}}, "train.device", "'cuda:77'", "cpu"),
        ({"train": {"warmup_steps": 120}}, "train.warmup_steps", 120, "train.epochs"),
        (
            {"controller": {"block_size": 201}, "scoring": {"replicas": 2}},
            "controller.block_size",
            201,
            "100 or less",
        ),
        ({"scoring": {"cpus": 10_000}}, "scoring.cpus", 10000, "scoring.replicas to 0"),
        ({"scoring": {"gpus": 1000}}, "scoring.gpus", 1000, "scoring.replicas to 0"),
    ],
    ids=["large batch", "batch of one", "device", "warm-up", "block", "cpus", "gpus"],
)
@pytest.mark.usefixtures("fast_machine")
def test_what_does_not_fit_is_said(sections: dict[str, dict[str, object]], key: str, value: object, fix: str) -> None:
    asked = config(**sections)
    measured = plans.measure(asked)
    [misfit] = plans.misfits(asked, measured, reckon(asked, measured))

    assert misfit.key == key
    assert str(value) in misfit.problem
    assert fix in misfit.fix


@pytest.mark.usefixtures("fast_machine")
def test_what_does_not_fit_is_told_in_one_line_each() -> None:
    assert plan(config())["does_not_fit"] == []
    texts = plan(config(train={"batch_size": 201}, controller={"block_size": 201}))["does_not_fit"]

    assert [text.partition(" ")[0] for text in texts] == ["train.batch_size", "controller.block_size"]


@pytest.mark.parametrize(
    ("scoring", "cpus", "gpus", "room"),
    [
        ({"replicas": 8, "cpus": 0.25}, 2, 0, None),
        ({"replicas": 9, "cpus": 0.25}, 2, 0, 8),
        ({"replicas": 30, "cpus": 0.1}, 3, 0, None),
        ({"replicas": 9, "cpus": 0}, 1, 0, None),
        ({"replicas": 3, "gpus": 0.4}, 2, 1, 2),
        ({"replicas": 5, "gpus": 0.4}, 2, 2, 4),  # not 5: a part of a GPU is of one GPU
        ({"replicas": 2, "gpus": 2}, 2, 3, 1),
        ({"replicas": 0, "gpus": 1}, 2, 0, None),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None,
)
def test_scorers_are_counted_as_ray_places_them(
    scoring: dict[str, object], cpus: int, gpus: int, room: int | None
) -> None:
    misfits = plans.scorers_misfit(config(scoring=scoring), cpus, gpus)

    assert len(misfits) == (room is not None)
    assert all(f"scoring.replicas to {room}" in misfit.fix for misfit in misfits)


def test_the_place_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / "file").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        [busy] = place_misfit(config(rest={"port": port}, run={"root": str(tmp_path / "new")}))
    [held] = place_misfit(config(run={"folder": str(tmp_path / "run")}))
    [unwritable] = place_misfit(config(run={"root": str(tmp_path / "file")}))

    assert (busy.key, held.key, unwritable.key) == ("rest.port", "run.folder", "run.root")
    assert f"127.0.0.1:{port}" in busy.problem
    assert str(tmp_path / "run") in held.problem
    assert str(tmp_path / "file") in unwritable.problem
    assert busy.fix
    assert held.fix
    assert unwritable.fix
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]


def test_a_pass_longer_than_the_training_is_said() -> None:
    facts = {"steps": 100, "full_pass_seconds": 300.0, "training_seconds": 100.0}
    [misfit] = freshness_misfit(config(), facts)

    assert misfit.key == "scoring.replicas"
    assert "5 min" in misfit.problem
    assert "100.0 s" in misfit.problem
    assert misfit.fix
    assert freshness_misfit(config(), facts | {"full_pass_seconds": 99.0}) == []
    assert freshness_misfit(config(), facts | {"full_pass_seconds": None}) == []


def test_a_plan_fetches_nothing(tmp_path: Path) -> None:
    with refuses(DatasetMissing, "data.root", tmp_path / "FashionMNIST" / "raw"):
        local_dataset(DataConfig(name="fashion_mnist", root=str(tmp_path), download=True))

    assert list(tmp_path.iterdir()) == []


def test_printed_plan_says_how_it_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    asked = config(scoring={"replicas": 2})
    facts = reckon(asked, MEASURED) | {"would_start": would_start(asked, MEASURED)}
    print_plan(facts | {"does_not_fit": []})
    fits = capsys.readouterr().out
    print_plan(facts | reckon(config(scoring={"replicas": 0}), MEASURED) | {"does_not_fit": ["x is 1"]})
    misfits = capsys.readouterr().out

    assert "scorer, measured alone   100 samples/s on cpu\n" in fits
    assert "full scoring pass        5.0 s, 10.0 checkpoints long\n" in fits
    assert "  2 x scorer: 0.25 CPUs, 0 GPUs each\n" in fits
    assert fits.endswith("everything fits\n")
    assert "full scoring pass        no scorers\n" in misfits
    assert misfits.endswith("does not fit\n  - x is 1\n")
