import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import Field, field_validator, model_validator

import deploy
from deploy.compare.config import CompareConfig
from deploy.config import RunConfig
from scorer.adm import score_batch
from scorer.config import AttackConfig
from scorer.worker import build_attack
from shared.config import DATASETS, MODELS, Config, _keys, make_config, read_config
from shared.errors import ConfigError, ConfigErrors
from shared.measures import MEASURES
from tests.raising import refuses
from trainer.curriculum import CURRICULA

CONFIGS = sorted((Path(deploy.__file__).parent / "configs").glob("*.toml"))


def read(tmp_path: Path, text: str = "", *settings: str) -> RunConfig:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return read_config(RunConfig, path, settings)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configuration_is_valid(path: Path) -> None:
    compares = "[method." in path.read_text(encoding="utf-8")
    config = read_config(CompareConfig if compares else RunConfig, path)

    assert config.model_fields_set  # it says something, under sections that exist


def test_shipped_configurations_are_found() -> None:
    assert {"quickstart.toml", "fashion_mnist.toml"} <= {path.name for path in CONFIGS}


def test_file_and_settings_override_the_defaults_in_this_order(tmp_path: Path) -> None:
    text = "[train]\nepochs = 7\nseed = 5\n[train.sam]\nrho = 0.5\n"
    train = read(tmp_path, text, "train.epochs=8", "train.epochs=9", "train.sam.adaptive=true").train

    assert (train.epochs, train.seed, train.batch_size) == (9, 5, 64)
    assert (train.sam.rho, train.sam.adaptive) == (0.5, True)


@pytest.mark.parametrize(
    ("setting", "section", "key", "value"),
    [
        ("train.learning_rate=1e-3", "train", "learning_rate", 0.001),
        ("data.subset=12", "data", "subset", 12),
        ("data.download=true", "data", "download", True),
        ("data.name=digits", "data", "name", "digits"),
        ('data.root="a b"', "data", "root", "a b"),
        ("data.root=/a/b=c", "data", "root", "/a/b=c"),
        ("data.root=", "data", "root", ""),
    ],
)
def test_setting_is_toml_or_a_bare_word(tmp_path: Path, setting: str, section: str, key: str, value: Any) -> None:
    assert getattr(getattr(read(tmp_path, "", setting), section), key) == value


@pytest.mark.parametrize(
    ("text", "settings", "key", "value"),
    [
        ("[train]\nepochs = 0", [], "train.epochs", "0"),
        ("", ["train.epochs=many"], "train.epochs", "'many'"),
        ("", ["data.name=mnist"], "data.name", "'mnist'"),
        ("", ["data.root=[1]"], "data.root", "[1]"),
        ("", ["run.tensorboard=3"], "run.tensorboard", "3"),
        ("", ["train.sam.rho=nan"], "train.sam.rho", "nan"),
        ("", ["train.epochs"], "--set", "'train.epochs'"),
        ("", ["=3"], "--set", "'=3'"),
        ("", ["train..epochs=3"], "--set", "'train..epochs=3'"),
        ("data = 3", ["data.name=digits"], "data", "'data'"),
        ("", ["train.seed=3", "train.seed.x=1"], "train.seed", "'train.seed.x=1'"),
        ("data = 3", [], "data", "3"),
        ("", ["train.epochs.x=1"], "train.epochs", "train.epochs.x"),
        ("", ["model.args=3"], "model.args", "3"),
        ("", ["train.curriculum.name=low_adm_first"], "train.curriculum.name", "'low_adm_first'"),
        ("", ["train.curriculum.measure=gab"], "train.curriculum.measure", "'gab'"),
        ("", ["train.curriculum.guard_floor=2"], "train.curriculum.guard_floor", "2"),
        ("", ["train.curriculum.guard_loss=0"], "train.curriculum.guard_loss", "0"),
        ("", ["train.curriculum.form=weights"], "train.curriculum.form", "'weights'"),
        ("[train.curriculum]\nhold_until = 0.9", [], "train.curriculum.hold_until", "0.9"),
        ("", ["train.curriculum.passes=second"], "train.curriculum.passes", "'second'"),
        ("", ["scoring.delay_versions=3"], "scoring.delay_versions", "3"),
        ("", ["scoring.resources.tpu=0"], "scoring.resources.tpu", "0"),
        ("", ["train.evaluate_every_epochs=0"], "train.evaluate_every_epochs", "0"),
        ("", ["train.augment=rotate"], "train.augment", "'rotate'"),
    ],
)
def test_refused(tmp_path: Path, text: str, settings: list[str], key: str, value: str) -> None:
    with refuses(ConfigError, key, value):
        read(tmp_path, text, *settings)


@pytest.mark.parametrize(
    ("text", "settings", "key", "near"),
    [
        ("[train]\nepoch = 3", [], "train.epoch", "train.epochs"),
        ("[trian]\nepochs = 3", [], "trian", "train"),
        ("", ["train.sam.roh=1"], "train.sam.roh", "train.sam.rho"),
        ("zzzzzzzzzzzz = 1", [], "zzzzzzzzzzzz", "rest.port"),
    ],
)
def test_unknown_setting_is_told_with_the_nearest_or_with_all(
    tmp_path: Path, text: str, settings: list[str], key: str, near: str
) -> None:
    with refuses(ConfigError, key, key) as caught:
        read(tmp_path, text, *settings)
    assert set(re.findall(r"[\w.]*\w", caught.value.fix)) & {*_keys(RunConfig)} == (
        {near} if key[0] == "t" else {*_keys(RunConfig)}
    )


