"""The user's own network and data, by import path: "module:function" in a configuration.

The module is an installed one, or lies in the folder that steppe was started in, which a cluster job takes along.
Trainer, scorers and services import it each for itself, so a function must give the same wherever it is called: the
same samples in the same order, and a network of the same shape.
"""

import dataclasses
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from shared.config import DataConfig, ModelConfig
from shared.errors import ConfigError, DataError
from shared.samples import Keys, Labels, Pixels, Samples, keys

if TYPE_CHECKING:
    import torch
    from torch import nn

CODE_VARIABLE = "STEPPE_CODE"  # tells processes that start elsewhere where steppe was started
LOOK_AT = 1000  # samples whose content is a part of the fingerprint
LABEL_CHUNK = 256


def find(key: str, path: str) -> Any:
    """What `path`, the setting `key`, names. Raises ConfigError when it cannot be imported, saying why."""
    module_name, _, name = path.partition(":")
    folder = os.environ.get(CODE_VARIABLE) or os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)  # last: it may hold a trainer.py
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"{key} is {path!r}, which needs {error.name}: {error}", fix="install it", key=key
            ) from error
        raise ConfigError(
            f"{key} is {path!r}, but there is no module {error.name}",
            fix=f"install it, or start steppe in the folder that holds it (here it was {folder})",
            key=key,
        ) from error
    except Exception as error:
        wrong = f"{key} is {path!r}, which cannot be imported: {_told(error)}"
        raise ConfigError(wrong, fix="correct that module", key=key) from error
    if (found := getattr(module, name, None)) is None:
        wrong = f"{key} is {path!r}, but {inspect.getfile(module)} has no {name}"
        raise ConfigError(wrong, fix="name a function that is there", key=key)
    return found


def own_model(config: ModelConfig) -> "nn.Module":
    """The user's network, built anew. Raises ConfigError when it cannot be."""
    from torch import nn

    model = _call("model.name", config.name, **config.args)
    if not isinstance(model, nn.Module):
        wrong = f"model.name is {config.name!r}, which returns {_kind(model)}"
        raise ConfigError(wrong, fix="let it return a torch Module", key="model.name")
    return model


def own_samples(config: DataConfig) -> "tuple[OwnSamples, OwnSamples]":
    """The user's training split and, perhaps without any samples, the one to evaluate on. Raises ConfigError."""
    adapter = find("data.adapter", config.adapter) if config.adapter else None
    scored, drawn = (_call("data.name", config.name, role, **config.args) for role in ("score", "train"))
    train = _samples("data.name", config.name, scored, drawn, adapter)
    if config.test is None:
        return train, train.select(np.empty(0, np.int64))
    test = _call("data.test", config.test, "test", **config.args)
    return train, _samples("data.test", config.test, test, test, adapter)


