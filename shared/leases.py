"""What controller and scorers say to each other about blocks."""

import dataclasses

import numpy as np
import numpy.typing as npt

MAX_REPLICAS = 1024


@dataclasses.dataclass(frozen=True)
class Lease:
    """The right of one scorer to score one block until a deadline that the controller keeps."""

    lease_id: int
    block: int
    sample_ids: npt.NDArray[np.int64]
