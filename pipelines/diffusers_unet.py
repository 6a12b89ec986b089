"""The code of an exported diffusers model that UNet2DModel cannot hold; diffusers runs it.

`diffusers_code` flattens this file, with what it needs of `consistency`, to the one file that
travels in the folder: diffusers copies a component's file elsewhere before it runs it, and fetches
no second one from a hub. It needs diffusers and torch; cmforge need not be installed there.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

from consistency.config import NetworkConfig
from consistency.networks import build
from consistency.parameterization import noise_label


class CmforgeUNet(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """F(c_in x; c_noise, labels) with the face of UNet2DModel.

    `description` is cmforge's own of the model (`config.json` of its model folders).
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        sample_size: int,
        in_channels: int,
        out_channels: int,
        num_class_embeds: int | None,
        description: Mapping[str, Any],
    ) -> None:
        super().__init__()
        assert in_channels == out_channels
        network: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in description["network"].items()
        }
        self.net = build(
            NetworkConfig(**network),
            size=sample_size,
            image_channels=in_channels,
            num_classes=num_class_embeds or 0,
        )

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """sample = c_in x [B, C, H, W], timestep = 1000 ln(sigma) / 4 by the scheduler."""
        if self.dtype != torch.float32:
            raise ValueError("weights must stay float32; for speed, call under torch.autocast")
        about, noise = self.config.description, self.config.description["noise"]
        time = torch.as_tensor(timestep, dtype=torch.float64, device=sample.device)
        sigma = (time / 250).exp().float().expand(len(sample))
        lowest = about["lowest_sigma"]
        if bool((sigma < lowest * (1 - 1e-6)).any()):
            raise ValueError(f"this model knows no noise level below {lowest:g}: give timesteps")
        c_noise = noise_label(sigma, noise["sigma_data"], noise["c_noise"])
        output = self.net(sample.float(), c_noise, class_labels)
        return UNet2DOutput(sample=output) if return_dict else (output,)
