"""What a report says of a comparison small enough to work out by hand."""

import copy
import json
import math
from typing import Any

import pytest
from scipy import stats

from deploy.compare.report import (
    overview,
    report,
    search_table,
    to_markdown,
    to_text,
)
from deploy.compare.statistics import AHEAD, BEHIND, NOT_TESTED
from shared.errors import DataError
from tests.raising import refuses

SAM = [0.80, 0.81, 0.82, 0.83]
UP = [0.81, 0.83, 0.83, 0.85]  # 1, 2, 1, 2 points above SAM: mean 1.5, deviation 1/sqrt(3), error 0.288675
DOWN = [0.79, 0.79, 0.81, 0.81]
HALF_95 = 3.182446 * 0.288675  # t(0.975, 3)


def cells(data: str, method: str, values: list[float], cost: float, fidelity: float | None = None) -> list[Any]:
    return [
        {"data": data, "method": method, "seed": 100 + index, "accuracy": value, "seconds": 30.0}
        | {"seconds_per_epoch": cost + index, "forward_equivalents": 1000 * cost, "fidelity": fidelity}
        for index, value in enumerate(values)
    ]


def trials(method: str, values: dict[float, list[float]]) -> list[Any]:
    return [
        {"data": "easy", "method": method, "settings": {"rho": rho}, "seed": seed, "accuracy": accuracy}
        for rho, accuracies in values.items()
        for seed, accuracy in enumerate(accuracies)
    ]


@pytest.fixture
def results() -> dict[str, Any]:
    return copy.deepcopy(
        {
            "name": "small",
            "created_at": "2026-01-02T03:04:05+00:00",
            "command": "steppe compare small.toml",
            "candidate": "adm",
            "controls": ["sam"],
            "equivalences": [{"a": "adm_async", "b": "adm", "margin": 0.5}],
            "methods": {
                "sam": {"label": "plain SAM"},
                "adm": {"label": "low ADM"},
                "adm_async": {"label": "async"},
            },
            "data": {"easy": {"label": "Easy | images"}, "hard": {"label": "Hard images"}},
            "chosen": {"easy": {"sam": {"rho": 0.1}}},
            "search": trials("sam", {0.1: [0.5, 0.6], 0.05: [0.4, 0.42]}) + trials("adm", {0.1: [0.7]}),
            "cells": [
                *cells("easy", "sam", SAM, 2.0),
                *cells("easy", "adm", UP, 3.0, 0.9),
                *cells("easy", "adm_async", [value + 0.001 * (-1) ** index for index, value in enumerate(UP)], 3.0),
                *cells("hard", "sam", SAM, 2.0),
                *cells("hard", "adm", DOWN, 3.0, 0.9),
            ],
        }
    )


def test_the_table_is_in_percent(results: dict[str, Any]) -> None:
    sam, adm, _ = report(results)["tables"][0]["rows"]

    assert (sam["label"], sam["n"], sam["mean"]) == ("plain SAM", 4, pytest.approx(81.5))
    assert sam["standard_error"] == pytest.approx(math.sqrt(5 / 3) / 2)
    assert (sam["relative_cost"], sam["seconds_per_epoch"], sam["fidelity"]) == (1.0, 3.5, None)
    assert (adm["relative_cost"], adm["seconds_per_epoch"], adm["fidelity"]) == (1.5, 4.5, pytest.approx(0.9))


def test_differences_are_in_points_with_holm_over_the_data_sets(results: dict[str, Any]) -> None:
    easy, hard = report(results)["differences"]
    p = 2 * stats.t.sf(1.5 / 0.288675, 3)

    assert (easy["data"], easy["control"], easy["n"]) == ("easy", "sam", 4)
    assert easy["mean"] == pytest.approx(1.5)
    assert (easy["low"], easy["high"]) == pytest.approx((1.5 - HALF_95, 1.5 + HALF_95), abs=1e-4)
    assert easy["high_all"] == pytest.approx(1.5 + stats.t.ppf(1 - 0.0125, 3) * 0.288675, abs=1e-4)
    assert (easy["p"], easy["p_holm"]) == pytest.approx((p, 2 * p), rel=1e-5)
    assert [easy["verdict"], hard["verdict"]] == [AHEAD, BEHIND]


