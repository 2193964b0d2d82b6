"""What controller and scorers say to each other about blocks."""

import dataclasses

import numpy as np
import numpy.typing as npt

MAX_REPLICAS = 1024
AUDIT = -1  # in place of a block: samples whose rows are compared with the store's and not stored


@dataclasses.dataclass(frozen=True)
class Lease:
    """The right of one scorer to score a block, or the audit's samples, until a deadline that the controller keeps."""

    lease_id: int
    block: int
    sample_ids: npt.NDArray[np.int64]
