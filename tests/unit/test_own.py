"""The user's own network and data: found, loaded, told apart, and refused with what is wrong."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from deploy.config import RunConfig
from deploy.first_batch import check_first_batch
from shared.config import make_config
from shared.datasets import load_dataset
from shared.errors import ConfigError, DataError, SteppeError
from shared.models import build_model, logits
from shared.own import CODE_VARIABLE, find
from tests.raising import refuses

N = 12
MODULE = __name__


class Points(Dataset[Any]):
    """Points of 2 x 3 in [0, 1]; those that are drawn are moved a little."""

    def __init__(self, role: str = "score", count: int = N, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.rand(count, 2, 3, generator=generator) * scale
        self.targets = [i % 3 for i in range(count)]
        self.role, self.loaded = role, 0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        self.loaded += 1
        return self.x[i] * (0.5 if self.role == "train" else 1.0), self.targets[i]


class Dictionaries(Points):
    """No `targets`, but keys, classes and a fingerprint."""

    def __init__(self, role: str = "score") -> None:
        super().__init__(role)
        self.labels = self.targets
        self.targets = []
        self.keys, self.classes, self.fingerprint = [f"p{i}" for i in range(N)], ["a", "b", "c", "d"], "points 1"

    def __getitem__(self, i: int) -> Any:
        return {"x": self.x[i], "y": self.labels[i]}


def points(role: str, count: int = N, scale: float = 1.0) -> Points:
    return Points(role, count, scale)


def dictionaries(role: str) -> Dictionaries:
    return Dictionaries(role)


def to_xy(batch: Any) -> Any:
    return batch["x"], batch["y"]


def fails(role: str) -> Points:
    raise OSError("no disk")


def uneven(role: str) -> Points:
    return Points(role, N if role == "score" else N - 1)


def a_list(role: str) -> Any:
    return iter([])


class Restless(Points):
    """Augments what is scored."""

    def __getitem__(self, i: int) -> Any:
        return torch.rand(2, 3), self.targets[i]


class Misshaped(Points):
    def __getitem__(self, i: int) -> Any:
        return (torch.rand(2, 2), self.targets[i]) if self.role == "train" else super().__getitem__(i)


class Broken(Points):
    def __getitem__(self, i: int) -> Any:
        if i == 7:
            raise ValueError("torn file")
        return super().__getitem__(i)


class Whole(Points):
    def __getitem__(self, i: int) -> Any:
        return (self.x[i] * 255).to(torch.uint8), self.targets[i]


class Output:
    def __init__(self, logits_BK: Tensor) -> None:
        self.logits = logits_BK


class Net(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Output:
        return Output(self.linear(x.flatten(1)))


class Infinite(Net):
    def forward(self, x: Tensor) -> Output:
        return Output(self.linear(x.flatten(1)) * torch.inf)


def config_of(data: str = "points", model: str = "Net", **settings: Any) -> RunConfig:
    values = {"data": {"name": f"{MODULE}:{data}"}, "model": {"name": f"{MODULE}:{model}"}}
    return make_config(RunConfig, values, [f"{key}={value}" for key, value in settings.items()])


def test_a_name_alone_stands_for_its_section() -> None:
    config = make_config(RunConfig, {"model": "mypkg.nets:build", "data": "digits"})

    assert (config.model.name, config.model.is_own) == ("mypkg.nets:build", True)
    assert (config.data.name, config.data.is_own) == ("digits", False)
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


def test_what_is_scored_is_not_what_is_drawn() -> None:
    dataset = load_dataset(config_of().data)
    x_B, y_B = dataset.train.batch([3, 1])
    drawn_B, _ = dataset.train.for_training().batch([3, 1])

    assert torch.equal(x_B, Points().x[[3, 1]])
    assert torch.equal(drawn_B, x_B * 0.5)
    assert y_B.tolist() == [0, 1]
    assert (len(dataset.train), len(dataset.test), dataset.train.num_classes) == (N, 0, 3)


def test_targets_spare_a_pass_and_wrong_ones_are_not_believed() -> None:
    items = Points(count=500)
    items.targets = [i % 3 for i in range(500)]
    known = sys.modules[MODULE]
    known.items = lambda role: items  # type: ignore[attr-defined]
    assert load_dataset(config_of("items").data).train.label_N.tolist() == items.targets
    assert items.loaded == 64

    class Shifted(Points):
        def __getitem__(self, i: int) -> Any:
            x, y = super().__getitem__(i)
            return x, (y + 1) % 3

    known.items = lambda role: Shifted(count=500)  # type: ignore[attr-defined]
    assert load_dataset(config_of("items").data).train.label_N.tolist() == [(i + 1) % 3 for i in range(500)]
    del known.items  # type: ignore[attr-defined]


def test_dictionaries_go_through_the_adapter_and_keys_classes_and_fingerprint_count() -> None:
    config = config_of("dictionaries", "Net", **{"data.adapter": f"{MODULE}:to_xy"})
    dataset = load_dataset(config.data)

    assert dataset.train.label_N.tolist() == [i % 3 for i in range(N)]
    assert dataset.train.key_N.tolist() == [f"p{i}" for i in range(N)]
    assert dataset.train.num_classes == 4
    assert b"points 1" in b"".join(dataset.train.content())


def test_the_fingerprint_tells_data_apart() -> None:
    one, again = (load_dataset(config_of().data).fingerprint for _ in range(2))
    scaled = load_dataset(config_of(**{"data.args.scale": 0.5}).data).fingerprint
    fewer = load_dataset(config_of(**{"data.subset": 10}).data).fingerprint

    assert one == again
    assert len({one, scaled, fewer}) == 3


def test_splits_and_label_noise_are_as_with_any_data() -> None:
    settings = {"data.validation": 4, "data.label_noise": 0.5, "data.args.count": 20}
    dataset = load_dataset(config_of(**settings).data)

    assert (len(dataset.train), len(dataset.test)) == (16, 4)
    assert dataset.train.clean_label_N is not None
    assert (dataset.train.label_N != dataset.train.clean_label_N).sum() == 8
    assert torch.equal(dataset.train.for_training().batch([15])[0], Points("train", 20).x[15:16] * 0.5)
    held_out = load_dataset(config_of(**{"data.test": f"{MODULE}:points"}).data)
    assert (len(held_out.train), len(held_out.test)) == (N, N)


def test_own_networks_are_built_with_their_arguments_and_may_give_an_output_object() -> None:
    config = config_of(**{"model.args.classes": 5})
    dataset = load_dataset(config.data)

    assert logits(build_model(config.model, dataset)(torch.zeros(2, 6))).shape == (2, 5)
    check_first_batch(config, dataset)


@pytest.mark.parametrize(
    ("settings", "kind", "key", "value"),
    [
        ({"data.name": "nowhere.data:f"}, ConfigError, "data.name", "module nowhere"),
        ({"data.name": f"{MODULE}:nothing"}, ConfigError, "data.name", "nothing"),
        ({"data.name": f"{MODULE}:fails"}, ConfigError, "data.name", "fails('score') raised OSError: no disk"),
        ({"data.name": f"{MODULE}:uneven"}, ConfigError, "data.name", "11 in the role train"),
        ({"data.name": f"{MODULE}:a_list"}, ConfigError, "data.name", "list_iterator"),
        ({"data.name": f"{MODULE}:dictionaries"}, DataError, "data.adapter", "x, y"),
        ({"data.name": f"{MODULE}:Whole"}, DataError, "data.name", "torch.uint8"),
        ({"data.name": f"{MODULE}:Broken"}, DataError, "0", "ValueError: torn file"),
        ({"data.name": f"{MODULE}:Restless"}, ConfigError, "data.name", "others each time"),
        ({"data.name": f"{MODULE}:Misshaped"}, ConfigError, "data.name", "(2, 2) in the role train"),
        ({"data.args.scale": 3}, DataError, "scoring.attack.clamp", "[0.0, 1.0]"),
        ({"data.args.scale": "nan"}, DataError, "data.name", "[nan, nan]"),
        ({"model.name": f"{MODULE}:points", "model.args.role": "x"}, ConfigError, "model.name", "Points"),
        ({"model.name": f"{MODULE}:Infinite"}, ConfigError, "model.name", "not finite"),
        ({"model.args.classes": 2}, DataError, "model.name", "label 2"),
        ({"model.args.width": 2}, ConfigError, "model.name", "Net(width=2) raised TypeError"),
        ({"model.name": "small_cnn", "model.args": "{}"}, ConfigError, "model.name", "(2, 3)"),
    ],
)
def test_mistakes_are_told(settings: dict[str, Any], kind: type[SteppeError], key: str, value: str) -> None:
    def check() -> None:
        config = config_of(**settings)
        check_first_batch(config, load_dataset(config.data))

    with refuses(kind, key, value) as raised:
        check()

    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "key", "value"),
    [
        (["data.name=nets"], "data.name", "'nets'"),
        (["model.name=a.b"], "model.name", "'a.b'"),
        (["data.root=/x"], "data.root", "'/x'"),
        (["data.adapter=to_xy"], "data.adapter", "'to_xy'"),
        (["model.width=3"], "model.width", 3),
        (["data.name=digits", "data.args.x=1"], "data.args", {"x": 1}),
        (["data.name=digits", "data.test=a:b"], "data.test", "'a:b'"),
        (["scoring.attack.clamp=[1, 0]"], "scoring.attack.clamp", [1, 0]),
    ],
)
def test_settings_that_do_not_go_together_are_told(settings: list[str], key: str, value: object) -> None:
    with refuses(ConfigError, key, value):
        make_config(RunConfig, {"data": "mypkg:f", "model": "mypkg:g"}, settings)


def test_inputs_of_any_range_with_clamp_none() -> None:
    config = config_of(**{"data.args.scale": 3, "scoring.attack.clamp": "none"})
    check_first_batch(config, load_dataset(config.data))
    ids = {config_of(**{"scoring.attack.clamp": clamp}).scoring.scoring_id for clamp in ("none", "[0, 1]", "[0, 2]")}

    assert len(ids) == 3
    assert config_of().scoring.scoring_id in ids


@pytest.fixture
def module_of(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "steppe_test_nets.py").write_text("def build():\n    return 3\n")
    before = list(sys.path)
    yield "steppe_test_nets"
    sys.path[:] = before
    sys.modules.pop("steppe_test_nets", None)
    importlib.invalidate_caches()


def test_modules_are_found_where_steppe_was_started(
    module_of: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scorers start elsewhere, and are told where by the environment; the folder comes last, whatever it holds."""
    (tmp_path / "trainer.py").write_text("raise SystemExit\n")
    monkeypatch.setenv(CODE_VARIABLE, str(tmp_path))

    assert find("model.name", f"{module_of}:build")() == 3
    assert sys.path[-1] == str(tmp_path)