def test_a_negative_result_is_told_like_a_positive_one(results: dict[str, Any]) -> None:
    easy, hard = report(results)["differences"]

    assert hard["mean"] == pytest.approx(-easy["mean"])
    assert (-hard["high"], -hard["low"]) == pytest.approx((easy["low"], easy["high"]))
    for written in (to_text(report(results)), to_markdown(report(results))):
        lines = [line for line in written.splitlines() if "0.014" in line]
        told = ["".join(" " if letter in "|" else letter for letter in line).split() for line in lines]
        assert told == [
            ["plain", "SAM", "ahead", "4", "+1.50", "+0.58", "to", "+2.42", "+0.29", "to", "+2.71", "0.014", "0.028"],
            ["plain", "SAM", "behind", "4", "-1.50", "-2.42", "to", "-0.58", "-2.71", "to", "-0.29", "0.014", "0.028"],
        ]


def test_holm_goes_over_data_sets_and_not_over_controls(results: dict[str, Any]) -> None:
    before = report(results)["differences"][0]
    results["controls"] = ["sam", "adm_async"]

    assert before in report(results)["differences"]


def test_only_seeds_that_both_have_are_paired(results: dict[str, Any]) -> None:
    gone = [("sam", 100), ("adm", 103)]
    results["cells"] = [cell for cell in results["cells"] if (cell["method"], cell["seed"]) not in gone]

    answer = report(results)

    assert (answer["differences"][0]["n"], answer["differences"][0]["mean"]) == (2, pytest.approx(1.5))
    assert [row["n"] for row in answer["tables"][0]["rows"]] == [3, 3, 4]


def test_missing_cells_are_counted_and_said(results: dict[str, Any]) -> None:
    answer = report(results)

    assert (answer["expected_cells"], answer["missing_cells"]) == (24, 4)
    assert "Unfinished: 4 of 24 cells are missing." in to_text(answer)
    assert tuple(
        report(results | {"seeds": [100, 101, 102, 103, 104]})[key] for key in ("expected_cells", "missing_cells")
    ) == (30, 10)
    results["cells"] += cells("hard", "adm_async", DOWN, 3.0)
    assert "Unfinished" not in to_text(report(results))


def test_equivalence_is_told_per_data_set(results: dict[str, Any]) -> None:
    """Differences ±0.1 point: deviation 0.1155, error 0.0577, t(0.95, 3) = 2.3534: ±0.136 lies within ±0.5."""
    easy, hard = report(results)["equivalences"]

    assert (easy["a"], easy["b"], easy["margin"], easy["holds"]) == ("adm_async", "adm", 0.5, True)
    assert (easy["low"], easy["high"]) == pytest.approx((-0.1359, 0.1359), abs=1e-3)
    assert (hard["n"], hard["mean"], hard["holds"]) == (0, None, False)


def test_a_run_that_has_just_begun_claims_nothing(results: dict[str, Any]) -> None:
    answer = report(results | {"cells": [], "search": [], "seeds": [100]})

    assert {NOT_TESTED} == {one["verdict"] for one in answer["differences"]}
    assert {None} == {one[key] for one in answer["differences"] for key in ("mean", "low", "p", "p_holm")}
    assert "Unfinished: 6 of 6 cells are missing." in to_text(answer)


def test_the_report_survives_json(results: dict[str, Any]) -> None:
    answer = report(results)

    assert answer == json.loads(json.dumps(answer, allow_nan=False))


def test_the_text_fits_a_hundred_columns_and_loses_no_word_of_long_labels(results: dict[str, Any]) -> None:
    results["methods"]["sam"]["label"] = "plain [bold] SAM with a label " + "that goes on " * 8 + "to its last_word"
    results["search"][0]["settings"] = {f"a.long.setting.number_{index}": 0.125 for index in range(5)}

    written = to_text(report(results))

    assert max(map(len, written.splitlines())) <= 100
    assert "…" not in written
    assert "[bold]" in written
    assert "last_word" in written


