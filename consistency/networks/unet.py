"""The U that DDPM++, NCSN++ and ADM share; `song` and `adm` say how they embed and how they end.

Shapes: B images, C channels of the feature map at hand, S = side of the image, M = `channels`,
E = 4M the width of the embedding, K classes, L = len(channel_mult) resolutions S, S/2, S/4 ...

    c_noise [B], label [B], gap [B] -> embedding [B, E], fp32 (`_embed`)
    embedding -> a shift (and a factor) [B, C] per block, fp32

    x [B, image_channels, S, S]
      enc  {S}x{S}_conv                     -> [B, M, S, S]
           per resolution: _down, _block0 .. _block{num_blocks-1}; every output is kept as a skip
      dec  lowest resolution first: _in0 (attention), _in1, else _up;
           then _block0 .. _block{num_blocks}, each on cat(h, skip) [B, C + C_skip, s, s]
      norm, SiLU, convolution (`_output`)   -> [B, image_channels, S, S]

State-dict keys and shapes are those of the published weights (SongUNet, DhariwalUNet) without their
leading `model.`, so an importer strips that prefix and drops the `*.resample_filter` buffers: these
constants are in the code here.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consistency.config import NetworkConfig, check_network
from consistency.networks.blocks import SQRT_HALF, Block, Init, ResidualInput, Style


class UNet(nn.Module, ABC):
    """F(x; c_noise, label): the raw network that `parameterization` scales into a denoiser.

    network           widths, depths, attention; see `NetworkConfig`
    size              side of the square images, divisible by 2 ** (len(channel_mult) - 1)
    image_channels    1 or 3 (input and output)
    num_classes       0 = unconditional
    dropout           probability inside each block, in train mode only
    dropout_max_side  dropout only in blocks whose output has at most this side; None = in all
    gap               whether `forward` takes a second time (MeanFlow's t - r)
    generator         source of the initial weights; None = torch's global generator

    Raises ValueError, beginning with the name of the argument, for a network that cannot exist
    (those of `check_network` too).
    """

    attend_throughout: ClassVar[bool]  # attention in all blocks of a decoder level, or the last

    map_label: nn.Linear
    map_layer0: nn.Linear
    map_layer1: nn.Linear
    map_gap: nn.Linear

    def __init__(
        self,
        network: NetworkConfig,
        *,
        size: int,
        image_channels: int,
        num_classes: int,
        dropout: float = 0.0,
        dropout_max_side: int | None = None,
        gap: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_network(network, size)
        if image_channels < 1:
            raise ValueError(f"image_channels: at least 1, got {image_channels}")
        if num_classes < 0:
            raise ValueError(f"num_classes: 0 (unconditional) or more, got {num_classes}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: a probability in [0, 1), got {dropout}")
        if dropout_max_side is not None and dropout_max_side < 1:
            raise ValueError(f"dropout_max_side: at least 1 pixel, got {dropout_max_side}")
        self.network, self.gap = network, gap
        self.size, self.image_channels, self.num_classes = size, image_channels, num_classes
        style = self._style(network)
        init = Init(style.init, generator)
        noise_width = self._add_embedding(init)
        if gap:  # zero at first: a gap-less network's weights, once in, mean what they meant
            self.map_gap = init.linear(noise_width, noise_width, 0.0)

        def block(side: int, c_in: int, c_out: int, attend: bool, resample: int = 0) -> Block:
            return Block(
                c_in,
                c_out,
                4 * network.channels,
                style,
                init,
                heads=network.heads(c_out) if attend else 0,
                resample=resample,
                dropout=dropout if side <= (dropout_max_side or size) else 0.0,
            )

        c, c_aux = network.channels, image_channels
        widths = [network.channels * mult for mult in network.channel_mult]
        levels = [(size >> i, width) for i, width in enumerate(widths)]
        skips = [c]
        self.enc = nn.ModuleDict()
        self.enc[f"{size}x{size}_conv"] = init.conv(image_channels, c, 3)
        for side, width in levels:
            if side != size:
                self.enc[f"{side}x{side}_down"] = block(side, c, c, False, resample=-1)
                if network.architecture == "ncsnpp":
                    self.enc[f"{side}x{side}_aux_residual"] = ResidualInput(c_aux, c, init)
                    c_aux = c
                skips.append(c)
            for i in range(network.num_blocks):
                attend = side in network.attention
                self.enc[f"{side}x{side}_block{i}"] = block(side, c, width, attend)
                c = width
                skips.append(c)

        self.dec = nn.ModuleDict()
        for side, width in reversed(levels):
            if side == levels[-1][0]:
                self.dec[f"{side}x{side}_in0"] = block(side, c, c, True)
                self.dec[f"{side}x{side}_in1"] = block(side, c, c, False)
            else:
                self.dec[f"{side}x{side}_up"] = block(side, c, c, False, resample=+1)
            for i in range(network.num_blocks + 1):
                here = self.attend_throughout or i == network.num_blocks
                attend = here and side in network.attention
                self.dec[f"{side}x{side}_block{i}"] = block(side, c + skips.pop(), width, attend)
                c = width
        assert not skips
        self._add_output(c, style, init)

    def forward(
        self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None, gap: Tensor | None = None
    ) -> Tensor:
        """x [B, image_channels, size, size], c_noise [B] float, labels [B] int64 -> like x.

        A negative label, or labels=None, is the null class. A network with num_classes=0 ignores
        labels. gap [B] float goes with a network made for it, and with no other. Raises ValueError
        for another image shape and for a gap missing or unwanted; a label >= num_classes fails in
        the lookup (IndexError on CPU, device assert on CUDA: checking here would stall the GPU).
        """
        if x.shape[1:] != (self.image_channels, self.size, self.size):
            expected = f"[B, {self.image_channels}, {self.size}, {self.size}]"
            raise ValueError(f"x: expected {expected}, got {list(x.shape)}")
        if self.gap != (gap is not None):
            raise ValueError(
                "gap: this network was built with gap=True and needs one"
                if self.gap
                else "gap: this network was built without gap=True and takes none"
            )
        encoder = [layer for layer in self.enc.values() if isinstance(layer, Block)]
        decoder = [layer for layer in self.dec.values() if isinstance(layer, Block)]

        # Neighbouring noise levels differ by 1e-3 in c_noise, below the resolution of bf16. ("meta"
        # tensors, used to count FLOPs, know no autocast of their own.)
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            dtype = torch.promote_types(self.map_layer0.weight.dtype, torch.float32)
            emb = self._embed(c_noise.to(dtype), labels, None if gap is None else gap.to(dtype))
            conditions = iter([block.condition(emb) for block in encoder + decoder])

        h = aux = x
        skips: list[Tensor] = []
        for layer in self.enc.values():
            if isinstance(layer, Block):
                h = layer(h, *next(conditions))
                skips.append(h)
            elif isinstance(layer, ResidualInput):
                h = aux = skips[-1] = (h + layer(aux)).mul_(SQRT_HALF)
            else:
                h = layer(h)
                skips.append(h)
        for block in decoder:
            if block.c_in > h.shape[1]:
                h = torch.cat([h, skips.pop()], dim=1)
            h = block(h, *next(conditions))
        return self._output(h)

    @staticmethod
    @abstractmethod
    def _style(network: NetworkConfig) -> Style:
        """How the blocks of this kind of network look."""

    @abstractmethod
    def _add_embedding(self, init: Init) -> int:
        """Make the layers of `_embed`; the width of `_waves`."""

    @abstractmethod
    def _waves(self, t: Tensor) -> Tensor:
        """Sines and cosines of t [B] -> [B, width]."""

    @abstractmethod
    def _embed(self, c_noise: Tensor, labels: Tensor | None, gap: Tensor | None) -> Tensor:
        """c_noise, labels, gap, each [B] -> [B, 4 * channels]."""

    @abstractmethod
    def _add_output(self, c: int, style: Style, init: Init) -> None:
        """Make the layers of `_output` for c channels."""

    @abstractmethod
    def _output(self, h: Tensor) -> Tensor:
        """h [B, c, S, S] -> [B, image_channels, S, S]."""

    def _time(self, c_noise: Tensor, gap: Tensor | None) -> Tensor:
        """The waves of c_noise [B], plus a linear function of those of gap [B] -> [B, width]."""
        emb = self._waves(c_noise)
        return emb if gap is None else emb + self.map_gap(self._waves(gap))

    def _class_rows(self, labels: Tensor | None, like: Tensor) -> Tensor:
        """map_label.weight times the one-hot label, as a lookup; zeros for the null class."""
        # Without labels the lookup stays in the graph: DDP must always meet the same parameters.
        if labels is None:
            labels = torch.full(like.shape[:1], -1, device=like.device)
        rows = F.embedding(labels.clamp(min=0), self.map_label.weight.t())
        return rows * (labels >= 0)[:, None]


def frequencies(half: int, last: float, like: Tensor) -> Tensor:
    """`half` frequencies from 1 to 10000^(-last), evenly spaced on a log scale."""
    return torch.logspace(0, -4 * last, half, dtype=like.dtype, device=like.device)
