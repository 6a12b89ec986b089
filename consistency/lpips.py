"""LPIPS: a perceptual distance from VGG16 features (Zhang et al. 2018, version 0.1).

Needs weights trained on ImageNet, which the user supplies as one file. They leak ImageNet into
whatever is trained with them, and so into its FID: an option, never a default.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# VGG16's 3x3 convolutions up to relu5_3, by stage: their places in torchvision's `features`
# (ReLUs and the max pool before every later stage take the numbers between) and their width.
STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
WIDTHS = (64, 128, 256, 512, 512)


class LPIPS(nn.Module):
    """Frozen network of the distance; differentiable with respect to the images.

    `weights` by the names of either layout: `features.0.weight` .. (torchvision's VGG16) or
    `net.slice1.0.weight` .. (the lpips package), with `lin0.model.1.weight` .. or
    `lins.0.model.1.weight` ..; others are ignored. Raises ValueError naming a tensor that is
    missing or misshapen, or a negative linear weight (no distance then).
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        # ImageNet's mean .485 .456 .406 and std .229 .224 .225, for images in [-1, 1].
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        self.register_buffer("shift", shift.view(3, 1, 1), persistent=False)
        self.register_buffer("scale", scale.view(3, 1, 1), persistent=False)

        self.stages, self.linear = nn.ModuleList(), nn.ParameterList()
        channels = 3
        for number, (places, width) in enumerate(zip(STAGES, WIDTHS, strict=True)):
            stage: list[nn.Module] = [nn.MaxPool2d(2)] if number > 0 else []
            for place in places:
                layouts = [f"features.{place}", f"net.slice{number + 1}.{place}"]
                conv = nn.Conv2d(channels, width, 3, padding=1, device="meta")
                conv.weight = _take(weights, layouts, "weight", (width, channels, 3, 3))
                conv.bias = _take(weights, layouts, "bias", (width,))
                stage += [conv, nn.ReLU(inplace=True)]
                channels = width
            self.stages.append(nn.Sequential(*stage))
            layouts = [f"lin{number}.model.1", f"lins.{number}.model.1"]
            linear = _take(weights, layouts, "weight", (1, width, 1, 1))
            if not bool((linear >= 0).all()):
                raise ValueError(f"{layouts[0]}.weight has negative entries: not weights of LPIPS")
            self.linear.append(linear)
        self.eval()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of each pair, float32 [B]; a and b [B, C, H, W] in [-1, 1] with C 1 or 3.

        Sides below 256 pixels are brought to 224 first, bilinearly (as Song et al. 2023 do).
        Always in float32, whatever the autocast. Raises ValueError on other or unequal shapes.
        """
        if a.shape != b.shape or a.ndim != 4 or a.shape[1] not in (1, 3):
            raise ValueError(
                "LPIPS compares two [B, 1 or 3, H, W] of one shape, got "
                f"{tuple(a.shape)} and {tuple(b.shape)}"
            )
        distance = torch.zeros(len(a), device=a.device)
        with torch.autocast("cpu" if a.is_meta else a.device.type, enabled=False):
            pairs = zip(self._features(a), self._features(b), self.linear, strict=True)
            for feature_a, feature_b, linear in pairs:
                squares = (_unit(feature_a) - _unit(feature_b)).square()
                distance = distance + (linear * squares).sum(1).mean((1, 2))
        return distance

    def _features(self, x: Tensor) -> Iterator[Tensor]:
        """The output of each stage's last ReLU, [B, width, H', W']."""
        x = x.float()
        if x.shape[-1] < 256:
            x = F.interpolate(x, size=224, mode="bilinear", align_corners=False)
        x = (x.expand(-1, 3, -1, -1) - self.shift) / self.scale
        for stage in self.stages:
            x = stage(x)
            yield x


def load_lpips(path: Path | str) -> LPIPS:
    """LPIPS with the weights of one file: .safetensors, or .pt or .pth holding tensors only.

    Raises ValueError, in one line that begins with the path, for a file that cannot be read as
    such or lacks a tensor.
    """
    path = Path(path)
    try:
        weights = _read(path)
    except Exception as error:  # each format has its own, torch's with a page of advice
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path}: cannot be read as weights of LPIPS: {reason}") from error
    try:
        return LPIPS(weights)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if path.suffix not in (".pt", ".pth"):
        raise ValueError("its name must end in .safetensors, .pt or .pth")
    weights = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(weights, Mapping):
        raise ValueError(f"it holds a {type(weights).__name__}, not tensors by name")
    return weights


def _take(
    weights: Mapping[str, Tensor], layouts: list[str], kind: str, shape: tuple[int, ...]
) -> nn.Parameter:
    """The tensor under its name in one of the layouts, as a frozen float32 parameter."""
    names = [f"{layout}.{kind}" for layout in layouts]
    found = [name for name in names if name in weights]
    if not found:
        raise ValueError(f"no tensor {names[0]} (nor {names[1]})")
    tensor = weights[found[0]]
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{found[0]} has shape {list(tensor.shape)}, expected {list(shape)}")
    return nn.Parameter(tensor.detach().float(), requires_grad=False)


def _unit(features: Tensor) -> Tensor:
    """Scaled to norm 1 over the channels; where all of them are 0 they stay so."""
    norm: Tensor = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return features / (norm + 1e-10)
