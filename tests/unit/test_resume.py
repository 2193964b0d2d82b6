"""A training that is interrupted and resumed is the uninterrupted one, bit for bit; and which run may be resumed."""

import dataclasses
import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

import trainer.loop
from deploy.config import RunConfig
from deploy.resume import check_fits, clear_leftovers, find_resumable
from shared.attempts import begin
from shared.catalogue import Run, process_identity
from shared.checkpoints import CheckpointPublisher, load, stable
from shared.config import DataConfig, ModelConfig
from shared.datasets import Dataset, Images, load_dataset
from shared.errors import ConfigError, RunError, StateError
from shared.models import build_model
from shared.score_store import ScoreWriter
from tests.raising import refuses
from tests.rows import make_rows
from trainer.comm import ALONE
from trainer.config import CurriculumConfig, SamConfig, TrainConfig
from trainer.feed import ScoreFeed, ScoreView
from trainer.loop import TrainResult, train
from trainer.state import StateSaver, load_newest_state

SAMPLES, STEPS_PER_EPOCH, STEPS = 120, 6, 18


class Killed(BaseException):
    """What `kill -9` is to a training."""


@dataclasses.dataclass(frozen=True)
class Watched(Images):
    """Images that note which ids are asked for; before batch number `killed_at` the process is killed."""

    drawn: list[list[int]] = dataclasses.field(default_factory=list)
    killed_at: int | None = None

    def batch(self, ids: npt.ArrayLike) -> tuple[torch.Tensor, torch.Tensor]:
        if len(self.drawn) == self.killed_at:
            raise Killed
        self.drawn.append(np.asarray(ids).tolist())
        return super().batch(ids)


@functools.cache
def digits() -> Dataset:
    full = load_dataset(DataConfig(name="digits", subset=SAMPLES))
    return dataclasses.replace(full, test=full.test.select(slice(60)))


def watched(killed_at: int | None = None) -> Dataset:
    images = digits().train
    fields = {field.name: getattr(images, field.name) for field in dataclasses.fields(Images)}
    return dataclasses.replace(digits(), train=Watched(**fields, killed_at=killed_at))


