"""Images to features, by networks whose weights are known by their hash.

Everything is float32: no autocast, no TF32, no reduced products, whatever the process has set.

Weights are read without running what they hold: .safetensors, or torch files of tensors only. A
network of the user's own is a program, as TorchScript or an exported .pt2. Loading TorchScript runs
no Python: torch's C++ reader knows tensors and TorchScript's classes and refuses anything else a
pickle could name; exported programs are gone through first (exported.py). Programs all the same,
which may call operators of torch, and some of those read and write files: give only ones you trust.

Shapes: images uint8 [N, H, W, C] outside, float32 [B, 3, S, S] on a scale of 0..255 inside.
"""

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from consistency.evaluation.backbones import CifarResNet, GoogLeNet, SqueezeNet
from consistency.evaluation.dinov2 import DINOv2
from consistency.evaluation.domain import FeatureNet
from consistency.evaluation.exported import load_exported
from consistency.evaluation.inception import InceptionV3
from consistency.evaluation.protocol import DOMAIN, DOMAIN_FEATURES, FeatureProtocol
from consistency.evaluation.resize import resize
from consistency.evaluation.specs import FILE, SPECS, ExtractorSpec
from consistency.sampling import from_uint8

BATCH = 32  # images at a time; larger ones are no faster
DOMAIN_BATCH = 500
_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "inception_fid": InceptionV3,
    "dinov2_vitl14": DINOv2,
    "googlenet_bvlc": GoogLeNet,
    "squeezenet11": SqueezeNet,
    "resnet56_cifar10": CifarResNet,
}

# uint8 [B, H, W, C] -> features [B, D], logits [B, K] or None
Forward = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Features:
    """pooled [N, D]; logits [N, K], the classifier's scores (Inception's without their bias, as
    the Inception Score has them), or None where the network has no classes."""

    pooled: NDArray[np.float32]
    logits: NDArray[np.float32] | None


class Extractor:
    """A feature network, ready to use. `protocol` says which it is."""

    def __init__(
        self,
        protocol: FeatureProtocol,
        forward: Forward,
        *,
        device: str | torch.device = "cpu",
        batch: int = BATCH,
    ) -> None:
        self.protocol, self.batch = protocol, batch
        self._forward, self._device = forward, torch.device(device)

    def __call__(self, images_u8: NDArray[np.uint8]) -> Features:
        """images_u8 [N, H, W, C], N >= 1, C 1 (grey, repeated) or 3 -> their features, in order.

        Raises ValueError for other images, a size the network does not take, or features that
        are not finite.
        """
        name = self.protocol.extractor
        if images_u8.dtype != np.uint8 or images_u8.ndim != 4 or images_u8.shape[3] not in (1, 3):
            got = f"{images_u8.dtype} {list(images_u8.shape)}"
            raise ValueError(f"{name}: images must be uint8 [N, H, W, 1 or 3], got {got}")
        if images_u8.size == 0:
            raise ValueError(f"{name}: needs at least one image, got {list(images_u8.shape)}")
        pooled, logits = [], []
        with torch.inference_mode(), exact_float32(self._device):
            for start in range(0, len(images_u8), self.batch):
                pixels = np.ascontiguousarray(images_u8[start : start + self.batch])
                features, scores = self._forward(torch.from_numpy(pixels).to(self._device))
                if not bool(features.isfinite().all()):
                    stop = start + len(pixels)
                    raise ValueError(
                        f"{name}: features of images {start}..{stop - 1} are not finite; "
                        f"are these its weights?"
                    )
                pooled.append(features.cpu().numpy())
                if scores is not None:
                    logits.append(scores.cpu().numpy())
        return Features(np.concatenate(pooled), np.concatenate(logits) if logits else None)


def load_extractor(name: str, path: Path, *, device: str | torch.device = "cpu") -> Extractor:
    """A network of SPECS with the weights of a file, or with `name` "file" a program.

    Where the spec pins a hash, another file is refused. A program takes uint8 [B, 3, H, W], resizes
    and normalises by itself, and returns float [B, D]; one with an argument `return_features` gets
    True for it (the convention of StyleGAN's detectors). It is called as its file, without suffix.
    Raises ValueError, in one line that begins with the path.
    """
    path = Path(path)
    try:
        if name == FILE:
            return _program(path, torch.device(device))
        return _published(SPECS[name], path, torch.device(device))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def domain_extractor(net: FeatureNet, weights_sha256: str, device: str | torch.device) -> Extractor:
    """The classifier trained on the data at hand: its features, and its logits."""
    net = net.to(device).eval()
    protocol = FeatureProtocol(
        extractor=DOMAIN,
        weights_sha256=weights_sha256,
        layer="hidden",
        dim=DOMAIN_FEATURES,
        resize="none",
        size=net.size,
        channels="native",
    )
    expected = (net.size, net.size, net.image_channels)

    def forward(pixels: Tensor) -> tuple[Tensor, Tensor]:
        if pixels.shape[1:] != expected:
            raise ValueError(f"{DOMAIN}: expected {expected} images, got {tuple(pixels.shape[1:])}")
        features = net.features(from_uint8(pixels))
        return features, net.head(features)

    return Extractor(protocol, forward, device=device, batch=DOMAIN_BATCH)


