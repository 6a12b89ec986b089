"""Published classifiers whose files are small and free: proxies where the FID network is not.

Weights go by the names of their .safetensors files. Each network takes float32 [B, 3, H, W] in
RGB on a scale of 0..255, subtracts its own mean, and returns (features [B, D], logits [B, K]):
the features are the last convolution's maps, averaged over the image.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BatchNorm(nn.Module):
    """Batch normalisation by fixed statistics; the four tensors of a trained layer and no more."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


def _per_channel(x: Tensor, *values: float) -> Tensor:
    """[3, 1, 1], to be taken from or divided into images."""
    return torch.tensor(values, device=x.device).view(3, 1, 1)


def _caffe(x: Tensor) -> Tensor:
    """Input of Caffe's model zoo: BGR minus ImageNet's mean colour."""
    return x.flip(1) - _per_channel(x, 104.0, 117.0, 123.0)


def imagenet_normalised(x: Tensor) -> Tensor:
    """0..255 -> ImageNet's mean 0 and standard deviation 1, per colour of RGB."""
    return (x / 255 - _per_channel(x, 0.485, 0.456, 0.406)) / _per_channel(x, 0.229, 0.224, 0.225)


def _pool(x: Tensor) -> Tensor:
    """3x3 maximum at stride 2; Caffe rounds the size up."""
    return F.max_pool2d(x, 3, 2, ceil_mode=True)


class Fire(nn.Module):
    """1x1 convolution to few channels, then 1x1 and 3x3 side by side (Iandola et al. 2016)."""

    def __init__(self, channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.s = nn.Conv2d(channels, squeeze, 1)
        self.e1 = nn.Conv2d(squeeze, expand, 1)
        self.e3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.s(x))
        return F.relu(torch.cat([self.e1(x), self.e3(x)], 1))


class SqueezeNet(nn.Module):
    """SqueezeNet 1.1, trained on ImageNet: 512 features from fire9, 1000 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 64, 3, 2)
        self.f2, self.f3 = Fire(64, 16, 64), Fire(128, 16, 64)
        self.f4, self.f5 = Fire(128, 32, 128), Fire(256, 32, 128)
        self.f6, self.f7 = Fire(256, 48, 192), Fire(384, 48, 192)
        self.f8, self.f9 = Fire(384, 64, 256), Fire(512, 64, 256)
        self.c10 = nn.Conv2d(512, 1000, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = _pool(F.relu(self.c1(_caffe(x))))
        x = _pool(self.f3(self.f2(x)))
        x = _pool(self.f5(self.f4(x)))
        x = self.f9(self.f8(self.f7(self.f6(x))))
        return x.mean((2, 3)), F.relu(self.c10(x)).mean((2, 3))


class Inception(nn.Module):
    """Four branches side by side: 1x1, 3x3 and 5x5 behind a 1x1 each, and pooling with a 1x1.

    widths: of 1x1, 3x3's reduction, 3x3, 5x5's reduction, 5x5, pooling (Szegedy et al. 2014).
    """

    def __init__(self, channels: int, widths: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        one, reduce3, three, reduce5, five, pool = widths
        self.b1 = nn.Conv2d(channels, one, 1)
        self.r3, self.b3 = nn.Conv2d(channels, reduce3, 1), nn.Conv2d(reduce3, three, 3, padding=1)
        self.r5, self.b5 = nn.Conv2d(channels, reduce5, 1), nn.Conv2d(reduce5, five, 5, padding=2)
        self.pp = nn.Conv2d(channels, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        branches = (
            self.b1(x),
            self.b3(F.relu(self.r3(x))),
            self.b5(F.relu(self.r5(x))),
            self.pp(F.max_pool2d(x, 3, 1, padding=1)),
        )
        return F.relu(torch.cat(branches, 1))


class GoogLeNet(nn.Module):
    """BVLC's GoogLeNet (Inception v1), trained on ImageNet: 1024 features of 5b, 1000 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 64, 7, 2, padding=3)
        self.c2r = nn.Conv2d(64, 64, 1)
        self.c2 = nn.Conv2d(64, 192, 3, padding=1)
        self.i3a = Inception(192, (64, 96, 128, 16, 32, 32))
        self.i3b = Inception(256, (128, 128, 192, 32, 96, 64))
        self.i4a = Inception(480, (192, 96, 208, 16, 48, 64))
        self.i4b = Inception(512, (160, 112, 224, 24, 64, 64))
        self.i4c = Inception(512, (128, 128, 256, 24, 64, 64))
        self.i4d = Inception(512, (112, 144, 288, 32, 64, 64))
        self.i4e = Inception(528, (256, 160, 320, 32, 128, 128))
        self.i5a = Inception(832, (256, 160, 320, 32, 128, 128))
        self.i5b = Inception(832, (384, 192, 384, 48, 128, 128))
        self.fc = nn.Linear(1024, 1000)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = _pool(F.relu(self.c1(_caffe(x))))
        x = F.local_response_norm(x, 5)  # alpha 1e-4, beta 0.75, over neighbouring channels
        x = F.relu(self.c2(F.relu(self.c2r(x))))
        x = _pool(F.local_response_norm(x, 5))
        x = _pool(self.i3b(self.i3a(x)))
        x = _pool(self.i4e(self.i4d(self.i4c(self.i4b(self.i4a(x))))))
        features = self.i5b(self.i5a(x)).mean((2, 3))
        return features, self.fc(features)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; where the width grows, the shortcut skips pixels and pads channels
    with zeros on both sides (option A of He et al. 2015, without parameters)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride, self.padding = stride, (width - channels) // 2
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = BatchNorm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = BatchNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.padding:
            x = x[:, :, :: self.stride, :: self.stride]
            x = F.pad(x, (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """ResNet-56 of He et al. 2015, trained on CIFAR-10 at 32x32: 64 features, 10 classes."""

    def __init__(self, blocks: int = 9) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = BatchNorm(16)
        self.layer1 = _stage(16, 16, 1, blocks)
        self.layer2 = _stage(16, 32, 2, blocks)
        self.layer3 = _stage(32, 64, 2, blocks)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.bn1(self.conv1(imagenet_normalised(x))))
        features = self.layer3(self.layer2(self.layer1(x))).mean((2, 3))
        return features, self.linear(features)


def _stage(channels: int, width: int, stride: int, blocks: int) -> nn.Sequential:
    rest = [BasicBlock(width, width, 1) for _ in range(blocks - 1)]
    return nn.Sequential(BasicBlock(channels, width, stride), *rest)
