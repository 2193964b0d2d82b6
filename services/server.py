"""uvicorn in a thread, on a socket that is bound before the thread starts, so that a taken port is an error at once."""

import errno
import socket
import threading
import time

import uvicorn
from fastapi import FastAPI

from shared.errors import ConfigError, ServiceError

START_TIMEOUT_S = 30.0


class Server:
    """Serves `app` until `stop`. Raises ConfigError when the port is taken."""

    def __init__(self, app: FastAPI, host: str, port: int) -> None:
        self._socket = bind(host, port)
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://{host if ':' not in host else f'[{host}]'}:{self.port}"
        self._server = uvicorn.Server(
            uvicorn.Config(app, log_config=None, log_level="warning", access_log=False, lifespan="off")
        )
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="rest", daemon=True)

    def start(self) -> str:
        """Returns the URL once requests are answered."""
        self._thread.start()
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise ServiceError(f"the REST service at {self.url} did not start within {START_TIMEOUT_S:.0f} s")
            time.sleep(0.01)
        return self.url

    def stop(self) -> None:
        self._server.should_exit = True
        if self._thread.ident is not None:
            self._thread.join(timeout=START_TIMEOUT_S)
        self._socket.close()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError naming host and port when it cannot be had, with what to set instead."""
    if not host:  # would be every address
        raise ConfigError("the REST service's host is empty; set rest.host, such as to 127.0.0.1, or 0.0.0.0 for all")
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
        )
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {_reason_and_fix(error)}") from error


def _reason_and_fix(error: OSError) -> str:
    here = "set rest.host to an address of this machine, such as 127.0.0.1, or 0.0.0.0 for all of them"
    if isinstance(error.__context__ or error, socket.gaierror):  # create_server wraps it
        return f"the name is not known; {here}"
    if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
        return f"this machine does not have that address; {here}"
    if error.errno == errno.EACCES:
        return "ports below 1024 need special rights; set rest.port to 1024 or above, or to 0 to take any free one"
    if error.errno == errno.EADDRINUSE:
        return "the port is taken; set rest.port to a free one, or to 0 to take any"
    return f"{error.strerror}; set rest.host and rest.port"
