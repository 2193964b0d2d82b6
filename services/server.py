"""uvicorn in a thread, on a socket that is bound before the thread starts, so that a taken port is an error at once."""

import errno
import socket
import threading
import time

import uvicorn
from fastapi import FastAPI

from shared.errors import ConfigError, ServiceError

START_TIMEOUT_S = 30.0
SETTINGS = ("rest.host", "rest.port")


class Server:
    """Serves `app` until `stop`. Raises ConfigError as `bind` does."""

    def __init__(self, app: FastAPI, host: str, port: int, *, named: tuple[str, str] = SETTINGS) -> None:
        self._socket = bind(host, port, named)
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
                raise ServiceError(
                    f"the REST service at {self.url} did not start within {START_TIMEOUT_S:.0f} s",
                    fix="look into its log for the reason",
                    key=self.url,
                )
            time.sleep(0.01)
        return self.url

    def stop(self) -> None:
        self._server.should_exit = True
        if self._thread.ident is not None:
            self._thread.join(timeout=START_TIMEOUT_S)
        self._socket.close()


def bind(host: str, port: int, named: tuple[str, str] = SETTINGS) -> socket.socket:
    """Open a listening socket. Raises ConfigError when it cannot be had.

    Args:
        named: what the user calls host and port, for the error: two settings, or two options.
    """
    if not host:  # would be every address
        raise ConfigError(
            "the REST service's host is empty",
            fix=f"set {named[0]}, such as to 127.0.0.1, or 0.0.0.0 for all",
            key=named[0],
        )
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
        )
    except OSError as error:
        reason, key, fix = _refusal(error, *named)
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}", fix=fix, key=key) from error


def _refusal(error: OSError, host: str, port: str) -> tuple[str, str, str]:
    """Why it was refused, which of the settings named `host` and `port` is at fault, and the fix."""
    here = f"set {host} to an address of this machine, such as 127.0.0.1, or 0.0.0.0 for all of them"
    if isinstance(error.__context__ or error, socket.gaierror):  # create_server wraps it
        return "the name is not known", host, here
    if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
        return "this machine does not have that address", host, here
    if error.errno == errno.EACCES:
        fix = f"set {port} to 1024 or above, or to 0 to take any free one"
        return "ports below 1024 need special rights", port, fix
    if error.errno == errno.EADDRINUSE:
        return "the port is taken", port, f"set {port} to a free one, or to 0 to take any"
    return str(error.strerror), port, f"set {host} and {port} to others"
