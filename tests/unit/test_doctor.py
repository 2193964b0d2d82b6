import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from deploy import doctor
from deploy.cluster import RUN_VARIABLE
from deploy.doctor import CHECKS, Cgroup, Finding, Place, examine, print_findings, ray_cpus, run_check
from shared.catalogue import Run, process_identity
from shared.datasets import Images
from shared.errors import ConfigError

TRAIN = Images(np.zeros((2, 1, 2, 2), dtype=np.uint8), np.array([0, 1]), white=255, num_classes=2)


def look(name: str, root: Path, port: int = 0) -> list[Finding]:
    return run_check(name, dict(CHECKS)[name], Place(str(root), "127.0.0.1", port))


def create(path: Path, runtime: dict[str, object] | None = None) -> Run:
    run = Run.create(path, dataset_fingerprint="abc", train=TRAIN, config={}, scoring_id="s1")
    if runtime is not None:
        run.write("runtime.json", runtime)
    return run


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Python's temporary folder, one with a short path of its own."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def write(folder: Path, **content: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in content.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_this_machine_can_run_the_tests(tmp_path: Path) -> None:
    findings = examine(str(tmp_path / "runs"), "127.0.0.1", 0)

    of = {finding.name: finding.status for finding in findings}
    needed = ("Python", "packages", "torch", "torchvision", "ray", "pyarrow", "run root", "REST port", "digits")
    assert {name: of[name] for name in needed} == dict.fromkeys(needed, "ok")
    assert {finding.name for finding in findings if finding.status != "ok" and not finding.fix} == set()
    assert list(tmp_path.iterdir()) == []


def test_a_check_that_raises_is_a_problem() -> None:
    def broken(_: Place) -> Finding:
        raise ZeroDivisionError("no such luck")

    def refuses(_: Place) -> Iterator[Finding]:
        raise ConfigError("the port 1 is taken; by whom is not known", fix="take another; or none")
        yield

    place = Place("runs", "127.0.0.1", 0)
    assert run_check("x", broken, place) == [Finding("x", "problem", "ZeroDivisionError: no such luck")]
    assert run_check("y", refuses, place) == [
        Finding("y", "problem", "the port 1 is taken; by whom is not known", "take another; or none"),
    ]


