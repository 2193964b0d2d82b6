from pathlib import Path
from typing import Any

import pytest
import torch

import deploy
from deploy.compare.config import CompareConfig
from deploy.config import RunConfig
from scorer.adm import score_batch
from scorer.config import AttackConfig
from scorer.worker import build_attack
from shared.config import read_config
from shared.errors import ConfigError
from shared.measures import MEASURES
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
    ("text", "settings", "message"),
    [
        ("[train]\nepoch = 3", [], r"train\.epoch: unknown setting; did you mean train\.epochs\?"),
        ("[trian]\nepochs = 3", [], r"trian: unknown setting; did you mean train\?"),
        ("", ["train.sam.roh=1"], r"train\.sam\.roh: unknown setting; did you mean train\.sam\.rho\?"),
        ("zzzzzzzzzzzz = 1", [], r"zzzzzzzzzzzz: unknown setting; known: run, run\.root, run\.folder"),
        ("[train]\nepochs = 0", [], r"train\.epochs = 0: must be at least 1"),
        ("", ["train.epochs=many"], r"train\.epochs = 'many': must be a whole number"),
        ("", ["data.name=mnist"], r"data\.name = 'mnist': must be 'digits', 'fashion_mnist', .* or 'image_folder'"),
        ("", ["train.sam.rho=nan"], r"train\.sam\.rho = nan: "),
        ("[train]\nepochs = 0\nseeds = 1", [], r"train\.epochs = 0: (.|\n)*train\.seeds: .*train\.seed\?"),
        ("", ["train.epochs"], r"--set 'train\.epochs': write it as section\.key=value"),
        ("", ["=3"], "--set '=3': write it as"),
        ("", ["train..epochs=3"], "write it as"),
        ("data = 3", ["data.name=digits"], "'data' is a value, not a section"),
        ("", ["train.seed=3", "train.seed.x=1"], "'seed' is a value, not a section"),
        ("[train\nepochs = 3", [], r"run\.toml is not TOML: .*line 1"),
        (
            "",
            ["train.curriculum.name=low_adm_first"],
            rf"train\.curriculum\.name: no curriculum 'low_adm_first'; known: {', '.join(CURRICULA)}$",
        ),
        (
            "",
            ["train.curriculum.measure=gab"],
            rf"curriculum\.measure: no measure 'gab'; known: {', '.join(MEASURES)}$",
        ),
        ("", ["train.curriculum.guard_floor=2"], r"train\.curriculum\.guard_floor = 2: must be at most 1$"),
        ("", ["train.curriculum.guard_loss=0"], r"train\.curriculum\.guard_loss = 0: must be more than 0$"),
        ("", ["train.curriculum.form=weights"], r"curriculum\.form = 'weights': must be 'sampling' or 'weighting'$"),
        (
            "[train.curriculum]\nhold_until = 0.9",
            [],
            r"^train\.curriculum\.hold_until is 0\.9, after fade_until, 0\.7; set it to that or less$",
        ),
        (
            "",
            ["train.curriculum.passes=second"],
            r"^train\.curriculum\.passes is 'second', which only weights of the loss can be; set form = \"weighting\"$",
        ),
        (
            "",
            ["scoring.delay_versions=3"],
            r"^scoring\.delay_versions is 3 in the mode async, but only every_epoch can delay; set "
            r"scoring\.mode to that, or leave it out$",
        ),
        ("", ["train.evaluate_every_epochs=0"], r"train\.evaluate_every_epochs = 0: must be at least 1$"),
        ("", ["train.augment=rotate"], r"train\.augment = 'rotate': must be 'none', 'flip', 'crop' or 'crop_flip'$"),
    ],
)
def test_refused(tmp_path: Path, text: str, settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text, *settings)


def test_path_that_holds_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "latin1.toml").write_bytes(b'[data]\nroot = "\xe4"')

    with pytest.raises(ConfigError, match=r"no configuration file '.*missing\.toml'"):
        read_config(RunConfig, tmp_path / "missing.toml")
    for path in (tmp_path, tmp_path / "latin1.toml"):
        with pytest.raises(ConfigError, match=str(path)):
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
