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
from torch import Tensor, nn

from consistency import networks, sampling
from consistency.config import ChurnConfig, NetworkConfig, NoiseConfig
from consistency.parameterization import ConsistencyFunction, Denoiser, MeanVelocity, guided
from consistency.schedules import karras_sigmas


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """What must be known beside the weights to rebuild and sample a model."""

    kind: Literal["denoiser", "consistency", "mean_flow"]
    network: NetworkConfig
    noise: NoiseConfig
    size: int
    channels: int
    class_names: tuple[str, ...]
    boundary: float = 0.002  # sigma at which f is the identity
    lowest_sigma: float = 0.0  # trained from here upwards only (TCM's second stage)
    mid_sigma: float = 0.821  # second noise level of two-step sampling (iCT's for CIFAR-10)
    # Noise levels that a search found better than the default ones, one list per number of steps.
    searched: tuple[tuple[float, ...], ...] = ()

    @property
    def num_classes(self) -> int:
        """Classes the network is conditioned on; 0 when unconditional."""
        return len(self.class_names) if self.network.class_conditional else 0

    def sigmas(self, steps: int) -> list[float]:
        """The noise levels of a `steps`-step consistency sample, descending from sigma_max.

        Those `searched` for so many steps, if any. Else two steps use `mid_sigma`, more steps the
        Karras grid between sigma_max and the lowest level the model knows (sigma_min excluded). No
        level lies below `lowest_sigma`.
        """
        noise, lowest = self.noise, self.lowest_sigma
        if steps == 1:
            return [noise.sigma_max]
        for levels in self.searched:
            if len(levels) == steps:
                return list(levels)
        if steps == 2:
            return [noise.sigma_max, max(self.mid_sigma, lowest)]
        if lowest > 0:
            grid = karras_sigmas(steps, lowest, noise.sigma_max, noise.rho)
            return [float(s) for s in grid.flip(0)]
        grid = karras_sigmas(steps + 1, noise.sigma_min, noise.sigma_max, noise.rho)
        return [float(s) for s in grid.flip(0)[:-1]]

    def times(self, steps: int) -> list[float]:
        """The times of a `steps`-step MeanFlow sample, descending from 1.

        They pass through t = sigma / (1 + sigma) of the levels `searched` for so many steps. Else
        two steps pass through that of `mid_sigma`, more are equally long.
        """
        for levels in self.searched:
            if len(levels) == steps:
                return [1.0, *(sigma / (1 + sigma) for sigma in levels[1:])]
        if steps == 2:
            return [1.0, self.mid_sigma / (1 + self.mid_sigma)]
        return [1 - step / steps for step in range(steps)]

    @property
    def sampler(self) -> str:
        return {"denoiser": "heun", "consistency": "multistep", "mean_flow": "mean_flow"}[self.kind]

    def levels(self, steps: int) -> list[float]:
        """Where a sampler evaluates the network: sigmas, or MeanFlow's times; [] for Heun."""
        if self.kind == "denoiser":
            return []
        return self.times(steps) if self.kind == "mean_flow" else self.sigmas(steps)

    def evaluations(self, steps: int) -> int:
        """Network calls per image (guidance doubles them)."""
        return 2 * steps - 1 if self.kind == "denoiser" else steps

    def to_json(self) -> str:
        """What `from_json` reads; without `searched` where nothing was, as before there was one."""
        said = dataclasses.asdict(self)
        if not self.searched:
            del said["searched"]
        return json.dumps(said, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "ModelDescription":
        """Raises ValueError when a key is missing or unknown, or `searched` holds no numbers."""
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
                    "searched": tuple(tuple(map(_number, s)) for s in raw.get("searched", ())),
                }
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"config.json is not a cmforge model description: {error}") from error


def _number(raw: Any) -> float:
    if not isinstance(raw, int | float):
        raise TypeError(f"{raw!r} is no noise level")
    return float(raw)


