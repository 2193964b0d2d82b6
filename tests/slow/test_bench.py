"""The benchmarks measure what they say; how fast is not for a test to judge."""

from pathlib import Path

import pytest

from deploy.bench import controller, ranks, rest, run_bench, sampler, scorers
from tests.waiting import LIMIT_S


@pytest.mark.slow
def test_recovery() -> None:
    found = run_bench("recovery", 2)

    assert found["n"] == 2
    assert 0 < found["p50"] <= found["p95"] <= found["max"]


@pytest.mark.slow
def test_rest(tmp_path: Path) -> None:
    found = rest.load(tmp_path, 1, num_samples=20_000, seconds=1)

    for one in found["loads"].values():
        assert one["per_s"] > 0
        assert 0 < one["p50_ms"] <= one["p99_ms"]
    assert found["point_to_bare"] > 0
    assert found["snapshot_ms"] > 0


@pytest.mark.slow
def test_scorers(tmp_path: Path) -> None:
    found = scorers.compare(tmp_path / "run", 3, seconds=1.0)

    assert all(found["samples_per_s"][name] > 0 for name in ("plain", "one", "two"))
    assert found["one_to_plain"]["median"] > 0
    assert found["two_to_one"]["median"] > 0


@pytest.mark.slow
def test_controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No lease that is answered expires; how short one may be on this machine is for the benchmark to say."""
    monkeypatch.setattr(controller, "LEASE_TIMEOUT_S", LIMIT_S)
    found = controller.load(tmp_path, 1, num_samples=100_000, seconds=2.0)

    assert [one["block_size"] for one in found["blocks"]] == [256, 8192]
    for one in found["blocks"]:
        assert one["rows_per_s"] > 0
        assert one["alone_to_store"] > 0
        assert one["leases_expired"] == 0
        assert 0 < one["submit_p50_ms"] <= one["submit_p99_ms"]


@pytest.mark.slow
def test_ranks() -> None:
    found = ranks.measure(1, epochs=2)

    for arm, losses in found["loss"].items():
        assert losses[-1] < losses[0]
        assert found["seconds_per_epoch"][arm] > 0


@pytest.mark.slow
def test_sampler() -> None:
    found = sampler.measure(1, sizes=(20_000, 2**24 + 8))

    small, large = found["sizes"]
    assert 0 < small["planning_ms_per_batch"] < small["ms_per_batch"]
    assert small["multinomial_ms_per_batch"] > 0
    assert large["multinomial_ms_per_batch"] is None
