"""The benchmarks measure what they say; how fast is not for a test to judge."""

import pytest

from deploy.bench import run_bench


@pytest.mark.slow
def test_recovery() -> None:
    found = run_bench("recovery", 2)

    assert found["n"] == 2
    assert 0 < found["p50"] <= found["p95"] <= found["max"] < 60
