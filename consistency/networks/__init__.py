"""Networks F(c_in x; c_noise, labels), written from the formulas; layouts follow public weights."""

import torch

from consistency.config import NetworkConfig
from consistency.networks.adm import ADM
from consistency.networks.song import SongUNet
from consistency.networks.unet import UNet

__all__ = ["ADM", "SongUNet", "UNet", "build"]


def build(
    network: NetworkConfig,
    *,
    size: int,
    image_channels: int,
    num_classes: int,
    dropout: float = 0.0,
    dropout_max_side: int | None = None,
    gap: bool = False,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> UNet:
    """The network a description stands for, with initial weights; arguments as of `UNet`.

    device is where the weights are made, and the generator's; None = torch's default device. On
    "meta" the network has shapes but no memory, whatever its size.
    Raises ValueError, beginning with the name of the argument, for a network that cannot exist.
    """
    make = ADM if network.architecture == "adm" else SongUNet
    with torch.device(torch.get_default_device() if device is None else device):
        return make(
            network,
            size=size,
            image_channels=image_channels,
            num_classes=num_classes,
            dropout=dropout,
            dropout_max_side=dropout_max_side,
            gap=gap,
            generator=generator,
        )
