"""What the U-Nets are made of: the residual block, resampling, initial weights.

Written from the formulas of Karras et al. 2022 (EDM, Table 7), Song et al. 2021 (NCSN++), Dhariwal
& Nichol 2021 (ADM) and Lu & Song 2024 (sCM, section 4.1). B images, C channels, s side in pixels.

Forward-mode derivatives (torch.func.jvp) go through everything here, in any memory format, as long
as attention runs under `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`: torch's fused attention
kernels have no such formula.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from consistency.config import norm_groups
from consistency.randomness import batch_mask

SQRT_HALF = math.sqrt(0.5)  # keeps the variance of a sum of two branches


@dataclass(frozen=True)
class Style:
    """What all blocks of one network share, and the published networks differ in."""

    adagn: Literal["shift", "scale_shift", "double_norm"]
    eps: float  # of the group norms
    skip_scale: float  # of the sum of two branches
    project: bool  # the skip of every resampling block has a 1x1 convolution
    smooth: bool  # resample with the filter [1, 3, 3, 1] / 8, else with [1, 1] / 2
    init: Literal["xavier", "fan_in"]
    last_gain: float  # on the initial weights of the last layer of a residual branch
    attention_gain: float  # on those of qkv
    groups: int | None = None  # of the group norms; None: EDM's rule, see `norm_groups`


@dataclass(frozen=True)
class Init:
    """Makes layers with their initial weights.

    xavier  weight uniform with variance 2 / (fan_in + fan_out), bias zero (EDM's DDPM++ and NCSN++)
    fan_in  weight and bias uniform in +-1/sqrt(fan_in), torch's own rule (ADM)

    A gain multiplies the bounds; with gain 0 nothing is drawn. Layers are made on the current
    default device, so that `with torch.device("meta")` gives shapes without memory.
    """

    scheme: Literal["xavier", "fan_in"]
    generator: torch.Generator | None

    def conv(self, c_in: int, c_out: int, kernel: int, gain: float = 1.0) -> nn.Conv2d:
        """A convolution that keeps the side."""
        # By way of "meta", so that torch's own initialisation draws nothing from its generator.
        conv = Conv2d(c_in, c_out, kernel, padding=kernel // 2, device="meta")
        self._fill(conv.to_empty(device=torch.get_default_device()), gain)
        return conv

    def linear(self, n_in: int, n_out: int, gain: float = 1.0) -> nn.Linear:
        layer = Linear(n_in, n_out, device="meta")
        self._fill(layer.to_empty(device=torch.get_default_device()), gain)
        return layer

    def normal(self, *shape: int) -> Tensor:
        """Independent standard normal values."""
        return torch.empty(shape).normal_(generator=self.generator)

    def _fill(self, layer: nn.Conv2d | nn.Linear, gain: float) -> None:
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
        if gain == 0:
            nn.init.zeros_(layer.weight)
        elif self.scheme == "xavier":
            nn.init.xavier_uniform_(layer.weight, gain, self.generator)
        else:
            bound = gain / math.sqrt(layer.weight[0].numel())
            nn.init.uniform_(layer.weight, -bound, bound, self.generator)
            nn.init.uniform_(layer.bias, -bound, bound, self.generator)


class Block(nn.Module):
    """Residual block conditioned on an embedding, then self-attention where asked.

        h = conv0(resample(SiLU(norm0(x))))
        h = norm1(h + shift)                        "shift"
            norm1(h) * (1 + scale) + shift          "scale_shift" (AdaGN)
            norm1(h) * P(1 + scale) + P(shift)      "double_norm" (sCM), P(v) = v / rms of channels
        h = conv1(dropout(SiLU(h)))
        x = (skip(resample(x)) + h) * skip_scale
        x = (x + proj(softmax(q k^T / sqrt(C / heads)) v)) * skip_scale,   q, k, v = qkv(norm2(x))

    scale and shift are `affine` of the embedding; skip is a 1x1 convolution or nothing.

    heads     of the attention; 0 = no attention
    resample  -1 halves the side, +1 doubles it, 0 keeps it
    """

    fir: Tensor | None

    def __init__(
        self,
        c_in: int,
        c_out: int,
        emb_width: int,
        style: Style,
        init: Init,
        *,
        heads: int = 0,
        resample: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.c_in, self.c_out, self.style = c_in, c_out, style
        self.heads, self.resample, self.dropout = heads, resample, dropout
        self.norm0 = GroupNorm(c_in, style.eps, style.groups)
        self.conv0 = init.conv(c_in, c_out, 3)
        self.affine = init.linear(emb_width, c_out if style.adagn == "shift" else 2 * c_out)
        self.norm1 = GroupNorm(c_out, style.eps, style.groups)
        self.conv1 = init.conv(c_out, c_out, 3, style.last_gain)
        self.register_buffer(
            "fir", smooth_filter() if style.smooth and resample else None, persistent=False
        )
        projected = c_in != c_out or (resample != 0 and style.project)
        self.skip = init.conv(c_in, c_out, 1) if projected else None
        if heads:
            self.norm2 = GroupNorm(c_out, style.eps, style.groups)
            self.qkv = init.conv(c_out, 3 * c_out, 1, style.attention_gain)
            self.proj = init.conv(c_out, c_out, 1, style.last_gain)

    def condition(self, emb: Tensor) -> tuple[Tensor | None, Tensor]:
        """emb [B, emb_width] -> factor (None: one) and shift around norm1, each [B, c_out, 1, 1]"""
        params = self.affine(emb)[:, :, None, None]
        if self.style.adagn == "shift":
            return None, params
        scale, shift = params.chunk(2, dim=1)
        if self.style.adagn == "double_norm":
            return pixel_norm(1 + scale), pixel_norm(shift)
        return 1 + scale, shift

    def forward(self, x: Tensor, factor: Tensor | None, shift: Tensor) -> Tensor:
        """x [B, c_in, s, s], factor and shift of `condition` -> [B, c_out, s', s']."""
        h = F.silu(self.norm0(x))
        if self.resample < 0:
            h, x = halve(h, self.fir), halve(x, self.fir)
        if self.resample > 0:
            h = double(h, self.fir)
        h = self.conv0(h)
        h = self.norm1(h + shift) if factor is None else self.norm1(h) * factor + shift
        h = F.silu(h)
        if self.training and self.dropout:
            h = drop(h, self.dropout)
        h = self.conv1(h)
        # A 1x1 convolution commutes with copying pixels: do it on the fewer ones. It does not with
        # the smooth filter, for which the image ends in zeros without the bias.
        if self.resample > 0 and self.fir is not None:
            x = double(x, self.fir)
        if self.skip is not None:
            x = self.skip(x)
        if self.resample > 0 and self.fir is None:
            x = double(x, None)
        x = self._scaled(h.add_(x))  # nobody's backward needs the output of conv1
        return self._scaled(x + self._attention(x)) if self.heads else x

    def _scaled(self, total: Tensor) -> Tensor:
        return total if self.style.skip_scale == 1 else total.mul_(self.style.skip_scale)

    def _attention(self, x: Tensor) -> Tensor:
        """x [B, C, s, s] -> the attention branch, same shape."""
        c = self.c_out
        # Stored rows run (head, width, qkv) with q, k, v innermost. Reordering the small weight
        # instead of the activations gives q, k, v whose channels lie side by side, as the kernels
        # want.
        weight = self.qkv.weight.view(c, 3, c).transpose(0, 1).reshape(3 * c, c)
        assert self.qkv.bias is not None
        bias = self.qkv.bias.view(c, 3).t().reshape(-1)
        tokens = self.norm2(x).flatten(2).transpose(1, 2)  # [B, s*s, C]
        qkv = linear(tokens, weight, bias).reshape(*tokens.shape[:2], 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, s*s, C / heads]
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        a = linear(a, self.proj.weight.view(c, c), self.proj.bias)
        return a.transpose(1, 2).reshape(x.shape)


# Linear maps have forward-mode rules of their own: torch's also multiply the zero tangents of the
# weights, which makes a product cost three passes instead of two.


class Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        x, tangent = forward_ad.unpack_dual(x)  # type: ignore[no-untyped-call]
        y = super().forward(x)
        if tangent is None:
            return y
        moved = F.conv2d(tangent, self.weight, padding=self.padding)
        dual: Tensor = forward_ad.make_dual(y, moved)  # type: ignore[no-untyped-call]
        return dual


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear."""
    x, tangent = forward_ad.unpack_dual(x)  # type: ignore[no-untyped-call]
    y = F.linear(x, weight, bias)
    if tangent is None:
        return y
    dual: Tensor = forward_ad.make_dual(y, F.linear(tangent, weight))  # type: ignore[no-untyped-call]
    return dual


class GroupNorm(nn.GroupNorm):
    """`norm_groups` of the channels. The statistics are fp32 under autocast.

    Its own forward-mode rule: torch's views its input as if it were contiguous, and is slower.
    """

    def __init__(self, channels: int, eps: float, groups: int | None = None) -> None:
        super().__init__(norm_groups(channels, groups), channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        x, tangent = forward_ad.unpack_dual(x)  # type: ignore[no-untyped-call]
        if tangent is None:
            return super().forward(x)
        groups = x.shape[0], self.num_groups, -1
        grouped, moved = x.reshape(groups), tangent.reshape(groups)
        variance, mean = torch.var_mean(grouped, 2, correction=0, keepdim=True)
        scale = (variance + self.eps).rsqrt()
        # y = (x - mean) scale;  dy = scale (dx - mean(dx) - y mean(y dx))
        y = (grouped - mean) * scale
        along = (y * moved).mean(2, keepdim=True)
        dy = (moved - moved.mean(2, keepdim=True) - y * along) * scale
        weight, bias = self.weight.view(1, -1, 1, 1), self.bias.view(1, -1, 1, 1)
        y, dy = y.view(x.shape) * weight + bias, dy.view(x.shape) * weight
        dual: Tensor = forward_ad.make_dual(y, dy)  # type: ignore[no-untyped-call]
        return dual


class ResidualInput(nn.Module):
    """NCSN++: the image, halved and brought to the width of a resolution; aux_residual.

    The composition of a 3x3 convolution and of `halve` with its smooth filter, seen as one filter
    on an image surrounded by zeros. They commute: the smooth filter goes first, on few channels,
    and the convolution does the halving.
    """

    fir: Tensor

    def __init__(self, c_in: int, c_out: int, init: Init) -> None:
        super().__init__()
        made = init.conv(c_in, c_out, 3)
        self.weight, self.bias = made.weight, made.bias
        self.register_buffer("fir", smooth_filter(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, c_in, s, s] -> [B, c_out, s/2, s/2]."""
        # At every place that the convolution reads, up to one pixel beyond the image.
        x = F.conv2d(x, per_channel(self.fir, x), padding=2, groups=x.shape[1])
        return F.conv2d(x, self.weight, self.bias, stride=2)


def smooth_filter() -> Tensor:
    """The smooth filter [1, 3, 3, 1] / 8 both ways, [4, 4]."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    return torch.outer(taps, taps)


def per_channel(fir: Tensor, x: Tensor) -> Tensor:
    """[4, 4] -> [C, 1, 4, 4], the weight of a depthwise convolution of x [B, C, ...]."""
    return fir.expand(x.shape[1], 1, -1, -1)


def halve(x: Tensor, fir: Tensor | None) -> Tensor:
    """Side s -> s/2: the mean of 2x2 pixels, or the filter at every second place, zeros around."""
    if fir is None:
        return F.avg_pool2d(x, 2)
    return F.conv2d(x, per_channel(fir, x), stride=2, padding=1, groups=x.shape[1])


def double(x: Tensor, fir: Tensor | None) -> Tensor:
    """Side s -> 2s: nearest neighbour, or 4 times the filter's transpose (the mean stays)."""
    if fir is None:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    weight = per_channel(4 * fir, x)
    return F.conv_transpose2d(x, weight, stride=2, padding=1, groups=x.shape[1])


def drop(h: Tensor, p: float) -> Tensor:
    """Dropout of h [B, C, s, s]; its mask depends on torch's generator and the batch's shape alone.

    That of `F.dropout` also depends on the memory format, the dtype and whether a forward-mode
    derivative is taken; two passes that must share a mask would not.
    """
    b, c, *sides = h.shape
    keep = batch_mask(b, (*sides, c), 1 - p, h.device)
    return (h * keep.permute(0, 3, 1, 2)).mul_(1 / (1 - p))


def pixel_norm(v: Tensor) -> Tensor:
    """v [B, C, ...] over its root mean square along C (Karras et al. 2018, section 4.2)."""
    return v * (v.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()
