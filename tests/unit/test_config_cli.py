import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from deploy.config import RunConfig
from deploy.config_cli import TEMPLATES, app
from shared.config import read_config
from shared.errors import ConfigError, DataError, DatasetMissing, SteppeError

QUICKSTART = str(TEMPLATES / "quickstart.toml")


def config(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def refused(*arguments: str) -> SteppeError:
    """What the command raises, having printed nothing."""
    result = config(*arguments)

    assert result.output == ""
    assert isinstance(result.exception, SteppeError)
    assert result.exception.fix
    return result.exception


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
    assert refused("show", QUICKSTART, "--set", "train.epoch=3").key == "train.epoch"


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
    ("settings", "kind", "key", "value"),
    [
        (["train.epochs=0"], ConfigError, "train.epochs", "0"),
        (["data.subset=100", "train.batch_size=101"], ConfigError, "train.batch_size", "101"),
        (["data.subset=100", "train.batch_size=99"], ConfigError, "train.batch_size", "99"),
        (["data.subset=100000"], DataError, "data.subset", "100000"),
        (["data.name=fashion_mnist", "data.root=nowhere"], DatasetMissing, "data.root", "nowhere"),
        (["model.name=resnet18"], ConfigError, "model.width", "48"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_invalid(settings: list[str], kind: type[SteppeError], key: str, value: str) -> None:
    error = refused("validate", QUICKSTART, *(part for setting in settings for part in ("--set", setting)))

    assert (type(error), error.key) == (kind, key)
    assert value in error.problem


def test_init_copies_a_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    default, named = config("init"), config("init", "mine.toml", "--template", "fashion_mnist")

    assert default.stdout == "wrote ./steppe.toml; start it with: steppe run ./steppe.toml\n"
    assert (named.exit_code, default.exit_code) == (0, 0)
    assert Path("steppe.toml").read_bytes() == (TEMPLATES / "quickstart.toml").read_bytes()
    assert Path("mine.toml").read_bytes() == (TEMPLATES / "fashion_mnist.toml").read_bytes()


def test_init_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("mine")

    for path in (tmp_path / "mine.toml", tmp_path):
        error = refused("init", str(path))
        assert (type(error), error.key) == (ConfigError, str(path))
    assert (tmp_path / "mine.toml").read_text() == "mine"


def test_init_refuses(tmp_path: Path) -> None:
    unknown = refused("init", str(tmp_path / "x.toml"), "--template", "mnist")
    nowhere = refused("init", str(tmp_path / "nowhere" / "x.toml"))

    assert (unknown.key, nowhere.key) == ("--template", str(tmp_path / "nowhere" / "x.toml"))
    assert "'mnist'" in unknown.problem
    assert all(name in unknown.fix for name in ("quickstart", "fashion_mnist"))
    assert list(tmp_path.iterdir()) == []
