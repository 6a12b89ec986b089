"""DINOv2's ViT-L/14, whose class token carries FD-DINOv2 (Oquab et al. 2023, Stein et al. 2023).

Parameters go by the names of the published checkpoint. That file was not at hand when this was
written: the code is held by a recomputation from the formulas on narrow random networks.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consistency.evaluation.backbones import imagenet_normalised

PATCH = 14
TRAINED = 518  # side of the images its position embedding was trained on: 37 x 37 patches
_OFFSET = 0.1  # see `_positions`


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, tokens, width / heads]
        x = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.proj(x.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.ls1 = Attention(width, heads), LayerScale(width)
        self.mlp, self.ls2 = MLP(width), LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        out: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return out


class PatchEmbed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, PATCH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return out


class DINOv2(nn.Module):
    """float32 [B, 3, S, S] on a scale of 0..255, S a multiple of 14 -> (class token [B, width],
    after the last norm; None, for it has no classes)."""

    def __init__(self, width: int = 1024, depth: int = 24, heads: int = 16) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (TRAINED // PATCH) ** 2, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # in the file; used in training only
        self.patch_embed = PatchEmbed(width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        side = x.shape[-1] // PATCH
        x = self.patch_embed(imagenet_normalised(x))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self._positions(side)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0], None

    def _positions(self, side: int) -> Tensor:
        """The embedding [1, 1 + side^2, width]: of the class token, and bicubic of the grid.

        The original asks for (side + 0.1) / 37 as the scale, to be safe from rounding, and its
        features come with that: pixel i is read at 37 / (side + 0.1) of its place, not 37 / side.
        """
        token, grid = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        trained = math.isqrt(grid.shape[1])
        if side == trained:
            return self.pos_embed
        grid = grid.reshape(1, trained, trained, -1).permute(0, 3, 1, 2)
        scale = (side + _OFFSET) / trained
        grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
        return torch.cat([token, grid.flatten(2).transpose(1, 2)], 1)