def test_taken_port_is_a_problem(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        [finding] = look("REST port", tmp_path, port)

    assert finding.status == "problem"
    assert f"127.0.0.1:{port}" in finding.detail
    assert "rest.port" in finding.fix


def test_run_root_that_cannot_be_made_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    for root in (tmp_path / "file", tmp_path / "file" / "runs"):
        [finding] = look("run root", root)
        assert (finding.status, finding.detail) == ("problem", f"{tmp_path / 'file'} is not a folder")
        assert "run.root" in finding.fix


def test_little_free_space_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LEAST_FREE_BYTES", 2**62)
    [finding] = look("run root", tmp_path)

    assert finding.status == "warning"
    assert "GiB free, less than" in finding.detail


def test_long_temporary_folder_is_a_warning(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [short] = look("temporary folder", temporary)
    long = temporary / ("x" * 40)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    [warned] = look("temporary folder", temporary)

    assert short.status == "ok"
    assert warned.status == "warning"
    assert f"{long} has {len(str(long))} characters, Ray's sockets allow 39: runs use /tmp" in warned.detail


def test_killed_runs_are_named_with_their_end(tmp_path: Path) -> None:
    gone: dict[str, object] = {"pid": os.getpid(), "pid_started": psutil.Process().create_time() - 60}
    killed = create(tmp_path / "a killed one", gone)
    create(tmp_path / "running", process_identity())
    create(tmp_path / "ended").write("summary.json", {})
    [finding] = look("killed runs", tmp_path)

    assert (finding.name, finding.status) == ("killed runs", "warning")
    assert finding.fix == f"steppe down '{killed.path}'"


def test_no_killed_runs(tmp_path: Path) -> None:
    create(tmp_path / "running", process_identity())

    assert look("killed runs", tmp_path) == [Finding("killed runs", "ok", f"none of 1 in {tmp_path}")]


def test_ray_folders_without_a_process_are_left_over(tmp_path: Path, temporary: Path) -> None:
    for name in ("steppe-orphan", "steppe-killed", "steppe-used", "steppe-young", "steppe-notes", "other"):
        (temporary / name).mkdir()
        if name != "steppe-notes":
            (temporary / name / "session_2026").mkdir()
        if name != "steppe-young":
            os.utime(temporary / name, (time.time() - 3600,) * 2)
    run = create(tmp_path / "run", {"pid": 1, "pid_started": 0, "ray_folder": str(temporary / "steppe-killed")})
    command = [sys.executable, "-c", "input()", f"--session_dir={temporary}/steppe-used/session_2026"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        findings = look("Ray folders", tmp_path)
        process.communicate(b"\n")
    here = [finding for finding in findings if str(temporary) in finding.detail]  # /tmp is looked at too

    assert {finding.fix for finding in here} == {f"rm -r {temporary}/steppe-orphan", f"steppe down {run.path}"}
    assert {finding.status for finding in here} == {"warning"}


def test_other_ray_clusters_are_told_from_ours(tmp_path: Path) -> None:
    sleep = shutil.which("sleep")
    assert sleep
    shutil.copy(sleep, tmp_path / "raylet")
    command = [str(tmp_path / "raylet"), "60"]
    strange = subprocess.Popen(command)
    ours = subprocess.Popen(command, env=os.environ | {RUN_VARIABLE: "/runs/x"})
    try:
        [finding] = look("other Ray clusters", tmp_path)
    finally:
        for process in (strange, ours):
            process.kill()
            process.wait()

    pids = finding.detail.removeprefix("pids ").partition(";")[0].split(", ")
    assert finding.status == "ok"
    assert str(strange.pid) in pids
    assert str(ours.pid) not in pids
    assert "do not join it" in finding.detail


def test_fashion_mnist_is_looked_for_where_runs_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    monkeypatch.setenv("HOME", str(tmp_path))
    fetched = tmp_path / ".cache/steppe/FashionMNIST/raw"
    names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    fetched.mkdir(parents=True)
    for name in names[1:]:
        (fetched / name).write_bytes(b"")
    [before] = look("Fashion-MNIST", tmp_path)
    (fetched / f"{names[0]}.gz").write_bytes(b"")
    [after] = look("Fashion-MNIST", tmp_path)

    assert before.status == "warning"
    assert "data.download=true" in before.fix
    assert after == Finding("Fashion-MNIST", "ok", f"in {fetched}")


def test_limits_of_a_cgroup_of_version_2_are_the_tightest(tmp_path: Path) -> None:
    write(tmp_path, proc="0::/job/step")
    write(tmp_path / "fs/job", cpu__max="150000 100000", memory__max="5000", memory__current="1000")
    write(tmp_path / "fs/job/step", cpu__max="max 100000", memory__max="4500", memory__current="900")
    write(tmp_path / "fs/job", memory__stat="anon 600\ninactive_file 300")
    cgroup = Cgroup(tmp_path / "proc", tmp_path / "fs")

    assert cgroup.cpu_quota() == 1.5
    assert cgroup.memory_left() == 4500 - 900


def test_limits_of_a_cgroup_of_version_1(tmp_path: Path) -> None:
    """In a container the path is the host's, and only the top of each hierarchy is there."""
    write(tmp_path, proc="4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n0::/")
    write(tmp_path / "fs/cpu", cpu__cfs_quota_us="50000", cpu__cfs_period_us="100000")
    write(tmp_path / "fs/memory", memory__limit_in_bytes="5000", memory__usage_in_bytes="1000")
    write(tmp_path / "fs/memory", memory__stat="inactive_file 1\ntotal_inactive_file 400")
    cgroup = Cgroup(tmp_path / "proc", tmp_path / "fs")

    assert (cgroup.cpu_quota(), cgroup.memory_left()) == (0.5, 5000 - 600)


def test_no_limits(tmp_path: Path) -> None:
    write(tmp_path, proc="2:cpu:/\n0::/")
    write(tmp_path / "fs/cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")

    for cgroup in (Cgroup(tmp_path / "proc", tmp_path / "fs"), Cgroup(tmp_path / "none", tmp_path / "fs")):
        assert (cgroup.cpu_quota(), cgroup.memory_left()) == (None, None)


@pytest.mark.parametrize(("limit", "cpus"), [("300000 100000", 3), ("350000 100000", 3), ("max 100000", None)])
def test_ray_counts_whole_cpus_of_the_quota(tmp_path: Path, limit: str, cpus: int | None) -> None:
    write(tmp_path, cpu__max=limit)

    assert ray_cpus(tmp_path) == (cpus or os.cpu_count())


def test_findings_are_printed_a_line_each_with_the_fix_below(capsys: pytest.CaptureFixture[str]) -> None:
    print_findings([Finding("a", "ok", "here [bold]"), Finding("b", "problem", "x" * 200, "do this")])

    assert capsys.readouterr().out.splitlines() == [
        "ok       a: here [bold]",
        f"problem  b: {'x' * 200}",
        "         fix: do this",
    ]
