"""What the cells of a comparison show: tables and differences as a dict, as text, and as Markdown.

The dict speaks percent and percentage points; the cells' accuracies are shares.
"""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deploy.compare.statistics import LEVEL, SHOWN, equivalent, simultaneous, summary
from shared.errors import DataError

PERCENT = 100.0
PLAIN = "sam"  # the method whose cost counts as 1, where there is one; else the candidate's
WIDTH = 100
OVERVIEW_NOTE = (
    "± is the standard error over the seeds, in brackets stands the 95 % interval of that difference alone; bold is "
    "what is ahead or behind after Holm over the data sets."
)
NOT_COVERED = (
    "Not covered: the images are fixed. Seeds vary the initialisation, the order, and which labels are flipped; "
    "so this is about repeating the training on these images, not about other images or data sets."
)

OPTIONAL = ("fidelity", "draws_unscored")  # columns that not every comparison has

Cells = dict[tuple[str, str], dict[int, Mapping[str, Any]]]


def report(results: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that is said of the results, JSON-able: tables, differences, equivalences, notes.

    Negative results stand like positive ones. Only the seeds that both have are paired; `missing_cells` counts what
    is not there of methods x data sets x seeds (`results["seeds"]`, else every seed seen in a cell).
    Raises DataError for names that are not among the methods and data sets, and for a cell that is there twice.
    """
    cells = cells_by_seed(results)
    seeds = results.get("seeds") or {seed for by_seed in cells.values() for seed in by_seed}
    expected = len(results["data"]) * len(results["methods"]) * len(set(seeds))
    return {
        "name": results["name"],
        "created_at": results["created_at"],
        "command": results["command"],
        "candidate": results["candidate"],
        "candidate_label": _label(results, "methods", results["candidate"]),
        "level": LEVEL,
        "chosen": {data: results["chosen"].get(data, {}) for data in results["data"]},
        "search": search_table(results),
        "tables": [_table(results, cells, data) for data in results["data"]],
        "differences": _differences(results, cells),
        "equivalences": _equivalences(results, cells),
        "expected_cells": expected,
        "missing_cells": expected - sum(len(by_seed) for by_seed in cells.values()),
        "diverged": list(results.get("diverged", [])),
        "changed": list(results.get("changed", [])),
        "notes": _notes(results),
    }


def search_table(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per data set, method and tried settings: validation accuracy in percent, and whether it was chosen."""
    tried: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for trial in results["search"]:
        key = json.dumps(trial["settings"], sort_keys=True)
        tried.setdefault((trial["data"], trial["method"], key), []).append(trial)
    rows = []
    for data in results["data"]:
        for method in results["methods"]:
            chosen = results["chosen"].get(data, {}).get(method)
            for trials in (trials for key, trials in tried.items() if key[:2] == (data, method)):
                settings = dict(trials[0]["settings"])
                rows.append(
                    {
                        "data": data,
                        "data_label": _label(results, "data", data),
                        "method": method,
                        "label": _label(results, "methods", method),
                        "settings": settings,
                        **asdict(summary([PERCENT * trial["accuracy"] for trial in trials])),
                        "chosen": chosen is not None and settings.items() <= chosen.items(),
                    }
                )
    return rows


def to_text(report: Mapping[str, Any]) -> str:
    """Aligned tables in at most 100 columns."""
    return _as_text(f"{report['name']}, {report['created_at']}", _sections(report), _remarks(report))


def to_markdown(report: Mapping[str, Any]) -> str:
    """The overview and the same tables for GitHub."""
    return f"{overview(report)}\n{OVERVIEW_NOTE}\n\n{_as_markdown(_sections(report), _remarks(report))}"


def overview(report: Mapping[str, Any]) -> str:
    """One table for GitHub: a row per data set, the candidate's accuracy, and its difference to each control.

    Accuracies are in percent with the standard error; differences in points with their 95 % interval, bold where
    `report` says ahead or behind.
    """
    accuracy = {
        table["data"]: next(row for row in table["rows"] if row["method"] == report["candidate"])
        for table in report["tables"]
    }
    rows: dict[str, list[str]] = {}
    for one in report["differences"]:
        mine = accuracy[one["data"]]
        found = f"{_number(mine['mean'], '.2f')} ± {_number(mine['standard_error'], '.2f')}"
        row = rows.setdefault(one["data"], [one["data_label"], str(one["n"]), found])
        text = f"{_number(one['mean'], '+.2f')} ({_interval(one['low'], one['high'])})"
        row.append(f"**{text}**" if one["verdict"] in SHOWN else text)
    controls = dict.fromkeys(one["control_label"] for one in report["differences"])
    header = ["data", "n", report["candidate_label"], *(f"minus {label}" for label in controls)]
    return _as_markdown([_Section("", header, list(rows.values()))], [])


def cells_by_seed(results: Mapping[str, Any]) -> Cells:
    """{(data, method): {seed: cell}}, after a check that all names are known and no cell is there twice."""
    named = [results["candidate"], *results["controls"]]
    named += [one[side] for one in results["equivalences"] for side in ("a", "b")]
    cells: Cells = {}
    for cell in results["cells"]:
        data, method, seed = cell["data"], cell["method"], cell["seed"]
        _label(results, "data", data)
        named.append(method)
        if seed in cells.setdefault((data, method), {}):
            raise DataError(
                f"the cell of {data}, {method}, seed {seed} is there twice", fix="keep one of them", key="cells"
            )
        cells[data, method][seed] = cell
    for method in dict.fromkeys(named):
        _label(results, "methods", method)
    return cells


def accuracies(cells: Cells, data: str, method: str) -> dict[int, float]:
    """Test accuracy in percent by seed, in rising order of the seeds."""
    by_seed = cells.get((data, method), {})
    return {seed: PERCENT * by_seed[seed]["accuracy"] for seed in sorted(by_seed)}


def _label(results: Mapping[str, Any], kind: str, name: str) -> str:
    if name not in results[kind]:
        raise DataError(
            f"{name!r} is not among the {kind} of the comparison",
            fix=f"name one of {', '.join(results[kind])}",
            key=kind,
        )
    return str(results[kind][name]["label"])


def _table(results: Mapping[str, Any], cells: Cells, data: str) -> dict[str, Any]:
    rows = []
    for method in results["methods"]:
        mine, plain = cells.get((data, method), {}), cells.get((data, _cost_of_one(results)), {})
        ratios = [
            mine[seed]["forward_equivalents"] / plain[seed]["forward_equivalents"] for seed in mine if seed in plain
        ]
        rows.append(
            {
                "method": method,
                "label": _label(results, "methods", method),
                **asdict(summary(list(accuracies(cells, data, method).values()))),
                "relative_cost": summary(ratios).mean,
                "seconds_per_epoch": _mean_of(mine.values(), "seconds_per_epoch"),
                "fidelity": _mean_of(mine.values(), "fidelity"),
                "draws_unscored": _mean_of(mine.values(), "draws_unscored"),
            }
        )
    return {"data": data, "data_label": _label(results, "data", data), "rows": rows}


def _cost_of_one(results: Mapping[str, Any]) -> str:
    return PLAIN if PLAIN in results["methods"] else str(results["candidate"])


def _mean_of(cells: Iterable[Mapping[str, Any]], key: str) -> float | None:
    return summary([cell[key] for cell in cells if cell.get(key) is not None]).mean


def _differences(results: Mapping[str, Any], cells: Cells) -> list[dict[str, Any]]:
    """Candidate minus control, by data set; the family that is adjusted together is one control's data sets."""
    candidate = results["candidate"]
    families = {
        control: simultaneous([_pairs(results, cells, data, candidate, control) for data in results["data"]])
        for control in results["controls"]
    }
    return [
        {
            "data": data,
            "data_label": _label(results, "data", data),
            "control": control,
            "control_label": _label(results, "methods", control),
            **asdict(family[index].paired),
            "low_all": family[index].low_all,
            "high_all": family[index].high_all,
            "p_holm": family[index].p_holm,
            "verdict": family[index].verdict,
        }
        for index, data in enumerate(results["data"])
        for control, family in families.items()
    ]


def _equivalences(results: Mapping[str, Any], cells: Cells) -> list[dict[str, Any]]:
    return [
        {
            "data": data,
            "data_label": _label(results, "data", data),
            "a": one["a"],
            "a_label": _label(results, "methods", one["a"]),
            "b": one["b"],
            "b_label": _label(results, "methods", one["b"]),
            "margin": one["margin"],
            **asdict(equivalent(*_pairs(results, cells, data, one["a"], one["b"]), one["margin"])),
        }
        for one in results["equivalences"]
        for data in results["data"]
    ]


def _pairs(results: Mapping[str, Any], cells: Cells, data: str, a: str, b: str) -> tuple[list[float], list[float]]:
    """Accuracies of the seeds that both have; none where a seed of either diverged, since the rest would flatter it."""
    if any(one["data"] == data and one["method"] in (a, b) for one in results.get("diverged", [])):
        return [], []
    of_a, of_b = accuracies(cells, data, a), accuracies(cells, data, b)
    both = [seed for seed in of_a if seed in of_b]
    return [of_a[seed] for seed in both], [of_b[seed] for seed in both]


def _notes(results: Mapping[str, Any]) -> dict[str, str]:
    many = len(results["data"])
    sets = "1 data set" if many == 1 else f"{many} data sets"
    notes = {"tables": "SE is the standard error of the mean over seeds."}
    plain = _label(results, "methods", _cost_of_one(results))
    notes["tables"] += (
        f" Cost is in forward passes, scorers included, relative to {plain} with the same seed. Seconds are those of "
        "the trainer, with other trainings on the other cores."
    )
    if any(cell.get("fidelity") is not None for cell in results["cells"]):
        notes["tables"] += (
            " Fidelity is the rank correlation of scores with those of the newest weights, which are about to replace "
            "them, where a run measured it. Unscored are draws without a score to go by."
        )
    if results["controls"]:
        notes["differences"] = (
            "95 % intervals of paired differences over seeds, Student t; Holm over data sets. The 95 % interval is of "
            f'that row alone; the interval "all sets" holds for the {sets} together (Bonferroni); p Holm is p adjusted '
            f'over the {sets}, for each control by itself. "ahead" and "behind" are said only where p Holm is below '
            "0.05; nothing is adjusted over the controls. A dash means fewer than two pairs, differences without any "
            "spread, or seeds that diverged: not tested."
        )
    if results["equivalences"]:
        notes["equivalences"] = (
            "Two one-sided t tests (Schuirmann 1987) at 5 %: methods count as equivalent when the 90 % interval lies "
            "within the margin; not adjusted over data sets. Seeds needed: pairs for 80 % power if the true difference "
            "is 0 and differences spread as here."
        )
    notes["search"] = (
        "Settings are chosen by the mean validation accuracy; with flipped labels those of the validation images are "
        "flipped too. A method begins with the settings chosen for the one that it is like."
    )
    return notes | {"not_covered": NOT_COVERED}


@dataclass(frozen=True)
class _Section:
    """A table of strings with its title above it and its note below.

    The first `text` columns are words, which may wrap; `gap` blanks stand between columns in plain text.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: int = 1
    gap: int = 2
    note: str = ""


def _sections(report: Mapping[str, Any]) -> list[_Section]:
    notes = report["notes"]
    tables = [_table_section(table) for table in report["tables"]]
    differences = [
        _difference_section(report, table["data"], table["data_label"])
        for table in report["tables"]
        if report["differences"]
    ]
    tests: dict[tuple[str, str, float], list[Mapping[str, Any]]] = {}
    for one in report["equivalences"]:
        tests.setdefault((one["a_label"], one["b_label"], one["margin"]), []).append(one)
    equivalences = [_equivalence_section(*names, rows) for names, rows in tests.items()]
    groups = (
        (tables, "tables"),
        (differences, "differences"),
        (equivalences, "equivalences"),
        (_search_sections(report["search"]), "search"),
    )
    return [
        replace(section, note=notes[name]) if section is sections[-1] else section
        for sections, name in groups
        for section in sections
    ]


def _table_section(table: Mapping[str, Any]) -> _Section:
    columns = (
        ("accuracy %", "mean", ".2f"),
        ("SE", "standard_error", ".2f"),
        ("cost", "relative_cost", ".2f"),
        ("s / epoch", "seconds_per_epoch", ".2f"),
        ("fidelity", "fidelity", ".3f"),
        ("unscored", "draws_unscored", ".0%"),
    )
    shown = [one for one in columns if one[1] not in OPTIONAL or any(row[one[1]] is not None for row in table["rows"])]
    rows = [
        [row["label"], str(row["n"]), *(_number(row[key], form) for _, key, form in shown)] for row in table["rows"]
    ]
    return _Section(f"Test accuracy: {table['data_label']}", ["method", "n", *(name for name, _, _ in shown)], rows)


def _difference_section(report: Mapping[str, Any], data: str, data_label: str) -> _Section:
    header = ["minus", "verdict", "n", "mean", "95 % interval", "all sets", "p", "p Holm"]
    rows = [
        [
            one["control_label"],
            one["verdict"],
            str(one["n"]),
            _number(one["mean"], "+.2f"),
            _interval(one["low"], one["high"]),
            _interval(one["low_all"], one["high_all"]),
            _p(one["p"]),
            _p(one["p_holm"]),
        ]
        for one in report["differences"]
        if one["data"] == data
    ]
    title = f"Difference in percentage points, {report['candidate_label']} minus each: {data_label}"
    return _Section(title, header, rows, text=2, gap=1)


def _equivalence_section(a: str, b: str, margin: float, equivalences: Sequence[Mapping[str, Any]]) -> _Section:
    header = ["data", "equivalent", "n", "mean", "90 % interval", "p", "seeds needed"]
    rows = [
        [
            one["data_label"],
            "yes" if one["holds"] else "not shown",
            str(one["n"]),
            _number(one["mean"], "+.2f"),
            _interval(one["low"], one["high"]),
            _p(one["p"]),
            _number(one["seeds_needed"], "d"),
        ]
        for one in equivalences
    ]
    return _Section(f"Equivalence within ±{margin:g} percentage points, {a} minus {b}", header, rows, text=2)


def _search_sections(rows: Sequence[Mapping[str, Any]]) -> list[_Section]:
    header = ["method", "settings", "chosen", "n", "accuracy %", "SE"]
    by_data: dict[str, list[list[str]]] = {}
    for row in rows:
        settings = ", ".join(f"{name} = {value}" for name, value in row["settings"].items()) or "-"
        numbers = [str(row["n"]), _number(row["mean"], ".2f"), _number(row["standard_error"], ".2f")]
        by_data.setdefault(row["data_label"], []).append(
            [row["label"], settings, "chosen" if row["chosen"] else "", *numbers]
        )
    return [_Section(f"Validation accuracy: {label}", header, lines, text=3) for label, lines in by_data.items()]


def _remarks(report: Mapping[str, Any]) -> list[str]:
    diverged = report["diverged"]
    missing, expected = report["missing_cells"] - len(diverged), report["expected_cells"]
    unfinished = [f"Unfinished: {missing} of {expected} cells are missing."] if missing else []
    named = ", ".join(f"{one['data']} {one['method']} seed {one['seed']}" for one in diverged)
    lost = [f"Diverged, and in no mean: {named}."] if diverged else []
    changed = [f"Changed since the settings were chosen: {', '.join(report['changed'])}."] if report["changed"] else []
    return [*unfinished, *lost, *changed, report["notes"]["not_covered"], f"Made by: {report['command']}"]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _interval(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{low:+.2f} to {high:+.2f}"


def _p(p: float | None) -> str:
    if p is None:
        return "-"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _as_text(title: str, sections: Sequence[_Section], remarks: Sequence[str]) -> str:
    written = io.StringIO()
    console = Console(file=written, width=WIDTH, color_system=None, markup=False, emoji=False, highlight=False)
    console.print(Text(title))
    for section in sections:
        table = Table(box=None, pad_edge=False, padding=(0, section.gap, 0, 0))
        for index, name in enumerate(section.header):
            words = index < section.text
            table.add_column(name, justify="left" if words else "right", no_wrap=not words, overflow="fold")
        for row in section.rows:
            table.add_row(*row)
        console.print("", Text(section.title), table, sep="\n")
        if section.note:
            console.print(Text(f"\n{section.note}"))
    for remark in remarks:
        console.print(Text(f"\n{remark}"))
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines()) + "\n"


def _as_markdown(sections: Sequence[_Section], remarks: Sequence[str]) -> str:
    parts = []
    for section in sections:
        rule = [":---" if index < section.text else "---:" for index in range(len(section.header))]
        table = "\n".join(_markdown_row(row) for row in (section.header, rule, *section.rows))
        title = [f"**{_on_one_line(section.title)}**"] if section.title else []
        parts += [*title, table, *([section.note] if section.note else [])]
    return "\n\n".join([*parts, *remarks]) + "\n"


def _markdown_row(row: Sequence[str]) -> str:
    return "| " + " | ".join(_on_one_line(cell).replace("|", "\\|") for cell in row) + " |"


def _on_one_line(text: str) -> str:
    return " ".join(text.split())
