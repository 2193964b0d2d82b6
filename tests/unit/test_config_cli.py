import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from deploy.config import RunConfig
from deploy.config_cli import TEMPLATES, app
from shared.config import read_config
from shared.errors import ConfigError

QUICKSTART = str(TEMPLATES / "quickstart.toml")


def config(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def refused(*arguments: str) -> str:
    """The text of the ConfigError that the command ends in."""
    result = config(*arguments)

    assert result.output == ""
    assert isinstance(result.exception, ConfigError)
    return str(result.exception)


def test_shown_configuration_can_be_read_again(tmp_path: Path) -> None:
    settings = ["train.seed=7", "scoring.attack.epsilon=0.03137254901960784", 'data.root="a b"']
    result = config("show", QUICKSTART, *(part for setting in settings for part in ("--set", setting)))
    (tmp_path / "shown.toml").write_text(result.stdout)
    resolved = read_config(RunConfig, QUICKSTART, settings)

    assert result.exit_code == 0
    assert read_config(RunConfig, tmp_path / "shown.toml") == resolved
    assert resolved.train.seed == 7


def test_shown_configuration_has_the_defaults() -> None:
    result = config("show", QUICKSTART, "--json")

    assert json.loads(result.stdout) == read_config(RunConfig, QUICKSTART).model_dump(mode="json")
    lines = config("show", QUICKSTART).stdout.splitlines()
    assert "momentum = 0.9" in lines  # not in the file
    assert not any(line.startswith("subset") for line in lines)  # has no value


def test_show_refuses_what_run_refuses() -> None:
    assert "did you mean train.epochs?" in refused("show", QUICKSTART, "--set", "train.epoch=3")


def test_valid() -> None:
    result = config("validate", QUICKSTART, "--set", "train.epochs=1")

    assert (result.exit_code, result.stdout) == (0, f"{QUICKSTART} is valid\n")


def test_data_still_to_be_fetched_is_valid_and_stays_unfetched(tmp_path: Path) -> None:
    settings = ("--set", "data.name=fashion_mnist", "--set", "data.download=true", "--set", f"data.root={tmp_path}")
    result = config("validate", QUICKSTART, *settings)

    assert (result.exit_code, result.stdout) == (0, f"{QUICKSTART} is valid\n")
    assert "what must fit the data was not checked" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "texts"),
    [
        (["train.epochs=0"], ["train.epochs = 0: "]),
        (["data.subset=100", "train.batch_size=101"], ["train.batch_size is 101, but there are 100 samples"]),
        (["data.subset=100", "train.batch_size=99"], ["train.batch_size 99 leaves one of 100 samples"]),
        (["data.subset=100000"], ["data.subset is 100000; digits has 1437 training images"]),
        (["data.name=fashion_mnist", "data.root=nowhere"], ["Fashion-MNIST is not at nowhere"]),
        (["model.name=resnet18"], ["model.width is 48, but resnet18 always has 64"]),
    ],
    ids=" ".join,
)
def test_invalid(settings: list[str], texts: list[str]) -> None:
    message = refused("validate", QUICKSTART, *(part for setting in settings for part in ("--set", setting)))

    assert [text for text in texts if text not in message] == []


def test_init_copies_a_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    default, named = config("init"), config("init", "mine.toml", "--template", "fashion_mnist")

    assert default.stdout == "wrote ./steppe.toml; start it with: steppe run ./steppe.toml\n"
    assert (named.exit_code, default.exit_code) == (0, 0)
    assert Path("steppe.toml").read_bytes() == (TEMPLATES / "quickstart.toml").read_bytes()
    assert Path("mine.toml").read_bytes() == (TEMPLATES / "fashion_mnist.toml").read_bytes()


def test_init_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("mine")

    assert "mine.toml is there already; name another file" in refused("init", str(tmp_path / "mine.toml"))
    assert "is there already" in refused("init", str(tmp_path))
    assert (tmp_path / "mine.toml").read_text() == "mine"


def test_init_refuses(tmp_path: Path) -> None:
    unknown = refused("init", str(tmp_path / "x.toml"), "--template", "mnist")

    assert unknown.startswith("no template 'mnist'; known: ")
    assert {"quickstart", "fashion_mnist"} <= set(unknown.partition("known: ")[2].split(", "))
    assert "No such file or directory" in refused("init", str(tmp_path / "nowhere" / "x.toml"))
    assert list(tmp_path.iterdir()) == []
