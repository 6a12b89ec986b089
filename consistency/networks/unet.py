"""The DDPM++ U-Net of EDM (Karras et al. 2022, Table 7; Song et al. 2021), one file, one pass.

Shapes: B images, C channels of the feature map at hand, S = side of the image, M = `channels`,
E = 4M the width of the embedding, K classes, L = len(channel_mult) resolutions S, S/2, S/4 ...

    c_noise [B] -> sin/cos [B, M] (+ label [B, M]) -> two linear layers -> embedding [B, E], fp32
    embedding [B, E] -> one shift [B, C] per block, fp32

    x [B, image_channels, S, S]
      enc  {S}x{S}_conv                     -> [B, M, S, S]
           per resolution: _down, _block0 .. _block{num_blocks-1}; every output is kept as a skip
      dec  lowest resolution first: _in0 (attention), _in1, else _up;
           then _block0 .. _block{num_blocks}, each on cat(h, skip) [B, C + C_skip, s, s]
           {S}x{S}_aux_norm, SiLU, _aux_conv -> [B, image_channels, S, S]

State-dict keys and shapes are those of the published SongUNet weights without their leading
`model.`, so an importer strips that prefix and drops the `*.resample_filter` buffers: with the
filter [1, 1] they mean "average 2x2" and "nearest neighbour", which is what is computed here.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consistency.config import NetworkConfig, check_network, norm_groups

SQRT_HALF = math.sqrt(0.5)  # keeps the variance of a sum of two branches
NEARLY_ZERO = 1e-5  # gain of the last layer of each residual branch
ATTENTION_GAIN = math.sqrt(0.2)


class UNet(nn.Module):
    """F(x; c_noise, label): the raw network that `parameterization` scales into a denoiser.

    size            side of the square images in pixels, divisible by 2 ** (len(channel_mult) - 1)
    image_channels  1 or 3 (input and output)
    num_classes     0 = unconditional
    channels        base width M, even, at least 4
    channel_mult    width of each resolution in multiples of `channels`, full resolution first
    num_blocks      residual blocks per resolution in the encoder (one more in the decoder)
    attention       resolutions (in pixels) with self-attention; the lowest one always has one
    dropout         probability inside each block, in train mode only
    generator       source of the initial weights; None = torch's global generator

    Raises ValueError, beginning with the name of the argument, for a network that cannot exist
    (those of `NetworkConfig` and `check_network`).
    """

    def __init__(
        self,
        *,
        size: int,
        image_channels: int,
        num_classes: int,
        channels: int,
        channel_mult: Sequence[int],
        num_blocks: int,
        attention: Sequence[int],
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        network = NetworkConfig(
            channels=channels,
            channel_mult=tuple(channel_mult),
            num_blocks=num_blocks,
            attention=tuple(attention),
        )
        check_network(network, size)
        if image_channels < 1:
            raise ValueError(f"image_channels: at least 1, got {image_channels}")
        if num_classes < 0:
            raise ValueError(f"num_classes: 0 (unconditional) or more, got {num_classes}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: a probability in [0, 1), got {dropout}")
        resolutions = [size >> level for level in range(len(channel_mult))]

        self.size, self.image_channels, self.num_classes = size, image_channels, num_classes
        self.channels = channels
        width = 4 * channels
        if num_classes:
            self.map_label = _linear(num_classes, channels, generator)
        self.map_layer0 = _linear(channels, width, generator)
        self.map_layer1 = _linear(width, width, generator)

        def block(c_in: int, c_out: int, *, attend: bool = False, resample: int = 0) -> Block:
            return Block(c_in, c_out, width, attend, resample, dropout, generator)

        self.enc = nn.ModuleDict()
        c = channels
        skips = [c]
        self.enc[f"{size}x{size}_conv"] = _conv(image_channels, c, 3, generator)
        for res, mult in zip(resolutions, channel_mult, strict=True):
            if res != size:
                self.enc[f"{res}x{res}_down"] = block(c, c, resample=-1)
                skips.append(c)
            for i in range(num_blocks):
                self.enc[f"{res}x{res}_block{i}"] = block(
                    c, channels * mult, attend=res in attention
                )
                c = channels * mult
                skips.append(c)

        self.dec = nn.ModuleDict()
        for res, mult in reversed(list(zip(resolutions, channel_mult, strict=True))):
            if res == resolutions[-1]:
                self.dec[f"{res}x{res}_in0"] = block(c, c, attend=True)
                self.dec[f"{res}x{res}_in1"] = block(c, c)
            else:
                self.dec[f"{res}x{res}_up"] = block(c, c, resample=+1)
            for i in range(num_blocks + 1):
                self.dec[f"{res}x{res}_block{i}"] = block(
                    c + skips.pop(), channels * mult, attend=i == num_blocks and res in attention
                )
                c = channels * mult
        assert not skips
        self.dec[f"{size}x{size}_aux_norm"] = _norm(c)
        self.dec[f"{size}x{size}_aux_conv"] = _conv(c, image_channels, 3, generator, NEARLY_ZERO)

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """x [B, image_channels, size, size], c_noise [B] float, labels [B] int64 -> like x.

        A negative label, or labels=None, is the null class. A network with num_classes=0 ignores
        labels. Raises ValueError for another image shape; a label >= num_classes fails in the
        lookup (IndexError on CPU, device assert on CUDA: checking here would stall the GPU).
        """
        if x.shape[1:] != (self.image_channels, self.size, self.size):
            expected = f"[B, {self.image_channels}, {self.size}, {self.size}]"
            raise ValueError(f"x: expected {expected}, got {list(x.shape)}")
        encoder = [layer for layer in self.enc.values() if isinstance(layer, Block)]
        decoder = [layer for layer in self.dec.values() if isinstance(layer, Block)]

        # Neighbouring noise levels differ by 1e-3 in c_noise, below the resolution of bf16.
        with torch.autocast(x.device.type, enabled=False):
            emb = self._embed(c_noise.float(), labels)
            shifts = [block.affine(emb) for block in encoder + decoder]

        h: Tensor = self.enc[f"{self.size}x{self.size}_conv"](x)
        skips = [h]
        for block, shift in zip(encoder, shifts[: len(encoder)], strict=True):
            h = block(h, shift)
            skips.append(h)
        for block, shift in zip(decoder, shifts[len(encoder) :], strict=True):
            if block.c_in > h.shape[1]:
                h = torch.cat([h, skips.pop()], dim=1)
            h = block(h, shift)
        h = F.silu(self.dec[f"{self.size}x{self.size}_aux_norm"](h))
        out: Tensor = self.dec[f"{self.size}x{self.size}_aux_conv"](h)
        return out

    def _embed(self, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        """c_noise [B] fp32, labels [B] or None -> [B, 4 * channels]."""
        # Frequencies 10000^(-i / (M/2 - 1)), both ends included.
        freqs = torch.logspace(0, -4, self.channels // 2, device=c_noise.device)
        angles = c_noise[:, None] * freqs
        emb = torch.cat([angles.sin(), angles.cos()], dim=1)
        if self.num_classes:
            # Linear on (one-hot * sqrt(K)), as a lookup: row of the null class = zeros. Without
            # labels the lookup stays in the graph, so that DDP meets the same parameters always.
            if labels is None:
                labels = torch.full_like(c_noise, -1, dtype=torch.long)
            rows = F.embedding(labels.clamp(min=0), self.map_label.weight.t())
            scale = (labels >= 0).to(rows.dtype) * math.sqrt(self.num_classes)
            emb = emb + rows * scale[:, None] + self.map_label.bias
        emb = F.silu(self.map_layer0(emb))
        return F.silu(self.map_layer1(emb))


class Block(nn.Module):
    """Residual block with an additive embedding, then self-attention of one head where asked.

        h = conv0(resample(SiLU(norm0(x))))
        h = conv1(dropout(SiLU(norm1(h + shift))))
        x = (skip(resample(x)) + h) / sqrt(2)
        x = (x + proj(softmax(q k^T / sqrt(C)) v)) / sqrt(2),   q, k, v = qkv(norm2(x))

    resample: -1 halves the side (mean of 2x2), +1 doubles it (nearest), 0 keeps it.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        emb_width: int,
        attend: bool,
        resample: int,
        dropout: float,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.c_in, self.c_out = c_in, c_out
        self.attend, self.resample, self.dropout = attend, resample, dropout
        self.norm0 = _norm(c_in)
        self.conv0 = _conv(c_in, c_out, 3, generator)
        self.affine = _linear(emb_width, c_out, generator)
        self.norm1 = _norm(c_out)
        self.conv1 = _conv(c_out, c_out, 3, generator, NEARLY_ZERO)
        self.skip = _conv(c_in, c_out, 1, generator) if c_in != c_out or resample else None
        if attend:
            self.norm2 = _norm(c_out)
            self.qkv = _conv(c_out, 3 * c_out, 1, generator, ATTENTION_GAIN)
            self.proj = _conv(c_out, c_out, 1, generator, NEARLY_ZERO)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        """x [B, c_in, s, s], shift [B, c_out] -> [B, c_out, s', s']."""
        h = F.silu(self.norm0(x))
        if self.resample < 0:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        if self.resample > 0:
            h = F.interpolate(h, scale_factor=2.0, mode="nearest")
        h = self.conv0(h)
        h = F.silu(self.norm1(h + shift[:, :, None, None]))
        if self.dropout:
            h = F.dropout(h, self.dropout, self.training)
        h = self.conv1(h)
        if self.skip is not None:
            x = self.skip(x)
        if self.resample > 0:  # a 1x1 convolution commutes with the copying: do it on fewer pixels
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        x = h.add_(x).mul_(SQRT_HALF)  # nobody's backward needs the output of conv1
        return x.add(self._attention(x)).mul_(SQRT_HALF) if self.attend else x

    def _attention(self, x: Tensor) -> Tensor:
        """x [B, C, s, s] -> the attention branch, same shape."""
        c = self.c_out
        # Stored rows run (width, qkv) with q, k, v innermost. Reordering the small weight instead
        # of the activations gives q, k, v whose channels lie side by side, as the kernels want.
        weight = self.qkv.weight.view(c, 3, c).transpose(0, 1).reshape(3 * c, c)
        assert self.qkv.bias is not None
        bias = self.qkv.bias.view(c, 3).t().reshape(-1)
        tokens = self.norm2(x).flatten(2).transpose(1, 2)  # [B, s*s, C]
        q, k, v = F.linear(tokens, weight, bias).unsqueeze(1).chunk(3, dim=-1)  # [B, 1, s*s, C]
        a = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        a = F.linear(a, self.proj.weight.view(c, c), self.proj.bias)
        return a.transpose(1, 2).reshape(x.shape)


def _norm(c: int) -> nn.GroupNorm:
    return nn.GroupNorm(norm_groups(c), c, eps=1e-6)


def _conv(
    c_in: int, c_out: int, kernel: int, generator: torch.Generator | None, gain: float = 1.0
) -> nn.Conv2d:
    """Same-size convolution, Xavier-uniform weight times `gain`, zero bias."""
    # By way of "meta", so that torch's own initialisation draws nothing from the global generator.
    conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, device="meta").to_empty(device="cpu")
    assert conv.bias is not None
    nn.init.xavier_uniform_(conv.weight, gain, generator)
    nn.init.zeros_(conv.bias)
    return conv


def _linear(n_in: int, n_out: int, generator: torch.Generator | None) -> nn.Linear:
    """Linear layer, Xavier-uniform weight, zero bias."""
    linear = nn.Linear(n_in, n_out, device="meta").to_empty(device="cpu")
    nn.init.xavier_uniform_(linear.weight, generator=generator)
    nn.init.zeros_(linear.bias)
    return linear
