"""Reading a configuration: a TOML file, then `--set a.b=c`, into pydantic models that refuse what they do not know.

Each process's own settings stand beside it (`trainer/config.py` and so on); the data set and the model, on which
trainer and scorers must agree, stand here.
"""

import copy
import datetime
import difflib
import os
import re
import tomllib
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TypeGuard, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from shared.errors import ConfigError, ConfigErrors, SteppeError

RESNET18_WIDTH = 64
DEFAULT_IMAGE_SIZE = 64
DATASETS = ("digits", "fashion_mnist", "mnist_5k", "cifar10", "cifar100", "image_folder")
MODELS = ("small_cnn", "tiny_cnn", "resnet18")
NAMED = ("data", "model")  # sections that their name alone may stand for
IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


class Config(BaseModel):
    """Base of all settings: immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True, allow_inf_nan=False)


class Named(Config):
    """Something that steppe knows by its name, or the user's own by its import path. The name alone stands for all."""

    name: str
    args: dict[str, Any] = Field(default_factory=dict)

    @property
    def is_own(self) -> bool:
        """Whether `name` is an import path (`shared.own`)."""
        return ":" in self.name

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: object) -> object:
        return {"name": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _has_arguments_of_its_own(self) -> Self:
        if self.args and not self.is_own:
            raise ConfigError(
                f"args are {self.args}, but {self.name} takes none",
                fix="leave them out, or name a function of your own",
                key="args",
            )
        return self


class DataConfig(Named):
    """Which images, or any other inputs.

    `root` is a folder of the data set's files where it has any; `image_size` is the side in pixels to which an
    image_folder's images are brought (default 64). `validation` holds out so many training images and evaluates on them
    instead of the test split; `subset` keeps the first n ids of the others. `label_noise` is the share of the training
    and validation labels that become another class, drawn by `noise_seed`.

    Your own: `name` is "module:function", called with the role "train" or "score" and with `args`, for a map-style
    Dataset of (x, label) either way; what is scored is not augmented. `adapter` ("module:function") makes (x_B..., y_B)
    of a collated batch of it, such as a dictionary. `test` ("module:function") is called with the role "test"; without
    it, and without `validation`, no accuracy is measured.
    """

    name: str = "digits"
    adapter: str | None = None
    test: str | None = None
    root: str | None = None
    download: bool = False
    image_size: int | None = Field(default=None, ge=8, le=1024)
    validation: int | None = Field(default=None, ge=1)
    subset: int | None = Field(default=None, ge=2)
    label_noise: float = Field(default=0.0, ge=0, le=0.9)
    noise_seed: int = Field(default=0, ge=0)

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        return _known("data.name", name, DATASETS)

    @field_validator("adapter", "test")
    @classmethod
    def _is_a_path(cls, path: str | None, info: ValidationInfo) -> str | None:
        if path is not None and not IMPORT_PATH.fullmatch(path):
            key = f"data.{info.field_name}"
            raise ConfigError(f"{key} is {path!r}", fix="set it to an import path, 'module:function'", key=key)
        return path

    @model_validator(mode="after")
    def _has_its_size(self) -> "DataConfig":
        if self.name != "image_folder" and self.image_size is not None:
            raise ConfigError(
                f"data.image_size is {self.image_size}, but only image_folder has a size to choose, {self.name} has "
                "its own",
                fix="leave it out",
                key="data.image_size",
            )
        return self

    @model_validator(mode="after")
    def _is_own_or_not(self) -> "DataConfig":
        for key in ("root", "download") if self.is_own else ("adapter", "test"):
            if value := getattr(self, key):
                fix = "give it to your function by data.args" if self.is_own else "leave it out, or name your own data"
                problem = f"data.{key} is {value!r}, which {self.name} does not know"
                raise ConfigError(problem, fix=fix, key=f"data.{key}")
        return self


class ModelConfig(Named):
    """Which network; `width` is the number of channels of its first layer (default: 32, for tiny_cnn 16, for resnet18
    64).

    Your own: `name` is "module:function", called with `args` for a torch Module that gives logits (B, K), or something
    that has `logits`.
    """

    name: str = "small_cnn"
    width: int | None = Field(default=None, ge=1, le=1024)

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        return _known("model.name", name, MODELS)

    @model_validator(mode="after")
    def _has_its_width(self) -> "ModelConfig":
        if self.name == "resnet18" and self.width not in (None, RESNET18_WIDTH):
            raise ConfigError(
                f"model.width is {self.width}, but resnet18 always has {RESNET18_WIDTH}",
                fix="set that, or leave it out",
                key="model.width",
            )
        if self.is_own and self.width is not None:
            raise ConfigError(
                f"model.width is {self.width}, but {self.name} is your own",
                fix="give it to your function by model.args",
                key="model.width",
            )
        return self


def _known(key: str, name: str, names: Sequence[str]) -> str:
    if name not in names and not IMPORT_PATH.fullmatch(name):
        known = ", ".join(repr(one) for one in names[:-1])
        raise ConfigError(
            f"{key} is {name!r}", fix=f"set it to {known} or {names[-1]!r}, or your own as 'module:function'", key=key
        )
    return name


C = TypeVar("C", bound=Config)


def read_config(kind: type[C], path: str | os.PathLike[str], settings: Sequence[str] = ()) -> C:
    """Read `path` (TOML), apply each "a.b=c" of `settings`, validate.

    Raises ConfigError that names the key, the value, and for an unknown key the nearest known one.
    """
    name = os.fspath(path)
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {name!r}", fix="to make one: steppe config init", key=name) from None
    except IsADirectoryError:
        raise ConfigError(f"{name!r} is a folder", fix="name the configuration file in it", key=name) from None
    except OSError as error:
        fix = "name a file that you may read"
        raise ConfigError(f"cannot read {name!r}: {error.strerror}", fix=fix, key=name) from error
    except UnicodeDecodeError as error:
        wrong = f"byte 0x{error.object[error.start]:02x} at position {error.start}"
        raise ConfigError(f"{name} is not UTF-8 ({wrong})", fix="save it as UTF-8", key=name) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name} is not TOML: {error}", fix="correct it there", key=name) from error
    return make_config(kind, values, settings)


