"""The worker with checkpoints, samples and a controller that are of no use."""

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from scorer.adm import score_batch
from scorer.attacks import Fgsm, Pgd
from shared.checkpoints import CheckpointPublisher, newest
from shared.errors import ServiceError
from shared.schema import FLOAT_COLUMNS
from shared.score_store import ScoreReader
from tests.scorers import (
    SAMPLES,
    LocalLeases,
    X,
    Y,
    batches,
    make_worker,
    net_of,
    publish,
    running,
    spoil,
)
from tests.waiting import wait_for


def rewrite(run: Path, *, tensors: dict[str, Tensor] | bytes | None = None, **meta: Any) -> None:
    """Alter the newest checkpoint such that its checksum holds."""
    folder = newest(run).path
    if tensors is not None:
        data = tensors if isinstance(tensors, bytes) else safetensors.torch.save(tensors)
        (folder / "weights.safetensors").write_bytes(data)
        meta["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "meta.json").write_text(json.dumps(json.loads((folder / "meta.json").read_text()) | meta))


def unreadable(run: Path) -> None:
    """A folder in the file's place: reading it is an OSError for root too."""
    path = newest(run).path / "weights.safetensors"
    path.unlink()
    path.mkdir()


WEIGHT, BIAS, ONE = torch.ones(3, 5), torch.ones(3), torch.ones(1)
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "altered": (lambda run: spoil(run, "altered"), "CheckpointCorrupt"),
    "truncated": (lambda run: spoil(run, "truncated"), "CheckpointCorrupt"),
    "gone": (lambda run: spoil(run, "gone"), "CheckpointCorrupt"),
    "unreadable": (unreadable, "IsADirectoryError"),
    "no safetensors": (lambda run: rewrite(run, tensors=b"not a header"), "SafetensorError"),
    "another shape": (lambda run: rewrite(run, tensors={"weight": WEIGHT, "bias": torch.ones(4)}), "StateError"),
    "another type": (lambda run: rewrite(run, tensors={"weight": WEIGHT, "bias": BIAS.int()}), "StateError"),
    "a tensor missing": (lambda run: rewrite(run, tensors={"weight": WEIGHT}), "StateError"),
    "a tensor too many": (
        lambda run: rewrite(run, tensors={"weight": WEIGHT, "bias": BIAS, "b": ONE}),
        "StateError",
    ),
    "tied to nothing": (lambda run: rewrite(run, tied={"bias": "nothing"}), "KeyError"),
    "no step": (lambda run: rewrite(run, step="ten"), "TypeError"),
}


@pytest.mark.parametrize(("damage", "error"), DAMAGES.values(), ids=DAMAGES)
def test_weights_at_hand_are_kept_whole_when_a_newer_checkpoint_is_of_no_use(
    tmp_path, controller, publisher, damage, error
):
    """It is reported once, and the one after it is followed."""
    leases = LocalLeases(controller)
    model = net_of(99)
    worker = make_worker(tmp_path, leases, model=model)
    publish(publisher, seed=1, step=10)
    worker.follow_checkpoints()
    publish(publisher, seed=2, step=20)
    damage(tmp_path)
    for _ in range(3):
        worker.follow_checkpoints()

    assert_weights(net_of(1), model)
    assert (worker.model_version, worker.corrupt_checkpoints) == (1, 1)
    ((scorer_id, event, detail),) = leases.reports
    assert (scorer_id, event) == ("a", "checkpoint_skipped")
    assert detail.startswith(f"version 2: {error}: ")
    rows, failed = worker.score(np.array([7, 2]))
    assert failed == {}
    assert rows.column("sample_id").to_pylist() == [7, 2]
    assert rows.column("model_version").to_pylist() == [1, 1]
    assert rows.column("step").to_pylist() == [10, 10]
    publish(publisher, seed=3, step=30)
    worker.follow_checkpoints()
    assert_weights(net_of(3), model)


def assert_weights(expected: nn.Module, actual: nn.Module) -> None:
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, actual.state_dict()[name]), name


def test_checkpoints_that_cannot_be_listed_are_reported_once_each_time(tmp_path, controller, publisher):
    leases = LocalLeases(controller)
    worker = make_worker(tmp_path, leases)
    publish(publisher, seed=1, step=10)
    folder, aside = tmp_path / "checkpoints", tmp_path / "aside"
    for _ in range(2):
        folder.rename(aside)
        folder.write_text("a file in the folder's place")
        worker.follow_checkpoints()
        worker.follow_checkpoints()
        folder.unlink()
        aside.rename(folder)
        worker.follow_checkpoints()

    assert worker.model_version == 1
    assert [event for _, event, _ in leases.reports] == ["checkpoint_skipped"] * 2


