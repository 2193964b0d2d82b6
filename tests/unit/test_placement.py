"""What no host has, in words, and what Ray is asked for."""

from typing import Any

import pytest

from deploy.config import RunConfig
from deploy.placement import missing, needs_of, scorer_options
from scorer.config import ScoringConfig
from shared.config import make_config
from shared.errors import ConfigError
from tests.raising import refuses

SCORER = {"steppe.io/role": "scorer"}


def host(cpus: float = 4, gpus: float = 0, labels: dict[str, str] | None = None, alive: bool = True) -> dict[str, Any]:
    return {"Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus}, "Labels": labels or {}}


@pytest.mark.parametrize(
    ("needs", "labels", "hosts", "expected"),
    [
        ({"CPU": 4}, (), [host(2), host(4)], None),
        ({"CPU": 6}, (), [host(4), host(4)], "6 CPU (there are 4)"),
        ({"CPU": 1, "scorer": 1}, (), [host()], "1 scorer (there are 0)"),
        ({"CPU": 4, "GPU": 1}, (), [host(4), host(2, gpus=1)], "all of 4 CPU, 1 GPU on one host"),
        ({"GPU": 0.5}, (), [host(gpus=1)], None),
        ({}, (SCORER,), [host()], "a host with the label steppe.io/role=scorer (of 1 hosts none has it)"),
        ({}, (SCORER,), [host(labels=SCORER, alive=False), host()], "a host with the label steppe.io/role=scorer (of"),
        ({"CPU": 3}, (SCORER,), [host(8), host(2, labels=SCORER)], "3 CPU (there are 2)"),
        ({"CPU": 3}, (SCORER, {}), [host(8), host(2, labels=SCORER)], None),
        ({}, ({"zone": "in(a, b)"},), [host(labels={"zone": "b"})], None),
        ({}, ({"zone": "!in(a, b)"},), [host(labels={"zone": "b"})], "a host with the label zone=!in(a, b)"),
        ({}, ({"zone": "!a"},), [host(labels={"zone": "b"})], None),
    ],
    ids=str,
)
def test_what_is_missing_is_said(
    needs: dict[str, float], labels: tuple[dict[str, str], ...], hosts: list[dict[str, Any]], expected: str | None
) -> None:
    found = missing(needs, labels, hosts)

    assert (found is None) == (expected is None)
    assert expected is None or str(found).startswith(expected)


def test_scorers_are_asked_for_with_labels_fallbacks_and_custom_resources() -> None:
    config = ScoringConfig(cpus=0.5, gpus=0.25, labels=SCORER, fallback_labels=({},), resources={"scorer": 1})

    assert needs_of(config) == {"CPU": 0.5, "GPU": 0.25, "scorer": 1}
    assert scorer_options(config) == {
        "num_cpus": 0.5,
        "num_gpus": 0.25,
        "scheduling_strategy": "DEFAULT",
        "resources": {"scorer": 1},
        "label_selector": SCORER,
        "fallback_strategy": [{"label_selector": {}}],
    }
    plain = {"num_cpus": 0.25, "num_gpus": 0, "scheduling_strategy": "DEFAULT"}
    assert scorer_options(ScoringConfig()) == plain


def test_a_fallback_needs_something_to_fall_back_from() -> None:
    with refuses(ConfigError, "scoring.fallback_labels", "scoring.labels"):
        make_config(RunConfig, {"scoring": {"fallback_labels": [{}]}})
