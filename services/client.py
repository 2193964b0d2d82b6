"""The REST service from Python: `Client("http://127.0.0.1:7471").scores([3, 14, 159])` is a pyarrow Table."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, Self

import httpx2
import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import tenacity

from services.answers import HEAD
from services.web import ARROW
from shared.catalogue import Run, RunState
from shared.errors import ConfigError, DataError, RunError, ServiceError, SteppeError

TOKEN_VARIABLE = "STEPPE_TOKEN"  # noqa: S105
TIMEOUT_S = 10.0
RETRIES = 3
LONGEST_WAIT_S = 2.0
_SERVE = "to ask for its scores: steppe serve {run}"
_SCORED = ("nobody scores it now", "to go on: steppe score CONFIG; " + _SERVE)
_STATE_AND_FIX = {
    RunState.FINISHED: ("it is finished, its results are in its summary.json", _SERVE),
    RunState.INTERRUPTED: ("it was interrupted", "to go on: steppe run {run} --resume; " + _SERVE),
    RunState.KILLED: ("it was killed", "to go on: steppe run {run} --resume; to end what it left: steppe down {run}"),
}
_NOT_STEPPE = "check that this is the address of a steppe service"


class Client:
    """Asks one service. Requests that change nothing are repeated when the service does not answer or is not ready.

    Args:
        url: of the service.
        token: for changes, and off loopback for everything; default: the environment's STEPPE_TOKEN.
        timeout_s: of connecting, and of each wait for more.
        retries: how often one is repeated, after waits of a tenth of a second to 2 s.

    Raises: ServiceError when it does not answer or refuses; DataError for unknown ids, versions and cursors;
        ConfigError for what it cannot do as asked.
    """

    def __init__(
        self, url: str, *, token: str | None = None, timeout_s: float = TIMEOUT_S, retries: int = RETRIES
    ) -> None:
        token = token or os.environ.get(TOKEN_VARIABLE)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx2.Client(base_url=url, headers=headers, timeout=timeout_s, trust_env=False)
        self._again = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Again),
            stop=tenacity.stop_after_attempt(1 + retries),
            wait=tenacity.wait_random_exponential(multiplier=0.1, max=LONGEST_WAIT_S),
            reraise=True,
        )

    @classmethod
    def of_run(cls, run: str | os.PathLike[str] | Run, *, timeout_s: float = TIMEOUT_S, retries: int = RETRIES) -> Self:
        """Of a run that is up on this machine, with its token. Raises RunError, with what to do, when it is not up."""
        run = run if isinstance(run, Run) else Run(run)
        runtime, state = run.runtime(), run.state()
        if not runtime or state not in (RunState.RUNNING, RunState.SERVED):
            what, fix = _STATE_AND_FIX[state] if run.is_trained_here else _SCORED
            raise RunError(f"run {run.path} is not up: {what}", fix=fix.format(run=run.path), key=str(run.path))
        if "url" not in runtime:
            raise RunError(
                f"run {run.path} is starting and does not answer yet",
                fix="try again in a few seconds",
                key=str(run.path),
            )
        token = os.environ.get(TOKEN_VARIABLE)
        with contextlib.suppress(PermissionError):  # another user's run may be read
            token = token or run.token()
        return cls(runtime["url"], token=token, timeout_s=timeout_s, retries=retries)

    def sample(self, sample_id: int, **parameters: Any) -> dict[str, Any]:
        """All that is known of one sample. Parameters: measure, max_age_versions, max_age_s."""
        return self.get(f"/v1/samples/{int(sample_id)}", **parameters)

    def scores(self, ids: npt.ArrayLike, measure: str = "adm", **limits: Any) -> pa.Table:
        """value, percentile, status and ages of `ids`, in the order asked; `facts(table)` tells the rest."""
        body = {"ids": np.asarray(ids).reshape(-1).tolist(), "measure": measure, **limits}
        return _table(self._send("POST", "/v1/scores:query", {"Accept": ARROW}, body=body))

    def values(self, ids: npt.ArrayLike, measure: str = "adm", **limits: Any) -> npt.NDArray[np.float64]:
        """The values alone, shape [B]; NaN where unscored, refused or not finite."""
        column = self.scores(ids, measure, **limits).column("value")
        values: npt.NDArray[np.float64] = column.combine_chunks().to_numpy(zero_copy_only=False).astype(np.float64)
        return values

    def pages(self, *, limit: int = 1000, **selection: Any) -> Iterator[pa.Table]:
        """Samples by percentile, the hardest first, page by page of one store version.

        Args:
            limit: rows to a page.
            selection: measure, order ("asc" or "desc"), label, domain, status, max_age_versions, max_age_s.
        """
        at: dict[str, Any] = selection
        while True:
            page = _table(self._send("GET", "/v1/scores", {"Accept": ARROW}, {"limit": limit, **at}))
            yield page
            if (cursor := facts(page).get("next_cursor")) is None:
                return
            at = {"cursor": cursor}

    def snapshot(
        self, *, version: int | None = None, since: int = 0, store: str | None = None, compression: str | None = None
    ) -> pa.Table:
        """The latest row of each scored sample; `since` a store version only what came after.

        Raises DataError when that version is not, or `store` is another than the one that is there now.

        Args:
            since: the `version` of an earlier snapshot's `facts`.
            store: its `store`.
            compression: lz4 or zstd, on slow lines.
        """
        parameters = {"version": version, "since": since, "store": store, "compression": compression}
        return _table(self._send("GET", "/v1/scores/snapshot", {"Accept": ARROW}, parameters))

    def history(self, sample_id: int, measure: str = "adm") -> pa.Table:
        """The kept rows of one sample, one per model_version, oldest first."""
        return _table(
            self._send("GET", f"/v1/samples/{int(sample_id)}/history", {"Accept": ARROW}, {"measure": measure})
        )

    def suspects(self, limit: int = 100) -> pa.Table:
        """Samples that look mislabelled, most suspicious first."""
        return _table(self._send("GET", "/v1/suspects", {"Accept": ARROW}, {"limit": limit}))

    def image(self, sample_id: int, scale: int = 1) -> bytes:
        """One image as a PNG file."""
        return self._send("GET", f"/v1/samples/{int(sample_id)}/image", {}, {"scale": scale}).content

    def stats(self) -> dict[str, Any]:
        """Coverage, ages and counts of the run."""
        return self.get("/v1/stats")

    def scorers(self) -> dict[str, Any]:
        """The wanted and the registered scorers. Raises ServiceError where there are none to ask for."""
        return self.get("/v1/scorers")

    def scale(self, replicas: int) -> dict[str, Any]:
        """Set the wanted number of scorers."""
        return _json(self._send("PATCH", "/v1/scorers", {}, body={"replicas": int(replicas)}))

    def get(self, path: str, **parameters: Any) -> dict[str, Any]:
        """Any other answer in JSON."""
        return _json(self._send("GET", path, {}, parameters))

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Any other query in JSON."""
        return _json(self._send("POST", path, {}, body=body))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _send(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        parameters: Mapping[str, Any] | None = None,
        *,
        body: Mapping[str, Any] | None = None,
    ) -> httpx2.Response:
        query = {name: value for name, value in (parameters or {}).items() if value is not None}
        content = None if body is None else orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        sent = dict(headers) | ({} if body is None else {"Content-Type": "application/json"})

        def once() -> httpx2.Response:
            try:
                answer = self._http.request(method, path, params=query, content=content, headers=sent)
            except httpx2.HTTPError as error:
                url = str(self._http.base_url)
                what = f"{url} does not answer: {error or type(error).__name__}"
                raise _Again(what, fix="check the address, and that the service is up", key=url) from error
            if answer.is_error:
                raise _refusal(answer)
            return answer

        try:
            return once() if method == "PATCH" else self._again(once)
        except _Again as error:
            raise ServiceError(error.problem, fix=error.fix, key=error.key) from error.__cause__


