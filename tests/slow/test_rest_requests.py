"""Ten thousand requests that the service's own description makes."""

from pathlib import Path

import pytest

from tests.rest import ask, controller_of, make_run, score_some, serving

pytestmark = pytest.mark.slow

REQUESTS = 10_000


def test_answers_to_ten_thousand_requests_are_as_described(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    score_some(run)
    with controller_of(run) as controller, serving(run, fleet=controller) as url:
        seen = ask(url, REQUESTS + REQUESTS // 10)  # a few are made but once

    assert sum(count for label, count in seen.items() if " " in label) >= REQUESTS
    assert seen["200"] > REQUESTS / 10
