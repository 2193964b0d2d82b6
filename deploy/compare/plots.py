"""Pictures of a comparison, as PNG or SVG by the suffix; each is drawn on a figure of its own and returned.

Imports matplotlib (half a second): import this module where a picture is wanted.
"""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from deploy.compare.report import Cells, accuracies, cells_by_seed, search_table
from deploy.compare.statistics import SHOWN, summary
from shared.errors import ConfigError

FORMATS = (".png", ".svg")
INK, PALE = "#1f3a5f", "#9db4d0"
COLOURS = ("#1f3a5f", "#c8553d", "#3f8f5f", "#8a5fa8", "#b8860b", "#2a9db5", "#5c5c5c")
MARKERS = "osD^vP*"
PANEL_INCHES, INCHES_PER_ROW, INCHES_PER_LINE, PANELS_ACROSS = 3.6, 0.4, 0.1, 3


def plot_differences(report: Mapping[str, Any], path: str | Path) -> Figure:
    """Candidate minus each control in percentage points, a panel per data set (takes what `report` returned).

    Thick bars are the 95 % intervals of one difference, thin ones hold for all data sets together; a filled point is
    a difference that Holm's adjusted p shows. A difference that was not tested has no bar.
    Raises ConfigError for a suffix other than .png and .svg.
    """
    names = list(dict.fromkeys(one["control_label"] for one in report["differences"]))
    figure, panels = _rows_of_names(
        path, len(report["tables"]), names, f"{report['candidate_label']} minus", sharex=True
    )
    for table, axes in zip(report["tables"], panels, strict=True):
        rows = [one for one in report["differences"] if one["data"] == table["data"]]
        axes.axvline(0, color="black", linewidth=0.8)
        for place, one in enumerate(rows):
            _bar(axes, place, one["mean"], one["low_all"], one["high_all"], width=1.0)
            _bar(axes, place, one["mean"], one["low"], one["high"], width=3.0)
            if one["mean"] is not None:
                fill = INK if one["verdict"] in SHOWN else "white"
                axes.plot([one["mean"]], [place], "o", color=INK, markerfacecolor=fill, markersize=7)
        _title(axes, table["data_label"], [one["n"] for one in rows])
        axes.set_xlabel("difference of test accuracy\n(percentage points)")
    figure.supxlabel(
        "thick: 95 % interval of paired differences, Student t; thin: for all data sets together (Bonferroni)\n"
        "filled: Holm-adjusted p below 0.05 over the data sets; hollow: no difference shown",
        fontsize=8,
    )
    return _save(figure, path)


def plot_accuracy(results: Mapping[str, Any], path: str | Path) -> Figure:
    """Test accuracy in percent of each method, a panel per data set: mean with its standard error, and each seed.

    Raises ConfigError for a suffix other than .png and .svg.
    """
    cells = cells_by_seed(results)
    names = [str(method["label"]) for method in results["methods"].values()]
    figure, panels = _rows_of_names(path, len(results["data"]), names, "", sharex=False)
    for data, axes in zip(results["data"], panels, strict=True):
        counts = [
            _accuracies_of_one(axes, place, cells, data, method) for place, method in enumerate(results["methods"])
        ]
        _title(axes, results["data"][data]["label"], counts)
        axes.set_xlabel("test accuracy (%)")
    figure.supxlabel("squares: mean ± standard error over seeds; dots: single seeds", fontsize=8)
    return _save(figure, path)


def plot_search(results: Mapping[str, Any], path: str | Path) -> Figure | None:
    """Validation accuracy in percent against the searched number, a row of panels per data set, a panel per setting.

    Shows the methods that searched exactly one setting, a number; the chosen value is ringed. Without any such
    method nothing is written and the answer is None. Raises ConfigError for a suffix other than .png and .svg.
    """
    _check_suffix(path)
    curves = list(_curves(search_table(results)))
    if not curves:
        return None
    data = [one for one in results["data"] if any(one == row["data"] for _, rows in curves for row in rows)]
    settings = list(dict.fromkeys(setting for setting, _ in curves))
    methods = list(results["methods"])
    size = (PANEL_INCHES * 1.2 * len(settings), 3.0 * len(data) + 0.9)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(wspace=0.05))
    panels = figure.subplots(len(data), len(settings), squeeze=False)
    for row, name in enumerate(data):
        for column, setting in enumerate(settings):
            axes = panels[row][column]
            shown = [rows for of, rows in curves if of == setting and rows[0]["data"] == name]
            for rows in shown:
                _curve(axes, setting, rows, methods.index(rows[0]["method"]))
            _title(axes, results["data"][name]["label"], [one["n"] for rows in shown for one in rows])
            axes.set_xlabel(_plain(setting))
            axes.set_ylabel("validation accuracy (%)")
            _tick_tried(axes, sorted({row["settings"][setting] for rows in shown for row in rows}))
            if shown:
                axes.legend(fontsize=7, framealpha=0.6)
    figure.supxlabel("mean ± standard error over seeds; ringed: chosen", fontsize=8)
    return _save(figure, path)


