"""`steppe bench NAME`: measurements of the whole thing on this machine, as commands and not as timed tests."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deploy.progress import print_facts
from shared.errors import ConfigError

PICTURES = (".png", ".svg", ".pdf")


def _print(found: Mapping[str, Any]) -> None:
    print_facts({key: str(value) for key, value in found.items()})


@dataclasses.dataclass(frozen=True)
class Bench:
    """One benchmark: `measure(repeats)` gives what `show` prints, as JSON can hold it.

    `repeats` is how often it measures unless told otherwise; `draw` is None where there is nothing to draw.
    """

    measure: Callable[[int], dict[str, Any]]
    repeats: int
    show: Callable[[Mapping[str, Any]], None] = _print
    draw: Callable[[Mapping[str, Any], Path], None] | None = None


def _recovery() -> Bench:
    from deploy.bench import recovery

    return Bench(recovery.measure, repeats=20)


def _flat() -> Bench:
    from deploy.bench import flat

    return Bench(flat.measure, repeats=12, show=flat.show, draw=flat.draw)


def _store() -> Bench:
    from deploy.bench import store

    return Bench(store.measure, repeats=200, show=store.show)


def _store_crash() -> Bench:
    from deploy.bench import crash

    return Bench(crash.measure, repeats=1000)


def _store_load() -> Bench:
    from deploy.bench import load

    return Bench(load.measure, repeats=60)


def _rest() -> Bench:
    from deploy.bench import rest

    return Bench(rest.measure, repeats=5, show=rest.show)


def _scorers() -> Bench:
    from deploy.bench import scorers

    return Bench(scorers.measure, repeats=7, show=scorers.show)


def _controller() -> Bench:
    from deploy.bench import controller

    return Bench(controller.measure, repeats=5, show=controller.show)


def _ranks() -> Bench:
    from deploy.bench import ranks

    return Bench(ranks.measure, repeats=5, show=ranks.show)


def _sampler() -> Bench:
    from deploy.bench import sampler

    return Bench(sampler.measure, repeats=5, show=sampler.show)


BENCHES: dict[str, Callable[[], Bench]] = {  # called for the one that is asked for
    "recovery": _recovery,
    "flat": _flat,
    "store": _store,
    "store-crash": _store_crash,
    "store-load": _store_load,
    "rest": _rest,
    "scorers": _scorers,
    "controller": _controller,
    "ranks": _ranks,
    "sampler": _sampler,
}


def find_bench(name: str) -> Bench:
    """Raises ConfigError listing the known names."""
    if name not in BENCHES:
        raise ConfigError(f"no benchmark {name!r}", fix=f"choose one of {', '.join(BENCHES)}", key="name")
    return BENCHES[name]()


def run_bench(name: str, repeats: int | None = None, plot: Path | None = None) -> dict[str, Any]:
    """What was measured, drawn to `plot` where given. Raises ConfigError for a name or a plot that cannot be."""
    bench = find_bench(name)
    if plot is not None:
        _check_plot(name, bench, plot)
    found = {"bench": name} | bench.measure(repeats or bench.repeats)
    if plot is not None and bench.draw is not None:
        bench.draw(found, plot)
    return found


def _check_plot(name: str, bench: Bench, plot: Path) -> None:
    """Before the measuring, which can be long."""
    if bench.draw is None:
        raise ConfigError(f"--plot {plot}: {name} has nothing to draw", fix="leave --plot out", key="--plot")
    if plot.suffix not in PICTURES:
        raise ConfigError(
            f"--plot {plot}: the name ends in {plot.suffix!r}", fix=f"let it end in {', '.join(PICTURES)}", key="--plot"
        )
    if not plot.parent.is_dir():
        raise ConfigError(f"--plot {plot}: there is no folder {plot.parent}", fix="make it first", key="--plot")