def make_config(kind: type[C], values: dict[str, Any], settings: Sequence[str] = ()) -> C:
    """As `read_config`, of values that are read already, such as those in a run.json.

    Several settings that cannot work are a ConfigErrors.
    """
    values = copy.deepcopy(values)
    for setting in settings:
        _apply(values, setting)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        found = [_explain(kind, item) for item in error.errors()]
        raise (found[0] if len(found) == 1 else ConfigErrors.of(found)) from error


def _apply(values: dict[str, Any], setting: str) -> None:
    key, equals, text = (part.strip() for part in setting.partition("="))
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {setting!r} sets nothing", fix="write it as section.key=value", key="--set")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    if isinstance(value, datetime.date | datetime.time):
        value = text  # no setting is a date, but a folder may be named after one
    *sections, last = key.split(".")
    for depth, section in enumerate(sections, 1):
        if section in NAMED and isinstance(values.get(section), str):
            values[section] = {"name": values[section]}
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            path = ".".join(sections[:depth])
            raise ConfigError(f"--set {setting!r}: {section!r} is a value, not a section", fix=f"set {path}", key=path)
    values[last] = value


def _explain(kind: type[BaseModel], item: Any) -> ConfigError:
    """The error for one of pydantic's findings."""
    loc, place = _setting(kind, item["loc"])
    if item["type"] == "value_error":  # of a check of our own, which names value and limit itself
        return _placed(item["ctx"]["error"], loc, _is_model(place))
    key = ".".join(loc)
    problem, fix = _problem(kind, key, item)
    return ConfigError(problem, fix=fix, key=key)


