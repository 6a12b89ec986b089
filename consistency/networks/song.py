"""DDPM++ and NCSN++ of Song et al. 2021 as Karras et al. 2022 (Table 7) train them: SongUNet.

DDPM++   c_noise as 10000^(-i / (M/2 - 1)) sines and cosines, resampling with [1, 1]
NCSN++   c_noise as sines and cosines of M random frequencies N(0, fourier_scale^2); resampling with
         [1, 3, 3, 1]; the image, halved, joins the encoder at every resolution (`aux_residual`)

    waves (+ label scaled by sqrt(K)) -> map_layer0, SiLU -> map_layer1, SiLU
    attention of one head; in the decoder only in the last block of a resolution
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consistency.config import NetworkConfig
from consistency.networks.blocks import SQRT_HALF, GroupNorm, Init, Style
from consistency.networks.unet import UNet, frequencies


class SongUNet(UNet):
    """See `UNet`; network.architecture is "ddpmpp" or "ncsnpp"."""

    attend_throughout = False

    @staticmethod
    def _style(network: NetworkConfig) -> Style:
        return Style(
            adagn=network.adagn or "shift",
            eps=1e-6,
            groups=network.groups,
            skip_scale=SQRT_HALF,
            project=True,
            smooth=network.architecture == "ncsnpp",
            init="xavier",
            last_gain=1e-5,
            attention_gain=math.sqrt(0.2),
        )

    def _add_embedding(self, init: Init) -> int:
        channels, width = self.network.channels, 4 * self.network.channels
        fourier = self.network.architecture == "ncsnpp"
        noise_width = 2 * channels if fourier else channels
        if fourier:
            self.map_noise = Fourier(init.normal(channels) * self.network.fourier_scale)
        if self.num_classes:
            self.map_label = init.linear(self.num_classes, noise_width)
        self.map_layer0 = init.linear(noise_width, width)
        self.map_layer1 = init.linear(width, width)
        return noise_width

    def _waves(self, t: Tensor) -> Tensor:
        if self.network.architecture == "ncsnpp":
            angles = 2 * math.pi * t[:, None] * self.map_noise.freqs
        else:
            angles = t[:, None] * frequencies(self.network.channels // 2, 1.0, t)
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    def _embed(self, c_noise: Tensor, labels: Tensor | None, gap: Tensor | None) -> Tensor:
        emb = self._time(c_noise, gap)
        if self.num_classes:
            rows = self._class_rows(labels, emb) * math.sqrt(self.num_classes)
            emb = emb + rows + self.map_label.bias
        emb = F.silu(self.map_layer0(emb))
        return F.silu(self.map_layer1(emb))

    def _add_output(self, c: int, style: Style, init: Init) -> None:
        top = f"{self.size}x{self.size}"
        self.dec[f"{top}_aux_norm"] = GroupNorm(c, style.eps, style.groups)
        self.dec[f"{top}_aux_conv"] = init.conv(c, self.image_channels, 3, style.last_gain)

    def _output(self, h: Tensor) -> Tensor:
        top = f"{self.size}x{self.size}"
        out: Tensor = self.dec[f"{top}_aux_conv"](F.silu(self.dec[f"{top}_aux_norm"](h)))
        return out


class Fourier(nn.Module):
    """Random frequencies, drawn once: a buffer, so that they are stored with the weights."""

    freqs: Tensor

    def __init__(self, freqs: Tensor) -> None:
        super().__init__()
        self.register_buffer("freqs", freqs)
