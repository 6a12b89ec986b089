"""Networks F(c_in x; c_noise, labels), written from the formulas, laid out as public weights are."""

from consistency.networks.unet import UNet

__all__ = ["UNet"]