@contextlib.contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Products and convolutions in full float32, whatever training has allowed in the process."""
    products = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    cudnn = torch.backends.cudnn
    try:
        with (
            torch.autocast(device.type, enabled=False),
            cudnn.flags(
                enabled=cudnn.enabled,
                benchmark=cudnn.benchmark,
                deterministic=cudnn.deterministic,
                allow_tf32=False,
            ),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(products)


# --- published networks --------------------------------------------------------------------------


def _published(spec: ExtractorSpec, path: Path, device: torch.device) -> Extractor:
    digest, size = _sha256(path), path.stat().st_size
    if spec.sha256 not in (None, digest) or spec.bytes not in (None, size):
        raise ValueError(
            f"not the weights of {spec.name}: {size:,} bytes, sha256 {digest}; expected "
            f"{spec.bytes:,} bytes, sha256 {spec.sha256}; get them again"
        )

    with torch.device("meta"):  # no memory, no random numbers
        net = _NETWORKS[spec.name]()
    _assign(net, _read(path))
    if isinstance(net, InceptionV3):
        net = net.fold()
    net = net.requires_grad_(False).eval().to(device)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        x = resize(_rgb(pixels).float(), spec.resize, spec.size)
        out: tuple[Tensor, Tensor | None] = net(x.contiguous(memory_format=torch.channels_last))
        return out

    protocol = FeatureProtocol(
        extractor=spec.name,
        weights_sha256=digest,
        layer=spec.layer,
        dim=spec.dim,
        resize=spec.resize,
        size=spec.size,
    )
    return Extractor(protocol, forward, device=device)


def _read(path: Path) -> Mapping[str, Tensor]:
    """Tensors by name. ValueError for a file that holds anything else, or nothing readable."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # each format has its own, torch's with a page of advice
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"cannot be read as tensors by name: {reason}") from error
    if not isinstance(weights, Mapping) or not all(
        isinstance(value, Tensor) for value in weights.values()
    ):
        raise ValueError("holds other things than tensors by name; give a state dict")
    return weights


def _assign(net: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Into a network on "meta", as float32. ValueError names what does not fit."""
    # Counters of training, which some converters keep.
    weights = {k: v.float() for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    expected = net.state_dict()
    for key, wanted in expected.items():
        if key not in weights:
            raise ValueError(f"no tensor {key}; is it the weights of another network?")
        if weights[key].shape != wanted.shape:
            got = list(weights[key].shape)
            raise ValueError(f"{key} has shape {got}, expected {list(wanted.shape)}")
    for key in weights.keys() - expected.keys():
        raise ValueError(f"tensor {key} has no place in the network; is it of another one?")
    net.load_state_dict(weights, assign=True)


def _rgb(pixels: Tensor) -> Tensor:
    """[B, H, W, 1 or 3] -> [B, 3, H, W], grey repeated."""
    return pixels.permute(0, 3, 1, 2).expand(-1, 3, -1, -1)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- a network of the user's own -----------------------------------------------------------------


def _program(path: Path, device: torch.device) -> Extractor:
    name = re.sub("[^0-9A-Za-z]+", "_", path.stem).strip("_")
    if name in ("", DOMAIN, *SPECS):
        raise ValueError(f"rename it: fd_{name} is what another network's distances are called")
    digest = _sha256(path)
    side: tuple[int, ...] = (32, 32)
    pools = False
    if path.suffix == ".pt2":
        module, example = load_exported(path, device)
        side = example[2:]
    else:
        try:
            module = torch.jit.load(str(path), map_location=device)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise ValueError(f"not a TorchScript file: {_last_line(error)}") from error
        module.eval()
        pools = any(a.name == "return_features" for a in module.forward.schema.arguments)

    def forward(pixels: Tensor) -> tuple[Tensor, None]:
        x = _rgb(pixels).contiguous()
        try:
            out = module(x, return_features=True) if pools else module(x)
        except (RuntimeError, AssertionError) as error:
            shape = list(x.shape)
            raise ValueError(f"fails on uint8 {shape}: {_last_line(error)}") from error
        if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(x):
            got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"must return float [B, D] for uint8 [B, 3, H, W], got {got}")
        return out.float(), None

    with torch.inference_mode(), exact_float32(device):
        features, _ = forward(torch.zeros(2, *side, 3, dtype=torch.uint8, device=device))
    protocol = FeatureProtocol(
        extractor=name,
        weights_sha256=digest,
        layer="features" if pools else "output",
        dim=features.shape[1],
        resize="own",
        size=0,
    )
    return Extractor(protocol, forward, device=device)


def _last_line(error: Exception) -> str:
    """Where TorchScript says what happened, after a page of where."""
    return str(error).strip().splitlines()[-1]