@pytest.mark.parametrize("attack", [Fgsm(0.1), Fgsm(0.1, "l2"), Pgd(0.1, 3, 0.05), Pgd(0.1, 3, 0.05, "l2")], ids=str)
def test_weights_that_give_nan_give_rows_of_nan(tmp_path, controller, publisher, attack):
    """That is no fault of the samples: none failed, all rows go the way of rows, and the store takes none."""
    publish_nan(publisher)
    leases = LocalLeases(controller)
    worker = make_worker(tmp_path, leases, attack=attack)
    worker.follow_checkpoints()
    rows, failed = worker.score(np.arange(5))
    with running(worker):
        wait_for(lambda: controller.status()["quarantined_rows"] >= SAMPLES, what="all rows in quarantine")

    for name in FLOAT_COLUMNS:
        assert np.isnan(rows.column(name).to_numpy()).all()
    assert failed == leases.failed == {}
    assert leases.reports == []
    assert ScoreReader(tmp_path / "scores").rows == 0


def publish_nan(publisher: CheckpointPublisher) -> None:
    broken = net_of(1)
    for parameter in broken.parameters():
        nn.init.constant_(parameter, float("nan"))
    publisher.publish(broken, 10)
    publisher.flush()


def nan_pixel(ids: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    x, y = batches(ids)
    x[ids == 7] = float("nan")
    return x, y


def unreadable_image(ids: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    if 7 in ids:
        raise OSError("image file is truncated\n(3 bytes not processed)")
    return batches(ids)


def lost_image(ids: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    return batches(ids[ids != 7])


@pytest.mark.parametrize(
    ("source", "kind", "value"),
    [
        (nan_pixel, "DataError", "nan"),
        (unreadable_image, "OSError", "truncated"),
        (lost_image, "DataError", "0 samples for 1 ids"),
    ],
)
def test_a_sample_that_cannot_be_scored_is_handed_in_with_the_reason(
    tmp_path, controller, publisher, source, kind, value
):
    publish(publisher, seed=1, step=10)
    leases = LocalLeases(controller)
    worker = make_worker(tmp_path, leases, batches=source)
    with running(worker):
        wait_for(lambda: worker.scored == SAMPLES - 1, what="all others scored")
        wait_for(lambda: controller.status()["oldest_block_version"] == 1, what="all blocks committed")
    reader = ScoreReader(tmp_path / "scores")
    others = np.arange(SAMPLES) != 7

    (reason,) = leases.failed.values()
    assert (list(leases.failed), reason.partition(":")[0], value in reason) == ([7], kind, True)
    assert reader.dense("model_version").tolist() == [1 if other else -1 for other in others]
    expected = score_batch(net_of(1), X, Y, Fgsm(0.1))["margin"].numpy()
    np.testing.assert_allclose(reader.dense("margin")[others], expected[others], rtol=1e-4, atol=1e-5)
    assert controller.status()["quarantined_rows"] == 1


def test_a_scorer_for_which_every_sample_fails_ends_with_the_error(tmp_path, controller, publisher):
    publish(publisher, seed=1, step=10)

    def gone(ids: npt.ArrayLike) -> tuple[Tensor, Tensor]:
        raise OSError("the data set's disk is gone")

    leases = LocalLeases(controller)
    with pytest.raises(OSError, match="disk is gone"):
        make_worker(tmp_path, leases, batches=gone).run()

    assert "submit" not in leases.asked


class LosesReports(LocalLeases):
    def report(self, scorer_id: str, event: str, detail: str) -> "Future[None]":
        super().report(scorer_id, event, detail)
        raise ServiceError("the controller is gone")


@pytest.mark.parametrize("kind", [LocalLeases, LosesReports])
def test_short_memory_is_reported_and_reports_may_get_lost(tmp_path, controller, publisher, kind):
    """Of the other kind of loss, no answer, the worker hears nothing since it does not listen."""
    publish(publisher, seed=1, step=10)
    leases = kind(controller, lambda name: Future() if name == "report" else None)

    def tight(ids: npt.ArrayLike) -> tuple[Tensor, Tensor]:
        if len(np.array(ids)) > 2:
            torch.empty(1 << 50)
        return batches(ids)

    worker = make_worker(tmp_path, leases, batches=tight, batch_size=8)
    with running(worker):
        wait_for(lambda: controller.status()["oldest_block_version"] == 1, what="all blocks committed")

    assert worker.batch_size == 2
    assert [report[:2] for report in leases.reports] == [("a", "batch_halved")] * 2
    assert [detail.partition(":")[0] for *_, detail in leases.reports] == ["from 8 to 4", "from 4 to 2"]
    assert leases.failed == {}
