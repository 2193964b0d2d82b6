"""The benchmarks measure what they say; how fast is not for a test to judge."""

import pytest

from deploy.bench import BENCHES, run_bench
from shared.errors import ConfigError


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHES)
def test_bench(name: str) -> None:
    found = run_bench(name, 2)

    assert found["n"] == 2
    assert 0 < found["p50"] <= found["p95"] <= found["max"] < 60


@pytest.mark.slow
def test_unknown_bench_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="no benchmark 'speed'; known: recovery"):
        run_bench("speed", 1)
