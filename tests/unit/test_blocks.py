"""Leases of blocks, with a clock in the test's hand."""

import numpy as np
import pytest

from services.blocks import BlockTable
from shared.errors import ConfigError
from shared.leases import Lease
from tests.raising import refuses

NO_LEASE = 0  # ids begin with 1


def lease(table: BlockTable, version: int = 1, *, scorer: str = "a", now: float = 0.0) -> Lease | None:
    return table.lease(scorer, version, now, 10.0)


def test_blocks_cover_every_id_once_in_random_order():
    table = BlockTable(103, 10)
    blocks = [table.ids(block) for block in range(len(table))]

    assert [len(block) for block in blocks] == [10] * 10 + [3]
    assert list(range(103)) == sorted(np.concatenate(blocks).tolist())
    assert list(range(103)) != np.concatenate(blocks).tolist()


def test_a_block_of_a_folder_sorted_by_class_has_all_classes():
    label_N = np.repeat(np.arange(4), 100)
    table = BlockTable(400, 50)

    assert all(len(np.unique(label_N[table.ids(block)])) == 4 for block in range(len(table)))


def test_the_permutation_depends_on_the_seed_alone():
    """A restarted controller must find the same blocks."""
    first, again, other = (BlockTable(64, 64, seed).ids(0).tolist() for seed in (5, 5, 6))

    assert first == again
    assert first != other


def test_leases_are_exclusive_and_carry_their_ids():
    table = BlockTable(30, 10)
    leases = [lease(table, scorer=scorer) for scorer in "abc"]

    assert [held.block for held in leases] == [0, 1, 2]
    assert len({held.lease_id for held in leases}) == 3
    assert all(table.ids(held.block).tolist() == held.sample_ids.tolist() for held in leases)
    assert lease(table, scorer="d") is None
    assert table.leased == 3


def test_the_block_scored_longest_ago_comes_first():
    table = BlockTable(30, 10)
    table.committed([(NO_LEASE, 0, 3), (NO_LEASE, 1, 1), (NO_LEASE, 2, 2)])

    assert [lease(table, 9).block for _ in range(3)] == [1, 2, 0]


@pytest.mark.parametrize(("version", "leased"), [(2, False), (3, False), (4, True)])
def test_no_lease_for_blocks_that_are_new_enough(version, leased):
    table = BlockTable(10, 10)
    table.committed([(NO_LEASE, 0, 3)])

    assert leased == (lease(table, version) is not None)


def test_a_committed_lease_is_done_and_its_block_as_new_as_its_rows():
    table = BlockTable(20, 10)
    done = lease(table, 7)
    table.submitted(done.lease_id, done.block, "a")
    table.committed([(done.lease_id, done.block, 7)])

    assert table.leased == 0
    assert table.oldest_version == 0
    assert lease(table, 7).block == 1
    assert lease(table, 7) is None
    table.committed([(NO_LEASE, 1, 6)])
    assert table.oldest_version == 6


def test_a_block_never_gets_older():
    table = BlockTable(10, 10)
    table.committed([(NO_LEASE, 0, 5)])
    table.committed([(NO_LEASE, 0, 4)])

    assert table.oldest_version == 5


def test_an_expired_lease_is_counted_and_its_block_free_again():
    table = BlockTable(10, 10)
    late = lease(table, now=0.0)

    assert lease(table, scorer="b", now=10.0) is None
    again = lease(table, scorer="b", now=10.1)
    assert again.block == late.block
    assert again.lease_id != late.lease_id
    assert table.expired == 1
    table.submitted(late.lease_id, late.block, "a")
    assert table.leased == 1


def test_rows_that_are_in_have_no_deadline():
    table = BlockTable(10, 10)
    held = lease(table, now=0.0)
    table.submitted(held.lease_id, held.block, "a")

    assert lease(table, now=1e9) is None
    assert table.expired == 0


def test_late_rows_of_a_free_block_keep_it_from_being_leased_until_their_commit():
    """The lease expired, or an earlier life of the controller gave it."""
    table = BlockTable(10, 10)
    table.submitted(NO_LEASE, 0, "a")
    assert lease(table, now=0.0) is None
    table.committed([(NO_LEASE, 0, 1)])

    assert table.oldest_version == 1
    assert table.leased == 0


def test_the_block_of_rows_is_known_by_their_samples():
    table = BlockTable(25, 10, seed=3)

    for block in range(3):
        assert table.block_of(table.ids(block)[::-1].copy()) == block
    assert table.block_of(table.ids(0)[:-1]) is None
    assert table.block_of(np.append(table.ids(0)[:-1], table.ids(1)[0])) is None
    assert table.block_of(np.zeros(0, dtype=np.int64)) is None
    assert table.block_of(np.array([25])) is None
    assert table.block_of(np.array([-1])) is None


def test_lease_ids_of_two_lives_do_not_meet():
    assert lease(BlockTable(10, 10), now=0.0).lease_id != lease(BlockTable(10, 10), now=0.0).lease_id


def test_release_hands_back_what_has_no_rows_yet():
    table = BlockTable(40, 10)
    submitted = lease(table, scorer="a")
    lease(table, scorer="a")
    lease(table, scorer="b")
    table.submitted(submitted.lease_id, submitted.block, "a")

    assert table.release("a") == 1
    assert table.leased == 2
    assert table.release("a") == 0
    assert [lease(table, scorer="c").block for _ in range(2)] == [1, 3]


def test_restore_takes_a_block_for_as_old_as_its_oldest_sample():
    table = BlockTable(40, 10)
    version_N = np.full(40, 9)
    version_N[table.ids(1)[3]] = 5
    version_N[table.ids(2)[0]] = -1
    version_N[table.ids(3)] = 8
    table.restore(version_N)

    assert table.oldest_version == 0
    assert [lease(table, 10).block for _ in range(4)] == [2, 1, 3, 0]
    assert lease(BlockTable(40, 10), 0) is None


@pytest.mark.parametrize(
    ("samples", "size", "key", "value"),
    [(0, 10, "num_samples", 0), (10, 0, "block_size", 0), (-1, 1, "num_samples", -1)],
)
def test_sizes_below_one_are_refused(samples, size, key, value):
    with refuses(ConfigError, key, value):
        BlockTable(samples, size)