@pytest.mark.parametrize(
    ("setting", "known"),
    [
        ("train.curriculum.name=x", CURRICULA),
        ("train.curriculum.measure=x", MEASURES),
        ("data.name=x", DATASETS),
        ("model.name=x", MODELS),
        ("scoring.mode=x", ["async", "every_epoch", "shadow", "off"]),
    ],
)
def test_unknown_choice_is_told_with_all_there_are(tmp_path: Path, setting: str, known: Sequence[str]) -> None:
    with refuses(ConfigError, setting.partition("=")[0]) as caught:
        read(tmp_path, "", setting)
    assert set(re.findall(r"\w+", caught.value.fix)) >= {*known}


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    with refuses(ConfigErrors, "train.epochs") as caught:
        read(tmp_path, "[train]\nepochs = 0\nseeds = 1")

    assert isinstance(caught.value, ConfigErrors)
    assert [one.key for one in caught.value.errors] == ["train.epochs", "train.seeds"]
    assert str(caught.value).splitlines() == [str(one) for one in caught.value.errors]


class Inner(Config):
    name: str = "x"
    choice: tuple[float, float] | Literal["none"] = "none"
    mood: str = ""
    key: str = ""

    @field_validator("name")
    @classmethod
    def _is_x(cls, name: str) -> str:
        if name == "plain":
            raise ValueError("name is 'plain'")
        if name != "x":
            raise ConfigError(f"name is {name!r}", fix="set it to 'x'", key="" if name == "y" else name)
        return name

    @model_validator(mode="after")
    def _is_in_the_mood(self) -> "Inner":
        if self.mood:
            raise ConfigError(f"mood is {self.mood!r}", fix="leave it out", key=self.key)
        return self


class Middle(Config):
    inner: Inner = Inner()


class Outer(Config):
    middle: Middle = Middle()
    named: dict[str, Inner] = Field(default_factory=dict)


@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        ({"name": "y"}, "name", "'y'"),
        ({"name": "name"}, "name", "'name'"),
        ({"name": "inner.name"}, "name", "'inner.name'"),
        ({"name": "middle.inner.name"}, "name", "'middle.inner.name'"),
        ({"name": "other"}, "name", "'other'"),
        ({"name": "plain"}, "name", "'plain'"),
        ({"mood": "bad"}, "", "'bad'"),
        ({"mood": "bad", "key": "mood"}, "mood", "'bad'"),
        ({"mood": "bad", "key": "inner.mood"}, "mood", "'bad'"),
        ({"mood": "bad", "key": "middle.inner.mood"}, "mood", "'bad'"),
        ({"choice": [1, "b"]}, "choice", "'b'"),
    ],
    ids=str,
)
def test_a_check_may_leave_out_where_its_setting_stands(given: dict[str, Any], key: str, value: str) -> None:
    """Or a part of that; and a field's own check is about that field, whatever it says."""
    with refuses(ConfigError, f"middle.inner.{key}".removesuffix("."), value):
        make_config(Outer, {"middle": {"inner": given}})


def test_a_setting_of_a_section_with_a_name_of_the_users_has_its_whole_key() -> None:
    with refuses(ConfigError, "named.a.mood", "'bad'"):
        make_config(Outer, {"named": {"a": {"mood": "bad", "key": "mood"}}})


def test_path_that_holds_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "latin1.toml").write_bytes(b'[data]\nroot = "\xe4"')
    (tmp_path / "torn.toml").write_text("[train\nepochs = 3")

    for path, value in (
        (tmp_path / "missing.toml", "no configuration file"),
        (tmp_path, "is a folder"),
        (tmp_path / "latin1.toml", "0xe4"),
        (tmp_path / "torn.toml", "line 1"),
    ):
        with refuses(ConfigError, str(path), value):
            read_config(RunConfig, path)


def test_what_fits_together_is_taken(tmp_path: Path) -> None:
    second = ["train.curriculum.form=weighting", "train.curriculum.passes=second"]
    held = ["train.curriculum.hold_until=0.7", "scoring.mode=every_epoch", "scoring.delay_versions=3"]
    config = read(tmp_path, "", *second, *held)

    assert (config.train.curriculum.passes, config.scoring.delay_versions) == ("second", 3)


@pytest.mark.parametrize(("name", "steps"), [("fgsm", 7), ("pgd", 1), ("pgd", 4)])
def test_forward_equivalents_of_an_attack_are_the_passes_that_scoring_takes(name: Any, steps: int) -> None:
    """Counted on a net: each forward pass is one, and so is each pass back to the input."""
    net, passes = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)), {"forward": 0, "backward": 0}

    def count(module: torch.nn.Module, arguments: Any, output: torch.Tensor) -> None:
        passes["forward"] += 1
        if output.requires_grad:
            output.register_hook(lambda _: passes.update(backward=passes["backward"] + 1))

    net.register_forward_hook(count)
    attack = AttackConfig(name=name, steps=steps)
    score_batch(net, torch.rand(5, 1, 2, 2), torch.arange(5) % 3, build_attack(attack))

    assert attack.forward_equivalents == sum(passes.values())
