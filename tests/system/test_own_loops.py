"""Own training loops in four frameworks, two ranks each: every position goes to one rank, also when resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.attempts import abandoned
from shared.checkpoints import stable
from tests import own_loops

ROOT = Path(__file__).parents[2]
PER_EPOCH = own_loops.STEPS // own_loops.EPOCHS


@pytest.mark.slow
@pytest.mark.parametrize("framework", own_loops.FRAMEWORKS)
def test_positions_epochs_and_weights_stopped_twice_in_mid_epoch(framework: str, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "tests.own_loops", framework, str(tmp_path)],
        capture_output=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        timeout=300,
    )

    assert done.returncode == 0, done.stderr[-5000:]
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    epochs = range(0, own_loops.STEPS, PER_EPOCH)
    drawn = [[i for rank in ranks for batch in rank["whole"][at : at + PER_EPOCH] for i in batch] for at in epochs]
    for epoch in drawn:
        assert sorted(epoch) == list(range(own_loops.N))
    assert len({tuple(epoch) for epoch in drawn}) == own_loops.EPOCHS
    for rank in ranks:
        assert [len(piece) for piece in rank["pieces"]] == [4, 9, 14]
        assert [batch for piece in rank["pieces"] for batch in piece] == rank["whole"]
        assert rank["weights"][0] == rank["weights"][1] == ranks[0]["weights"][0]
    assert [one.step for one in stable(tmp_path / "pieces" / "run")] == [24, 18, 12, 6]
    assert abandoned(tmp_path / "pieces" / "run") == ()
