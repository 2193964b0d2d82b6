"""The REST service of a run; and alone, for any run folder: without Ray, without scorers, long after the run too."""

import os
import sys
import threading
from collections.abc import Sequence

from deploy.interrupts import interrupts
from deploy.logs import logging_to
from deploy.runtime import RuntimeFile
from services.api import Fleet, create_app, is_loopback
from services.client import TOKEN_VARIABLE
from services.config import RestConfig
from services.server import SETTINGS, Server
from shared.catalogue import Run, RunState
from shared.errors import ConfigError, StoreError
from shared.score_store import ScoreReader


def service(run: Run, config: RestConfig, fleet: Fleet | None = None, *, named: tuple[str, str] = SETTINGS) -> Server:
    """Make the service, bound and not started, as every run has it. Raises ConfigError as `services.server.bind`.

    Changes need the environment's STEPPE_TOKEN, else the token of the run's file, which is made.

    Args:
        named: what the user calls host and port, for the error.
    """
    loopback = is_loopback(config.host)
    token = os.environ.get(TOKEN_VARIABLE) or _token_of(run, is_needed=not loopback)
    app = create_app(run, fleet=fleet, token=token, loopback=loopback, cors_origins=config.cors_origins)
    return Server(app, config.host, config.port, named=named)


def _token_of(run: Run, *, is_needed: bool) -> str | None:
    """None where the run is another user's, or its folder cannot be written: reading on this machine needs none."""
    try:
        return run.token() or run.create_token()
    except OSError as error:
        if not is_needed:
            return None
        raise ConfigError(
            f"{run.path / 'token'} can be neither read nor made ({error.strerror}), and off this machine every request "
            "needs a token",
            fix=f"set {TOKEN_VARIABLE} in the environment",
            key=str(run.path / "token"),
        ) from error


def serve(run: Run, host: str, port: int, cors_origins: Sequence[str] = ()) -> None:
    """Answer until Ctrl-C or SIGTERM, which raise KeyboardInterrupt. The other commands find it, unless the run is up.

    Raises: ConfigError when the port is taken.
    """
    config = RestConfig(host=host, port=port, cors_origins=tuple(cors_origins))
    server = service(run, config, named=("--host", "--port"))
    runtime = None if run.state() in (RunState.RUNNING, RunState.SERVED) else RuntimeFile(run, "serve")
    with interrupts(), logging_to(run.path, "serve"):
        try:
            url = server.start()
            if runtime is not None:
                try:
                    runtime.update(url=url, pids={})
                except OSError as error:
                    sys.stderr.write(f"other steppe commands will not find this service: {error}\n")
                    runtime = None
            try:
                ScoreReader(run.scores_uri)
            except StoreError as error:  # it is looked for again at each question
                sys.stderr.write(f"no scores can be asked for now: {error}\n")
            print(f"{run.path} is served at {url}, until Ctrl-C", flush=True)
            threading.Event().wait()
        finally:
            if runtime is not None:
                runtime.remove()
            server.stop()
