"""The network of the Frechet Inception Distance: Inception v3 as frozen in December 2015.

It is not the Inception v3 of model zoos: its 1008 outputs, its average pooling, which leaves the
padding out of the mean, and the maximum in place of the mean in its very last block are those of
the TensorFlow graph that all published FIDs were measured with (Szegedy et al. 2015, Heusel et
al. 2017).

Parameters go by the names of the converted weights: 472 tensors, 23,885,392 numbers.
Shapes: float32 [B, 3, 299, 299] on a scale of 0..255, brought there by `resize.tf1_bilinear`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from consistency.evaluation.backbones import BatchNorm


class ConvBN(nn.Module):
    """Convolution without bias, normalisation by stored statistics, ReLU.

    Padded so that the size stays ("same"), or not at all.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        kernel: int | tuple[int, int] = 1,
        stride: int = 1,
        same: bool = True,
    ) -> None:
        super().__init__()
        size = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (size[0] // 2, size[1] // 2) if same else (0, 0)
        self.conv = nn.Conv2d(channels, width, size, stride, padding, bias=False)
        self.bn: nn.Module = BatchNorm(width, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)

    def fold(self) -> None:
        """The normalisation goes into the convolution's weight and bias: one pass less."""
        bn = self.bn
        assert isinstance(bn, BatchNorm)
        self.conv.weight, self.conv.bias = fuse_conv_bn_weights(
            self.conv.weight, None, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
        )
        self.bn = nn.Identity()


def _mean3x3(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False)


def _max3x3(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 1, padding=1)


class BlockA(nn.Module):
    """35x35: 1x1, 5x5, two 3x3, mean."""

    def __init__(self, channels: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = ConvBN(channels, 64)
        self.branch5x5_1 = ConvBN(channels, 48)
        self.branch5x5_2 = ConvBN(48, 64, 5)
        self.branch3x3dbl_1 = ConvBN(channels, 64)
        self.branch3x3dbl_2 = ConvBN(64, 96, 3)
        self.branch3x3dbl_3 = ConvBN(96, 96, 3)
        self.branch_pool = ConvBN(channels, pooled)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_mean3x3(x))], 1)


class BlockB(nn.Module):
    """35x35 -> 17x17: 3x3, two 3x3, maximum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3 = ConvBN(channels, 384, 3, stride=2, same=False)
        self.branch3x3dbl_1 = ConvBN(channels, 64)
        self.branch3x3dbl_2 = ConvBN(64, 96, 3)
        self.branch3x3dbl_3 = ConvBN(96, 96, 3, stride=2, same=False)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), three, F.max_pool2d(x, 3, 2)], 1)


class BlockC(nn.Module):
    """17x17: 1x1, one 7x7 and two 7x7 as pairs of 1x7 and 7x1, mean."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        row, column = (1, 7), (7, 1)
        self.branch1x1 = ConvBN(channels, 192)
        self.branch7x7_1 = ConvBN(channels, width)
        self.branch7x7_2 = ConvBN(width, width, row)
        self.branch7x7_3 = ConvBN(width, 192, column)
        self.branch7x7dbl_1 = ConvBN(channels, width)
        self.branch7x7dbl_2 = ConvBN(width, width, column)
        self.branch7x7dbl_3 = ConvBN(width, width, row)
        self.branch7x7dbl_4 = ConvBN(width, width, column)
        self.branch7x7dbl_5 = ConvBN(width, 192, row)
        self.branch_pool = ConvBN(channels, 192)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), seven, twice, self.branch_pool(_mean3x3(x))], 1)


class BlockD(nn.Module):
    """17x17 -> 8x8: 3x3, 7x7 and 3x3, maximum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3_1 = ConvBN(channels, 192)
        self.branch3x3_2 = ConvBN(192, 320, 3, stride=2, same=False)
        self.branch7x7x3_1 = ConvBN(channels, 192)
        self.branch7x7x3_2 = ConvBN(192, 192, (1, 7))
        self.branch7x7x3_3 = ConvBN(192, 192, (7, 1))
        self.branch7x7x3_4 = ConvBN(192, 192, 3, stride=2, same=False)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([three, self.branch7x7x3_4(seven), F.max_pool2d(x, 3, 2)], 1)


class BlockE(nn.Module):
    """8x8: 1x1, 3x3 and two 3x3 whose last is split into 1x3 beside 3x1, and pooling.

    The graph pools by the mean in the first of these blocks and by the maximum in the second.
    """

    def __init__(self, channels: int, maximum: bool) -> None:
        super().__init__()
        row, column = (1, 3), (3, 1)
        self.pool = _max3x3 if maximum else _mean3x3
        self.branch1x1 = ConvBN(channels, 320)
        self.branch3x3_1 = ConvBN(channels, 384)
        self.branch3x3_2a = ConvBN(384, 384, row)
        self.branch3x3_2b = ConvBN(384, 384, column)
        self.branch3x3dbl_1 = ConvBN(channels, 448)
        self.branch3x3dbl_2 = ConvBN(448, 384, 3)
        self.branch3x3dbl_3a = ConvBN(384, 384, row)
        self.branch3x3dbl_3b = ConvBN(384, 384, column)
        self.branch_pool = ConvBN(channels, 192)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branches = [
            self.branch1x1(x),
            *(self.branch3x3_2a(three), self.branch3x3_2b(three)),
            *(self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice)),
            self.branch_pool(self.pool(x)),
        ]
        return torch.cat(branches, 1)


class InceptionV3(nn.Module):
    """x -> (pool3 [B, 2048], logits without their bias [B, 1008], as the Inception Score has it).

    As loaded it computes what torch-fidelity computes, to the bit; folded, the same to 1e-6.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, stride=2, same=False)
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvBN(64, 80)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3, same=False)
        self.Mixed_5b = BlockA(192, 32)
        self.Mixed_5c = BlockA(256, 64)
        self.Mixed_5d = BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(768, 128)
        self.Mixed_6c = BlockC(768, 160)
        self.Mixed_6d = BlockC(768, 160)
        self.Mixed_6e = BlockC(768, 192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b = BlockE(1280, maximum=False)
        self.Mixed_7c = BlockE(2048, maximum=True)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = (x - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, 2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6a(x)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        x = self.Mixed_7a(x)
        x = self.Mixed_7c(self.Mixed_7b(x))
        pool3 = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return pool3, pool3.mm(self.fc.weight.T)

    def fold(self) -> "InceptionV3":
        """Every normalisation into its convolution; no state dict fits it any more."""
        for module in self.modules():
            if isinstance(module, ConvBN):
                module.fold()
        return self
