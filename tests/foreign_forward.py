"""What the networks of other projects compute, restated from the words that describe them.

Functions of a foreign state dict and torch's own operators; nothing is shared with our networks.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]
Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def random_state(layout: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random values for every tensor of a layout, those that training begins at zero included."""
    generator = torch.Generator().manual_seed(seed)
    taps = torch.tensor(layout["config"].get("resample_filter", [1, 1]), dtype=torch.float)
    state = {}
    for key, shape in layout["keys"]:
        if key.endswith("resample_filter"):
            state[key] = torch.outer(taps, taps)[None, None] / taps.sum() ** 2
            continue
        values = torch.randn(shape, generator=generator)
        norm = any(part in key for part in ("norm", "in_layers.0.", "out_layers.0.", "out.0."))
        if key.endswith("weight") and norm:
            state[key] = 1 + 0.1 * values
        elif len(shape) > 1:
            state[key] = values / math.sqrt(values[0].numel())
        else:
            state[key] = values if key.endswith("freqs") else 0.1 * values
    return state


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def conv(state: State, name: str, x: Tensor) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)


def norm(state: State, name: str, x: Tensor, groups: int, eps: float) -> Tensor:
    return F.group_norm(x, groups, state[f"{name}.weight"], state[f"{name}.bias"], eps)