def test_what_the_intervals_are_and_do_not_cover_is_said(results: dict[str, Any]) -> None:
    for written in (to_text(report(results)), to_markdown(report(results))):
        words = " ".join(written.split())
        assert "95 % intervals of paired differences over seeds, Student t; Holm over data sets" in words
        assert "Not covered: the images are fixed. Seeds vary the initialisation, the order, and which labels" in words
        assert "steppe compare small.toml" in words


def test_every_row_of_a_markdown_table_has_as_many_cells_as_its_header(results: dict[str, Any]) -> None:
    results["methods"]["sam"]["label"] = "plain | SAM"
    tables = [part for part in to_markdown(report(results)).split("\n\n") if part.startswith("|")]

    assert len(tables) == 7
    for table in tables:
        assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1


def test_the_overview_has_a_row_per_data_set_and_bold_where_something_is_shown(results: dict[str, Any]) -> None:
    header, _, *rows = overview(report(results)).strip().splitlines()

    assert header == "| data | n | low ADM | minus plain SAM |"
    assert rows[0].startswith("| Easy \\| images | 4 | 83.00 ± 0.82 | **+1.50 (")
    assert rows[1].startswith("| Hard images | 4 | 80.00 ± 0.58 | **-1.50 (")


def test_the_search_table_marks_what_was_chosen(results: dict[str, Any]) -> None:
    rows = search_table(results)

    assert [(row["method"], row["settings"], row["chosen"]) for row in rows] == [
        ("sam", {"rho": 0.1}, True),
        ("sam", {"rho": 0.05}, False),
        ("adm", {"rho": 0.1}, False),
    ]
    assert (rows[0]["n"], rows[0]["mean"], rows[0]["standard_error"]) == (2, pytest.approx(55.0), pytest.approx(5.0))
    assert (rows[2]["n"], rows[2]["standard_error"]) == (1, None)
    assert "| plain SAM | rho = 0.1 | chosen | 2 | 55.00 | 5.00 |" in to_markdown(report(results))


def test_where_a_seed_diverged_nothing_is_claimed(results: dict[str, Any]) -> None:
    """The seeds that are left would flatter the method that loses some."""
    results["diverged"] = [{"data": "easy", "method": "adm", "seed": 104, "reason": "loss is nan"}]
    found = report(results)

    easy, hard = found["differences"]
    assert (easy["n"], easy["mean"], easy["verdict"]) == (0, None, NOT_TESTED)
    assert hard["verdict"] == BEHIND
    assert found["equivalences"][0]["holds"] is False
    assert "Diverged, and in no mean: easy adm seed 104." in to_text(found)


def test_claims_that_were_changed_after_the_choice_are_told(results: dict[str, Any]) -> None:
    found = report(results | {"changed": ["seeds (8, now 30)"]})

    assert "Changed since the settings were chosen: seeds (8, now 30)." in to_markdown(found)


def test_without_plain_sam_costs_are_relative_to_the_candidate(results: dict[str, Any]) -> None:
    for cell in results["cells"]:
        cell["method"] = {"sam": "plain"}.get(cell["method"], cell["method"])
    results |= {"methods": {("plain" if name == "sam" else name): of for name, of in results["methods"].items()}}
    found = report(results | {"controls": ["plain"], "search": []})

    costs = {row["method"]: row["relative_cost"] for row in found["tables"][0]["rows"]}
    assert costs["adm"] == 1.0
    assert 0 < costs["plain"] < 1


def test_mistakes_name_value_and_fix(results: dict[str, Any]) -> None:
    with refuses(DataError, "methods", "'adam'") as caught:
        report(results | {"candidate": "adam"})
    assert "sam, adm" in caught.value.fix
    with refuses(DataError, "methods", "'adam'"):
        report(results | {"equivalences": [{"a": "adm", "b": "adam", "margin": 1.0}]})
    with refuses(DataError, "data", "'soft'"):
        report(results | {"cells": cells("soft", "sam", SAM, 1.0)})
    with refuses(DataError, "cells", "easy, sam, seed 100"):
        report(results | {"cells": results["cells"] + results["cells"][:1]})
