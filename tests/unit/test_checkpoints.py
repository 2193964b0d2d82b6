import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from shared.checkpoints import PERTURBED_FLAG, CheckpointPublisher, load, newest, stable
from shared.errors import CheckpointCorrupt, CheckpointError, PerturbedWeights
from tests.raising import refuses
from tests.waiting import LIMIT_S


def linear(value: float) -> nn.Linear:
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.fill_(value)
        model.bias.fill_(value)
    return model


def publish(run: Path, *values: float, keep_last: int = 4) -> list[int]:
    """Each value as the weights of one version, each stable before the next."""
    versions = []
    with CheckpointPublisher(run, keep_last=keep_last) as publisher:
        for value in values:
            versions.append(publisher.publish(linear(value), step=int(10 * value)))
            publisher.flush()
    return versions


def versions(run: Path) -> list[int]:
    return [checkpoint.model_version for checkpoint in stable(run)]


def value(run: Path) -> float:
    """The published value of the newest checkpoint."""
    checkpoint = newest(run)
    assert checkpoint is not None
    return load(checkpoint)["bias"].item()


class SlowDisk:
    """Holds the publisher's thread when it serialises, from the first copy on, until `release`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached = threading.Event()
        self._released = threading.Event()
        self._save = safetensors.torch.save
        monkeypatch.setattr(safetensors.torch, "save", self._wait)

    def _wait(self, tensors: dict[str, torch.Tensor]) -> bytes:
        self.reached.set()
        assert self._released.wait(LIMIT_S)
        return self._save(tensors)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._released.set()


def test_round_trip_of_parameters_buffers_layouts_and_ties(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.norm = nn.BatchNorm2d(4)
            self.embed = nn.Linear(4, 4, bias=False)
            self.head = nn.Linear(4, 4, bias=False)
            self.head.weight = self.embed.weight
            self.coarse = nn.Parameter(torch.randn(5, dtype=torch.bfloat16))
            self.transposed = nn.Parameter(torch.randn(2, 3).t())
            self.register_buffer("big", torch.tensor(2**60 + 1))

    model = Net().to(memory_format=torch.channels_last)
    model.norm(torch.randn(8, 4, 2, 2))
    with CheckpointPublisher(tmp_path) as publisher:
        assert publisher.publish(model, step=17) == 1
    checkpoint = newest(tmp_path)
    assert checkpoint is not None
    state = load(checkpoint)

    assert (checkpoint.model_version, checkpoint.step) == (1, 17)
    assert not model.conv.weight.is_contiguous()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name
    assert state["norm.num_batches_tracked"].item() == 1
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()
    Net().load_state_dict(state, strict=True)


def test_nothing_published(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    assert list(stable(tmp_path / "nowhere")) == []


def test_newest_jumps_over_what_was_published_in_between(tmp_path: Path) -> None:
    publish(tmp_path, 1, 2, 3)
    checkpoint = newest(tmp_path)

    assert checkpoint is not None
    assert (checkpoint.model_version, checkpoint.step) == (3, 30)
    assert value(tmp_path) == 3
    assert versions(tmp_path) == [3, 2, 1]


def test_versions_rise_over_restarts_and_two_publishers(tmp_path: Path) -> None:
    first, second = CheckpointPublisher(tmp_path), CheckpointPublisher(tmp_path)
    given = [publisher.publish(linear(0), 0) for publisher in (first, second, second, first)]
    first.close()
    second.close()

    assert given == [1, 2, 3, 4]
    assert publish(tmp_path, 1, 2) == [5, 6]


def test_reserved_version_is_not_reused_although_it_was_never_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save", lambda _: 1 / 0)
        publisher = CheckpointPublisher(tmp_path)
        assert publisher.publish(linear(2), 2) == 2
        with refuses(CheckpointError, str(tmp_path / "checkpoints"), "division by zero"):
            publisher.close()
    assert versions(tmp_path) == [1]
    after = CheckpointPublisher(tmp_path)

    assert after.newest_version == 1
    assert after.publish(linear(3), 3) == 3
    after.close()
    assert after.newest_version == 3
    assert versions(tmp_path) == [3, 1]


def test_version_without_marker_is_not_seen(tmp_path: Path) -> None:
    publish(tmp_path, 1, 2)
    (tmp_path / "checkpoints" / "v00000002" / "STABLE").unlink()

    assert versions(tmp_path) == [1]
    assert value(tmp_path) == 1


def test_marker_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At no point where the publisher can die is there a marker beside an incomplete version."""
    fsync, seen = os.fsync, []

    def record(descriptor: int) -> None:
        fsync(descriptor)
        seen.append(sorted(name for name in os.listdir(tmp_path / "checkpoints/v00000001") if name[0] != "."))

    with CheckpointPublisher(tmp_path) as publisher:
        monkeypatch.setattr(os, "fsync", record)
        publisher.publish(linear(1), 1)

    assert seen[0] == []
    assert all("STABLE" not in names or len(names) == 3 for names in seen)
    assert seen[-1] == ["STABLE", "meta.json", "weights.safetensors"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\xff"),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
    ],
    ids=["truncated", "altered", "empty", "gone"],
)
def test_damaged_weights(tmp_path: Path, damage: object) -> None:
    publish(tmp_path, 1, 2)
    first, second = newest(tmp_path), None
    assert first is not None
    damage(first.path / "weights.safetensors")  # type: ignore[operator]

    with refuses(CheckpointCorrupt, str(tmp_path / "checkpoints" / "v00000002" / "weights.safetensors")):
        load(first)
    second = list(stable(tmp_path))[1]
    assert load(second)["bias"].item() == 1


