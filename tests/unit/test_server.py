"""Why an address cannot be listened on, and what to set instead."""

import errno
import os
import socket

import pytest

from services.server import bind
from shared.errors import ConfigError


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EADDRINUSE, "in use"), "the port is taken; set rest.port to a free one, or to 0 to take any"),
        (
            PermissionError(errno.EACCES, "denied"),
            "ports below 1024 need special rights; set rest.port to 1024 or above, or to 0 to take any free one",
        ),
        (OSError(errno.EADDRNOTAVAIL, "no"), "this machine does not have that address; set rest.host to an address of"),
        (socket.gaierror(socket.EAI_NONAME, "no"), "the name is not known; set rest.host to an address of"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "Too many open files; set rest.host and rest.port"),
    ],
    ids=["taken", "rights", "address", "name", "other"],
)
def test_reason_and_fix(error: OSError, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> socket.socket:
        raise error

    monkeypatch.setattr(socket, "create_server", refuse)

    with pytest.raises(ConfigError) as refused:
        bind("127.0.0.1", 80)
    assert str(refused.value).startswith(f"cannot listen on 127.0.0.1:80: {said}")