@dataclasses.dataclass(frozen=True)
class OwnSamples(Samples):
    """Samples of a map-style Dataset, loaded when they are asked for.

    `items` are as they are scored, `drawn_items` as they are trained on; sample i is item `index_N[i]` of either.
    """

    source: str
    items: Any
    drawn_items: Any
    adapter: Callable[[Any], Any] | None
    index_N: Labels
    label_N: Labels
    num_classes: int
    key_N: Keys
    clean_label_N: Labels | None = None
    white: int = 255
    per_sample: ClassVar[tuple[str, ...]] = ("index_N",)

    @property
    def channels(self) -> int:
        return int(self.batch([0])[0].shape[1])

    def for_training(self) -> Self:
        return dataclasses.replace(self, items=self.drawn_items)

    def batch(self, ids: npt.ArrayLike) -> "tuple[torch.Tensor, torch.Tensor]":
        """x_B... float32, as the Dataset and the adapter give it, and y_B int64 of `ids` (B,).

        Raises: DataError, naming the first sample, for what cannot be loaded.
        """
        import torch

        index = np.asarray(ids, dtype=np.int64)
        x_B, _ = load(self.items, self.index_N[index], self.adapter, self.source)
        return x_B, torch.from_numpy(self.label_N[index])

    def pixels(self, index: npt.ArrayLike) -> Pixels:
        """Inputs of one or three channels, in [0,1], as images. Raises DataError for any others."""
        x_BCHW = self.batch(index)[0].numpy()
        shape = x_BCHW.shape[1:]
        if len(shape) != 3 or shape[0] not in (1, 3) or not 0 <= x_BCHW.min() <= x_BCHW.max() <= 1:
            wrong = f"samples of {self.source} are {shape}, no images of 1 or 3 channels in [0, 1]"
            raise DataError(wrong, key="data.name")
        return np.round(x_BCHW * self.white).astype(np.uint8)

    def content(self) -> Iterator[bytes]:
        """The Dataset's own `fingerprint`, a text, where it has one; else up to 1,000 of its samples, and the keys."""
        yield f"{self.source} {len(self)} ".encode()
        if isinstance(own := getattr(self.items, "fingerprint", None), str):
            yield own.encode()
            yield self.index_N.tobytes()
            return
        yield "\n".join(self.key_N.tolist()).encode()
        looked_at = np.unique(np.linspace(0, len(self) - 1, min(len(self), LOOK_AT)).astype(np.int64))
        for start in range(0, len(looked_at), LABEL_CHUNK):
            x_B, _ = self.batch(looked_at[start : start + LABEL_CHUNK])
            yield x_B.numpy().tobytes()

    def pixel_statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation per channel over the first samples."""
        x_BCHW = self.batch(np.arange(min(len(self), LOOK_AT)))[0].double()
        if x_BCHW.dim() != 4:
            raise ConfigError(
                f"samples of {self.source} are {tuple(x_BCHW.shape[1:])}, which steppe's networks do not take",
                fix="set model.name to one of your own",
                key="model.name",
            )
        return x_BCHW.mean((0, 2, 3)).tolist(), x_BCHW.std((0, 2, 3), correction=0).tolist()


def load(
    items: Any, index: npt.NDArray[np.int64], adapter: Callable[[Any], Any] | None, source: str
) -> "tuple[torch.Tensor, torch.Tensor]":
    """x_B... float32 and y_B int64 of some items. Raises DataError, naming them, for what cannot be loaded."""
    import torch
    from torch.utils.data import default_collate

    wanted = index.tolist()
    which = f"{source}, items {wanted[0]}..{wanted[-1]}" if len(wanted) > 1 else f"{source}, item {wanted[0]}"
    key = "data.adapter" if adapter else "data.name"
    try:
        rows = items.__getitems__(wanted) if hasattr(items, "__getitems__") else [items[i] for i in wanted]
        batch = default_collate(rows)
        parts = adapter(batch) if adapter else batch
    except MemoryError:
        raise
    except Exception as error:  # it is the user's code
        fix = "correct the Dataset, or the adapter"
        raise DataError(f"{which}: {_told(error)}", fix=fix, key=str(wanted[0])) from error
    if isinstance(parts, dict):
        raise DataError(
            f"{which}: a batch is a dictionary of {', '.join(map(str, parts))}",
            fix="set data.adapter to a function that makes (x, y) of it",
            key="data.adapter",
        )
    if not (isinstance(parts, Sequence) and len(parts) == 2 and all(isinstance(part, torch.Tensor) for part in parts)):
        raise DataError(f"{which}: a batch is {_kind(parts)}", fix="let it be two tensors, (x, y)", key=key)
    x_B, y_B = parts
    if y_B.shape != (len(wanted),) or y_B.is_floating_point() or len(x_B) != len(wanted):
        raise DataError(
            f"{which}: x is {tuple(x_B.shape)}, y {tuple(y_B.shape)} {y_B.dtype}",
            fix=f"let them be ({len(wanted)}, ...) and ({len(wanted)},) of whole numbers",
            key=key,
        )
    if not x_B.is_floating_point():
        wrong = f"{which}: x is {x_B.dtype}, and the attack needs floats"
        raise DataError(wrong, fix="give floats, such as pixels / 255", key=key)
    return x_B.float(), y_B.long()


def _samples(key: str, path: str, scored: Any, drawn: Any, adapter: Callable[[Any], Any] | None) -> OwnSamples:
    for items, role in ((scored, "score"), (drawn, "train")):
        if not (hasattr(items, "__getitem__") and hasattr(items, "__len__")):
            wrong = f"{key} is {path!r}, which returns {_kind(items)}"
            raise ConfigError(wrong, fix="let it return a map-style Dataset", key=key)
        if len(items) != len(scored) or not len(items):
            raise ConfigError(
                f"{key} is {path!r}, which has {len(scored)} samples in the role score and {len(items)} in the role "
                f"{role}",
                fix="give both the same, 1 or more",
                key=key,
            )
    label_N = _labels(scored, adapter, path)
    if label_N.min() < 0:
        raise DataError(f"{path} has the label {label_N.min()}", fix="let labels be 0, 1, 2 ...", key=key)
    names = getattr(scored, "classes", None) or ()
    num_classes = max(len(names), int(label_N.max()) + 1)
    return OwnSamples(path, scored, drawn, adapter, np.arange(len(scored)), label_N, num_classes, _keys(scored))


def _labels(items: Any, adapter: Callable[[Any], Any] | None, source: str) -> Labels:
    """From the `targets` of the Dataset, as torchvision's have them, where they are right; else from all samples."""
    count = len(items)
    some = np.unique(np.linspace(0, count - 1, min(count, 64)).astype(np.int64))
    seen = load(items, some, adapter, source)[1].numpy()
    targets = getattr(items, "targets", None)
    if targets is not None and len(targets) == count:
        known = np.asarray(targets)
        if known.ndim == 1 and known.dtype.kind in "iu" and np.array_equal(known[some], seen):
            return known.astype(np.int64)
    chunks = [np.arange(start, min(start + LABEL_CHUNK, count)) for start in range(0, count, LABEL_CHUNK)]
    return np.concatenate([load(items, chunk, adapter, source)[1].numpy() for chunk in chunks])


def _keys(items: Any) -> Keys:
    """`keys` of the Dataset where it has them, paths of torchvision's ImageFolder; else the places."""
    count = len(items)
    known = getattr(items, "keys", None)
    if known is not None and not callable(known) and len(known) == count:
        return np.array([str(key) for key in known], np.dtypes.StringDType())
    samples, root = getattr(items, "samples", None), getattr(items, "root", None)
    if isinstance(samples, list) and isinstance(root, str) and len(samples) == count:
        return np.array([os.path.relpath(path, root) for path, _ in samples], np.dtypes.StringDType())
    return keys("", range(count))


def _call(key: str, path: str, *given: Any, **args: Any) -> Any:
    function = find(key, path)
    try:
        return function(*given, **args)
    except Exception as error:
        called = ", ".join([*map(repr, given), *(f"{name}={value!r}" for name, value in args.items())])
        wrong = f"{key} is {path!r}: {path.partition(':')[2]}({called}) raised {_told(error)}"
        raise ConfigError(wrong, fix="correct it, or what it is given", key=key) from error


def _told(error: Exception) -> str:
    """What was raised, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}{where}"


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"
