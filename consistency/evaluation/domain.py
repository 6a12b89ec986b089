"""A small classifier trained on the data at hand; its 64 penultimate features carry the metrics.

Inception features mean nothing on 8x8 digits and cost a download. A network that knows the classes
of *this* data set gives a Frechet distance and an accuracy in seconds on one CPU core; its numbers
compare runs on the same data with the same network, never with published FIDs.

Shapes: images uint8 [N, H, W, C] outside, float [B, C, H, W] in [-1, 1] inside.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from consistency.evaluation.protocol import DOMAIN_FEATURES
from consistency.sampling import from_uint8

ROTATIONS = 4
SMALLEST = 4  # side of the last feature map


class FeatureNet(nn.Module):
    """3x3 convolutions down to about 4x4 (three layers up to 32 pixels, four at 64), two linear.

    num_classes is the width of the output: of the data, or 4 where the task is to tell rotations.
    Initial weights come from `generator` (None = torch's global one).
    """

    def __init__(
        self,
        *,
        size: int,
        image_channels: int,
        num_classes: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if size < SMALLEST:
            raise ValueError(f"size: at least {SMALLEST} pixels, got {size}")
        self.size, self.image_channels, self.num_classes = size, image_channels, num_classes

        halvings, side = 0, size
        while side > SMALLEST:
            halvings, side = halvings + 1, (side + 1) // 2
        depth = max(3, halvings)
        # By way of "meta", so that torch's own initialisation draws nothing from the global
        # generator. Full-size layers first, then one halving per layer.
        self.convs = nn.ModuleList()
        c = image_channels
        for i in range(depth):
            width = 32 if i == 0 else 64
            stride = 2 if i >= depth - halvings else 1
            conv = nn.Conv2d(c, width, 3, stride, padding=1, device="meta")
            self.convs.append(conv.to_empty(device="cpu"))
            c = width
        self.hidden = nn.Linear(c * side * side, DOMAIN_FEATURES, device="meta").to_empty(
            device="cpu"
        )
        self.head = nn.Linear(DOMAIN_FEATURES, num_classes, device="meta").to_empty(device="cpu")
        for layer in [*self.convs, self.hidden, self.head]:
            assert isinstance(layer, nn.Conv2d | nn.Linear)
            assert layer.bias is not None
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)

    def features(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] in [-1, 1] -> [B, 64], each >= 0."""
        for conv in self.convs:
            x = F.relu(conv(x))
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] in [-1, 1] -> logits [B, num_classes]."""
        logits: Tensor = self.head(self.features(x))
        return logits


def feature_net_for(
    *,
    size: int,
    image_channels: int,
    num_classes: int,
    generator: torch.Generator | None = None,
) -> FeatureNet:
    """The untrained net for data of `num_classes`: with fewer than 2, its outputs are rotations.

    Whoever loads what `train_feature_net` made builds it here, so that both have equal shapes.
    """
    outputs = num_classes if num_classes >= 2 else ROTATIONS
    return FeatureNet(
        size=size, image_channels=image_channels, num_classes=outputs, generator=generator
    )


def train_feature_net(
    images_u8: NDArray[np.uint8],
    labels: NDArray[np.int64],
    num_classes: int,
    *,
    steps: int,
    batch: int = 128,
    seed: int,
    lr: float = 2e-3,
) -> FeatureNet:
    """Cross-entropy with Adam, lr falling linearly to 0; returned on the CPU in eval mode.

    images_u8 [N, H, W, C] square, labels [N] in 0..num_classes-1. With num_classes < 2 there is
    nothing to classify: labels are ignored and the task is to tell by which of 0, 90, 180, 270
    degrees an image was turned (Gidaris et al. 2018), so the returned network has 4 outputs.
    Same arguments, same weights: all randomness is `seed`'s, the global generator is not touched.
    Raises ValueError for images or labels that do not fit.
    """
    if len(images_u8) == 0 or steps < 1 or batch < 1:
        raise ValueError(f"{len(images_u8)} images, steps={steps}, batch={batch}: all must be >= 1")
    rotations = num_classes < 2
    if not rotations:
        _check_labels(labels, len(images_u8), num_classes)
    generator = torch.Generator().manual_seed(seed)
    net = feature_net_for(
        size=images_u8.shape[1],
        image_channels=images_u8.shape[-1],
        num_classes=num_classes,
        generator=generator,
    )
    _check_images(net, images_u8)
    pixels = torch.from_numpy(np.ascontiguousarray(images_u8))
    targets = torch.from_numpy(np.ascontiguousarray(labels, dtype=np.int64))

    optimizer = torch.optim.Adam(net.parameters(), lr)
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        while len(order) < batch:  # epoch after epoch, each in a new order
            order = torch.cat([order, torch.randperm(len(pixels), generator=generator)])
        index, order = order[:batch], order[batch:]
        x = from_uint8(pixels[index])
        if rotations:
            y = torch.randint(ROTATIONS, (batch,), generator=generator)
            x = torch.stack([x.rot90(k, (2, 3)) for k in range(ROTATIONS)])[y, torch.arange(batch)]
        else:
            y = targets[index]
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(net(x), y))
        optimizer.step()
    return net.eval()


def extract(net: FeatureNet, images_u8: NDArray[np.uint8], batch: int = 500) -> NDArray[np.float32]:
    """images_u8 [N, H, W, C] -> features [N, 64]; the batch size does not change the result."""
    _check_images(net, images_u8)
    out = np.empty((len(images_u8), DOMAIN_FEATURES), np.float32)
    with torch.no_grad():
        for x, where in _batches(net, images_u8, batch):
            out[where] = net.features(x).cpu().numpy()
    return out


def accuracy(
    net: FeatureNet, images_u8: NDArray[np.uint8], labels: NDArray[np.int64], batch: int = 500
) -> float:
    """Share in 0..1 of images the classifier takes for their label; images [N, H, W, C], N >= 1.

    Raises ValueError for labels outside the network's classes. A network trained on rotations
    answers rotations: here it needs turned images with labels 0..3.
    """
    _check_images(net, images_u8)
    _check_labels(labels, len(images_u8), net.num_classes)
    hits = 0
    with torch.no_grad():
        for x, where in _batches(net, images_u8, batch):
            hits += int((net(x).argmax(1).cpu().numpy() == labels[where]).sum())
    return hits / len(images_u8)


def _batches(
    net: FeatureNet, images_u8: NDArray[np.uint8], batch: int
) -> Iterator[tuple[Tensor, slice]]:
    """Network input [<= batch, C, H, W] on the network's device, and where it came from."""
    device = net.head.weight.device
    for start in range(0, len(images_u8), batch):
        where = slice(start, start + batch)
        pixels = torch.from_numpy(np.ascontiguousarray(images_u8[where]))
        yield from_uint8(pixels.to(device)), where


def _check_images(net: FeatureNet, images_u8: NDArray[np.uint8]) -> None:
    expected = (net.size, net.size, net.image_channels)
    if images_u8.dtype != np.uint8 or images_u8.shape[1:] != expected:
        raise ValueError(
            f"images: expected uint8 [N, {', '.join(map(str, expected))}], "
            f"got {images_u8.dtype} {list(images_u8.shape)}"
        )


def _check_labels(labels: NDArray[np.int64], count: int, num_classes: int) -> None:
    if labels.shape != (count,) or count == 0:
        raise ValueError(f"labels: expected one for each of {count} images, got {labels.shape}")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"labels: expected 0..{num_classes - 1}, got {labels.min()}..{labels.max()}"
        )
