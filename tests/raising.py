"""Tests of refusals assert what an error says in its fields, not its sentences."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from shared.errors import ConfigErrors, SteppeError


@contextmanager
def refuses(
    kind: type[SteppeError], key: str | None = None, value: object = None
) -> Iterator[pytest.ExceptionInfo[SteppeError]]:
    """Assert that the block raises `kind`, about `key`, naming `value`, with a fix; yield pytest's record of it.

    Of several settings at once each must have a fix. Errors that nobody can fix are for pytest.raises.
    """
    with pytest.raises(kind) as caught:
        yield caught
    error = caught.value
    assert key is None or error.key == key, f"{error.key!r} is not {key!r}: {error}"
    assert value is None or str(value) in error.problem, f"{str(value)!r} is not named by {error.problem!r}"
    for one in error.errors if isinstance(error, ConfigErrors) else (error,):
        assert one.fix, f"no fix: {one}"
