"""Reading a configuration: a TOML file, then `--set a.b=c`, into pydantic models that refuse what they do not know.

Each process's own settings stand beside it (`trainer/config.py` and so on); the data set and the model, on which
trainer and scorers must agree, stand here.
"""

import datetime
import difflib
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.errors import ConfigError


class Config(BaseModel):
    """Base of all settings: immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)


class DataConfig(Config):
    """Which images. `root` is a folder of the data set's files where it has any; `subset` keeps the first n ids."""

    name: Literal["digits", "fashion_mnist"] = "digits"
    root: str | None = None
    download: bool = False
    subset: int | None = Field(default=None, ge=2)


class ModelConfig(Config):
    """Which network; `width` is the number of channels of its first layer (default: 32, for resnet18 64)."""

    name: Literal["small_cnn", "resnet18"] = "small_cnn"
    width: int | None = Field(default=None, ge=1, le=1024)


C = TypeVar("C", bound=Config)


def read_config(kind: type[C], path: str | os.PathLike[str], settings: Sequence[str] = ()) -> C:
    """Read `path` (TOML), apply each "a.b=c" of `settings`, validate.

    Raises ConfigError that names the key, the value, and for an unknown key the nearest known one.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {os.fspath(path)!r}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {os.fspath(path)!r}: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{os.fspath(path)}: {error}") from error
    for setting in settings:
        _apply(values, setting)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(kind, item) for item in error.errors())) from error


def _apply(values: dict[str, Any], setting: str) -> None:
    key, equals, text = (part.strip() for part in setting.partition("="))
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {setting!r}: write it as section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    if isinstance(value, datetime.date | datetime.time):
        value = text  # no setting is a date, but a folder may be named after one
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {setting!r}: {section!r} is a value, not a section")
    values[last] = value


def _explain(kind: type[BaseModel], item: Any) -> str:
    """One line for one of pydantic's findings."""
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] != "extra_forbidden":
        return f"{key} = {item['input']!r}: {item['msg']}" if key else f"{item['msg']}"
    known = _keys(kind)
    near = difflib.get_close_matches(key, known, n=1)
    return f"{key}: unknown setting" + (f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}")


def _keys(kind: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += [f"{prefix}{name}", *_keys(field.annotation, f"{prefix}{name}.")]
        else:
            keys.append(f"{prefix}{name}")
    return keys