@pytest.mark.parametrize("meta", [b'{"step": 2', b"{}", b"[]", b"\xff", b'{"step": 2, "surprise": 1}', None])
def test_damaged_description_is_passed_over(tmp_path: Path, meta: bytes | None) -> None:
    publish(tmp_path, 1, 2)
    path = tmp_path / "checkpoints" / "v00000002" / "meta.json"
    path.unlink() if meta is None else path.write_bytes(meta)

    assert versions(tmp_path) == [1]


@pytest.mark.parametrize(("keep_last", "kept"), [(1, [5]), (2, [5, 4]), (9, [5, 4, 3, 2, 1])])
def test_retention(tmp_path: Path, keep_last: int, kept: list[int]) -> None:
    publish(tmp_path, 1, 2, 3, 4, 5, keep_last=keep_last)

    assert versions(tmp_path) == kept
    assert len(os.listdir(tmp_path / "checkpoints")) == len(kept)


def test_retention_counts_finished_versions_and_clears_unfinished_ones(tmp_path: Path) -> None:
    publish(tmp_path, 1, 2)
    for name in ("v00000003", "v00000004"):  # reserved by trainers that died
        (tmp_path / "checkpoints" / name).mkdir()
    assert publish(tmp_path, 5, keep_last=2) == [5]
    assert versions(tmp_path) == [5, 2]

    publish(tmp_path, 6, keep_last=2)
    assert os.listdir(tmp_path / "checkpoints") in (["v00000005", "v00000006"], ["v00000006", "v00000005"])


@pytest.mark.parametrize("kind", [nn.Linear, nn.BatchNorm1d])
def test_published_is_the_copy_of_the_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type) -> None:
    """Training goes on while the background thread still writes: neither parameters nor buffers may follow it."""
    model = kind(2, 2) if kind is nn.Linear else kind(2)
    then = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    disk = SlowDisk(monkeypatch)
    with CheckpointPublisher(tmp_path) as publisher, disk.held():
        publisher.publish(model, step=1)
        assert disk.reached.wait(LIMIT_S)
        for tensor in model.state_dict().values():
            tensor.add_(1)
    checkpoint = newest(tmp_path)
    assert checkpoint is not None
    state = load(checkpoint)

    assert all(torch.equal(state[name], tensor) for name, tensor in then.items())


def test_of_too_many_waiting_copies_the_oldest_are_skipped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch)
    with CheckpointPublisher(tmp_path, keep_last=9, max_pending=2) as publisher, disk.held():
        publisher.publish(linear(1), 1)
        assert disk.reached.wait(LIMIT_S)  # version 1 is no longer waiting
        given = [publisher.publish(linear(i), i) for i in (2, 3, 4, 5)]

        assert given == [2, 3, 4, 5]
        assert publisher.skipped == 2
    assert versions(tmp_path) == [5, 4, 1]
    assert publisher.published == 3
    assert value(tmp_path) == 5


def test_failure_of_the_background_thread_surfaces_in_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    publisher = CheckpointPublisher(tmp_path)
    monkeypatch.setattr(os, "fsync", no_space)
    publisher.publish(linear(1), 1)

    for call in (publisher.flush, publisher.close):
        with refuses(CheckpointError, str(tmp_path / "checkpoints"), "No space left"):
            call()
    assert publisher.failed == 1
    assert newest(tmp_path) is None


def test_a_version_that_cannot_be_written_does_not_stop_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with CheckpointPublisher(tmp_path) as publisher:
        with monkeypatch.context() as full, contextlib.suppress(CheckpointError):
            full.setattr(os, "fsync", no_space)
            publisher.publish(linear(1), 1)
            publisher.flush()
        publisher.publish(linear(2), np.int64(2))

    assert (publisher.failed, publisher.published) == (1, 1)
    assert (newest(tmp_path).model_version, newest(tmp_path).step) == (2, 2)


def test_perturbed_weights_are_refused_and_use_no_version(tmp_path: Path) -> None:
    model = linear(1)
    with CheckpointPublisher(tmp_path) as publisher:
        setattr(model.bias, PERTURBED_FLAG, True)
        with refuses(PerturbedWeights, "model"):
            publisher.publish(model, 1)
        delattr(model.bias, PERTURBED_FLAG)
        assert publisher.publish(model, 1) == 1


def test_closed_publisher(tmp_path: Path) -> None:
    publisher = CheckpointPublisher(tmp_path)
    publisher.publish(linear(1), 1)
    publisher.close()
    publisher.close()

    assert versions(tmp_path) == [1]
    with refuses(CheckpointError, "", "closed"):
        publisher.publish(linear(2), 2)


@pytest.mark.parametrize("key", ["keep_last", "max_pending"])
def test_settings_that_cannot_work(tmp_path: Path, key: str) -> None:
    with refuses(CheckpointError, key, 0):
        CheckpointPublisher(tmp_path, **{key: 0})


def test_version_that_cannot_be_reserved_is_counted_and_the_training_goes_on(tmp_path: Path) -> None:
    """The folder of the checkpoints is gone, as on a lost mount, and there again later."""
    with CheckpointPublisher(tmp_path) as publisher:
        publisher.publish(linear(1.0), 1)
        publisher.flush()
        (tmp_path / "checkpoints").rename(tmp_path / "away")
        (tmp_path / "checkpoints").write_text("")
        returned = publisher.publish(linear(2.0), 2)
        (tmp_path / "checkpoints").unlink()
        (tmp_path / "away").rename(tmp_path / "checkpoints")
        later = publisher.publish(linear(3.0), 3)

    assert (publisher.failed, publisher.published, returned) == (1, 2, 1)
    assert later > returned
    assert value(tmp_path) == 3.0
