import numpy as np
import pytest
import torch

from shared.config import ModelConfig, make_config
from shared.datasets import Dataset
from shared.errors import ConfigError
from shared.models import Normalize, build_model
from shared.samples import Images
from tests.raising import refuses

NAMES = ["small_cnn", "tiny_cnn", "resnet18"]


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    rng = np.random.default_rng(3)
    pixels = (rng.integers(0, 17, (20, 2, 8, 8)) // np.array([1, 4])[None, :, None, None]).astype(np.uint8)
    images = Images(pixels, rng.integers(0, 5, 20), white=16, num_classes=5)
    return Dataset("random", images, images)


def test_normalize_by_hand() -> None:
    x = torch.tensor([[[[0.0, 1.0]], [[0.5, 0.5]]]])
    out = Normalize([0.5, 0.5], [0.25, 0.0])(x)

    assert out[0, 0].tolist() == [[-2.0, 2.0]]
    assert out[0, 1].tolist() == [[0.0, 0.0]]  # a channel of one colour is not 0/0


@pytest.mark.parametrize("name", NAMES)
def test_takes_pixels_and_normalises_inside(dataset: Dataset, name: str) -> None:
    """What the network's own layers see has mean 0 and deviation 1; the two statistics travel with the weights."""
    seen: list[torch.Tensor] = []
    model = build_model(ModelConfig(name=name), dataset).eval()
    first = next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
    first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        logits = model(dataset.train.batch(np.arange(20))[0])

    std, mean = torch.std_mean(seen[0], dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(mean, torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(std, torch.ones(2), atol=1e-5, rtol=0)
    assert logits.shape == (20, 5)
    assert {tuple(value.flatten().tolist()) for value in model.state_dict().values()} >= {
        tuple(np.float32(values).tolist()) for values in dataset.pixel_statistics()
    }


@pytest.mark.parametrize("name", NAMES)
def test_eval_is_deterministic_and_of_each_image_alone(dataset: Dataset, name: str) -> None:
    model = build_model(ModelConfig(name=name), dataset).eval()
    x, _ = dataset.train.batch(np.arange(4))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        once, again, reversed_ = model(x), model(x), model(x.flip(0)).flip(0)

    assert torch.equal(once, again)
    torch.testing.assert_close(once, reversed_)
    assert not torch.allclose(once[0], once[1])
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_same_seed_same_network(dataset: Dataset) -> None:
    def weights(seed: int) -> torch.Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return torch.nn.utils.parameters_to_vector(build_model(ModelConfig(), dataset).parameters())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize(("width", "channels"), [(None, 32), (3, 3)])
def test_small_cnn_width_is_that_of_its_first_layer(dataset: Dataset, width: int | None, channels: int) -> None:
    model = build_model(ModelConfig(width=width), dataset)
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]

    assert [c.out_channels for c in convolutions] == [channels, 2 * channels, 2 * channels]


@pytest.mark.parametrize(("width", "channels"), [(None, 16), (3, 3)])
def test_tiny_cnn_works_on_a_half_and_a_quarter_of_the_side(dataset: Dataset, width: int | None, channels: int) -> None:
    model = build_model(ModelConfig(name="tiny_cnn", width=width), dataset).eval()
    seen: list[tuple[int, ...]] = []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda _, inputs, outputs: seen.append(tuple(outputs.shape)))
    model(torch.zeros(1, 2, 28, 28))

    assert seen == [(1, channels, 28, 28), (1, 2 * channels, 14, 14), (1, 2 * channels, 7, 7)]


def test_resnet18_has_one_width_and_a_stem_that_keeps_small_images_whole(dataset: Dataset) -> None:
    with refuses(ConfigError, "model.width", 32):
        make_config(ModelConfig, {"name": "resnet18", "width": 32})
    resnet = build_model(ModelConfig(name="resnet18", width=64), dataset)[1]
    seen: list[torch.Tensor] = []
    resnet.layer1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    resnet.eval()(torch.zeros(1, 2, 8, 8))

    assert seen[0].shape == (1, 64, 8, 8)
