"""The REST service alone, for any run folder: without Ray, without scorers, while the run goes on or long after."""

import threading

from deploy.interrupts import interrupts
from deploy.logs import logging_to
from deploy.runtime import RuntimeFile
from services.api import create_app, is_loopback
from services.server import Server
from shared.catalogue import Run, RunState
from shared.errors import ConfigError


def serve(run: Run, host: str, port: int) -> None:
    """Answer until Ctrl-C or SIGTERM, which raise KeyboardInterrupt. The other commands find it, unless the run is up.

    Raises: ConfigError when the port is taken.
    """
    token = run.token() or run.create_token()
    try:
        server = Server(create_app(run, token=token, loopback=is_loopback(host)), host, port)
    except ConfigError as error:
        raise ConfigError(str(error).replace("rest.", "--")) from None  # here they are options
    runtime = None if run.state() in (RunState.RUNNING, RunState.SERVED) else RuntimeFile(run, "serve")
    with interrupts(), logging_to(run.path, "serve"):
        try:
            url = server.start()
            if runtime is not None:
                runtime.update(url=url, pids={})
            print(f"{run.path} is served at {url}, until Ctrl-C", flush=True)
            threading.Event().wait()
        finally:
            if runtime is not None:
                runtime.remove()
            server.stop()
