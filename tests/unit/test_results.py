"""What the README says of the comparisons is what the committed reports say."""

import json
from pathlib import Path
from typing import Any

import pytest

from deploy.compare.config import CompareConfig
from deploy.compare.report import overview, report
from shared.config import read_config

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "deploy" / "results"
COMPARISONS = ["small", "default", "staleness", "equivalence"]


@pytest.mark.parametrize("name", COMPARISONS)
def test_the_readmes_table_is_the_reports(name: str) -> None:
    found = json.loads((RESULTS / name / "report.json").read_text())

    assert found["missing_cells"] == 0
    assert overview(found).strip() in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", COMPARISONS)
def test_the_report_is_that_of_the_results_and_these_of_the_configuration(name: str) -> None:
    results = json.loads((RESULTS / name / "results.json").read_text())
    config = read_config(CompareConfig, str(ROOT / "deploy" / "configs" / "compare" / f"{name}.toml"), [])

    assert_close(report(results), json.loads((RESULTS / name / "report.json").read_text()))
    assert results["config"] == config.model_dump(mode="json", by_alias=True)


def assert_close(found: Any, expected: Any, where: str = "report") -> None:
    """The same content; floats to nine digits, as other versions of the libraries compute them."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_close(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for at, value in enumerate(expected):
            assert_close(found[at], value, f"{where}[{at}]")
    else:
        assert found == (pytest.approx(expected, rel=1e-9) if isinstance(expected, float) else expected), where