def facts(table: pa.Table) -> dict[str, Any]:
    """What an answer tells once: measure and meaning, store_version, refused, next_cursor ..."""
    found: dict[str, Any] = orjson.loads((table.schema.metadata or {}).get(HEAD, b"{}"))
    return found


class _Again(ServiceError):
    """What may pass by itself."""


def _refusal(answer: httpx2.Response) -> SteppeError:
    """Make the error that the service's problem document (RFC 9457) tells of."""
    kinds: dict[int, type[SteppeError]] = {404: DataError, 406: ConfigError, 413: ConfigError, 422: ConfigError}
    kind = kinds.get(answer.status_code, _Again if answer.status_code in (502, 503, 504) else ServiceError)
    try:
        told = answer.json()
        return kind(str(told["detail"]), fix=str(told.get("fix") or ""), key=str(told.get("key") or ""))
    except (ValueError, KeyError, TypeError):
        url = str(answer.url)
        return kind(f"{url} answers {answer.status_code}: {answer.text[:200]}", fix=_NOT_STEPPE, key=url)


def _json(answer: httpx2.Response) -> dict[str, Any]:
    try:
        content: dict[str, Any] = answer.json()
    except ValueError as error:
        raise _other_answer(answer, "JSON") from error
    return content


def _table(answer: httpx2.Response) -> pa.Table:
    try:
        return pa.ipc.open_stream(answer.content).read_all()
    except (pa.ArrowException, OSError) as error:
        raise _other_answer(answer, "Arrow stream") from error


def _other_answer(answer: httpx2.Response, wanted: str) -> ServiceError:
    url = str(answer.url)
    return ServiceError(f"{url} answers no {wanted}: {answer.text[:200]}", fix=_NOT_STEPPE, key=url)
