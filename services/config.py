"""Settings of the controller and the REST service."""

from pydantic import Field

from shared.config import Config
from shared.score_store import Retention


class ControllerConfig(Config):
    """Blocks, leases, commits, and which store versions stay readable (`shared.score_store.Retention`).

    `audit_share` of the samples, at least 128, are scored at every version to measure what staleness costs; 0: none.
    """

    block_size: int = Field(default=256, ge=1)
    lease_timeout_s: float = Field(default=60.0, gt=0)
    commit_interval_s: float = Field(default=0.2, gt=0)
    keep_last: int = Field(default=256, ge=0)
    keep_every: int = Field(default=0, ge=0)
    keep_all: bool = False
    permutation_seed: int = Field(default=0, ge=0)
    audit_share: float = Field(default=0.01, ge=0, le=1)

    @property
    def retention(self) -> Retention:
        return Retention(self.keep_last, self.keep_every, self.keep_all)


class RestConfig(Config):
    """Where the REST service listens; port 0 picks a free one."""

    host: str = "127.0.0.1"
    port: int = Field(default=7471, ge=0, le=65535)
