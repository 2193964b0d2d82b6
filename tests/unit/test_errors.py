import inspect
import pickle
import re

import pytest

from shared import errors
from shared.errors import ConfigError, ConfigErrors, SteppeError

CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_survives_pickle(kind: type[SteppeError]) -> None:
    """Ray pickles what an actor raises; the type is what callers catch."""
    raised = kind("epsilon is -1", fix="set it to 0 or more", key="epsilon")
    error = pickle.loads(pickle.dumps(raised))  # noqa: S301

    assert isinstance(error, SteppeError)
    assert (type(error), error.problem, error.fix, error.key) == (kind, raised.problem, raised.fix, raised.key)
    assert str(error) == str(raised) == "epsilon is -1; set it to 0 or more"


def test_several_at_once_survive_pickle() -> None:
    found = [ConfigError(f"{key} is -1", fix=f"set it to {fix}", key=key) for key, fix in (("rho", "0"), ("seed", "1"))]
    error = pickle.loads(pickle.dumps(ConfigErrors.of(found)))  # noqa: S301

    assert isinstance(error, ConfigErrors)
    assert (error.key, error.fix) == ("rho", "")
    assert str(error) == error.problem == "\n".join(map(str, found))
    assert [(type(one), vars(one)) for one in error.errors] == [(ConfigError, vars(one)) for one in found]


def test_without_a_fix_the_problem_is_the_message() -> None:
    assert str(SteppeError("epsilon is -1")) == "epsilon is -1"


def test_the_drawn_tree_is_the_real_one() -> None:
    """Each line of the docstring's tree names a class, by its depth the parent, in brackets the builtin it also is."""
    drawn, parents = {}, {}
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"([ │├└─]{4,})([A-Z]\w+)(?: \((\w+)\))?", line):
            depth = (len(found[1]) - 4) // 4
            parents[depth] = found[2]
            drawn[found[2]] = {parents[depth - 1] if depth else "Exception", found[3]} - {None}

    assert drawn == {kind.__name__: {base.__name__ for base in kind.__bases__} for kind in CLASSES}
