"""Bytes of an image file to pixels, for a model of 1 or 3 channels. Pillow decodes.

What is sent to a served model is a stranger's: the pixel count is checked on the header, before
anything is unpacked, and only PNG, JPEG and WebP are tried.
"""

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 2**24

Pixels = npt.NDArray[np.uint8]


def decode_image(data: bytes, channels: int) -> tuple[Pixels, npt.NDArray[np.bool_]]:
    """(uint8 [H, W, channels], where it is transparent [H, W]), upright, laid on white.

    Colour becomes grey by its luma, grey becomes colour by repetition. Raises ValueError.
    """
    image = _open(data)
    with_alpha = image.convert("RGBA")
    alpha = np.asarray(with_alpha.getchannel("A"))
    laid = _laid_on(with_alpha, 255) if alpha.min() < 255 else image
    pixels = np.array(laid.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels), alpha < 128


def decode_mask(data: bytes) -> npt.NDArray[np.bool_]:
    """bool [H, W], True where the image is white (> 127): strokes on nothing count as on black."""
    return np.asarray(_laid_on(_open(data).convert("RGBA"), 0).convert("L")) > 127


def _open(data: bytes) -> "Image":
    """Decoded, upright, of 8 bits. Raises ValueError in one line for what is no such image."""
    import zlib

    from PIL import Image, ImageOps, UnidentifiedImageError

    damage = (OSError, SyntaxError, ValueError, EOFError, zlib.error, Image.DecompressionBombError)
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width}x{height} pixels, more than {MAX_PIXELS:,}")
            image.load()
            upright = ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise ValueError("not a PNG, JPEG or WebP") from None
    except damage as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"not a readable PNG, JPEG or WebP ({reason})") from error
    if upright.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
        deep: npt.NDArray[Any] = np.asarray(upright)
        return Image.fromarray((deep.clip(0, 65535) // 257).astype(np.uint8))
    return upright


def _laid_on(image: "Image", level: int) -> "Image":
    """RGBA on one grey level."""
    from PIL import Image

    ground = Image.new("RGBA", image.size, (level, level, level, 255))
    return Image.alpha_composite(ground, image).convert("RGB")