def make_model() -> nn.Module:
    """Dropout makes the steps depend on torch's random numbers too."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Dropout(0.1), build_model(ModelConfig(width=4), digits()))


def make_config(**settings: Any) -> TrainConfig:
    """Six steps an epoch, windows of 40 draws against batches of 20; nothing published but at the end."""
    fixed = {
        "epochs": 3,
        "batch_size": 20,
        "learning_rate": 0.05,
        "device": "cpu",
        "threads": 1,
        "warmup_steps": 1000,
        "curriculum": CurriculumConfig(strength=2.0, fade_until=1.0, windows_per_epoch=3),
    }
    return TrainConfig(**(fixed | settings))


CONFIGS = {
    "SAM": make_config(),
    "ASAM": make_config(
        sam=SamConfig(rho=0.5, adaptive=True),
        curriculum=CurriculumConfig(strength=2.0, fade_until=1.0, windows_per_epoch=7),
    ),
    "weighting": make_config(
        augment="crop_flip",
        evaluate_every_epochs=2,
        curriculum=CurriculumConfig(
            strength=2.0, fade_until=1.0, windows_per_epoch=4, form="weighting", passes="second", memory=0.5
        ),
    ),
}


class FakeEpochScorer:
    """Scores that follow from the weights alone. Both `Scores` and `EpochScorer`.

    `interrupt` is called in the middle of scoring; when it says so, half of the samples keep the scores they had.
    """

    def __init__(self, interrupt: Callable[[], bool] = lambda: False) -> None:
        self._view = ScoreView.empty(SAMPLES)
        self._interrupt = interrupt
        self.rescored_at: list[int] = []

    def view(self) -> ScoreView:
        return self._view

    def newest_version(self) -> int:
        return int(max(self._view.newest_scored(), 0))

    def rescore(self, model: nn.Module, step: int) -> None:
        self.rescored_at.append(step)
        bits = torch.cat([value.flatten().double() for value in model.state_dict().values()])
        rng = np.random.default_rng(int.from_bytes(bits.sum().numpy().tobytes(), "little"))
        percentile_N = rng.permutation(np.linspace(0.0, 1.0, SAMPLES))
        if self._interrupt():
            percentile_N[SAMPLES // 2 :] = self._view.percentile_N[SAMPLES // 2 :]
        self._view = ScoreView(step, percentile_N, np.full(SAMPLES, step), 4).frozen()

    def state_dict(self) -> dict[str, Any]:
        return {
            "percentile": torch.tensor(self._view.percentile_N),
            "model_version": torch.tensor(self._view.model_version_N),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        model_version_N = state["model_version"].numpy().copy()
        self._view = ScoreView(1, state["percentile"].numpy().copy(), model_version_N, 4).frozen()


@dataclasses.dataclass
class Outcome:
    """What came of all lives of a training."""

    weights: dict[str, torch.Tensor]
    drawn: list[list[int]]
    result: TrainResult | None
    scorer: FakeEpochScorer | None = None

    def counted(self) -> tuple[Any, ...]:
        assert self.result is not None
        draws = self.result.draws
        return draws.fresh, draws.stale, draws.unscored, draws.age_counts.tolist()


def live(
    run: Path,
    config: TrainConfig,
    *,
    attempt: int = 1,
    stop_after: int | None = None,
    killed_at: int | None = None,
    scorer: FakeEpochScorer | None = None,
    stopped: Callable[[], bool] | None = None,
) -> Outcome:
    """One life: from the state that is there to the end, to a Ctrl-C after `stop_after` steps, or to a kill."""
    model, data = make_model(), watched(killed_at)
    torch.manual_seed(attempt)  # whatever the process did before must not matter
    saver, outcome = StateSaver(run, attempt), Outcome({}, data.train.drawn, None, scorer)
    asked = stopped or (lambda: len(data.train.drawn) == stop_after)
    with CheckpointPublisher(run, keep_last=99) as publisher:
        feed = ScoreFeed(run, SAMPLES, newest_version=lambda: 1)  # stops publish too
        feed.close()
        feed.refresh()
        try:
            outcome.result = train(
                config,
                ALONE,
                model,
                data,
                publisher,
                scorer or feed,
                lambda _: None,
                asked,
                epoch_scorer=scorer,
                saver=saver,
                resumed=load_newest_state(run),
            )
        except Killed:
            saver.close()  # what was given to the disk gets there
    outcome.weights = model.state_dict()
    return outcome


def live_several(run: Path, config: TrainConfig, scores: str, stops: tuple[int, ...] = ()) -> Outcome:
    """A training that is stopped after each of `stops` steps, counted from the very first, and resumed."""
    if scores == "a store":
        with ScoreWriter(run / "scores", SAMPLES) as writer:
            writer.append(make_rows(np.arange(SAMPLES), log_ratio=np.arange(float(SAMPLES))))
    drawn: list[list[int]] = []
    for attempt, (begins, ends) in enumerate(zip((0, *stops), (*stops, None), strict=True), 1):
        scorer = FakeEpochScorer() if scores == "every epoch" else None
        after = None if ends is None else ends - begins
        outcome = live(run, config, attempt=attempt, stop_after=after, scorer=scorer)
        drawn += outcome.drawn
    return dataclasses.replace(outcome, drawn=drawn)


def assert_same(expected: Outcome, actual: Outcome) -> None:
    assert expected.drawn == actual.drawn
    assert expected.weights.keys() == actual.weights.keys()
    different = [name for name, value in expected.weights.items() if not torch.equal(value, actual.weights[name])]
    assert different == []
    assert expected.counted() == actual.counted()
    assert expected.result is not None
    assert actual.result is not None
    assert (expected.result.steps, actual.result.steps) == (STEPS, STEPS)
    assert expected.result.test_accuracy == actual.result.test_accuracy


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Outcome]:
    @functools.cache
    def find(config: str, scores: str) -> Outcome:
        return live_several(tmp_path_factory.mktemp("whole"), CONFIGS[config], scores)

    return find


STOPS = {
    "before the first step": (0,),
    "in the first epoch": (1,),
    "at the first epoch's end": (6,),
    "after an epoch's first step": (7,),
    "in mid-epoch": (9,),
    "at the second epoch's end": (12,),
    "before the last step": (17,),
    "twice in a row": (8, 9),
    "twice, first in the first epoch": (3, 14),
    "four times": (2, 6, 6, 13),
}


CASES = [
    *((name, "SAM", "every epoch") for name in STOPS),
    *((name, "SAM", "a store") for name in ("in the first epoch", "in mid-epoch", "twice in a row")),
    *((name, "SAM", "none") for name in ("before the first step", "at the first epoch's end", "in mid-epoch")),
    ("four times", "ASAM", "every epoch"),
    ("in mid-epoch", "ASAM", "a store"),
    ("four times", "weighting", "every epoch"),
    ("in mid-epoch", "weighting", "a store"),
]


@pytest.mark.parametrize(("stops", "config", "scores"), CASES)
def test_resumed_training_is_the_uninterrupted_one(
    tmp_path: Path, uninterrupted: Callable[[str, str], Outcome], stops: str, config: str, scores: str
) -> None:
    expected = uninterrupted(config, scores)
    actual = live_several(tmp_path, CONFIGS[config], scores, STOPS[stops])

    assert_same(expected, actual)


def test_the_ways_to_score_differ_so_that_the_tests_above_can_fail(
    uninterrupted: Callable[[str, str], Outcome],
) -> None:
    drawn = [str(uninterrupted("SAM", scores).drawn) for scores in ("none", "a store", "every epoch")]
    weights = [uninterrupted(config, "none").weights["1.1.0.0.weight"] for config in CONFIGS]

    assert len(set(drawn)) == 3
    assert len({value.numpy().tobytes() for value in weights}) == 3
    assert uninterrupted("SAM", "every epoch").scorer.rescored_at == [6, 12]


@pytest.mark.parametrize("scores", ["none", "every epoch"])
@pytest.mark.parametrize("killed_at", [5, 16])
def test_killed_training_goes_on_from_the_last_saved_step(
    tmp_path: Path, uninterrupted: Callable[[str, str], Outcome], killed_at: int, scores: str
) -> None:
    """Saved every four steps; what came after is drawn and trained again."""
    config = make_config(save_every_steps=4, save_interval_s=1e9)
    make_scorer = FakeEpochScorer if scores == "every epoch" else lambda: None
    first = live(tmp_path, config, killed_at=killed_at, scorer=make_scorer())
    state = load_newest_state(tmp_path)
    assert state is not None
    second = live(tmp_path, config, attempt=2, scorer=make_scorer())
    expected = uninterrupted("SAM", scores)

    assert state.step in range(4, killed_at + 1, 4)  # one that came while another was written is skipped
    assert_same(expected, dataclasses.replace(second, drawn=first.drawn[: state.step] + second.drawn))


def test_states_are_saved_at_the_ends_of_epochs_and_of_all(tmp_path: Path) -> None:
    live(tmp_path, make_config(save_interval_s=0.0), killed_at=14)
    at_kill = load_newest_state(tmp_path)
    live(tmp_path, make_config(save_interval_s=1e9), attempt=2)
    at_end = load_newest_state(tmp_path)

    assert at_kill.step in (6, 12)  # one that came while another was written is skipped
    assert at_end.step == 18
    assert (at_kill.model_version, at_end.model_version) == (0, 0)


def test_state_names_the_newest_version_given_out(tmp_path: Path) -> None:
    config = make_config(warmup_steps=2, publish_every_steps=3)
    live(tmp_path, config, stop_after=9)
    state = load_newest_state(tmp_path)
    published = {one.model_version: one.step for one in stable(tmp_path)}

    assert published == {1: 2, 2: 5, 3: 8, 4: 9}
    assert (state.step, state.model_version) == (9, 3)
    weights = load(next(stable(tmp_path)))
    assert all(torch.equal(weights[name], value) for name, value in state.content["model"].items())


@pytest.mark.parametrize("scores", ["none", "every epoch"])
def test_finished_training_that_is_resumed_trains_no_more(
    tmp_path: Path, uninterrupted: Callable[[str, str], Outcome], scores: str
) -> None:
    """Such as after a kill between the last step and the summary."""
    expected = live_several(tmp_path, CONFIGS["SAM"], scores)
    again = live(tmp_path, CONFIGS["SAM"], attempt=2, scorer=FakeEpochScorer() if scores == "every epoch" else None)

    assert again.drawn == []
    assert_same(expected, dataclasses.replace(again, drawn=expected.drawn))


def test_accuracy_after_a_stop_at_the_last_step_is_that_of_the_last_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Ctrl-C between the last step and the last evaluation: the resumed run has only this left to do."""

    def sum_of_weights(model: nn.Module, *_: Any) -> float:
        return sum(float(value.double().sum()) for value in model.state_dict().values())

    monkeypatch.setattr(trainer.loop, "evaluate", sum_of_weights)
    outcome = live_several(tmp_path, make_config(), "none", (STEPS,))
    model = make_model()
    model.load_state_dict(outcome.weights)

    assert outcome.result.steps == STEPS
    assert sum_of_weights(model) == outcome.result.test_accuracy


