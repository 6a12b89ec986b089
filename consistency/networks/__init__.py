"""Networks F(c_in x; c_noise, labels), written from the formulas; layouts follow public weights."""

from consistency.networks.unet import UNet

__all__ = ["UNet"]
