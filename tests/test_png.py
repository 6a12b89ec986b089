"""PNG writing, with Pillow as the oracle."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.png import encode_png, grid, tile_scale


def decode(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        image.load()
        pixels = np.asarray(image)
        assert image.mode == ("L" if pixels.ndim == 2 else "RGB")
    return pixels[..., None] if pixels.ndim == 2 else pixels


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    channels=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_pillow_reads_back_every_pixel(height: int, width: int, channels: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    np.testing.assert_array_equal(decode(encode_png(image)), image)


def test_a_view_with_strides_encodes_like_its_copy() -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    view = image[::2, ::-3]
    np.testing.assert_array_equal(decode(encode_png(view)), view)
    assert encode_png(view) == encode_png(view.copy())


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 23),
    side=st.integers(1, 9),
    columns=st.integers(1, 12),
    pad=st.integers(0, 3),
    scale=st.integers(1, 4),
    channels=st.sampled_from([1, 3]),
)
def test_every_tile_of_a_grid_is_its_image_and_the_rest_is_white(
    n: int, side: int, columns: int, pad: int, scale: int, channels: int
) -> None:
    images = np.random.default_rng(n).integers(0, 255, (n, side, side + 1, channels), np.uint8)
    sheet = grid(images, columns, pad=pad, scale=scale)
    across, height, width = min(columns, n), side * scale, (side + 1) * scale
    down = (n + across - 1) // across
    assert sheet.shape == (
        down * height + (down - 1) * pad,
        across * width + (across - 1) * pad,
        channels,
    )
    seen = np.zeros(sheet.shape, bool)
    for i in range(n):
        y, x = divmod(i, across)
        box = np.s_[
            y * (height + pad) : y * (height + pad) + height,
            x * (width + pad) : x * (width + pad) + width,
        ]
        tile = sheet[box]
        for dy in range(scale):
            for dx in range(scale):  # nearest neighbour: each phase is the image itself
                np.testing.assert_array_equal(tile[dy::scale, dx::scale], images[i])
        seen[box] = True
    assert (sheet[~seen] == 255).all()


@pytest.mark.parametrize(("size", "pixels"), [(8, 40), (16, 32), (32, 32), (64, 64)])
def test_small_tiles_are_enlarged_and_large_ones_are_left_alone(size: int, pixels: int) -> None:
    assert size * tile_scale(size) == pixels


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
    ],
    ids=["no channel axis", "two channels", "float", "empty"],
)
def test_what_is_no_image_is_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="image"):
        encode_png(bad)


def test_a_grid_of_nothing_or_of_no_columns_is_refused() -> None:
    with pytest.raises(ValueError, match="n >= 1"):
        grid(np.zeros((0, 4, 4, 1), np.uint8), 4)
    with pytest.raises(ValueError, match="columns=0"):
        grid(np.zeros((2, 4, 4, 1), np.uint8), 0)
