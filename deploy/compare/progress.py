"""How far a comparison is: one line per finished cell, with the time that is left."""

from collections.abc import Callable, Sequence
from typing import Any

from deploy.compare.cells import Cell, CellStore


class Progress:
    """Counts cells as they end and tells the time left, from the mean so far of the same data set and method."""

    def __init__(
        self, what: str, cells: Sequence[Cell], store: CellStore, cores: int, say: Callable[[str], None]
    ) -> None:
        self._what, self._cores, self._say = what, cores, say
        self._left = {cell.key: cell for cell in cells if store.result(cell) is None}
        self._total = len({cell.key for cell in cells})
        self._seconds: dict[tuple[str, str], list[float]] = {}
        if self._left:
            done = self._total - len(self._left)
            self._say(f"{what}: {self._total} trainings" + (f", {done} of them done before" if done else ""))

    def done(self, cell: Cell, found: dict[str, Any]) -> None:
        del self._left[cell.key]
        words = f"{self._what} {self._total - len(self._left)}/{self._total}  {cell}: "
        if found["accuracy"] is None:
            self._say(f"{words}diverged: {found['failed']}")
            return
        self._seconds.setdefault((cell.data, cell.method), []).append(found["seconds"])
        words += f"accuracy {found['accuracy']:.4f} in {found['seconds']:.0f} s"
        self._say(f"{words}; {self._time_left()} left" if self._left else words)

    def _time_left(self) -> str:
        everything = [second for seconds in self._seconds.values() for second in seconds]
        mean = sum(everything) / len(everything)
        work, longest = 0.0, 0.0
        for cell in self._left.values():
            own = self._seconds.get((cell.data, cell.method))
            seconds = sum(own) / len(own) if own else mean
            work += seconds * min(cell.slots, self._cores)
            longest = max(longest, seconds)
        left = max(work / self._cores, longest)  # cores without a cell do not help the last one
        return f"about {left / 60:.0f} min" if left >= 90 else f"about {left:.0f} s"
