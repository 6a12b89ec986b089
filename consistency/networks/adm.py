"""ADM of Dhariwal & Nichol 2021 (their best ImageNet-64 network, as in EDM): DhariwalUNet.

waves -> map_layer0, SiLU -> map_layer1 (+ a row per class, no bias), SiLU
waves: cosines, then sines, of c_noise times 10000^(-i / (M/2)), i = 0 .. M/2 - 1
blocks with AdaGN, branches summed unscaled; the last layer of each branch starts at zero
attention of 64-wide heads in every block of its resolutions, encoder and decoder
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consistency.config import NetworkConfig
from consistency.networks.blocks import GroupNorm, Init, Style
from consistency.networks.unet import UNet, frequencies


class ADM(UNet):
    """See `UNet`."""

    attend_throughout = True

    @staticmethod
    def _style(network: NetworkConfig) -> Style:
        return Style(
            adagn=network.adagn or "scale_shift",
            eps=1e-5,
            groups=network.groups,
            skip_scale=1.0,
            project=False,
            smooth=False,
            init="fan_in",
            last_gain=0.0,
            attention_gain=1.0,
        )

    def _add_embedding(self, init: Init) -> int:
        channels, width = self.network.channels, 4 * self.network.channels
        if self.num_classes:
            self.map_label = nn.Linear(self.num_classes, width, bias=False, device="meta")
            self.map_label.weight = nn.Parameter(init.normal(width, self.num_classes))
        self.map_layer0 = init.linear(channels, width)
        self.map_layer1 = init.linear(width, width)
        return channels

    def _waves(self, t: Tensor) -> Tensor:
        half = self.network.channels // 2
        angles = t[:, None] * frequencies(half, (half - 1) / half, t)
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    def _embed(self, c_noise: Tensor, labels: Tensor | None, gap: Tensor | None) -> Tensor:
        emb = self.map_layer1(F.silu(self.map_layer0(self._time(c_noise, gap))))
        return F.silu(emb + self._class_rows(labels, emb) if self.num_classes else emb)

    def _add_output(self, c: int, style: Style, init: Init) -> None:
        self.out_norm = GroupNorm(c, style.eps, style.groups)
        self.out_conv = init.conv(c, self.image_channels, 3, style.last_gain)

    def _output(self, h: Tensor) -> Tensor:
        out: Tensor = self.out_conv(F.silu(self.out_norm(h)))
        return out
