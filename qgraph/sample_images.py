"""Samples from images: cut to the size that the model takes, and scaled as its training did."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qgraph.errors import UserError, nearest
from qgraph.feeds import InputSpec, show_shape
from qgraph.pipeline import Feeds

__all__ = ["PRESETS", "ImageFolder", "Preset", "find_preset", "image_files"]

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@dataclasses.dataclass(frozen=True)
class Preset:
    """How pixels become an input: value = (pixel * scale - mean) / std, with pixels in 0..255.

    Attributes:
        scale: of the pixels.
        mean: one a channel, in the model's order of channels.
        std: one a channel.
        bgr: the model takes blue first.
        crop: share of the shorter side that a centred crop in the input's proportions keeps; None for the whole
            picture, whatever its proportions. The crop is resized bilinearly with antialiasing.
    """

    scale: float = 1.0
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    bgr: bool = False
    crop: float | None = None

    def arrays(self, pixels: np.ndarray, spec: InputSpec, where: str) -> np.ndarray:
        """Scale uint8 images that have been cut to size already; resize them only if their size differs.

        Args:
            pixels: [n, height, width, 3], [n, 3, height, width] or, in grey, [n, height, width]; red first.
            spec: the input, of rank 4.
            where: names the array in errors.

        Returns:
            float32 as `spec` lays it out.

        Raises:
            UserError: the array holds no such images, or the input takes none.
        """
        layout = _Layout.of(spec)
        if pixels.ndim == 4 and pixels.shape[1] in (1, 3) and pixels.shape[-1] not in (1, 3):
            pixels = np.moveaxis(pixels, 1, -1)
        if pixels.ndim == 3:
            pixels = pixels[..., None]
        if pixels.ndim != 4 or pixels.shape[-1] not in (1, 3):
            raise UserError(f"{where} has shape {show_shape(pixels.shape)}, which is none of images")
        if pixels.shape[1:3] == (layout.height, layout.width):
            return layout.arrange(self._scaled(_channels(pixels, layout.channels)))
        image = _pillow()
        whole = dataclasses.replace(self, crop=None)
        pictures = [image.fromarray(one[..., 0] if one.shape[-1] == 1 else one) for one in pixels]
        return layout.arrange(np.stack([whole.picture(picture, layout) for picture in pictures]))

    def file(self, path: Path, layout: _Layout) -> np.ndarray:
        """Read one image file; float32 [height, width, channels].

        Raises:
            UserError: it is not an image.
        """
        image = _pillow()
        try:
            with image.open(path) as picture:
                return self.picture(picture, layout)
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"{path} cannot be read as an image: {error}") from error

    def picture(self, picture: Any, layout: _Layout) -> np.ndarray:
        """Return a Pillow image as float32 [height, width, channels]."""
        image = _pillow()
        coloured = picture.convert("L" if layout.channels == 1 else "RGB")
        wide, high = coloured.size
        box = (0.0, 0.0, float(wide), float(high))
        if self.crop is not None:
            unit = self.crop * min(wide / layout.width, high / layout.height)
            left, top = (wide - unit * layout.width) / 2, (high - unit * layout.height) / 2
            box = (left, top, left + unit * layout.width, top + unit * layout.height)
        resized = coloured.resize((layout.width, layout.height), image.Resampling.BILINEAR, box=box)
        pixels = np.asarray(resized).reshape(layout.height, layout.width, layout.channels)
        return self._scaled(pixels)

    def _scaled(self, pixels: np.ndarray) -> np.ndarray:
        """Return [..., channels] scaled; grey takes the mean of the three channels' constants."""
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        if pixels.shape[-1] == 1:
            mean, std = mean.mean(keepdims=True), std.mean(keepdims=True)
        elif self.bgr:
            pixels = pixels[..., ::-1]
        return np.asarray((pixels.astype(np.float32) * np.float32(self.scale) - mean) / std)


_RGB_MEAN, _RGB_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CROP = 0.875

