"""From the raw network to the functions that are trained: D, f, TrigFlow's F, MeanFlow's u.

D and f are c_skip x + c_out F(c_in x, c_noise, labels); only c_skip and c_out differ, so a student
is started from its teacher by copying the weights (and buffers) of `.net`.

TrigFlow (Lu and Song 2024) is the same thing in other letters. With tan t = sigma / sigma_data and
x_t = cos(t) x0 + sin(t) z, z of std sigma_data: x_t / sigma_data = c_in x, cos^2 t = c_skip and
sigma_data sin t = c_out, so its D = cos(t) x_t - sin(t) sigma_data F holds for F = -net. One set of
weights serves both families; only `c_noise`, what the network is told of sigma, may differ.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from consistency.schedules import sigma_to_angle

NoiseLabel = Literal["log_sigma", "log_sigma_1000", "angle"]


def noise_label(sigma: Tensor, sigma_data: float, c_noise: NoiseLabel = "log_sigma") -> Tensor:
    """What the network is told of sigma: ln(sigma) / 4 (EDM), 1000 times that (the checkpoints of
    Song et al. 2023), or atan(sigma / sigma_data) (sCM)."""
    if c_noise == "angle":
        return sigma_to_angle(sigma, sigma_data)
    # Level 0 occurs (ECT's r = 0) and must stay finite: there c_out = 0 silences the network.
    label = sigma.clamp_min(torch.finfo(torch.float32).tiny).log() / 4
    return 1000 * label if c_noise == "log_sigma_1000" else label


def edm_coefficients(
    sigma: Tensor, sigma_data: float, c_noise: NoiseLabel = "log_sigma"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(c_skip, c_out, c_in, c_noise) of the denoiser, each shaped as sigma (Table 1, EDM).

    Raises ValueError unless sigma is float32 or float64: rounded to bfloat16, 72, 75 and 80 give
    nearly the same network input.
    """
    _require_full_precision(sigma)
    variance = sigma**2 + sigma_data**2
    c_skip = sigma_data**2 / variance
    c_out = sigma * sigma_data * variance.rsqrt()
    c_in = variance.rsqrt()
    return c_skip, c_out, c_in, noise_label(sigma, sigma_data, c_noise)


def boundary_coefficients(
    sigma: Tensor, sigma_data: float, sigma_min: float, c_noise: NoiseLabel = "log_sigma"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(c_skip, c_out, c_in, c_noise) of f; exactly (1, 0, ..) at sigma_min.

    App. C, Song et al. 2023. c_in and c_noise are the denoiser's. sigma_min = 0 gives the EDM
    coefficients, which ECT trains with. Raises ValueError as `edm_coefficients`.
    """
    _, _, c_in, label = edm_coefficients(sigma, sigma_data, c_noise)
    # Rounded to sigma's own precision first: a float32 0.002 minus the double 0.002 is not 0.
    above = sigma - sigma.new_full((), sigma_min)
    c_skip = sigma_data**2 / (above**2 + sigma_data**2)
    c_out = sigma_data * above * c_in
    # number / tensor is number * (1 / tensor), which need not be 1 for equal ones (0.29, 0.3).
    c_skip = torch.where(above == 0, 1.0, c_skip)
    return c_skip, c_out, c_in, label


class Denoiser(nn.Module):
    """D(x, sigma): x float [B, C, H, W], sigma float32|64 [B], labels int64 [B] or None.

    Returns [B, C, H, W] in x's precision, at least float32. `net` sees float32 inputs
    (c_in x, c_noise [B], labels); only inside it may autocast lower them.
    """

    def __init__(
        self, net: nn.Module, sigma_data: float, c_noise: NoiseLabel = "log_sigma"
    ) -> None:
        super().__init__()
        self.net = net
        self.sigma_data = sigma_data
        self.c_noise: NoiseLabel = c_noise

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        coefficients = edm_coefficients(sigma, self.sigma_data, self.c_noise)
        return _precondition(self.net, x, coefficients, labels)


class ConsistencyFunction(nn.Module):
    """f(x, sigma), the identity at sigma_min for any network; shapes as `Denoiser`.

    sigma_min = 0 has the denoiser's coefficients: the form that ECT and sCM train.
    """

    def __init__(
        self,
        net: nn.Module,
        sigma_data: float,
        sigma_min: float,
        c_noise: NoiseLabel = "log_sigma",
    ) -> None:
        super().__init__()
        self.net = net
        self.sigma_data = sigma_data
        self.sigma_min = sigma_min
        self.c_noise: NoiseLabel = c_noise

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        coefficients = boundary_coefficients(sigma, self.sigma_data, self.sigma_min, self.c_noise)
        return _precondition(self.net, x, coefficients, labels)


class TrigFlowVelocity(nn.Module):
    """F(x_t / sigma_data, c_noise) of TrigFlow: sigma_data F is the velocity dx_t / dt.

    u float32 [B, C, H, W] of about unit variance, c_noise [B] by `noise_label` -> float32 like u.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, u: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
        output: Tensor = self.net(u, c_noise, labels)
        return -output.to(torch.promote_types(output.dtype, torch.float32))


class MeanVelocity(nn.Module):
    """u(z, t, r), the average velocity between times r <= t (MeanFlow, Geng et al. 2025).

    z float32 [B, C, H, W] at time t [B] in [0, 1], t_minus_r [B] -> float32 like z. The network is
    told t and t - r.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(
        self, z: Tensor, t: Tensor, t_minus_r: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        output: Tensor = self.net(z, t, labels, t_minus_r)
        return output.to(torch.promote_types(output.dtype, torch.float32))


Guidable = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def guided(function: Guidable, scale: float) -> Guidable:
    """Classifier-free guidance: out(null) + scale (out(class) - out(null)) (Ho & Salimans 2022).

    Of D and of a velocity alike, both being linear in the network; scale 1 is `function` itself.
    Classes are needed: labels None raises ValueError. One call on 2 B rows.
    """
    if scale == 1:
        return function

    def evaluate(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        if labels is None:
            raise ValueError("guidance needs class labels")
        both = torch.cat([labels, torch.full_like(labels, -1)])
        with_class, without = function(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        return without + scale * (with_class - without)

    return evaluate


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