def test_stop_while_the_epoch_is_scored_changes_no_draw(
    tmp_path: Path, uninterrupted: Callable[[str, str], Outcome]
) -> None:
    """`EveryEpoch.rescore` returns early when a signal came, with half of the samples scored."""
    came: list[bool] = []

    def interrupt() -> bool:
        came.append(True)
        return True

    first = live(tmp_path, CONFIGS["SAM"], scorer=FakeEpochScorer(interrupt), stopped=lambda: bool(came))
    second = live(tmp_path, CONFIGS["SAM"], attempt=2, scorer=FakeEpochScorer())
    expected = uninterrupted("SAM", "every epoch")

    assert_same(expected, dataclasses.replace(second, drawn=first.drawn + second.drawn))


def test_last_news_of_a_stop_in_mid_epoch_name_that_epoch(tmp_path: Path) -> None:
    data, news = watched(), []
    with CheckpointPublisher(tmp_path) as publisher:
        train(
            make_config(),
            ALONE,
            make_model(),
            data,
            publisher,
            FakeEpochScorer(),
            news.append,
            lambda: len(data.train.drawn) == 8,
        )

    assert (news[-1].step, news[-1].epoch) == (8, 1)


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        (lambda state: state.pop("schedule"), "schedule", "['schedule']"),
        (lambda state: state.update(weather=1), "weather", "['weather']"),
        (lambda state: state.update(epoch_scorer={}), "scoring.mode", ""),
        (lambda state: state["sampler"].pop("draws"), "draws", "['draws']"),
        (lambda state: state["sampler"].update(num_samples=7), "num_samples", 7),
    ],
    ids=["a field less", "a field more", "another mode", "the sampler's", "another number of samples"],
)
def test_state_that_does_not_fit_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], key: str, value: object
) -> None:
    live(tmp_path, make_config(), stop_after=2)
    state = load_newest_state(tmp_path)
    change(state.content)

    with CheckpointPublisher(tmp_path) as publisher, refuses(StateError, key, value):
        train(make_config(), ALONE, make_model(), digits(), publisher, FakeEpochScorer(), lambda _: None, resumed=state)


