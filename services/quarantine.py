"""The quarantine: score rows that must not count, kept with the reason."""

import logging
import threading
from collections.abc import Sequence

import pyarrow as pa

from shared.schema import QUARANTINE_SCHEMA, arrow_file
from shared.storage import Folder
from shared.store_view import column_array, last_rows

logger = logging.getLogger(__name__)

QUARANTINE_FILE = "quarantine.arrow"


class Quarantine:
    """Rows that must not count, with the reason: the latest one of each sample in a file, all of them counted."""

    def __init__(self, run: Folder) -> None:
        self._run = run
        self.count = 0
        self._lock = threading.Lock()
        self._rows = self._saved = QUARANTINE_SCHEMA.empty_table()
        if QUARANTINE_FILE in run.names():
            self._rows = self._saved = pa.ipc.open_file(run.read(QUARANTINE_FILE)).read_all()

    def add(self, rows: pa.Table, reasons: Sequence[str]) -> None:
        logger.warning("%d rows in quarantine: %s", rows.num_rows, "; ".join(sorted(set(reasons))))
        named = rows.append_column("reason", pa.array(reasons, pa.string())).cast(QUARANTINE_SCHEMA)
        with self._lock:
            self.count += rows.num_rows
            both = pa.concat_tables([self._rows, named])
            *_, kept = last_rows(column_array(both, "sample_id"), column_array(both, "model_version"))
            self._rows = both.take(pa.array(kept))

    def save(self) -> None:
        """Durable on return; nothing to do when nothing was added."""
        with self._lock:
            rows = self._rows
        if rows is self._saved:
            return
        self._run.put(QUARANTINE_FILE, arrow_file(rows))
        self._saved = rows
