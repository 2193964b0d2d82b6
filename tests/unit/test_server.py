"""Why an address cannot be listened on, and what to set instead."""

import errno
import os
import socket

import pytest

from services.server import bind
from shared.errors import ConfigError
from tests.raising import refuses


@pytest.mark.parametrize(
    ("error", "key", "reason"),
    [
        (OSError(errno.EADDRINUSE, "in use"), "rest.port", "taken"),
        (PermissionError(errno.EACCES, "denied"), "rest.port", "rights"),
        (OSError(errno.EADDRNOTAVAIL, "no"), "rest.host", "address"),
        (socket.gaierror(socket.EAI_NONAME, "no"), "rest.host", "name"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "rest.port", "Too many open files"),
    ],
    ids=["taken", "rights", "address", "name", "other"],
)
def test_reason_and_fix(error: OSError, key: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> socket.socket:
        raise error

    monkeypatch.setattr(socket, "create_server", refuse)

    with refuses(ConfigError, key, reason) as caught:
        bind("127.0.0.1", 80)
    assert "127.0.0.1:80" in caught.value.problem
    assert key in caught.value.fix


@pytest.mark.parametrize(("host", "key"), [("", "--host"), ("192.0.2.1", "--host")])
def test_the_fix_uses_the_names_that_the_user_knows(host: str, key: str) -> None:
    with refuses(ConfigError, key) as caught:
        bind(host, 0, ("--host", "--port"))
    assert key in caught.value.fix
