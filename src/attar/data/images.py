"""Images in the one form the rest works on: uint8, (C, H, W), all of one size and color.

Files are opened and framed here both for training and for `predict`, so that an image means the
same to both.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from attar.data.config import Color, DataConfig
from attar.errors import DataError

SCALE = 1 / 255
MODES = {"gray": "L", "rgb": "RGB"}


@dataclass(frozen=True)
class Frame:
    """What every image of a data set is brought to.

    fit: `crop` cuts the centre to the frame's proportions, `stretch` distorts; both scale
        bilinearly with antialiasing. `same` takes images of just this size.
    convert: whether images of another color are turned; else color in a gray set is an error.
    """

    color: Color
    height: int
    width: int
    fit: Literal["crop", "stretch", "same"] = "crop"
    convert: bool = True

    @classmethod
    def of(cls, config: DataConfig, first: Image.Image) -> Frame:
        """The frame that the configuration asks for, its gaps filled from the first image."""
        gray = first.mode in ("1", "L", "LA")
        frame = cls(
            color=config.color or ("gray" if gray else "rgb"),
            height=first.height,
            width=first.width,
            fit="same",
            convert=config.color is not None or not gray,
        )
        if isinstance(config.size, int):
            return replace(frame, height=config.size, width=config.size, fit="crop")
        if config.size is not None:
            return replace(frame, height=config.size[0], width=config.size[1], fit="stretch")
        return frame

    @property
    def shape(self) -> tuple[int, int, int]:
        return (1 if self.color == "gray" else 3, self.height, self.width)


def open_image(source: Path | bytes, name: str) -> Image.Image:
    """The decoded image of a file or its bytes; `name` is what messages call it.

    Raises `DataError` for what is no image, is cut short, or has more than 8 bits a channel.
    """
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        image.load()
    except Exception as error:  # codecs raise whatever they like at damaged files
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise DataError(f"can't read the image {name}: {reason}") from None
    if image.mode[0] in "IF":
        raise DataError(f"the image {name} has more than 8 bits a channel: save it with 8")
    return image


def framed(image: Image.Image, frame: Frame, name: str) -> np.ndarray:
    """The image's pixels in the frame: uint8 (C, H, W)."""
    size = (frame.width, frame.height)
    if frame.fit == "same" and image.size != size:
        raise DataError(
            f"the image {name} is {image.width}×{image.height} where {frame.width}×{frame.height} "
            "was expected, as nothing says how to scale it: give the data a `size`"
        )
    if not frame.convert and image.mode not in ("1", "L", "LA"):
        raise DataError(
            f"the image {name} is in color where the first one is gray: give the data a `color`"
        )
    image = image.convert(MODES[frame.color])
    if frame.fit == "crop":
        image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
    elif frame.fit == "stretch":
        image = image.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(frame.height, frame.width, -1).transpose(2, 0, 1)


def as_images(array: np.ndarray, where: str) -> np.ndarray:
    """An array of images as (N, C, H, W): uint8, or float32 of 0 to 1 where that would lose.

    Takes (N, H, W), (N, H, W, C) and (N, C, H, W), of whole numbers 0–255 or of floats 0–1.
    """
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[-1] in (1, 3):
        array = np.ascontiguousarray(array.transpose(0, 3, 1, 2))
    if array.ndim != 4 or array.shape[1] not in (1, 3):
        raise DataError(f"{where} has shape {array.shape}: images of 1 or 3 channels were expected")
    if array.dtype == np.uint8:
        return array
    low, high = (array.min(), array.max()) if array.size else (0, 0)
    if not (low >= 0 and high <= 255):  # also where there is a NaN
        raise DataError(
            f"{where} ranges from {low:g} to {high:g}: pixels of 0 to 255 or 0 to 1 were expected"
        )
    pixels = array if array.dtype.kind in "iu" or high > 1 else array * 255.0
    rounded = np.rint(pixels).astype(np.uint8)
    if np.abs(pixels - rounded).max(initial=0) < 1e-3:
        return rounded
    return (pixels / 255.0).astype(np.float32)


def fit_images(images: np.ndarray, config: DataConfig, where: str) -> np.ndarray:
    """Images (N, C, H, W) in the color and size that the configuration asks for."""
    if not len(images):
        return images
    wanted = Frame.of(config, _picture(images[0]))
    if images.shape[1:] == wanted.shape:
        return images
    if images.dtype != np.uint8:
        raise DataError(
            f"{where} has float pixels, which `size` and `color` can't change: save them as uint8"
        )
    fitted = np.empty((len(images), *wanted.shape), np.uint8)
    for i, image in enumerate(images):
        fitted[i] = framed(_picture(image), wanted, f"{i} of {where}")
    return fitted


def preparation(
    shape: tuple[int, ...], config: DataConfig, mean: list[float], std: list[float]
) -> dict[str, Any]:
    """How an image file becomes what the network takes, in the manifest's words.

    `resize.fit` is `crop` (the centre of the frame's proportions, scaled: Pillow's
    `ImageOps.fit`) or `stretch` (Pillow's `resize`), both bilinear.
    """
    channels, height, width = shape
    return {
        "layout": "NCHW",
        "color": "gray" if channels == 1 else "rgb",
        "resize": {
            "height": height,
            "width": width,
            "fit": "stretch" if isinstance(config.size, tuple) else "crop",
            "interpolation": "bilinear",
        },
        "scale": SCALE,
        "mean": mean,
        "std": std,
    }


def _picture(image: np.ndarray) -> Image.Image:
    """Pixels (C, H, W) as a picture; floats only for their size and color."""
    pixels = image.astype(np.uint8) if image.dtype != np.uint8 else image
    if len(pixels) == 1:
        return Image.fromarray(pixels[0])
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
