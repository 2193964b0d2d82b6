import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shared.config import DataConfig
from shared.datasets import Dataset, load_dataset
from shared.errors import ConfigError, DataError, DatasetMissing
from shared.image_folder import ImageFiles
from tests.raising import refuses

RED, GREEN, BLUE = (200, 0, 0), (0, 100, 0), (0, 0, 50)


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


def plain(colour: tuple[int, int, int], height: int = 8, width: int = 8) -> np.ndarray:
    return np.broadcast_to(np.array(colour), (height, width, 3))


def config(root: Path, **settings: object) -> DataConfig:
    return DataConfig(name="image_folder", root=str(root), **({"image_size": 8} | settings))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """20 images of class a and b each, told apart by their red value, and 2 of c."""
    for i in range(20):
        write(tmp_path / "train" / "a" / f"{i}.png", plain((i, 0, 0)))
        write(tmp_path / "train" / "b" / "deeper" / f"{i}.png", plain((100 + i, 0, 0)))
    for i in range(2):
        write(tmp_path / "train" / "c" / f"{i}.png", plain((200 + i, 0, 0)))
    write(tmp_path / "test" / "b" / "0.png", plain(GREEN))
    write(tmp_path / "test" / "c" / "0.png", plain(BLUE))
    return tmp_path


def test_images_labels_and_keys_belong_together(root: Path) -> None:
    train = load_dataset(config(root)).train
    red_N = (train.batch(np.arange(42))[0][:, 0, 0, 0] * 255).round().long().tolist()

    folders = {0: "train/a/", 1: "train/b/deeper/", 2: "train/c/"}
    assert train.key_N.tolist() == [f"{folders[red // 100]}{red % 100}.png" for red in red_N]
    assert train.label_N.tolist() == [red // 100 for red in red_N]
    assert len(set(red_N)) == 42
    assert (train.num_classes, train.channels) == (3, 3)


def test_order_is_fixed_and_not_by_class(root: Path) -> None:
    first, again = load_dataset(config(root)).train, load_dataset(config(root)).train

    assert first.key_N.tolist() == again.key_N.tolist()
    assert set(first.label_N[:10]) >= {0, 1}
    assert set(first.label_N[-10:]) >= {0, 1}


def test_batch_is_decoded_in_the_order_asked(root: Path) -> None:
    train = load_dataset(config(root)).train
    everything, label_N = train.batch(np.arange(42))
    x, y = train.batch([41, 3, 41])

    assert torch.equal(x, everything[[41, 3, 41]])
    assert y.tolist() == label_N[[41, 3, 41]].tolist()
    assert (x.dtype, y.dtype, x.is_contiguous()) == (torch.float32, torch.int64, True)


def test_labels_of_the_test_split_are_those_of_the_training_classes(root: Path) -> None:
    """test/ has no class a: its first folder is b all the same."""
    test = load_dataset(config(root)).test
    x, y = test.batch([0, 1])

    assert dict(zip(test.key_N, y.tolist(), strict=True)) == {
        "test/b/0.png": 1,
        "test/c/0.png": 2,
    }
    assert {tuple((image[:, 0, 0] * 255).tolist()) for image in x} == {GREEN, BLUE}


def test_val_stands_for_test(root: Path) -> None:
    (root / "test").rename(root / "val")

    assert sorted(load_dataset(config(root)).test.key_N) == ["val/b/0.png", "val/c/0.png"]


@pytest.mark.parametrize("transposed", [False, True], ids=["wide", "tall"])
@pytest.mark.parametrize("scale", [1, 2, 3])
def test_shorter_side_is_brought_to_size_and_the_centre_kept(tmp_path: Path, transposed: bool, scale: int) -> None:
    """The whole image, resized, has 16 columns; the 8 in the middle are kept."""
    noise = np.random.default_rng(0).integers(0, 256, (8 * scale, 16 * scale, 3), dtype=np.uint8)
    expected_HWC = np.asarray(Image.fromarray(noise).resize((16, 8), Image.Resampling.BILINEAR))[:, 4:12]
    for part in ("train", "test"):
        write(tmp_path / part / "a" / "0.png", noise.transpose(1, 0, 2) if transposed else noise)
    [x], _ = load_dataset(config(tmp_path)).train.batch([0])
    got_HWC = (x.permute(2, 1, 0) if transposed else x.permute(1, 2, 0)) * 255

    np.testing.assert_allclose(got_HWC, expected_HWC, atol=1 + 1e-4)  # the two directions may round the other way


def test_halved_image_is_smoothed_not_thinned_out(tmp_path: Path) -> None:
    """A checkerboard of single pixels becomes grey; taking every other pixel would make it black or white."""
    checkerboard = np.indices((32, 32)).sum(axis=0)[:, :, None] % 2 * np.full(3, 200)
    for part in ("train", "test"):
        write(tmp_path / part / "a" / "0.png", checkerboard)
    x, _ = load_dataset(config(tmp_path)).train.batch([0])

    torch.testing.assert_close(x * 255, torch.full_like(x, 100), atol=2, rtol=0)


def test_default_size_is_64(root: Path) -> None:
    assert load_dataset(config(root, image_size=None)).train.batch([0])[0].shape == (1, 3, 64, 64)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_image_of_another_mode_becomes_rgb(root: Path, mode: str) -> None:
    path = root / "test" / "b" / ("1.jpg" if mode == "CMYK" else "1.png")
    Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode).save(path)
    test = load_dataset(config(root)).test
    [x], _ = test.batch(np.flatnonzero(test.key_N == f"test/b/{path.name}"))

    assert x.min() > 0.98


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"no image", "cannot identify image file"), (None, "No such file")],
    ids=["not an image", "removed"],
)
def test_broken_file_is_named_and_spoils_no_other_sample(root: Path, content: bytes | None, reason: str) -> None:
    train = load_dataset(config(root)).train
    path = root / "train" / "c" / "0.png"
    path.unlink() if content is None else path.write_bytes(content)
    [broken] = np.flatnonzero(train.key_N == "train/c/0.png")
    others = np.setdiff1d(np.arange(42), broken)

    assert len(train.batch(others)[0]) == 41
    with refuses(DataError, str(path), reason):
        train.batch(np.arange(42))


