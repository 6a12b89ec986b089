"""How images are brought to the size a feature network sees; part of what its numbers mean.

A 32x32 image enlarged to 299x299 differs by up to 97 grey levels between the first two of these:
they are shifted against each other by half a pixel of the source.

Shapes: float32 [B, C, H, W] on a scale of 0..255 -> [B, C, size, size].
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def resize(x: Tensor, how: str, size: int) -> Tensor:
    """`how` as in a protocol: "tf1", "bilinear", "bicubic", or "none" for images of that size.

    Raises ValueError for another word, or under "none" for another size.
    """
    if how == "tf1":
        return tf1_bilinear(x, size)
    if how == "bilinear":
        return bilinear(x, size)
    if how == "bicubic":
        return bicubic(x, size)
    if how != "none":
        raise ValueError(f"resize: {how!r} is unknown; use tf1, bilinear, bicubic or none")
    if x.shape[-2:] != (size, size):
        height, width = x.shape[-2:]
        raise ValueError(f"images: expected {size}x{size}, got {height}x{width}; resize them first")
    return x


def tf1_bilinear(x: Tensor, size: int) -> Tensor:
    """Bilinear as TensorFlow 1 had it (align_corners=False): pixel i comes from i * in / out.

    The convention of the published FIDs: the 2015 graph resizes its input so.
    """
    # Across first, then down, each as low + (high - low) * fraction in float32: the order of the
    # original, to the bit.
    low, high, fraction = _neighbours(x.shape[-1], size, x.device)
    left, right = x[..., low], x[..., high]
    x = left + (right - left) * fraction
    low, high, fraction = _neighbours(x.shape[-2], size, x.device)
    top, bottom = x[..., low, :], x[..., high, :]
    return top + (bottom - top) * fraction[:, None]


def bilinear(x: Tensor, size: int) -> Tensor:
    """Bilinear between pixel centres (half-pixel offset), without a low-pass when shrinking."""
    return F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)


def bicubic(x: Tensor, size: int) -> Tensor:
    """Bicubic with a = -0.5, widened when shrinking: Pillow's filter, in float32.

    The FD-DINOv2 of EDM2 and of those who use its code. dgm-eval's own (Stein et al. 2023) is
    Pillow's, which also rounds to 8 bits and clips; here neither is done.
    """
    return F.interpolate(x, size=(size, size), mode="bicubic", antialias=True)


def _neighbours(length: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `size` places: the pixels before and after it, and how far between them it is."""
    place = torch.arange(size, dtype=torch.float32, device=device) * torch.tensor(length / size)
    low = place.long()
    return low, (low + 1).clamp(max=length - 1), place - low.float()
