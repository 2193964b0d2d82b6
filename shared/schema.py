"""The score row: what one scoring of one sample yields; and how rows become a file.

Every loss-like measure is a function of the row (`shared.measures`), so that one store serves every curriculum.
"""

import pyarrow as pa

SCORE_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.int64()),
        pa.field("model_version", pa.int64()),  # the checkpoint that scored; 1, 2, 3 ...
        pa.field("step", pa.int64()),  # optimizer steps of that checkpoint
        pa.field("scored_at", pa.timestamp("us", tz="UTC")),
        pa.field("margin", pa.float32()),  # logsumexp_{j != y}(z_j) - z_y at the clean input
        pa.field("adversarial_margin", pa.float32()),  # the same at the adversarial input
        pa.field("log_ratio", pa.float32()),  # ln(adversarial loss / clean loss)
        pa.field("grad_norm", pa.float32()),  # ||d loss / d x||_2 at the clean input
        pa.field("el2n", pa.float32()),  # ||softmax(z) - onehot(y)||_2
        pa.field("predicted", pa.int32()),  # argmax of the clean logits
        pa.field("correct", pa.bool_()),  # clean prediction equals the label
        pa.field("robust", pa.bool_()),  # adversarial prediction equals the label
    ]
)

MEASURED_COLUMNS = ("margin", "adversarial_margin", "log_ratio", "grad_norm", "el2n", "predicted", "correct", "robust")
FLOAT_COLUMNS = ("margin", "adversarial_margin", "log_ratio", "grad_norm", "el2n")

SNAPSHOT_SCHEMA = SCORE_SCHEMA.append(pa.field("store_version", pa.int64()))  # the commit that brought the row
QUARANTINE_SCHEMA = SCORE_SCHEMA.append(pa.field("reason", pa.string()))


def arrow_file(rows: pa.Table) -> pa.Buffer:
    """The bytes of an Arrow IPC file that holds `rows` as one record batch."""
    rows = rows.combine_chunks()
    size = pa.MockOutputStream()  # a buffer that grows would be copied again and again
    _write(size, rows)
    buffer = pa.allocate_buffer(size.size())
    _write(pa.FixedSizeBufferWriter(buffer), rows)
    return buffer


def _write(sink: pa.NativeFile, rows: pa.Table) -> None:
    with pa.ipc.new_file(sink, rows.schema) as file:
        file.write_table(rows)
