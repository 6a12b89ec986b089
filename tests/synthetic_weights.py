"""Weights of no training for the published networks: the same numbers on every machine."""

import numpy as np
import torch
from torch import Tensor, nn


def synthetic(net: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """A state dict from numpy's PCG64; activations neither fade nor grow, and negative ones occur.

    Convolutions N(0, 2 / fan in), biases and means N(0, 0.1), scales and variances U(0.5, 1.5).
    """
    random = np.random.Generator(np.random.PCG64(seed))
    weights = {}
    for name, tensor in sorted(net.state_dict().items()):
        shape = tuple(tensor.shape)
        if name.endswith(("running_var", "bn.weight")):
            values = random.uniform(0.5, 1.5, shape)
        elif len(shape) > 1:
            values = random.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        else:
            values = random.normal(0, 0.1, shape)
        weights[name] = torch.from_numpy(values.astype(np.float32))
    return weights


def pictures(count: int, height: int = 32, width: int = 32) -> np.ndarray:
    """uint8 [count, height, width, 3]: smooth waves, each picture and colour its own."""
    y, x = np.mgrid[:height, :width][..., None] / 32
    number = np.arange(count)[:, None, None, None]
    wave = np.sin((2 + number) * x + (1 + np.arange(3)) * y) * np.cos(3 * y - number * x)
    return np.floor(127.5 * wave + 128).clip(0, 255).astype(np.uint8)