def _rows_of_names(
    path: str | Path, panels: int, names: Sequence[str], above: str, sharex: bool
) -> tuple[Figure, list[Axes]]:
    """A figure with one panel per data set, at most three side by side, and a row per name, the first on top."""
    _check_suffix(path)
    across = min(panels, PANELS_ACROSS)
    down = -(-panels // across)
    folded = [_plain(name, 26) for name in names]
    lines = max((name.count("\n") + 1 for name in folded), default=1)
    inches_per_row = INCHES_PER_ROW + INCHES_PER_LINE * (lines - 1)
    height = (inches_per_row * max(len(names), 2) + 1.4) * down + 0.6
    figure = Figure(figsize=(PANEL_INCHES * across + 1.6, height), layout=ConstrainedLayoutEngine(wspace=0.05))
    grid = figure.subplots(down, across, sharex=sharex, sharey=True, squeeze=False)
    for axes in grid.flat[panels:]:
        axes.remove()
    for axes in grid.flat[:panels]:
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(left=False, labelbottom=True)
    grid[0][0].set_yticks(range(len(names)), folded)
    grid[0][0].set_ylim(max(len(names), 1) - 0.5, -0.5)
    for axes in grid[:, 0]:
        axes.set_ylabel(_plain(above, 26))
    return figure, list(grid.flat[:panels])


def _bar(axes: Axes, place: int, mean: float | None, low: float | None, high: float | None, width: float) -> None:
    if mean is not None and low is not None and high is not None:
        axes.errorbar([mean], [place], xerr=[[mean - low], [high - mean]], fmt="none", ecolor=INK, elinewidth=width)


def _accuracies_of_one(axes: Axes, place: int, cells: Cells, data: str, method: str) -> int:
    """Draws one method's row and returns its number of seeds."""
    values = list(accuracies(cells, data, method).values())
    known = summary(values)
    if known.mean is not None:
        axes.plot(values, [place + 0.22] * known.n, "o", color=PALE, markersize=3.5, markeredgewidth=0)
        error = None if known.standard_error is None else [known.standard_error]
        axes.errorbar([known.mean], [place - 0.1], xerr=error, fmt="s", color=INK, markersize=5, capsize=3)
    return known.n


def _curves(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """(setting, rows by rising value) of each data set and method that searched one setting, a number."""
    by_method: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        by_method.setdefault((row["data"], row["method"]), []).append(row)
    for tried in by_method.values():
        setting = _searched_number(tried)
        if setting is not None:
            yield setting, _by_value(tried, setting)


def _searched_number(tried: Sequence[Mapping[str, Any]]) -> str | None:
    """The one setting that differs among the rows, when it is one and always a number."""
    first = tried[0]["settings"]
    names: dict[str, None] = dict.fromkeys(name for row in tried for name in row["settings"])
    differ = [name for name in names if any(row["settings"].get(name) != first.get(name) for row in tried)]
    if len(differ) != 1 or not all(_is_number(row["settings"].get(differ[0])) for row in tried):
        return None
    return differ[0]


def _by_value(rows: Sequence[Mapping[str, Any]], setting: str) -> list[Mapping[str, Any]]:
    return sorted(rows, key=lambda row: float(row["settings"][setting]))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _curve(axes: Axes, setting: str, rows: Sequence[Mapping[str, Any]], index: int) -> None:
    x = [row["settings"][setting] for row in rows]
    y = [row["mean"] for row in rows]
    errors = [row["standard_error"] or 0.0 for row in rows]
    colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
    axes.errorbar(
        x,
        y,
        yerr=errors,
        color=colour,
        marker=marker,
        markersize=4,
        capsize=2,
        linewidth=1.2,
        label=_plain(rows[0]["label"]),
    )
    chosen = [place for place, row in enumerate(rows) if row["chosen"]]
    axes.plot(
        [x[place] for place in chosen],
        [y[place] for place in chosen],
        "o",
        color=colour,
        fillstyle="none",
        markersize=11,
    )


def _tick_tried(axes: Axes, values: Sequence[float]) -> None:
    """Ticks at the tried values; logarithmic when they are positive and span a factor of ten."""
    if values and values[0] > 0 and values[-1] >= 10 * values[0]:
        axes.set_xscale("log")
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.set_xticks([], minor=True)


def _title(axes: Axes, label: str, counts: Sequence[int]) -> None:
    least, most = min(counts, default=0), max(counts, default=0)
    axes.set_title(f"{_plain(label, 34)}\nn = {least}" + (f" to {most}" if most > least else ""), fontsize=10)


def _plain(label: str, width: int = 60) -> str:
    """Folded to the width, with dollars that are no mathematics."""
    return textwrap.fill(label, width).replace("$", r"\$")


def _check_suffix(path: str | Path) -> None:
    if Path(path).suffix.lower() not in FORMATS:
        raise ConfigError(
            f"{path} ends in neither of {', '.join(FORMATS)}",
            fix="give a file name that ends in one of them",
            key=str(path),
        )


def _save(figure: Figure, path: str | Path) -> Figure:
    figure.savefig(path, dpi=150, metadata={"Date": None} if Path(path).suffix.lower() == ".svg" else None)
    return figure
