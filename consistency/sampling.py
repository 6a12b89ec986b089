"""Samplers: one step, multistep (Algorithm 1, Song et al. 2023), and Heun for the teacher (EDM).

Noise enters as `noise(draw) -> float32 [B, C, H, W]`: draw 0 starts, later draws re-noise. With
`sample_noise` behind it, sample i depends on (seed, i) alone, not on batch size or worker count:

    noise = lambda draw: sample_noise(seed, indices, (3, 32, 32), draw, device)
    images = to_uint8(sample_multistep(f, noise, [80.0, 0.821], labels))

Put the network in eval mode first. Nothing here records gradients.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from consistency.schedules import karras_sigmas
from consistency.solvers import euler_step, heun_step

Model = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""f or D: (x [B, C, H, W], sigma [B], labels [B] or None) -> [B, C, H, W]."""
Noise = Callable[[int], Tensor]


def sample_noise(
    seed: int,
    indices: Sequence[int],
    shape: Sequence[int],
    draw: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal float32 [n, *shape]; row i is a function of (seed, indices[i], draw) only.

    Drawn on the CPU, so that every device gets the same numbers.
    """
    generator = torch.Generator()
    rows = torch.empty(len(indices), *shape)
    for row, index in zip(rows, indices, strict=True):
        generator.manual_seed(_stream(seed, index, draw))
        torch.randn(*shape, generator=generator, out=row)
    return rows.to(device)


@torch.no_grad()
def sample_onestep(
    f: Model,
    noise: Noise,
    labels: Tensor | None = None,
    *,
    sigma_max: float = 80.0,
) -> Tensor:
    """f(sigma_max z, sigma_max), clamped to [-1, 1]."""
    return sample_multistep(f, noise, [sigma_max], labels, sigma_max=sigma_max)


@torch.no_grad()
def sample_multistep(
    f: Model,
    noise: Noise,
    sigmas: Sequence[float],
    labels: Tensor | None = None,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
) -> Tensor:
    """One evaluation of f per sigma, re-noised in between (Algorithm 1, Song et al. 2023).

    `sigmas` are noise levels (not grid indices): sigma_max first, then decreasing, none below
    sigma_min; ValueError otherwise.
    """
    _check_levels(sigmas, sigma_min, sigma_max)
    x = sigma_max * noise(0)
    for draw, sigma in enumerate(sigmas):
        if draw > 0:
            # f's output lies at sigma_min, which already holds that much noise.
            x = x + math.sqrt(sigma**2 - sigma_min**2) * noise(draw)
        x = f(x, x.new_full((len(x),), sigma), labels).clamp(-1, 1)
    return x


@torch.no_grad()
def sample_mean_flow(
    u: Callable[..., Tensor],
    noise: Noise,
    times: Sequence[float],
    labels: Tensor | None = None,
) -> Tensor:
    """z <- z - (t - r) u(z, t, t - r) from each time to the next and to 0 (Algorithm 2, MeanFlow).

    One evaluation of u per time, clamped to [-1, 1] at the end. `times` begin with 1 and decrease,
    all above 0; ValueError otherwise.
    """
    listed = ", ".join(f"{time:g}" for time in times)
    if not times or times[0] != 1 or times[-1] <= 0:
        raise ValueError(f"MeanFlow's times must start at 1 and stay above 0: [{listed}]")
    if any(not after < before for before, after in pairwise(times)):
        raise ValueError(f"MeanFlow's times must decrease: [{listed}]")
    z = noise(0)
    for t, r in pairwise([*times, 0.0]):
        z = z - (t - r) * u(z, z.new_full((len(z),), t), z.new_full((len(z),), t - r), labels)
    return z.clamp(-1, 1)


@torch.no_grad()
def sample_heun(
    denoise: Model,
    noise: Noise,
    num_steps: int,
    labels: Tensor | None = None,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
) -> Tensor:
    """Teacher samples, float32, in 2 num_steps - 1 evaluations (Algorithms 1 and 2, EDM).

    Karras grid from sigma_max to sigma_min in num_steps >= 2 points, then 0. The state is float64.
    S_churn > 0 adds fresh noise (draw i + 1 at step i) while the level is within [S_min, S_max].
    """

    def denoised(x: Tensor, sigma: Tensor) -> Tensor:
        return denoise(x, sigma, labels)

    x = sigma_max * noise(0).double()
    levels = [*karras_sigmas(num_steps, sigma_min, sigma_max, rho).flip(0).tolist(), 0.0]
    for step, (sigma, sigma_next) in enumerate(pairwise(levels)):
        if S_churn > 0 and S_min <= sigma <= S_max:
            raised = sigma * (1 + min(S_churn / num_steps, math.sqrt(2) - 1))
            x = x + math.sqrt(raised**2 - sigma**2) * S_noise * noise(step + 1)
            sigma = raised
        advance = heun_step if sigma_next > 0 else euler_step
        x = advance(denoised, x, x.new_full((), sigma), x.new_full((), sigma_next))
    return x.float()


class NotFinite(ValueError):
    """A network gave NaN or infinity where pixels should be."""


def to_uint8(x: Tensor) -> Tensor:
    """Float [B, C, H, W] in [-1, 1] -> uint8 [B, H, W, C], rounded to the nearest level (EDM).

    floor(127.5 x + 128), clamped; the common floor(127.5 (x + 1)) is half a level darker. Raises
    NotFinite on values that are not, which would become arbitrary pixels.
    """
    if not bool(torch.isfinite(x).all()):
        raise NotFinite("images hold values that are not finite")
    levels = torch.floor(127.5 * x.float() + 128).clamp(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def from_uint8(images: Tensor) -> Tensor:
    """uint8 [B, H, W, C] -> float32 [B, C, H, W] in [-1, 1], x / 127.5 - 1."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"need uint8 [B, H, W, C], got {images.dtype} {tuple(images.shape)}")
    return images.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def _stream(seed: int, index: int, draw: int) -> int:
    """A 32-bit generator seed, distinct for each index below 2^32 of one (seed, draw).

    PyTorch's CPU generator keeps only the low 32 bits of its seed: plain hashes of (seed, index)
    would give two of 50,000 samples the same noise in one run out of four. Hence a hashed offset
    per (seed, draw), and an odd multiplier (2^32 / golden ratio), which permutes the 32-bit words.
    """
    digest = hashlib.blake2b(f"{seed} {draw}".encode(), digest_size=4).digest()
    return (int.from_bytes(digest, "little") + int(index) * 0x9E3779B1) % 2**32


def _check_levels(sigmas: Sequence[float], sigma_min: float, sigma_max: float) -> None:
    listed = ", ".join(f"{sigma:g}" for sigma in sigmas)
    if not sigmas or sigmas[0] != sigma_max:
        raise ValueError(f"sampling levels must start at sigma_max = {sigma_max:g}: [{listed}]")
    if any(not after < before for before, after in pairwise(sigmas)):
        raise ValueError(f"sampling levels must decrease: [{listed}]")
    if not sigmas[-1] >= sigma_min:
        raise ValueError(
            f"sampling levels must not fall below sigma_min = {sigma_min:g}: [{listed}]"
        )