@pytest.mark.parametrize("kept", [10, 40, -1])
def test_truncated_file_is_named(root: Path, kept: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3))
    path = root / "train" / "c" / "0.png"
    write(path, noise)
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2 if kept < 0 else kept])
    train = load_dataset(config(root)).train

    with refuses(DataError, str(path)):
        train.batch(np.arange(42))


def test_deeper_image_is_refused_instead_of_cut_off(root: Path) -> None:
    path = root / "train" / "c" / "0.png"
    Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save(path)

    with refuses(DataError, str(path), "I;16"):
        load_dataset(config(root)).train.batch(np.arange(42))


def relabelled(dataset: Dataset) -> Dataset:
    return dataclasses.replace(dataset, train=dataset.train.relabelled((dataset.train.label_N + 1) % 3))


def test_fingerprint_sees_paths_sizes_labels_order_and_image_size(root: Path) -> None:
    dataset = load_dataset(config(root))
    same = load_dataset(config(root)).fingerprint
    prints = [
        dataset.fingerprint,
        relabelled(dataset).fingerprint,
        load_dataset(config(root, image_size=9)).fingerprint,
        load_dataset(config(root, subset=41)).fingerprint,
        dataclasses.replace(dataset, train=dataset.train.select(np.arange(42)[::-1])).fingerprint,
    ]
    path = root / "train" / "c" / "0.png"
    path.write_bytes(path.read_bytes() + b"\0")
    prints.append(dataset.fingerprint)
    path.rename(path.with_name("z.png"))
    prints.append(load_dataset(config(root)).fingerprint)

    assert same == prints[0]
    assert len(set(prints)) == 7
    with refuses(DataError, str(path), "No such file"):
        _ = dataset.fingerprint


def test_fingerprint_is_the_same_in_another_place(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    before = load_dataset(config(root)).fingerprint
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "images"
    root.rename(elsewhere)

    assert load_dataset(config(elsewhere)).fingerprint == before


def test_pixel_statistics_are_of_the_first_images(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load_dataset(config(root))
    x, _ = dataset.train.batch(np.arange(42))

    assert ImageFiles.statistics_over == 1000
    for count in (1000, 10):
        monkeypatch.setattr(ImageFiles, "statistics_over", count)
        mean, std = dataset.pixel_statistics()
        assert mean == pytest.approx(x[:count].double().mean(dim=(0, 2, 3)).tolist(), abs=1e-7)
        assert std == pytest.approx(x[:count].double().std(dim=(0, 2, 3), correction=0).tolist(), abs=1e-7)


def test_noise_and_validation_work_as_for_images_in_memory(root: Path) -> None:
    clean = load_dataset(config(root))
    noisy = load_dataset(config(root, validation=10, subset=20, label_noise=0.5))

    assert noisy.test.key_N.tolist() == clean.train.key_N[-10:].tolist()
    assert noisy.train.key_N.tolist() == clean.train.key_N[:20].tolist()
    assert (noisy.train.label_N != clean.train.label_N[:20]).sum() == 10
    np.testing.assert_array_equal(noisy.test.clean_label_N, clean.train.label_N[-10:])
    assert noisy.train.batch([4])[1].tolist() == [noisy.train.label_N[4]]


def test_folder_that_is_not_set_is_asked_for() -> None:
    with refuses(ConfigError, "data.root", "image_folder"):
        load_dataset(DataConfig(name="image_folder"))


@pytest.mark.parametrize("part", ["train", "test"])
def test_missing_folder_is_named(root: Path, part: str) -> None:
    (root / part).rename(root / "other")

    with refuses(DatasetMissing, "data.root", root / part):
        load_dataset(config(root))


def test_class_without_images_or_unknown_in_training_is_named(root: Path) -> None:
    (root / "test" / "d").mkdir()
    with refuses(DataError, str(root / "test"), "classes d"):
        load_dataset(config(root))
    write(root / "test" / "d" / "0.png", plain(RED))
    with refuses(DataError, str(root / "test"), "['d']"):
        load_dataset(config(root))


def test_noise_needs_two_classes(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write(tmp_path / part / "a" / "0.png", plain(RED))

    with refuses(DataError, "data.label_noise", 0.5):
        load_dataset(config(tmp_path, label_noise=0.5))