def _problem(kind: type[BaseModel], key: str, item: Any) -> tuple[str, str]:
    """What is wrong with the setting `key`, and what to do."""
    given, found = item["input"], item["type"]
    if found == "extra_forbidden":
        known = _keys(*_innermost(kind, item["loc"]))
        near = difflib.get_close_matches(key, known, n=1)
        return f"{key}: unknown setting", f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"
    if found == "missing":
        return f"{key} is missing", "set it"
    if found == "model_type":
        example = next((name for name in _keys(kind) if name.startswith(f"{key}.")), key)
        return f"{key} is {given!r}, but it is a section, not a value", f"set what is in it, such as {example}"
    if isinstance(given, dict) and given:
        return f"{key} is a value, not a section: there is no {key}.{next(iter(given))}", f"set {key}"
    if found in _FIXES:
        return f"{key} is {given!r}", _FIXES[found].format(**_plain(item.get("ctx", {})))
    return f"{key} is {given!r}: {item['msg']}", "correct it"


def _placed(error: Exception, loc: Sequence[str], is_section: bool) -> ConfigError:
    """What a check of our own raised, with the whole key: it may have left out where it stands, `loc`, or a part."""
    problem, fix, own = (
        (error.problem, error.fix, error.key) if isinstance(error, SteppeError) else (str(error), "correct it", "")
    )
    parts = own.split(".") if own else []
    if loc and parts[-len(loc) :] == [*loc]:
        key = own
    elif is_section:  # the check is of what is in it
        shared = next(n for n in range(len(loc), -1, -1) if [*loc[len(loc) - n :]] == parts[:n])
        key = ".".join([*loc, *parts[shared:]])
    else:
        key = ".".join(loc)
    return ConfigError(problem if key == own else f"{key}: {problem}", fix=fix, key=key)


def _plain(limits: dict[str, Any]) -> dict[str, Any]:
    """Limits as people write them: 0 and not 0.0."""
    return {key: f"{value:g}" if isinstance(value, float) else value for key, value in limits.items()}


_FIXES = {  # of pydantic's kinds of findings
    "greater_than": "set it to more than {gt}",
    "greater_than_equal": "set it to {ge} or more",
    "less_than": "set it to less than {lt}",
    "less_than_equal": "set it to {le} or less",
    "finite_number": "set it to a finite number",
    "literal_error": "set it to {expected}",
    "string_type": "set it to a text",
    "string_pattern_mismatch": "set it to a text of the form {pattern}",
    "too_short": "name at least {min_length}",
    "dict_type": "set what is in it, such as {{name = 1}}",
    "list_type": "set it to a list",
    "tuple_type": "set it to a list",
} | {
    f"{kind}_{finding}": f"set it to {what}"
    for kind, what in (("int", "a whole number"), ("float", "a number"), ("bool", "true or false"))
    for finding in ("type", "parsing", "parsing_size", "from_float")
}


def _setting(kind: type[BaseModel], loc: Sequence[int | str]) -> tuple[list[str], Any]:
    """The parts of the setting's key, and its type: after a choice of types `loc` goes on with pydantic's own words."""
    parts: list[str] = []
    place: Any = kind
    for part in loc:
        if get_origin(place) in (Union, types.UnionType) and type(None) not in get_args(place):
            break
        parts += str(part).split(".")
        place = _below(place, part)
    return parts, place


def _innermost(kind: type[BaseModel], loc: Sequence[int | str]) -> tuple[type[BaseModel], str]:
    """The last model in a dict or a list on the way to `loc`, and the beginning of its keys; `kind` where none is."""
    found = kind, ""
    place: Any = kind
    for depth, part in enumerate(loc[:-1], 1):
        is_field = _is_model(place)
        place = _below(place, part)
        if not is_field and _is_model(place):
            found = place, "".join(f"{key}." for key in loc[:depth])
    return found


def _below(place: Any, part: int | str) -> Any:
    """The type of the part of a model, a dict or a list; None where that is not known."""
    if _is_model(place):
        fields = place.model_fields.items()
        return next((field.annotation for name, field in fields if part in (name, field.alias)), None)
    return get_args(place)[-1] if get_args(place) else None


def _is_model(kind: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _keys(kind: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for python_name, field in kind.model_fields.items():
        name = field.alias or python_name
        if _is_model(field.annotation):
            keys += [f"{prefix}{name}", *_keys(field.annotation, f"{prefix}{name}.")]
        else:
            keys.append(f"{prefix}{name}")
    return keys