# -- which run ---------------------------------------------------------------------------------------------------------


def create(path: Path, **sections: Any) -> Run:
    config = RunConfig(**sections)
    return Run.create(
        path,
        dataset_fingerprint=digits().fingerprint,
        train=digits().train,
        config=config.model_dump(mode="json"),
        scoring_id=config.scoring.scoring_id,
    )


@functools.cache
def dead_process() -> dict[str, Any]:
    """The identity of a process that is gone."""
    script = "import json; from shared.catalogue import process_identity; print(json.dumps(process_identity()))"
    answer: dict[str, Any] = json.loads(subprocess.check_output([sys.executable, "-c", script]))
    return answer


def test_interrupted_and_killed_and_served_runs_are_resumed_with_their_settings(tmp_path: Path) -> None:
    run = create(tmp_path / "run", train={"epochs": 7}, scoring={"attack": {"steps": 3, "name": "pgd"}})
    for runtime in (None, {"role": "run", **dead_process()}, {"role": "serve", **process_identity()}):
        if runtime:
            run.write("runtime.json", runtime)
        found = find_resumable(str(run.path))

        assert found.run.path == run.path
        assert (found.config.train.epochs, found.config.scoring.attack.steps) == (7, 3)


def test_running_and_finished_runs_are_refused(tmp_path: Path) -> None:
    run = create(tmp_path)
    run.write("runtime.json", {"role": "run", **process_identity()})
    with refuses(RunError, str(tmp_path)) as running:
        find_resumable(str(tmp_path))
    assert f"steppe down {tmp_path}" in running.value.fix
    run.remove("runtime.json")
    run.write("summary.json", {})
    for runtime in (None, {"role": "serve", **process_identity()}, {"role": "run", **dead_process()}):
        if runtime:
            run.write("runtime.json", runtime)
        with refuses(RunError, str(tmp_path), "summary.json"):
            find_resumable(str(tmp_path))


