"""Every error that steppe raises for a reason a user can act on.

    SteppeError
    ├── ConfigError (ValueError)       a setting that cannot work
    │   └── ConfigErrors               several such settings at once
    ├── DataError (ValueError)         samples or labels that cannot be used
    │   └── DatasetMissing             the data set is not on this machine
    ├── StoreError                     the score store
    │   ├── StoreCorrupt               a file of the store is torn, altered or missing
    │   ├── StoreMismatch (ValueError) rows, sizes or formats that do not belong to this store
    │   ├── NoSuchVersion              a store version that is not there yet, or not kept any more
    │   └── Fenced                     another writer took over
    ├── CheckpointError                the checkpoint feed
    │   ├── CheckpointCorrupt          weights that do not match their checksum
    │   ├── CheckpointGone             weights that were removed meanwhile
    │   └── PerturbedWeights           publishing between SAM's two steps
    ├── StateError (ValueError)        a state dict that does not fit, steps out of order
    ├── TrainingDiverged               the loss is not a number any more
    ├── CellFailed                     one training of a comparison
    ├── RunError                       a run folder that is missing or of another data set
    └── ServiceError                   a process of the run that does not answer

All of them survive pickling, so that they keep their type across Ray actors.
"""

from collections.abc import Sequence
from typing import Self


class SteppeError(Exception):
    """Base of steppe's errors. `str()` joins the fields; code that decides and tests read the fields.

    Args:
        problem: what is wrong, with the value and the limit.
        fix: what the user can do about it; empty where nobody can.
        key: the setting ("train.epochs"), argument ("epsilon"), option ("--port"), file or sample that `problem` is
            about; empty where there is none.
    """

    def __init__(self, problem: str = "", *, fix: str = "", key: str = "") -> None:
        super().__init__(problem)
        self.problem, self.fix, self.key = problem, fix, key

    def __str__(self) -> str:
        return f"{self.problem}; {self.fix}" if self.fix else self.problem


class ConfigError(SteppeError, ValueError):
    """A setting that cannot work."""


class ConfigErrors(ConfigError):
    """Several settings that cannot work: `errors`. `problem` has a line for each, `key` is the first one's."""

    def __init__(
        self, problem: str = "", *, fix: str = "", key: str = "", errors: tuple[ConfigError, ...] = ()
    ) -> None:
        super().__init__(problem, fix=fix, key=key)
        self.errors = errors

    @classmethod
    def of(cls, errors: Sequence[ConfigError]) -> Self:
        """Join them; there must be one at least."""
        return cls("\n".join(map(str, errors)), key=errors[0].key, errors=tuple(errors))


class DataError(SteppeError, ValueError):
    """Samples or labels that cannot be used."""


class DatasetMissing(DataError):
    """The data set is not on this machine."""


class StoreError(SteppeError):
    """The score store cannot do what was asked."""


class StoreCorrupt(StoreError):
    """A file of the score store is torn, altered or missing; `key` is its path."""

    @classmethod
    def of(cls, file: object, problem: object) -> "StoreCorrupt":
        """Name the file, what is wrong with it, and the fix."""
        return cls(f"{file} {problem}", fix="restore it from a copy", key=str(file))


class StoreMismatch(StoreError, ValueError):
    """Rows, sizes or formats that do not belong to this score store."""


class NoSuchVersion(StoreError):
    """A store version that is not there yet, or not kept any more."""


class Fenced(StoreError):
    """Another writer took this score store over.

    Of this writer's last commit nothing is visible; or all, when the successor had seen it and went on from there.
    """


class CheckpointError(SteppeError):
    """The checkpoint feed cannot do what was asked."""


class CheckpointCorrupt(CheckpointError):
    """Published weights that do not match their checksum."""


class CheckpointGone(CheckpointError):
    """Published weights that were removed meanwhile."""


class PerturbedWeights(CheckpointError):
    """The model carries SAM's perturbation w + e(w); only w may be published."""


class StateError(SteppeError, ValueError):
    """A state dict that does not fit, or steps taken out of order."""


class TrainingDiverged(SteppeError):
    """The loss is not finite any more; the weights are of no use."""


class CellFailed(SteppeError):
    """One training of a comparison ended by an error that is not its settings' fault, or its process died."""


class RunError(SteppeError):
    """A run folder that is missing, in use, or of another data set."""


class ServiceError(SteppeError):
    """A process of the run does not answer, or refuses."""