PRESETS: Mapping[str, Preset] = {
    "imagenet": Preset(1 / 255, _RGB_MEAN, _RGB_STD, crop=_CROP),
    "mobilenet": Preset(1 / 127.5, (1.0, 1.0, 1.0), crop=_CROP),
    "caffe": Preset(1.0, (104.0, 117.0, 123.0), bgr=True, crop=_CROP),
    "cifar10": Preset(1 / 255, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "unit": Preset(1 / 255),
    "unit-bgr": Preset(1 / 255, bgr=True),
    "centred": Preset(1 / 128, (127 / 128, 127 / 128, 127 / 128)),
    "pixels": Preset(),
}
"""imagenet: torchvision's. mobilenet: TensorFlow's, -1..1. caffe: 0..255, blue first, less the mean. cifar10: that data
set's own mean and deviation. unit: 0..1 of the whole picture. centred: (pixel - 127) / 128. pixels: 0..255."""


def find_preset(name: str) -> Preset:
    """Return the preset called `name`.

    Raises:
        UserError: there is none.
    """
    if name not in PRESETS:
        raise UserError(f"there is no preset '{name}'.{nearest(name, PRESETS)} There are: {', '.join(PRESETS)}.")
    return PRESETS[name]


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How an input lays out a batch of images."""

    height: int
    width: int
    channels: int
    channels_first: bool

    @classmethod
    def of(cls, spec: InputSpec) -> _Layout:
        shape = spec.shape
        if shape is not None and len(shape) == 4:
            for channels_first in (True, False):
                channels, height, width = shape[1:] if channels_first else (shape[3], shape[1], shape[2])
                if channels in (1, 3) and height is not None and width is not None:
                    return cls(height, width, channels, channels_first)
                if channels in (1, 3):
                    raise UserError(
                        f"input '{spec.name}' takes images of any size {show_shape(shape)}: "
                        f"fix it with --shape {spec.name}=1,3,224,224 (or the size that it was trained for)"
                    )
        raise UserError(f"input '{spec.name}' takes {show_shape(shape)}, which is none of images")

    def arrange(self, pixels: np.ndarray) -> np.ndarray:
        """Return [n, height, width, channels] as the input wants it."""
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)) if self.channels_first else pixels


def _channels(pixels: np.ndarray, count: int) -> np.ndarray:
    if pixels.shape[-1] == count:
        return pixels
    if count == 3:
        return np.repeat(pixels, 3, axis=-1)
    weights = np.array([299, 587, 114], np.float32) / 1000  # as Pillow turns colours into grey (ITU-R 601-2)
    return np.rint(pixels @ weights)[..., None]


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise UserError("reading images needs Pillow: pip install 'qgraph-compiler[images]'") from None
    return Image


def image_files(folder: Path) -> list[Path]:
    """Return the images in `folder`, sorted by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)


class ImageFolder:
    """Images as feeds for a model's only input.

    Args:
        files: in order.
        inputs: what the model takes: one input, [n, 3, height, width] or [n, height, width, 3], or grey.
        preprocess: name of a preset; required.
        batch: images to a feed where the input leaves that open; those left over are not used.

    Raises:
        UserError: the preset is missing or unknown, or the model takes no images.
    """

    def __init__(self, files: Sequence[Path], inputs: Sequence[InputSpec], preprocess: str | None, batch: int) -> None:
        if preprocess is None:
            raise UserError(f"images need --preprocess PRESET: {', '.join(PRESETS)}")
        if len(inputs) != 1:
            names = ", ".join(f"'{spec.name}'" for spec in inputs)
            raise UserError(f"a folder of images can feed one input, but the model has {len(inputs)}: {names}")
        _pillow()
        self._preset = find_preset(preprocess)
        self._files = files
        self._spec = inputs[0]
        self._layout = _Layout.of(self._spec)
        self._batch = (self._spec.shape or (None,))[0] or batch

    def __len__(self) -> int:
        return len(self._files) // self._batch

    def feeds(self, indices: Sequence[int]) -> Iterator[Feeds]:
        """See `qgraph.samples.Source`."""
        for index in indices:
            files = self._files[index * self._batch : (index + 1) * self._batch]
            pixels = np.stack([self._preset.file(path, self._layout) for path in files])
            yield {self._spec.name: self._layout.arrange(pixels).astype(self._spec.dtype, copy=False)}

    def labels(self, name: str | None, indices: Sequence[int]) -> np.ndarray | None:
        """See `qgraph.samples.Source`."""
        del indices
        if name is not None:
            raise UserError(f"a folder of images has no array '{name}' for labels: put both into a .npz file")
        return None
