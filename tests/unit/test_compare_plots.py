"""The pictures carry the report's numbers, and are pictures."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from deploy.compare.plots import plot_accuracy, plot_differences, plot_search
from deploy.compare.report import report
from shared.errors import ConfigError
from tests.raising import refuses

SAM = [0.80, 0.81, 0.82, 0.83]
ADM = {"easy": [0.81, 0.83, 0.83, 0.85], "hard": [0.84, 0.81, 0.82, 0.87]}


@pytest.fixture
def results() -> dict[str, Any]:
    values = {(data, method): SAM if method == "sam" else ADM[data] for data in ADM for method in ("sam", "adm")}
    return {
        "name": "small",
        "created_at": "2026-01-02T03:04:05+00:00",
        "command": "steppe compare small.toml",
        "candidate": "adm",
        "controls": ["sam"],
        "equivalences": [],
        "methods": {"sam": {"label": "plain SAM"}, "adm": {"label": "low ADM at $5 or $6"}},
        "data": {"easy": {"label": "Easy images"}, "hard": {"label": "Hard images"}},
        "chosen": {"easy": {"sam": {"rho": 0.1}}},
        "search": [
            {"data": "easy", "method": "sam", "settings": {"rho": rho}, "seed": seed, "accuracy": accuracy}
            for rho, seed, accuracy in [(0.5, 0, 0.4), (0.1, 0, 0.6), (0.1, 1, 0.7), (0.02, 0, 0.5)]
        ],
        "cells": [
            {"data": data, "method": method, "seed": seed, "accuracy": accuracy, "seconds": 1.0}
            | {"seconds_per_epoch": 1.0, "forward_equivalents": 10.0, "fidelity": None}
            for (data, method), accuracies in values.items()
            for seed, accuracy in enumerate(accuracies)
        ],
    }


def bars(axes: Axes) -> list[list[float]]:
    """[low, high] of each horizontal error bar."""
    return [[float(end[0]) for end in bar.get_segments()[0]] for held in axes.containers for bar in held.lines[2]]


def points(axes: Axes) -> list[tuple[list[float], list[float]]]:
    return [([float(x) for x in line.get_xdata()], [float(y) for y in line.get_ydata()]) for line in axes.lines]


def titles(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


@pytest.mark.parametrize("plot", ["differences", "accuracy", "search"])
def test_a_png_is_a_picture_and_an_svg_a_drawing(plot: str, results: dict[str, Any], tmp_path: Path) -> None:
    draw = {"differences": plot_differences, "accuracy": plot_accuracy, "search": plot_search}[plot]
    given = report(results) if plot == "differences" else results

    draw(given, tmp_path / "plot.png")
    draw(given, tmp_path / "plot.svg")

    with Image.open(tmp_path / "plot.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert len(set(picture.convert("L").tobytes())) > 10
    assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_the_forest_shows_the_reports_intervals(results: dict[str, Any], tmp_path: Path) -> None:
    answer = report(results)
    figure = plot_differences(answer, tmp_path / "d.png")

    for axes, one in zip(figure.axes, answer["differences"], strict=True):
        assert bars(axes)[0] == pytest.approx([one["low_all"], one["high_all"]])
        assert bars(axes)[1] == pytest.approx([one["low"], one["high"]])
        assert points(axes)[0][0] == [0, 0]  # the line of no difference
        assert points(axes)[1] == ([pytest.approx(one["mean"])], [0.0])
        assert "percentage points" in axes.get_xlabel()
    assert titles(figure) == ["Easy images\nn = 4", "Hard images\nn = 4"]
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["plain SAM"]


def test_the_forest_fills_only_what_is_shown(results: dict[str, Any], tmp_path: Path) -> None:
    """Easy: 1, 2, 1, 2 points ahead, p Holm 0.028. Hard: 4, 0, 0, 4, more on average, but nothing shown."""
    easy, hard = plot_differences(report(results), tmp_path / "d.png").axes

    assert easy.lines[1].get_markerfacecolor() == easy.lines[1].get_color()
    assert hard.lines[1].get_markerfacecolor() == "white"


def test_a_difference_that_was_not_tested_has_no_bar(results: dict[str, Any], tmp_path: Path) -> None:
    results["cells"] = [cell for cell in results["cells"] if cell["data"] == "easy" and cell["seed"] == 0]
    easy, hard = plot_differences(report(results), tmp_path / "d.png").axes

    assert (bars(easy), points(easy)[1][0]) == ([], [pytest.approx(1.0)])
    assert (bars(hard), len(hard.lines), hard.get_title()) == ([], 1, "Hard images\nn = 0")


def test_accuracy_shows_every_seed_and_the_mean_with_its_error(results: dict[str, Any], tmp_path: Path) -> None:
    del results["cells"][-1]
    figure = plot_accuracy(results, tmp_path / "a.png")
    easy = figure.axes[0]

    assert points(easy)[0][0] == pytest.approx([80.0, 81.0, 82.0, 83.0])
    assert points(easy)[1][0] == [pytest.approx(81.5)]
    assert bars(easy)[0] == pytest.approx([81.5 - (5 / 3) ** 0.5 / 2, 81.5 + (5 / 3) ** 0.5 / 2])
    assert titles(figure) == ["Easy images\nn = 4", "Hard images\nn = 3 to 4"]
    assert easy.get_xlabel() == "test accuracy (%)"


def test_the_search_is_a_curve_over_the_searched_number(results: dict[str, Any], tmp_path: Path) -> None:
    figure = plot_search(results, tmp_path / "s.png")
    assert figure is not None
    (axes,) = figure.axes
    curve, ring = points(axes)[0], points(axes)[-1]

    assert curve == ([0.02, 0.1, 0.5], [pytest.approx(50.0), pytest.approx(65.0), pytest.approx(40.0)])
    assert ring == ([0.1], [pytest.approx(65.0)])
    assert axes.get_xscale() == "log"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("rho", "validation accuracy (%)")
    assert axes.get_title() == "Easy images\nn = 1 to 2"


@pytest.mark.parametrize(
    "tried",
    [[], [{"rho": 0.1}], [{"rho": 0.1, "lr": 1.0}, {"rho": 0.2, "lr": 2.0}], [{"mode": "a"}, {"mode": "b"}]],
    ids=["nothing searched", "one value", "two settings", "no number"],
)
def test_no_picture_without_a_searched_number(
    tried: list[dict[str, Any]], results: dict[str, Any], tmp_path: Path
) -> None:
    results["search"] = [
        {"data": "easy", "method": "sam", "settings": settings, "seed": 0, "accuracy": 0.5} for settings in tried
    ]

    assert plot_search(results, tmp_path / "s.png") is None
    assert not (tmp_path / "s.png").exists()


def test_no_label_is_cut_or_lies_on_another(results: dict[str, Any], tmp_path: Path) -> None:
    results["methods"] |= {f"m{index}": {"label": f"a method with a rather long name {index}"} for index in range(6)}
    results["data"] |= {f"d{index}": {"label": "a data set with a long name " * 2} for index in range(3)}
    figure = plot_accuracy(results, tmp_path / "a.png")
    figure.draw_without_rendering()
    ticks = [tick.get_window_extent() for tick in figure.axes[0].get_yticklabels()]
    names = [axes.title.get_window_extent() for axes in figure.axes]

    for boxes in (ticks, names):
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in ticks + names)


def test_another_suffix_is_refused(results: dict[str, Any], tmp_path: Path) -> None:
    for draw, given in ((plot_differences, report(results)), (plot_accuracy, results), (plot_search, results)):
        with refuses(ConfigError, str(tmp_path / "plot.pdf"), ".png, .svg"):
            draw(given, tmp_path / "plot.pdf")