def build_network(
    description: ModelDescription,
    dropout: float = 0.0,
    dropout_max_side: int | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The inner network F, untrained, in the memory layout it is fastest in.

    Measured on AVX2 cores, 3x3 convolutions at 16 to 32 pixels: channels last 1.0 to 2 times as
    fast; at 8 pixels no difference. GPU tensor cores want it too.
    """
    net = networks.build(
        description.network,
        size=description.size,
        image_channels=description.channels,
        num_classes=description.num_classes,
        dropout=dropout,
        dropout_max_side=dropout_max_side,
        gap=description.kind == "mean_flow",
        device=device,
    )
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def build(description: ModelDescription, weights: Mapping[str, Tensor]) -> "PublishedModel":
    """D, f or u in eval mode, with `weights` of the inner network F."""
    net = build_network(description)
    net.load_state_dict(dict(weights))
    net.eval().requires_grad_(False)
    noise = description.noise
    function: Denoiser | ConsistencyFunction | MeanVelocity
    if description.kind == "denoiser":
        function = Denoiser(net, noise.sigma_data, noise.c_noise)
    elif description.kind == "consistency":
        function = ConsistencyFunction(net, noise.sigma_data, description.boundary, noise.c_noise)
    else:
        function = MeanVelocity(net)
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
    function: Denoiser | ConsistencyFunction | MeanVelocity

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
        levels: Sequence[float] | None = None,
        guidance: float = 1.0,
        churn: ChurnConfig | None = None,
        batch: int = 250,
    ) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Images [n, H, W, C] uint8; row j depends on seed, indices[j] and the settings alone.

        levels: other noise levels (times, of a MeanFlow) than those of `steps`. guidance and churn
        are a denoiser's; churn needs two steps, as one is D itself. Raises ValueError for what this
        model cannot do.
        """
        if steps < 1:
            raise ValueError(f"steps: {steps} must be at least 1")
        about = self.description
        classes, diffusion = about.num_classes, about.kind == "denoiser"
        if label is not None and not 0 <= label < classes:
            raise ValueError(f"class: {label} is not one of this model's {classes} classes")
        if diffusion and levels is not None:
            raise ValueError("levels: a diffusion model takes Heun steps; give steps instead")
        if not diffusion and (guidance != 1 or churn is not None):
            raise ValueError("guidance and churn are a diffusion model's; this one has none")
        if guidance != 1 and classes == 0:
            raise ValueError("guidance: needs a class-conditional model")
        for sigma in levels or ():
            if sigma < about.lowest_sigma:
                raise ValueError(
                    f"levels: {sigma:g} lies below {about.lowest_sigma:g}, this model's lowest"
                )
        chunks = []
        for start in range(0, len(indices), batch):
            rows = indices[start : start + batch]
            images = self._sample(rows, steps, seed, label, levels, guidance, churn)
            chunks.append(sampling.to_uint8(images).cpu().numpy())
        return np.concatenate(chunks)

    def _sample(
        self,
        indices: Sequence[int],
        steps: int,
        seed: int,
        label: int | None,
        levels: Sequence[float] | None,
        guidance: float,
        churn: ChurnConfig | None,
    ) -> Tensor:
        about, noise = self.description, self.description.noise
        device = next(self.function.parameters()).device
        shape = (about.channels, about.size, about.size)
        labels = self.labels(indices, label)
        if labels is not None:
            labels = labels.to(device)

        def draw(number: int) -> Tensor:
            return sampling.sample_noise(seed, indices, shape, draw=number, device=device)

        levels = about.levels(steps) if levels is None else levels
        if isinstance(self.function, MeanVelocity):
            return sampling.sample_mean_flow(self.function, draw, levels, labels)
        if about.kind == "consistency":
            return sampling.sample_multistep(
                self.function,
                draw,
                levels,
                labels,
                sigma_min=about.boundary,
                sigma_max=noise.sigma_max,
            )
        denoise = guided(self.function, guidance)
        if steps == 1:  # Euler from sigma_max to 0 is D itself
            return sampling.sample_onestep(denoise, draw, labels, sigma_max=noise.sigma_max)
        return sampling.sample_heun(
            denoise,
            draw,
            steps,
            labels,
            sigma_min=noise.sigma_min,
            sigma_max=noise.sigma_max,
            rho=noise.rho,
            **({} if churn is None else churn.arguments()),
        )
