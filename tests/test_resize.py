"""Resizing: each convention against numbers worked out by hand or by another definition."""

import numpy as np
import pytest
import torch
from PIL import Image

from consistency.evaluation.resize import bicubic, bilinear, resize, tf1_bilinear


def image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (2, 3, height, width), generator=generator).float()


def test_tf1_of_2x2_is_what_the_formula_gives_by_hand() -> None:
    """Places 0, 1/2, 1, 3/2 of the source; past the last pixel it stays what it is."""
    x = torch.tensor([[[[0.0, 8.0], [16.0, 40.0]]]])
    expected = torch.tensor(
        [
            [0.0, 4.0, 8.0, 8.0],
            [8.0, 16.0, 24.0, 24.0],
            [16.0, 28.0, 40.0, 40.0],
            [16.0, 28.0, 40.0, 40.0],
        ]
    )
    assert torch.equal(tf1_bilinear(x, 4)[0, 0], expected)


def test_half_pixel_bilinear_of_2_is_what_the_formula_gives_by_hand() -> None:
    """Places -1/4, 1/4, 3/4, 5/4, held inside."""
    x = torch.tensor([0.0, 8.0]).expand(1, 1, 2, 2)
    assert bilinear(x, 4)[0, 0, 0].tolist() == [0.0, 2.0, 6.0, 8.0]


@pytest.mark.parametrize(("height", "width", "size"), [(5, 7, 12), (32, 20, 13), (1, 3, 4)])
def test_tf1_follows_its_definition_pixel_by_pixel(height: int, width: int, size: int) -> None:
    x = image(height, width)
    got = tf1_bilinear(x, size)
    for i in range(size):
        for j in range(size):
            y, z = i * height / size, j * width / size
            top, left = int(y + 1e-6), int(z + 1e-6)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            v, u = y - top, z - left
            mixed = (1 - v) * ((1 - u) * x[..., top, left] + u * x[..., top, right])
            mixed += v * ((1 - u) * x[..., bottom, left] + u * x[..., bottom, right])
            torch.testing.assert_close(got[..., i, j], mixed, atol=1e-3, rtol=0)


def test_the_two_bilinears_are_half_a_source_pixel_apart() -> None:
    ramp = (8.0 * torch.arange(32)).expand(1, 1, 32, 32)
    apart = (bilinear(ramp, 299) - tf1_bilinear(ramp, 299))[..., 20:-20]
    torch.testing.assert_close(apart, torch.full_like(apart, 4 * (32 / 299 - 1)), atol=1e-3, rtol=0)


@pytest.mark.parametrize("side", [20, 61])
def test_bicubic_is_pillows_on_floating_point_pixels(side: int) -> None:
    """20 pixels are enlarged, 61 are shrunk."""
    x = image(side, side)
    x[..., :5], x[..., 5:10] = 0, 255
    picture = Image.fromarray(x[0, 0].numpy())  # mode F
    pillow = np.array(picture.resize((42, 42), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(bicubic(x, 42)[0, 0].numpy(), pillow, atol=0.05)
    assert pillow.min() < -5  # it overshoots at the edge, and is not clipped


@pytest.mark.parametrize("how", ["tf1", "bilinear", "bicubic", "none"])
def test_an_image_of_the_right_size_stays_what_it_is(how: str) -> None:
    x = image(9, 9)
    torch.testing.assert_close(resize(x, how, 9), x)


def test_words_mean_their_functions() -> None:
    x = image(8, 6)
    for how, function in (("tf1", tf1_bilinear), ("bilinear", bilinear), ("bicubic", bicubic)):
        assert torch.equal(resize(x, how, 11), function(x, 11))


def test_what_cannot_be_resized_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 9x9, got 8x6"):
        resize(image(8, 6), "none", 9)
    with pytest.raises(ValueError, match="'lanczos' is unknown"):
        resize(image(8, 6), "lanczos", 9)
