"""From the raw network F to the denoiser D and the consistency function f.

Both are c_skip x + c_out F(c_in x, c_noise, labels); only c_skip and c_out differ, so a student is
started from its teacher by copying the weights (and buffers) of `.net`.
"""

import torch
from torch import Tensor, nn


def edm_coefficients(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(c_skip, c_out, c_in, c_noise) of the denoiser, each shaped as sigma (Table 1, EDM).

    Raises ValueError unless sigma is float32 or float64: rounded to bfloat16, 72, 75 and 80 give
    nearly the same network input.
    """
    _require_full_precision(sigma)
    variance = sigma**2 + sigma_data**2
    c_skip = sigma_data**2 / variance
    c_out = sigma * sigma_data * variance.rsqrt()
    c_in = variance.rsqrt()
    # Level 0 occurs (ECT's r = 0) and must stay finite: there c_out = 0 silences the network.
    c_noise = sigma.clamp_min(torch.finfo(torch.float32).tiny).log() / 4
    return c_skip, c_out, c_in, c_noise


def boundary_coefficients(
    sigma: Tensor, sigma_data: float, sigma_min: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(c_skip, c_out, c_in, c_noise) of f; exactly (1, 0, ..) at sigma_min.

    App. C, Song et al. 2023. c_in and c_noise are the denoiser's. sigma_min = 0 gives the EDM
    coefficients, which ECT trains with. Raises ValueError as `edm_coefficients`.
    """
    _, _, c_in, c_noise = edm_coefficients(sigma, sigma_data)
    # Rounded to sigma's own precision first: a float32 0.002 minus the double 0.002 is not 0.
    above = sigma - sigma.new_full((), sigma_min)
    c_skip = sigma_data**2 / (above**2 + sigma_data**2)
    c_out = sigma_data * above * c_in
    # number / tensor is number * (1 / tensor), which need not be 1 for equal ones (0.29, 0.3).
    c_skip = torch.where(above == 0, 1.0, c_skip)
    return c_skip, c_out, c_in, c_noise


class Denoiser(nn.Module):
    """D(x, sigma): x float [B, C, H, W], sigma float32|64 [B], labels int64 [B] or None.

    Returns [B, C, H, W] in x's precision, at least float32. `net` sees float32 inputs
    (c_in x, c_noise [B], labels); only inside it may autocast lower them.
    """

    def __init__(self, net: nn.Module, sigma_data: float) -> None:
        super().__init__()
        self.net = net
        self.sigma_data = sigma_data

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        return _precondition(self.net, x, edm_coefficients(sigma, self.sigma_data), labels)


class ConsistencyFunction(nn.Module):
    """f(x, sigma), the identity at sigma_min for any network; shapes as `Denoiser`."""

    def __init__(self, net: nn.Module, sigma_data: float, sigma_min: float) -> None:
        super().__init__()
        self.net = net
        self.sigma_data = sigma_data
        self.sigma_min = sigma_min

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        coefficients = boundary_coefficients(sigma, self.sigma_data, self.sigma_min)
        return _precondition(self.net, x, coefficients, labels)


def _precondition(
    net: nn.Module,
    x: Tensor,
    coefficients: tuple[Tensor, Tensor, Tensor, Tensor],
    labels: Tensor | None,
) -> Tensor:
    """c_skip x + c_out F(c_in x, c_noise, labels); float64 states stay float64 outside `net`."""
    c_skip, c_out, c_in, c_noise = coefficients
    if c_skip.shape != x.shape[:1]:
        raise ValueError(f"sigma must be [B] with B = {len(x)}, got {tuple(c_skip.shape)}")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    rows = (-1,) + (1,) * (x.ndim - 1)
    net_input = (c_in.view(rows) * x).float()
    output = net(net_input, c_noise.float(), labels).float()
    # Autocast leaves additions and products of float32 tensors alone, so this needs no guard.
    result: Tensor = c_skip.view(rows) * x + c_out.view(rows) * output
    return result.to(x.dtype)


def _require_full_precision(sigma: Tensor) -> None:
    if sigma.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"sigma must be float32 or float64, got {sigma.dtype}")
