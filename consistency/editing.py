"""Zero-shot edits with any f: one projection loop, an orthogonal transform A and a mask.

Algorithm 4, Song et al. 2023. What is known of an image are some coefficients of A y; the loop is
multistep sampling that puts them back after every evaluation, so that the rest is drawn to fit:

    known = inpainting(image, missing)
    x = edit(f, noise, known.y, preset("inpaint", 8), known.transform, known.mask, labels)

`consistency.edit_presets` has the levels. Images are float [B, C, H, W] in [-1, 1]; `noise` is that
of `consistency.sampling`, so result i depends on (seed, i) and not on its batch. Nothing here
records gradients.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from consistency.sampling import Model, Noise

LUMA = (0.2989, 0.5870, 0.1140)  # weights of R, G, B in grey (ITU-R BT.601)


class Transform(Protocol):
    """An orthogonal A: images to coefficients and back."""

    def forward(self, x: Tensor) -> Tensor: ...

    def inverse(self, coefficients: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Pixels:
    """A = identity; coefficients [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def inverse(self, coefficients: Tensor) -> Tensor:
        return coefficients


@dataclass(frozen=True)
class Channels:
    """Q on the channel axis; coefficients [B, C, H, W], coefficient 0 along `first` [C]."""

    first: tuple[float, ...] = LUMA

    def forward(self, x: Tensor) -> Tensor:
        return _turned(x, self._basis(x))

    def inverse(self, coefficients: Tensor) -> Tensor:
        return _turned(coefficients, self._basis(coefficients).T)

    def _basis(self, x: Tensor) -> Tensor:
        if x.shape[1] != len(self.first):
            raise ValueError(f"images have {x.shape[1]} channels, the basis {len(self.first)}")
        return orthogonal_from(self.first).to(x)


@dataclass(frozen=True)
class Patches:
    """Q on each p x p patch; coefficients [B, C, H/p, W/p, p^2], coefficient 0 = p times its mean.

    Q = I - 2 u u', the reflection that exchanges e0 and the constant 1/p: its first column is 1/p
    everywhere, and it costs p^2 products per patch instead of p^4.
    """

    p: int

    def forward(self, x: Tensor) -> Tensor:
        p = self.p
        batch, channels, height, width = x.shape
        if p < 1 or height % p or width % p:
            raise ValueError(f"patches of {p} do not divide images of {height}x{width}")
        tiles = x.reshape(batch, channels, height // p, p, width // p, p)
        return self._reflect(tiles.transpose(3, 4).flatten(4))

    def inverse(self, coefficients: Tensor) -> Tensor:
        p = self.p
        batch, channels, rows, columns, _ = coefficients.shape
        tiles = self._reflect(coefficients).reshape(batch, channels, rows, columns, p, p)
        return tiles.transpose(3, 4).reshape(batch, channels, rows * p, columns * p)

    def _reflect(self, patches: Tensor) -> Tensor:
        if self.p == 1:
            return patches
        u = patches.new_full((self.p**2,), -1 / self.p)
        u[0] += 1
        u /= u.norm()
        along: Tensor = (patches * u).sum(-1, keepdim=True)
        return patches - 2 * along * u


def _turned(x: Tensor, q: Tensor) -> Tensor:
    """q' on the channel axis; sums written out, since a matrix product's rounding would depend on
    the batch."""
    turned: Tensor = (x.unsqueeze(2) * q[:, :, None, None]).sum(1)
    return turned


def orthogonal_from(first: Sequence[float]) -> Tensor:
    """Q [n, n] float64 whose first column is along `first`: QR of [first, e1, ..., e(n-1)]."""
    columns = torch.eye(len(first), dtype=torch.float64)
    columns[:, 0] = torch.tensor(first, dtype=torch.float64)
    q, r = torch.linalg.qr(columns)
    oriented: Tensor = q * r[0, 0].sign()
    return oriented


# ---- the loop ------------------------------------------------------------------------------


@torch.no_grad()
def edit(
    f: Model,
    noise: Noise,
    y: Tensor,
    sigmas: Sequence[float],
    transform: Transform,
    mask: Tensor,
    labels: Tensor | None = None,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    start: Tensor | None = None,
) -> Tensor:
    """Images whose coefficients are A y where mask is 0, and drawn where it is 1 (Algorithm 4).

    mask: bool, or 0 and 1; broadcast against A y. start: f's first input, else y' + sigma_1 z with
    y' = A^-1[(A y)(1 - M)]. f's outputs are clamped to [-1, 1], then projected: the last thing that
    happens, so known coefficients hold to rounding while pixels may leave [-1, 1] a little.
    `sigmas` decrease, from at most sigma_max, to no less than sigma_min; ValueError otherwise.
    """
    check_levels(sigmas, sigma_min, sigma_max)
    free, known = mask.to(device=y.device, dtype=torch.bool), transform.forward(y)

    def project(x: Tensor) -> Tensor:
        return transform.inverse(torch.where(free, transform.forward(x), known))

    x = project(torch.zeros_like(y)) + sigmas[0] * noise(0) if start is None else start
    for draw, sigma in enumerate(sigmas):
        if draw > 0:
            # f's output lies at sigma_min, which already holds that much noise.
            x = x + math.sqrt(sigma**2 - sigma_min**2) * noise(draw)
        x = project(f(x, x.new_full((len(x),), sigma), labels).clamp(-1, 1))
    return x


# ---- the tasks -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """What an edit may not change: coefficients of A y where the mask is 0."""

    y: Tensor
    transform: Transform
    mask: Tensor


def inpainting(image: Tensor, missing: Tensor) -> Known:
    """Pixels where `missing` ([B or 1, 1, H, W], 1 or True) are drawn, the others stay exactly."""
    return Known(image, Pixels(), missing)


def colorization(grey: Tensor) -> Known:
    """Of RGB images, the luma of `grey` [B, 1 or 3, H, W]; two channels of colour are free."""
    if grey.shape[1] not in (1, 3):
        raise ValueError(f"colorization: grey images have 1 or 3 channels, not {grey.shape[1]}")
    return Known(grey.expand(-1, 3, -1, -1), Channels(), torch.tensor([0, 1, 1]).view(3, 1, 1))


def super_resolution(low: Tensor, factor: int) -> Known:
    """Each pixel of `low` [B, C, h, w] is the mean of a patch of `factor` x `factor` pixels."""
    if factor < 1:
        raise ValueError(f"super-resolution: factor {factor} must be at least 1")
    return patch_means(low.repeat_interleave(factor, 2).repeat_interleave(factor, 3), factor)


def patch_means(image: Tensor, p: int) -> Known:
    """Of each p x p patch the mean; the patches' details are free."""
    return Known(image, Patches(p), torch.arange(p**2) > 0)


def nothing(like: Tensor) -> Known:
    """All is free; the start decides:

    - stroke-guided (SDEdit): start = guide + sigma_1 z, so sigma_1 says how much of it is left
    - denoising: start = the noisy image, sigma_1 = the noise already in it
    - interpolation: the noise does, `slerp_noise` of two; sigma_1 = sigma_max
    """
    return Known(torch.zeros_like(like), Pixels(), torch.ones((), dtype=torch.bool))


# ---- interpolation -------------------------------------------------------------------------


def slerp_noise(first: Noise, second: Noise, along: Tensor) -> Noise:
    """Every draw interpolated, so that more steps have the samples of the same steps as ends."""
    return lambda draw: slerp(first(draw), second(draw), along)


def slerp(first: Tensor, second: Tensor, along: Tensor) -> Tensor:
    """Along the great circle of each sample's own angle (App. D, Song et al. 2023); [B, ...].

    sin((1 - a) psi) / sin(psi) z1 + sin(a psi) / sin(psi) z2, in float64; straight where psi is 0.
    """
    flat = [z.double().flatten(1) for z in (first, second)]
    lengths = flat[0].norm(dim=1) * flat[1].norm(dim=1)
    cosine = (flat[0] * flat[1]).sum(dim=1) / lengths.clamp_min(torch.finfo(torch.float64).tiny)
    psi, a = cosine.clamp(-1, 1).arccos(), along.to(flat[0])
    straight = psi.sin() < 1e-9
    sine = torch.where(straight, 1.0, psi.sin())
    shares = [
        torch.where(straight, share, (share * psi).sin() / sine).view(-1, *[1] * (first.ndim - 1))
        for share in (1 - a, a)
    ]
    return (shares[0] * first + shares[1] * second).to(first)


def check_levels(sigmas: Sequence[float], sigma_min: float, sigma_max: float) -> None:
    """ValueError for levels that no edit can take."""
    listed = ", ".join(f"{sigma:g}" for sigma in sigmas)
    if not sigmas or any(not after < before for before, after in pairwise(sigmas)):
        raise ValueError(f"an edit's levels must decrease: [{listed}]")
    if not sigma_min <= sigmas[-1] <= sigmas[0] <= sigma_max:
        raise ValueError(f"an edit's levels must lie in {sigma_min:g} to {sigma_max:g}: [{listed}]")