def test_a_run_that_a_loop_of_the_users_own_trains_is_refused(tmp_path: Path) -> None:
    """Else steppe's trainer would publish into it, in place of theirs."""
    config = RunConfig()
    dataset = digits()
    run = Run.create(
        tmp_path / "runs" / "own",
        dataset_fingerprint=dataset.fingerprint,
        train=dataset.train,
        config=config.model_dump(mode="json"),
        scoring_id=config.scoring.scoring_id,
        is_trained_here=False,
    )

    with refuses(RunError, str(run.path)) as caught:
        find_resumable(str(run.path))
    assert "steppe score" in caught.value.fix
    path = tmp_path / "config.toml"
    path.write_text(f'[run]\nroot = "{run.path.parent}"\n')
    with refuses(RunError, str(run.path.parent)):
        find_resumable(str(path))


@pytest.mark.parametrize(
    ("setting", "started_with"),
    [
        ("train.epochs=5", 30),
        ("train.seed=1", 0),
        ("train.batch_size=32", 64),
        ("train.sam.rho=0.5", 0.05),
        ("train.publish_every_steps=7", 20),
        ("train.curriculum.name=pacing", "soft"),
        ("scoring.mode=every_epoch", "async"),
        ("scoring.attack.name=pgd", "fgsm"),
        ("scoring.attack.step_size=0.5", None),
        ("data.subset=50", None),
        ("data.name=fashion_mnist", "digits"),
        ("model.width=8", None),
        ("train.curriculum.measure=loss", "adm"),
        ("train.curriculum.memory=0.5", None),
        ("train.curriculum.form=weighting", "sampling"),
        ("train.evaluate_every_epochs=2", 1),
        ("train.augment=flip", "none"),
    ],
)
def test_settings_that_decide_what_is_trained_are_refused(tmp_path: Path, setting: str, started_with: object) -> None:
    run = create(tmp_path / "run")
    config = tmp_path / "config.toml"
    config.write_text(f"[run]\nfolder = '{run.path}'\n")
    key, _, given = setting.partition("=")
    for path in (run.path, config):
        with refuses(ConfigError, key, run.path) as caught:
            find_resumable(str(path), [setting])

        values = caught.value.problem.replace(key, "").replace(str(run.path), "")
        assert given in values
        assert repr(started_with) in values


def test_settings_that_do_not_decide_it_may_change(tmp_path: Path) -> None:
    run = create(tmp_path)
    settings = [
        "run.progress_interval_s=1",
        "rest.port=0",
        "controller.block_size=17",
        "data.root=/somewhere",
        "train.device=cpu",
        "train.threads=1",
        "train.keep_checkpoints=9",
        "train.save_every_steps=10",
        "train.save_interval_s=0",
        "scoring.replicas=3",
        "scoring.cpus=1",
        "scoring.threads=2",
        "scoring.batch_size=10",
    ]
    config = find_resumable(str(run.path), settings).config

    assert (config.rest.port, config.controller.block_size, config.scoring.replicas) == (0, 17, 3)
    assert config.train.save_every_steps == 10
    assert Run(tmp_path).description == run.description


