import pytest
import torch
from torch import Tensor

from shared.errors import ConfigError
from tests.raising import refuses
from trainer.augment import AUGMENTATIONS, augment


def numbered(*shape: int) -> Tensor:
    """Pixels that differ from each other and from the zeros of the padding."""
    return torch.arange(1, torch.Size(shape).numel() + 1).reshape(shape).float()


def flipped(image_CHW: Tensor) -> Tensor:
    out = torch.empty_like(image_CHW)
    width = image_CHW.shape[2]
    for column in range(width):
        out[:, :, column] = image_CHW[:, :, width - 1 - column]
    return out


def shifted(image_CHW: Tensor, down: int, right: int) -> Tensor:
    """out[y, x] = image[y + down, x + right], 0 outside."""
    _, height, width = image_CHW.shape
    rows = [y for y in range(height) if 0 <= y + down < height]
    out = torch.zeros_like(image_CHW)
    for x in range(width):
        if 0 <= x + right < width:
            out[:, rows, x] = image_CHW[:, [y + down for y in rows], x + right]
    return out


def as_shift(out_CHW: Tensor, image_CHW: Tensor, padding: int) -> list[tuple[int, int]]:
    """The shifts of at most `padding` that make `out_CHW` of `image_CHW`: one, if it is a crop."""
    steps = range(-padding, padding + 1)
    return [(down, right) for down in steps for right in steps if torch.equal(out_CHW, shifted(image_CHW, down, right))]


def test_none_changes_nothing() -> None:
    x = numbered(3, 1, 8, 8)

    assert torch.equal(augment(x, "none"), x)


def test_flip_turns_half_of_the_samples_around_and_leaves_the_others() -> None:
    x = numbered(400, 2, 3, 5)
    out = augment(x, "flip", torch.Generator().manual_seed(0))
    turned = [torch.equal(after, flipped(before)) for after, before in zip(out, x, strict=True)]
    same = [torch.equal(after, before) for after, before in zip(out, x, strict=True)]

    assert [a != b for a, b in zip(turned, same, strict=True)] == [True] * 400
    assert 160 < sum(turned) < 240  # 4 standard deviations


@pytest.mark.parametrize(("height", "width", "padding"), [(8, 8, 2), (7, 12, 2), (31, 40, 2), (32, 32, 4)], ids=str)
def test_crop_shifts_each_sample_for_itself_over_zeros(height: int, width: int, padding: int) -> None:
    x = numbered(6, 2, height, width)
    out = augment(x, "crop", torch.Generator().manual_seed(1))
    shifts = [as_shift(after, before, padding) for after, before in zip(out, x, strict=True)]

    assert [len(found) for found in shifts] == [1] * 6
    assert len({found[0] for found in shifts}) > 2
    assert max(abs(step) for [shift] in shifts for step in shift) > padding - 2


@pytest.mark.parametrize(("size", "padding"), [(8, 2), (32, 4)])
def test_crop_takes_every_offset_as_often_in_both_directions(size: int, padding: int) -> None:
    """Where the only bright pixel goes, in the middle of each image."""
    middle = size // 2
    x = torch.zeros(5000, 1, size, size)
    x[:, 0, middle, middle] = 1
    out = augment(x, "crop", torch.Generator().manual_seed(2))
    hits = out.sum(dim=0)[0]
    reached = range(middle - padding, middle + padding + 1)
    expected = 5000 / len(reached) ** 2

    assert hits.sum() == 5000
    assert (hits > 0).nonzero().tolist() == [[row, column] for row in reached for column in reached]
    assert (hits[hits > 0] - expected).abs().max() < 4.5 * expected**0.5


def test_crop_flip_is_a_crop_that_is_flipped_or_not() -> None:
    x = numbered(40, 1, 6, 6)
    out = augment(x, "crop_flip", torch.Generator().manual_seed(3))
    plain = [bool(as_shift(after, before, 2)) for after, before in zip(out, x, strict=True)]
    turned = [bool(as_shift(flipped(after), before, 2)) for after, before in zip(out, x, strict=True)]

    assert [a != b for a, b in zip(plain, turned, strict=True)] == [True] * 40
    assert 7 < sum(turned) < 33
    assert not torch.equal(out[plain], x[plain])


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_input_type_and_layout_are_kept(kind: str) -> None:
    x = numbered(8, 3, 6, 6).double()
    before = x.clone()
    out = augment(x, kind)

    assert torch.equal(x, before)
    assert (out.dtype, out.shape, out.is_contiguous()) == (x.dtype, x.shape, True)


@pytest.mark.parametrize("kind", sorted(set(AUGMENTATIONS) - {"none"}))
def test_saved_random_state_replays_it(kind: str) -> None:
    x = numbered(64, 1, 8, 8)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        state = torch.get_rng_state()
        once, other = augment(x, kind), augment(x, kind)
        torch.set_rng_state(state)
        again = augment(x, kind)

    assert torch.equal(once, again)
    assert not torch.equal(once, other)


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_generator_leaves_the_global_random_state_alone(kind: str) -> None:
    state = torch.get_rng_state()
    first, second = (augment(numbered(64, 1, 8, 8), kind, torch.Generator().manual_seed(5)) for _ in range(2))

    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_unknown_name_lists_the_known() -> None:
    with refuses(ConfigError, "kind", "'mixup'") as caught:
        augment(numbered(1, 1, 8, 8), "mixup")
    assert all(name in caught.value.fix for name in AUGMENTATIONS)
