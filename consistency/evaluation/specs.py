"""The published feature networks: what each computes, and which file holds its weights.

Facts only, without torch: planning a run reads them too.
"""

from dataclasses import dataclass

from consistency.evaluation.protocol import FID_BYTES, FID_SHA256


@dataclass(frozen=True, kw_only=True)
class ExtractorSpec:
    """A published feature network."""

    name: str
    layer: str  # whose output is averaged over the image, or the token taken
    dim: int  # D, numbers per image
    resize: str  # "tf1", "bilinear" (half-pixel), "bicubic", "none"
    size: int  # side the network sees, in pixels
    file: str  # the name its weights go by in a weights folder
    sha256: str | None  # None: any file of the right shapes is taken, its hash only recorded
    bytes: int | None
    url: str | None  # where the weights are published; None: given by path alone
    licence: str


FILE = "file"  # any TorchScript or exported program

SPECS: dict[str, ExtractorSpec] = {
    spec.name: spec
    for spec in (
        ExtractorSpec(
            name="inception_fid",
            layer="pool3",
            dim=2048,
            resize="tf1",
            size=299,
            file="weights-inception-2015-12-05-6726825d.pth",
            sha256=FID_SHA256,
            bytes=FID_BYTES,
            url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
            "weights-inception-2015-12-05-6726825d.pth",
            licence="Apache-2.0",
        ),
        ExtractorSpec(
            name="dinov2_vitl14",
            layer="cls",
            dim=1024,
            resize="bicubic",
            size=224,
            file="dinov2_vitl14_pretrain.pth",
            sha256=None,
            bytes=None,
            url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
            licence="Apache-2.0",
        ),
        ExtractorSpec(
            name="googlenet_bvlc",
            layer="inception_5b",
            dim=1024,
            resize="bilinear",
            size=112,
            file="googlenet_bvlc_fp16.safetensors",
            sha256=None,
            bytes=None,
            url=None,
            licence="unrestricted",
        ),
        ExtractorSpec(
            name="squeezenet11",
            layer="fire9",
            dim=512,
            resize="bilinear",
            size=112,
            file="squeezenet11_fp32.safetensors",
            sha256=None,
            bytes=None,
            url=None,
            licence="BSD-2-Clause",
        ),
        ExtractorSpec(
            name="resnet56_cifar10",
            layer="layer3",
            dim=64,
            resize="none",
            size=32,
            file="resnet56_cifar10_fp32.safetensors",
            sha256=None,
            bytes=None,
            url=None,
            licence="BSD-2-Clause",
        ),
    )
}
