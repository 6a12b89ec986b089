"""A finished model as a folder: `weights.safetensors` and `config.json`, and how to sample from it.

Everything that serves a model (evaluation, the command line, the MLflow model) goes through
`generate`, so the same seed gives the same images everywhere.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from consistency import sampling
from consistency.config import NetworkConfig, NoiseConfig
from consistency.networks.unet import UNet
from consistency.parameterization import ConsistencyFunction, Denoiser
from consistency.schedules import karras_sigmas


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """What must be known beside the weights to rebuild and sample a model."""

    kind: Literal["denoiser", "consistency"]
    network: NetworkConfig
    noise: NoiseConfig
    size: int
    channels: int
    class_names: tuple[str, ...]
    mid_sigma: float = 0.821  # second noise level of two-step sampling (iCT's for CIFAR-10)

    @property
    def num_classes(self) -> int:
        """Classes the network is conditioned on; 0 when unconditional."""
        return len(self.class_names) if self.network.class_conditional else 0

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "ModelDescription":
        """Raises ValueError when a key is missing or unknown."""
        raw = json.loads(text)
        try:
            network: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in raw["network"].items()
            }
            return cls(
                **{
                    **raw,
                    "network": NetworkConfig(**network),
                    "noise": NoiseConfig(**raw["noise"]),
                    "class_names": tuple(raw["class_names"]),
                }
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"config.json is not a cmforge model description: {error}") from error


def build_network(description: ModelDescription, dropout: float = 0.0) -> UNet:
    """The inner network F, untrained, in the memory layout it is fastest in.

    Measured on AVX2 cores, 3x3 convolutions at 16 to 32 pixels: channels last 1.0 to 2 times as
    fast; at 8 pixels no difference. GPU tensor cores want it too.
    """
    network = description.network
    net = UNet(
        size=description.size,
        image_channels=description.channels,
        num_classes=description.num_classes,
        channels=network.channels,
        channel_mult=network.channel_mult,
        num_blocks=network.num_blocks,
        attention=network.attention,
        dropout=dropout,
    )
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def build(description: ModelDescription, weights: Mapping[str, Tensor]) -> "PublishedModel":
    """Denoiser D or consistency function f in eval mode, with `weights` of the inner network F."""
    net = build_network(description)
    net.load_state_dict(dict(weights))
    net.eval().requires_grad_(False)
    noise = description.noise
    function = (
        Denoiser(net, noise.sigma_data)
        if description.kind == "denoiser"
        else ConsistencyFunction(net, noise.sigma_data, noise.sigma_min)
    )
    return PublishedModel(description, function)


def load(folder: Path) -> "PublishedModel":
    """Read a model folder. Raises FileNotFoundError or ValueError for what is not one."""
    from safetensors.torch import load_file

    description = ModelDescription.from_json((folder / "config.json").read_text())
    return build(description, load_file(folder / "weights.safetensors"))


@dataclass(frozen=True)
class PublishedModel:
    """A model ready to sample."""

    description: ModelDescription
    function: Denoiser | ConsistencyFunction

    def sigmas(self, steps: int) -> list[float]:
        """The noise levels of a `steps`-step consistency sample, descending from sigma_max.

        Two steps use `mid_sigma`; more steps take the Karras grid between sigma_max and sigma_min
        (its end excluded).
        """
        noise = self.description.noise
        if steps == 1:
            return [noise.sigma_max]
        if steps == 2:
            return [noise.sigma_max, self.description.mid_sigma]
        grid = karras_sigmas(steps + 1, noise.sigma_min, noise.sigma_max, noise.rho)
        return [float(s) for s in grid.flip(0)[:-1]]

    def evaluations(self, steps: int) -> int:
        """Network calls per image."""
        return 2 * steps - 1 if self.description.kind == "denoiser" else steps

    def labels(self, indices: Sequence[int], label: int | None = None) -> Tensor | None:
        """Class of each sample: the one asked for, else sample i gets class i mod num_classes."""
        classes = self.description.num_classes
        if classes == 0:
            return None
        if label is None:
            return torch.tensor([i % classes for i in indices])
        return torch.full((len(indices),), label)

    def generate(
        self,
        indices: Sequence[int],
        *,
        steps: int,
        seed: int,
        label: int | None = None,
        batch: int = 250,
    ) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Images [n, H, W, C] uint8; row j depends on (seed, indices[j], label, steps) alone.

        Raises ValueError for a step count or label the model does not have.
        """
        if steps < 1:
            raise ValueError(f"steps: {steps} must be at least 1")
        classes = self.description.num_classes
        if label is not None and not 0 <= label < classes:
            raise ValueError(f"class: {label} is not one of this model's {classes} classes")
        chunks = [
            self._generate_batch(indices[start : start + batch], steps, seed, label)
            for start in range(0, len(indices), batch)
        ]
        return np.concatenate(chunks)

    def _generate_batch(
        self, indices: Sequence[int], steps: int, seed: int, label: int | None
    ) -> np.ndarray[Any, np.dtype[np.uint8]]:
        about, noise = self.description, self.description.noise
        device = next(self.function.parameters()).device
        shape = (about.channels, about.size, about.size)
        labels = self.labels(indices, label)
        if labels is not None:
            labels = labels.to(device)

        def draw(number: int) -> Tensor:
            return sampling.sample_noise(seed, indices, shape, draw=number, device=device)

        if steps == 1:  # for a denoiser too: Euler from sigma_max to 0 is D itself
            images = sampling.sample_onestep(self.function, draw, labels, sigma_max=noise.sigma_max)
        elif about.kind == "denoiser":
            images = sampling.sample_heun(
                self.function,
                draw,
                steps,
                labels,
                sigma_min=noise.sigma_min,
                sigma_max=noise.sigma_max,
                rho=noise.rho,
            )
        else:
            images = sampling.sample_multistep(
                self.function,
                draw,
                self.sigmas(steps),
                labels,
                sigma_min=noise.sigma_min,
                sigma_max=noise.sigma_max,
            )
        return sampling.to_uint8(images).cpu().numpy()