def test_settings_that_are_none_are_refused_as_ever(tmp_path: Path) -> None:
    create(tmp_path)

    with refuses(ConfigError, "train.epoch"):
        find_resumable(str(tmp_path), ["train.epoch=3"])


def test_configuration_file_means_its_folder_or_the_newest_unfinished_run(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    config = tmp_path / "config.toml"
    config.write_text(f"[run]\nroot = '{root}'\n")
    with refuses(RunError, str(root)):
        find_resumable(str(config))
    runs = {name: create(root / name) for name in ("c", "b", "a", "finished", "running")}
    runs["b"].write("runtime.json", {"role": "run", **dead_process()})
    runs["finished"].write("summary.json", {})
    runs["running"].write("runtime.json", {"role": "run", **process_identity()})

    assert find_resumable(str(config)).run.path == root / "a"
    assert find_resumable(str(config), [f"run.folder={root / 'c'}"]).run.path == root / "c"
    runs["a"].write("summary.json", {})
    assert find_resumable(str(config)).run.path == root / "b"
    with refuses(RunError, str(root / "nothing"), "run.json"):
        find_resumable(str(config), [f"run.folder={root / 'nothing'}"])
    with refuses(ConfigError, str(root / "nothing")):
        find_resumable(str(root / "nothing"))


def test_finished_run_that_is_served_hides_no_unfinished_one(tmp_path: Path) -> None:
    create(tmp_path / "unfinished")
    served = create(tmp_path / "served")
    served.write("summary.json", {})
    served.write("runtime.json", {"role": "serve", **process_identity()})
    config = tmp_path / "config.toml"
    config.write_text(f"[run]\nroot = '{tmp_path}'\n")

    assert find_resumable(str(config)).run.path == tmp_path / "unfinished"


def test_run_with_a_torn_runtime_file_is_an_unfinished_one(tmp_path: Path) -> None:
    create(tmp_path / "finished").write("summary.json", {})
    (create(tmp_path / "unfinished").path / "runtime.json").write_text("{")
    config = tmp_path / "config.toml"
    config.write_text(f"[run]\nroot = '{tmp_path}'\n")

    assert find_resumable(str(config)).run.path == tmp_path / "unfinished"


def test_other_data_and_another_attack_are_refused(tmp_path: Path) -> None:
    run = create(tmp_path)
    same, other = RunConfig(), RunConfig(scoring={"attack": {"epsilon": 0.1}})
    fewer = dataclasses.replace(digits(), train=digits().train.select(slice(50)))
    check_fits(run, same, digits())

    with refuses(RunError, str(tmp_path), digits().fingerprint) as data:
        check_fits(run, same, fewer)
    assert fewer.fingerprint in data.value.problem
    with refuses(RunError, "scoring.attack", same.scoring.scoring_id) as attack:
        check_fits(run, other, digits())
    assert other.scoring.scoring_id in attack.value.problem


def test_rays_folder_of_a_killed_driver_is_removed_and_no_other(tmp_path: Path) -> None:
    run = create(tmp_path / "run")
    for name, stays in (("steppe-abc", False), ("somebody-elses", True)):
        (tmp_path / name / "session").mkdir(parents=True)
        run.write("runtime.json", {"ray_folder": str(tmp_path / name), **dead_process()})

        assert clear_leftovers(run) == 0
        assert (tmp_path / name).exists() == stays
    run.remove("runtime.json")
    assert clear_leftovers(run) == 0


def test_second_attempt_begins_above_all_that_was_published(tmp_path: Path) -> None:
    """As the driver does it: versions never go back, though the state does."""
    config = make_config(warmup_steps=2, publish_every_steps=1, save_every_steps=4, save_interval_s=1e9)
    begin(tmp_path, fork_step=0, last_valid_version=0, first_version=1)
    live(tmp_path, config, killed_at=7)
    state = load_newest_state(tmp_path)
    with CheckpointPublisher(tmp_path) as publisher:
        attempt = begin(
            tmp_path, fork_step=state.step, last_valid_version=state.model_version, first_version=publisher.next_version
        )

        assert (attempt.fork_step, attempt.last_valid_version, attempt.first_version) == (4, 3, 7)
        assert publisher.publish(make_model(), state.step) == 7