def test_pixels_are_shown_of_images_alone() -> None:
    with pytest.raises(DataError) as caught:
        load_dataset(config_of().data).train.pixels([0])
    assert caught.value.key == "data.name"
    assert "(2, 3)" in caught.value.problem

    class Image(Points):
        def __getitem__(self, i: int) -> Any:
            return torch.full((3, 4, 4), i / N), self.targets[i]

    known = sys.modules[MODULE]
    known.images = lambda role: Image()  # type: ignore[attr-defined]
    pixels = load_dataset(config_of("images").data).train.pixels([6])
    assert pixels.shape == (1, 3, 4, 4)
    assert np.unique(pixels).tolist() == [128]
    del known.images  # type: ignore[attr-defined]


def test_torchvisions_image_folder_is_a_data_set_as_it_is(tmp_path: Path) -> None:
    """Its classes and the paths of its files are known; nothing but 64 images is looked at for the labels."""
    from PIL import Image
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import ToTensor

    for i in range(6):
        path = tmp_path / "cb"[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(path)
    known = sys.modules[MODULE]
    known.folder = lambda role: ImageFolder(str(tmp_path), ToTensor())  # type: ignore[attr-defined]
    train = load_dataset(config_of("folder").data).train

    assert train.key_N.tolist() == ["b/1.png", "b/3.png", "b/5.png", "c/0.png", "c/2.png", "c/4.png"]
    assert train.label_N.tolist() == [0, 0, 0, 1, 1, 1]
    assert (train.num_classes, train.channels) == (2, 3)
    del known.folder  # type: ignore[attr-defined]
