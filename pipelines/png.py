"""Images to PNG bytes with numpy and zlib alone (PNG, third edition, sections 5 and 9)."""

import struct
import zlib

import numpy as np
import numpy.typing as npt

UInt8Array = npt.NDArray[np.uint8]

_COLOUR_TYPE = {1: 0, 3: 2}  # channels -> greyscale, truecolour
_UP = 2  # filter: each row minus the one above, cheap and good on tiled images


def tile_scale(size: int) -> int:
    """The whole factor that brings a tile of `size` pixels near 40, so 8x8 digits can be read."""
    return max(1, round(40 / size))


def grid(images: UInt8Array, columns: int, pad: int = 1, scale: int = 1) -> UInt8Array:
    """[n, H, W, C] uint8 -> one [rows, width, C] image, row by row, `pad` white pixels between.

    `scale` repeats pixels (nearest neighbour); a last row that is not full ends in white.
    """
    if images.ndim != 4 or images.dtype != np.uint8 or len(images) == 0:
        raise ValueError(f"images: need uint8 [n >= 1, H, W, C], got {images.dtype} {images.shape}")
    if columns < 1 or pad < 0 or scale < 1:
        raise ValueError(f"columns={columns}, pad={pad}, scale={scale}: need >= 1, >= 0, >= 1")
    big = images.repeat(scale, axis=1).repeat(scale, axis=2)
    n, height, width, channels = big.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    sheet = np.full(
        (rows * (height + pad) - pad, columns * (width + pad) - pad, channels), 255, np.uint8
    )
    for i, image in enumerate(big):
        top, left = (i // columns) * (height + pad), (i % columns) * (width + pad)
        sheet[top : top + height, left : left + width] = image
    return sheet


def encode_png(image: UInt8Array) -> bytes:
    """[H, W, 1 or 3] uint8 -> a PNG file. The same pixels give the same bytes."""
    if image.ndim != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ValueError(f"image: need uint8 [H, W, C], got {image.dtype} {image.shape}")
    height, width, channels = image.shape
    if channels not in _COLOUR_TYPE:
        raise ValueError(f"image: {channels} channels, a PNG here has 1 or 3")
    rows = image.reshape(height, width * channels)
    lines = np.full((height, 1 + width * channels), _UP, np.uint8)
    lines[0, 1:] = rows[0]
    lines[1:, 1:] = rows[1:] - rows[:-1]  # modulo 256, as the filter wants
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPE[channels], 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", zlib.compress(lines.tobytes(), 9))
        + _chunk(b"IEND", b"")
    )


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
