"""What `steppe compare` reads: data sets, methods, what is searched, and what is claimed."""

from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from shared.config import Config
from shared.errors import ConfigError


def _is_plain(value: Any) -> Any:
    if not isinstance(value, bool | int | float | str):
        raise ConfigError(f"{value!r} is no value of a setting", fix="write true or false, a number, or a text")
    return value


Setting = Annotated[Any, AfterValidator(_is_plain)]

DECIDED = {  # settings of a run that are not for the configuration to choose: why, and what to set instead
    "train.seed": (
        "seeds count from 0 in the search and from first_seed in the final runs",
        "set seeds, search_seeds, first_seed",
    ),
    "data.noise_seed": ("it is the training's seed", "set seeds, search_seeds, first_seed"),
    "data.validation": ("only the search holds images out", "set validation of the data set"),
}


class DataSpec(Config):
    """A data set: settings of a run, written `"data.subset" = 2000`. The search holds `validation` images out."""

    label: str | None = None
    settings: dict[str, Setting] = Field(alias="set")
    validation: int = Field(ge=1)


class MethodSpec(Config):
    """A way to train: settings of a run on top of the base, or of what another method, `like`, ended up with.

    `search` holds the values to try, every combination of them; the best mean validation accuracy is taken, for each
    data set of its own. `equal_compute` stretches the epochs until the training costs as many forward equivalents as
    that method, its scorers counted.
    """

    label: str | None = None
    like: str | None = None
    settings: dict[str, Setting] = Field(default_factory=dict, alias="set")
    search: dict[str, Annotated[list[Setting], Field(min_length=1)]] = Field(default_factory=dict)
    equal_compute: str | None = None


class EquivalenceSpec(Config):
    """Methods `a` and `b` are claimed to be the same within `margin` percentage points."""

    a: str
    b: str
    margin: float = Field(default=0.5, gt=0)


class CompareConfig(Config):
    """Methods x data sets x seeds. `base` holds the sections of a run that all of them share.

    `candidate` is compared with each of `controls`. Seeds of the search are 0, 1, ...; those of the final runs begin
    with `first_seed`: no run that chose a setting is among those that are reported. What one comparison found is
    tested anew by another with a `first_seed` beyond its seeds.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    candidate: str
    controls: list[str] = Field(min_length=1)
    equivalences: list[EquivalenceSpec] = Field(default_factory=list)
    first_seed: int = Field(default=1000, ge=1000)
    seeds: int = Field(default=8, ge=2, le=1000)
    search_seeds: int = Field(default=3, ge=1, le=1000)
    base: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, DataSpec] = Field(min_length=1)
    method: dict[str, MethodSpec] = Field(min_length=2)

    @property
    def final_seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)

    @model_validator(mode="after")
    def _names_exist(self) -> "CompareConfig":
        named = [("candidate", self.candidate), *(("controls", name) for name in self.controls)]
        named += [("equivalences", name) for pair in self.equivalences for name in (pair.a, pair.b)]
        named += [(f"method.{name}", other) for name, spec in self.method.items() for other in needs(spec)]
        for key, name in named:
            if name not in self.method:
                raise ConfigError(
                    f"{key} names the method {name!r}, which is not there",
                    fix=f"name one of {', '.join(self.method)}",
                    key=key,
                )
        if self.candidate in self.controls:
            raise ConfigError(
                f"the candidate, {self.candidate}, is among controls",
                fix="leave it out there: a method is no control of itself",
                key="controls",
            )
        if len(set(self.controls)) < len(self.controls):
            raise ConfigError(
                f"controls names a method twice: {', '.join(self.controls)}", fix="name it once", key="controls"
            )
        stages(self)
        return self

    @model_validator(mode="after")
    def _decides_nothing_of_ours(self) -> "CompareConfig":
        sections = [(key, value) for key, value in self.base.items() if isinstance(value, dict)]
        given = {"base": {f"{key}.{name}" for key, section in sections for name in section}}
        given |= {f"data.{name}.set": set(spec.settings) for name, spec in self.data.items()}
        for name, spec in self.method.items():
            given |= {f"method.{name}.set": set(spec.settings), f"method.{name}.search": set(spec.search)}
        for place, keys in given.items():
            for key in sorted(keys & DECIDED.keys()):
                why, fix = DECIDED[key]
                raise ConfigError(f"{place}.{key} is given, but {why}", fix=fix, key=f"{place}.{key}")
        for name, spec in self.method.items():
            for place in (f"method.{name}.set", f"method.{name}.search"):
                if spec.equal_compute and "train.epochs" in given[place]:
                    raise ConfigError(
                        f"{place}.train.epochs is given, but method.{name}.equal_compute decides the epochs",
                        fix="leave one out",
                        key=f"{place}.train.epochs",
                    )
            if spec.like and self.method[spec.like].equal_compute:
                raise ConfigError(
                    f"method.{name} is like {spec.like}, whose epochs are not known before the final runs",
                    fix="let it be like another, with an equal_compute of its own",
                    key=f"method.{name}.like",
                )
        return self


def needs(spec: MethodSpec) -> list[str]:
    """The methods whose settings, or costs, must be known first."""
    return [other for other in (spec.like, spec.equal_compute) if other is not None]


def stages(config: CompareConfig) -> list[list[str]]:
    """The methods in order: each stage needs only those before. Raises ConfigError for a circle."""
    ordered: list[list[str]] = []
    left = dict(config.method)
    while left:
        known = {name for stage in ordered for name in stage}
        ready = [name for name, spec in left.items() if known.issuperset(needs(spec))]
        if not ready:
            circle = _circle(left)
            raise ConfigError(
                f"methods need one another in a circle: {' -> '.join(circle)}",
                fix="change like, or equal_compute, of one of them",
                key=f"method.{circle[0]}",
            )
        ordered.append(ready)
        for name in ready:
            del left[name]
    return ordered


def _circle(methods: dict[str, MethodSpec]) -> list[str]:
    """One among `methods`, each of which needs another of them; its first name is also the last."""
    path = [next(iter(methods))]
    while path.count(path[-1]) == 1:
        path.append(next(other for other in needs(methods[path[-1]]) if other in methods))
    return path[path.index(path[-1]) :]
