"""Real Ray clusters for tests, started with `ray start` and ended again, on this host or on several made-up ones."""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.system.runs import QUICKSTART, STEPPE
from tests.waiting import LIMIT_S, wait_for

BIN = Path(sys.executable).parent
LOCALHOST = "127.0.0.1"
OURS = ("ray::ScorerActor", "ray::ControllerActor", "ray::RestActor", "ray::Desk")


class Host:
    """A network namespace with an address of its own; without a name it is this machine."""

    def __init__(self, name: str = "", address: str = LOCALHOST) -> None:
        self.name, self.address = name, address

    @property
    def inside(self) -> tuple[str, ...]:
        """What a command begins with to run there."""
        return ("ip", "netns", "exec", self.name) if self.name else ()


HERE = Host()


class Cluster:
    """A head, and what joins it. With a token nobody gets in without."""

    def __init__(self, folder: Path, token: str = "", head: Host = HERE) -> None:
        self.folder, self.token, self.head = folder, token, head
        self.port, self.dashboard_port = free_port(), free_port()
        self.url = f"http://{head.address}:{self.dashboard_port}"
        self.nodes: list[subprocess.Popen[bytes]] = []
        dashboard = (
            "--include-dashboard=true",
            f"--dashboard-host={head.address}",
            f"--dashboard-port={self.dashboard_port}",
            f"--ray-client-server-port={free_port()}",
        )
        self._start(head, "--head", f"--port={self.port}", "--num-cpus=4", f"--temp-dir={folder}", *dashboard)
        wait_for(self._answers, what="the dashboard")

    def environment(self, token: str | None = None) -> dict[str, str]:
        """Of a process that may talk to it; or of one with another token."""
        token = self.token if token is None else token
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
        path = f"{BIN}:{os.environ['PATH']}"
        # Workers at Ray's usual nice 15 would hardly run beside other work on this machine.
        return os.environ | auth | {"PATH": path, "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}

    def join(self, *options: str, host: Host | None = None, before: tuple[str, ...] = ()) -> "subprocess.Popen[bytes]":
        """Another node, on `host` or the head's."""
        return self._start(host or self.head, f"--address={self.head.address}:{self.port}", *options, before=before)

    def submit(self, *options: str, token: str | None = None) -> "subprocess.Popen[str]":
        """`steppe submit` of the quickstart."""
        return self.steppe("submit", str(QUICKSTART), "--address", self.url, "--json", *options, token=token)

    @property
    def address(self) -> str:
        """For `steppe run --address` on the head."""
        return f"{self.head.address}:{self.port}"

    def steppe(self, *arguments: str, token: str | None = None, cwd: Path | None = None) -> "subprocess.Popen[str]":
        """A command on the head, with Ctrl-C ignored at first, as a script has it for what it starts with &."""
        return subprocess.Popen(
            [*self.head.inside, "bash", "-c", 'trap "" INT; exec "$@"', "bash", STEPPE, *arguments],
            cwd=cwd,
            env=self.environment(token),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def actors(self) -> list[str]:
        """Command lines of steppe's processes that are up."""
        lines = []
        for node in self.nodes:
            for process in _below(node):
                with contextlib.suppress(psutil.NoSuchProcess):
                    lines.append(" ".join(process.cmdline()))
        return [line for line in lines if line.startswith(OURS) or "-m deploy" in line]

    def drain(self, node_id: str) -> None:
        """Announce a node's preemption, ten minutes ahead."""
        ray = [str(BIN / "ray"), "drain-node", "--address", f"{self.head.address}:{self.port}", "--node-id", node_id]
        why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"]
        command = [*self.head.inside, *ray, *why, "--deadline-remaining-seconds", "600"]
        subprocess.run(command, env=self.environment(), check=True, timeout=LIMIT_S)

    def node_id(self, label: str, value: str) -> str:
        """Of the node with that label."""
        url = f"{self.url}/api/v0/nodes?detail=1"
        found = wait_for(lambda: _labelled(self.get(url), label, value), what=f"the node with {label}={value}")
        return str(found)

    def get(self, url: str) -> Any:
        """The answer of the dashboard, asked from the head."""
        asked = subprocess.run(
            [*self.head.inside, sys.executable, "-c", _ASK, url, self.token], capture_output=True, check=False
        )
        return json.loads(asked.stdout) if not asked.returncode else None

    def kill(self, node: "subprocess.Popen[bytes]") -> None:
        """End a node with kill -9, all its processes at once."""
        for process in _below(node):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        node.kill()
        node.wait()

    def stop(self) -> None:
        for node in reversed(self.nodes):
            left = _below(node)
            node.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(20)
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            node.kill()
            node.wait()

    def _start(self, host: Host, *options: str, before: tuple[str, ...] = ()) -> "subprocess.Popen[bytes]":
        ray = (str(BIN / "ray"), "start", "--block", f"--node-ip-address={host.address}")
        agent = f"--dashboard-agent-listen-port={free_port()}"  # jobs go through it: two clusters must not share one
        with open(f"{self.folder}.{len(self.nodes)}.log", "wb") as log:
            node = subprocess.Popen(
                [*host.inside, *before, *ray, agent, *options],
                env=self.environment(),
                stdout=log,
                stderr=log,
                cwd=self.folder.parent,
            )
        self.nodes.append(node)
        return node

    def _answers(self) -> bool:
        assert self.nodes[0].poll() is None, Path(f"{self.folder}.0.log").read_text()
        return self.get(f"{self.url}/api/version") is not None


_ASK = """
import sys, httpx2
headers = {"Authorization": f"Bearer {sys.argv[2]}"} if sys.argv[2] else {}
answer = httpx2.get(sys.argv[1], headers=headers, trust_env=False, timeout=30)
print(answer.text)
sys.exit(answer.status_code != 200)
"""


def _labelled(answer: Any, label: str, value: str) -> str | None:
    nodes = answer["data"]["result"]["result"] if answer else []
    return next((node["node_id"] for node in nodes if node.get("labels", {}).get(label) == value), None)


def _below(node: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(node.pid).children(recursive=True)
    return []


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind((LOCALHOST, 0))
        return int(taken.getsockname()[1])


@contextlib.contextmanager
def cluster(token: str = "", head: Host = HERE) -> Iterator[Cluster]:
    place = Path(tempfile.mkdtemp(prefix="sj-", dir="/tmp"))
    started: Cluster | None = None
    try:
        started = Cluster(place / "ray", token, head)
        yield started
    finally:
        if started is not None:
            started.stop()
        shutil.rmtree(place, ignore_errors=True)


class Network:
    """Two hosts of their own on this machine: network namespaces with a cable between them."""

    def __init__(self) -> None:
        self._id = secrets.token_hex(2)
        self.here = Host(f"steppe-{self._id}-a", "10.213.77.1")
        self.there = Host(f"steppe-{self._id}-b", "10.213.77.2")
        self._ends = f"st{self._id}a", f"st{self._id}b"
        _ip("link", "add", self._ends[0], "type", "veth", "peer", "name", self._ends[1])
        for host, end in zip((self.here, self.there), self._ends, strict=True):
            _ip("netns", "add", host.name)
            _ip("link", "set", end, "netns", host.name)
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", end)
            _ip("-n", host.name, "link", "set", "lo", "up")
            _ip("-n", host.name, "link", "set", end, "up")

    def cut(self) -> None:
        """From here on no packet arrives."""
        _ip("-n", self.there.name, "link", "set", self._ends[1], "down")

    def mend(self) -> None:
        _ip("-n", self.there.name, "link", "set", self._ends[1], "up")

    def close(self) -> None:
        for host in (self.here, self.there):
            subprocess.run(["ip", "netns", "delete", host.name], check=False, capture_output=True)


@contextlib.contextmanager
def network() -> Iterator[Network]:
    made = Network()
    try:
        yield made
    finally:
        made.close()


def namespaces_are_allowed() -> bool:
    return not subprocess.run(["unshare", "-mn", "ip", "link"], check=False, capture_output=True).returncode


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