def softmax_of(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v [B, heads, width, pixels] -> the same."""
    weights = torch.einsum("bhcq,bhck->bhqk", q / math.sqrt(q.shape[2]), k).softmax(dim=3)
    return torch.einsum("bhqk,bhck->bhcq", weights, v)


# --- OpenAI: UNetModel


def openai(state: State, config: Mapping[str, Any]) -> Network:
    """The network: (c_in x, 250 ln sigma, labels) -> like x."""
    wide, scaled = config["num_head_channels"], config["use_scale_shift_norm"]

    def residual(at: str, x: Tensor, emb: Tensor, resample: str = "") -> Tensor:
        h = F.silu(norm(state, f"{at}.in_layers.0", x, 32, 1e-5))
        if resample == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        if resample == "up":
            h, x = (F.interpolate(y, scale_factor=2, mode="nearest") for y in (h, x))
        h = conv(state, f"{at}.in_layers.2", h)
        shift = linear(state, f"{at}.emb_layers.1", F.silu(emb))[:, :, None, None]
        if scaled:
            half = shift.shape[1] // 2
            scale, shift = shift[:, :half], shift[:, half:]
            h = norm(state, f"{at}.out_layers.0", h, 32, 1e-5) * (1 + scale) + shift
        else:
            h = norm(state, f"{at}.out_layers.0", h + shift, 32, 1e-5)
        h = conv(state, f"{at}.out_layers.3", F.silu(h))
        if f"{at}.skip_connection.weight" in state:
            x = conv(state, f"{at}.skip_connection", x)
        return x + h

    def attention(at: str, x: Tensor) -> Tensor:
        b, c, s, _ = x.shape
        qkv = conv(state, f"{at}.qkv", norm(state, f"{at}.norm", x, 32, 1e-5))
        q, k, v = qkv.reshape(b, 3, c // wide, wide, s * s).unbind(1)
        return x + conv(state, f"{at}.proj_out", softmax_of(q, k, v).reshape(x.shape))

    def forward(x: Tensor, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        half = config["model_channels"] // 2
        angles = c_noise[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)
        emb = linear(state, "time_embed.2", F.silu(linear(state, "time_embed.0", waves)))
        if labels is not None:
            emb = emb + state["label_emb.weight"][labels]
        h = conv(state, "input_blocks.0.0", x)
        skips, number, factor = [h], 1, 1
        levels, count = len(config["channel_mult"]), config["num_res_blocks"]
        for level in range(levels):
            for _ in range(count):
                h = residual(f"input_blocks.{number}.0", h, emb)
                if factor in config["attention_resolutions"]:
                    h = attention(f"input_blocks.{number}.1", h)
                skips.append(h)
                number += 1
            if level < levels - 1:
                h = residual(f"input_blocks.{number}.0", h, emb, "down")
                skips.append(h)
                number, factor = number + 1, 2 * factor
        h = residual("middle_block.0", h, emb)
        h = residual("middle_block.2", attention("middle_block.1", h), emb)
        number = 0
        for level in reversed(range(levels)):
            for i in range(count + 1):
                at = f"output_blocks.{number}"
                h = residual(f"{at}.0", torch.cat([h, skips.pop()], dim=1), emb)
                attends = factor in config["attention_resolutions"]
                if attends:
                    h = attention(f"{at}.1", h)
                if level and i == count:
                    h = residual(f"{at}.{2 if attends else 1}", h, emb, "up")
                    factor //= 2
                number += 1
        return conv(state, "out.2", F.silu(norm(state, "out.0", h, 32, 1e-5)))

    return forward


# --- NVlabs EDM: SongUNet and DhariwalUNet


def edm(state: State, config: Mapping[str, Any]) -> Network:
    """The network: (c_in x, ln sigma / 4, one-hot labels or None) -> like x."""
    song = config["model_type"] == "SongUNet"
    eps, gain = (1e-6, math.sqrt(0.5)) if song else (1e-5, 1.0)
    taps = torch.tensor(config.get("resample_filter", [1, 1]), dtype=torch.float)
    fir, pad = torch.outer(taps, taps) / taps.sum() ** 2, (len(taps) - 1) // 2

    def group_norm(name: str, x: Tensor, eps: float = eps) -> Tensor:
        return norm(state, f"model.{name}", x, min(32, x.shape[1] // 4), eps)

    def down(x: Tensor) -> Tensor:
        weight = fir.repeat(x.shape[1], 1, 1, 1)
        return F.conv2d(x, weight, stride=2, padding=pad, groups=x.shape[1])

    def up(x: Tensor) -> Tensor:
        weight = 4 * fir.repeat(x.shape[1], 1, 1, 1)
        return F.conv_transpose2d(x, weight, stride=2, padding=pad, groups=x.shape[1])

    def block(name: str, x: Tensor, emb: Tensor) -> Tensor:
        move = {"down": down, "up": up}.get(name.rsplit("_", 1)[1], lambda y: y)
        h = conv(state, f"model.{name}.conv0", move(F.silu(group_norm(f"{name}.norm0", x))))
        params = linear(state, f"model.{name}.affine", emb)[:, :, None, None]
        if song:
            h = F.silu(group_norm(f"{name}.norm1", h + params))
        else:
            scale, shift = params.chunk(2, dim=1)
            h = F.silu(group_norm(f"{name}.norm1", h) * (1 + scale) + shift)
        h = conv(state, f"model.{name}.conv1", h)
        x = move(x)
        if f"model.{name}.skip.weight" in state:
            x = conv(state, f"model.{name}.skip", x)
        x = (x + h) * gain
        if f"model.{name}.qkv.weight" not in state:
            return x
        b, c, s, _ = x.shape
        heads = 1 if song else c // 64
        qkv = conv(state, f"model.{name}.qkv", group_norm(f"{name}.norm2", x))
        q, k, v = qkv.reshape(b, heads, c // heads, 3, s * s).unbind(3)
        return (x + conv(state, f"model.{name}.proj", softmax_of(q, k, v).reshape(x.shape))) * gain

    def embedding(c_noise: Tensor, one_hot: Tensor | None) -> Tensor:
        half = config["model_channels"] // 2
        if song and config["embedding_type"] == "fourier":
            angles = c_noise[:, None] * (2 * math.pi * state["model.map_noise.freqs"])
        else:
            steps = torch.arange(half) / (half - 1 if song else half)
            angles = c_noise[:, None] * (1 / 10000) ** steps
        emb = torch.cat([angles.cos(), angles.sin()], dim=1)
        if song:
            first, second = emb.chunk(2, dim=1)
            emb = torch.cat([second, first], dim=1)
            if one_hot is not None:
                scaled = one_hot * math.sqrt(one_hot.shape[1])
                emb = emb + linear(state, "model.map_label", scaled)
            emb = F.silu(linear(state, "model.map_layer0", emb))
            return F.silu(linear(state, "model.map_layer1", emb))
        emb = linear(state, "model.map_layer1", F.silu(linear(state, "model.map_layer0", emb)))
        if one_hot is not None:
            emb = emb + linear(state, "model.map_label", one_hot)
        return F.silu(emb)

    def forward(x: Tensor, c_noise: Tensor, one_hot: Tensor | None) -> Tensor:
        emb = embedding(c_noise, one_hot)
        size, blocks = config["img_resolution"], config["num_blocks"]
        sides = [size >> level for level in range(len(config["channel_mult"]))]
        h = aux = conv(state, f"model.enc.{size}x{size}_conv", x)
        skips, aux = [h], x
        for side in sides:
            if side != size:
                h = block(f"enc.{side}x{side}_down", h, emb)
                skips.append(h)
                name = f"model.enc.{side}x{side}_aux_residual"
                if f"{name}.weight" in state:
                    # The convolution, on an image with zeros around, then the filter's halving.
                    wide = F.pad(aux, (2, 2, 2, 2))
                    branch = F.conv2d(wide, state[f"{name}.weight"])
                    weight = fir.repeat(branch.shape[1], 1, 1, 1)
                    branch = F.conv2d(branch, weight, stride=2, groups=branch.shape[1])
                    bias = state[f"{name}.bias"][:, None, None]
                    h = aux = skips[-1] = (h + branch + bias) / math.sqrt(2)
            for i in range(blocks):
                h = block(f"enc.{side}x{side}_block{i}", h, emb)
                skips.append(h)
        for side in reversed(sides):
            if side == sides[-1]:
                h = block(f"dec.{side}x{side}_in0", h, emb)
                h = block(f"dec.{side}x{side}_in1", h, emb)
            else:
                h = block(f"dec.{side}x{side}_up", h, emb)
            for i in range(blocks + 1):
                name = f"dec.{side}x{side}_block{i}"
                wants = state[f"model.{name}.conv0.weight"].shape[1]
                if wants != h.shape[1]:
                    h = torch.cat([h, skips.pop()], dim=1)
                h = block(name, h, emb)
        top = f"dec.{size}x{size}_aux" if song else "out"
        return conv(state, f"model.{top}_conv", F.silu(group_norm(f"{top}_norm", h)))

    return forward


# --- what wraps them


def wrapped(
    network: Network,
    x: Tensor,
    sigma: Tensor,
    labels: Tensor | None,
    *,
    c_noise: Callable[[Tensor], Tensor],
    boundary: float = 0.0,
    sigma_data: float = 0.5,
) -> Tensor:
    """c_skip x + c_out F(c_in x): D, and f where a boundary is given."""
    s = sigma[:, None, None, None]
    c_skip = sigma_data**2 / ((s - boundary) ** 2 + sigma_data**2)
    c_out = (s - boundary) * sigma_data / (s**2 + sigma_data**2).sqrt()
    c_in = 1 / (s**2 + sigma_data**2).sqrt()
    return c_skip * x + c_out * network(c_in * x, c_noise(sigma), labels)


def thousandfold(sigma: Tensor) -> Tensor:
    return 1000 * 0.25 * torch.log(sigma + 1e-44)


def quarter(sigma: Tensor) -> Tensor:
    return sigma.log() / 4
