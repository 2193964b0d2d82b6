"""The images of a run's samples as PNG files, read from its data set when the first is asked for."""

import functools
import io
import threading
from typing import Any

import numpy as np

from shared.catalogue import Run
from shared.config import DataConfig, make_config
from shared.errors import DataError
from shared.samples import Samples

MAX_SCALE = 16


class Pictures:
    """Raises ConfigError or DataError when the data set is not here, RunError when it is another one."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._loading = threading.Lock()

    @functools.cached_property
    def _samples(self) -> Samples:
        from shared.datasets import local_dataset

        settings = self._run.description["config"].get("data")
        if settings is None:
            raise DataError(
                "the run was made without a configuration that names its data set: there are no images",
                fix="make a run with one, and ask that",
                key="data",
            )
        dataset = local_dataset(make_config(DataConfig, settings))
        self._run.check_dataset(dataset.fingerprint)
        return dataset.train

    def png(self, sample_id: int, scale: int = 1) -> bytes:
        """The image as a PNG file, each pixel `scale` x `scale` large."""
        from PIL import Image

        with self._loading:  # a page of many images asks for all at once
            samples = self._samples
        pixels_CHW: Any = samples.pixels([sample_id])[0].astype(np.float64) * (255 / samples.white)
        pixels_HWC = np.round(pixels_CHW).astype(np.uint8).transpose(1, 2, 0)
        image = Image.fromarray(pixels_HWC.squeeze(2) if pixels_HWC.shape[2] == 1 else pixels_HWC)
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()
