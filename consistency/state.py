"""Everything a training stage must remember, saved whole: resume equals never having stopped.

Random numbers and data order are functions of images seen, so they need no place here.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from consistency.config import ConstantEMA, EMAConfig, HalfLifeEMA, PowerEMA, TrainConfig
from consistency.ema import ema_update_, gamma_from_sigma_rel, half_life_beta, power_beta

FORMAT = 2


class CheckpointError(Exception):
    """A checkpoint that is damaged or belongs to another configuration; says which and why."""


@dataclass
class TrainState:
    """net: the inner network F (fp32 masters). target: theta-, or None. head: the learned loss
    weight, or None. averages: EMA name -> parameter name -> fp32 tensor. scaler: of fp16's loss,
    disabled otherwise. images and steps: progress over all workers."""

    net: nn.Module
    target: nn.Module | None
    head: nn.Module | None
    averages: dict[str, dict[str, Tensor]]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    images: int = 0
    steps: int = 0

    @classmethod
    def fresh(
        cls,
        net: nn.Module,
        target: nn.Module | None,
        config: TrainConfig,
        head: nn.Module | None = None,
    ) -> "TrainState":
        """Step zero: averages and target start as copies of the network."""
        if target is not None:
            target.load_state_dict(net.state_dict())
            target.requires_grad_(False)
        averages = {
            ema.name: {k: v.detach().float().clone() for k, v in net.state_dict().items()}
            for ema in config.ema
        }
        device = next(net.parameters()).device.type
        scaler = torch.amp.GradScaler(device, enabled=config.precision == "fp16")
        trained = [*net.parameters()] + ([] if head is None else [*head.parameters()])
        return cls(net, target, head, averages, make_optimizer(trained, config), scaler)

    def gradient_norm(self, clip: float) -> Tensor:
        """Global norm of the gradients, unscaled; they are then scaled down to `clip` if above it
        (0: never). On the device; of fp16 it may be infinite, which is no error."""
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if clip > 0:
            nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        return norm

    def step_optimizer(self) -> bool:
        """Step; whether it was taken. Only fp16 refuses one: its scaled gradients overflowed, the
        scale is lowered and nothing else moves."""
        self.scaler.step(self.optimizer)
        before = self.scaler.get_scale()
        self.scaler.update()
        return self.scaler.get_scale() >= before

    @torch.no_grad()
    def update_averages(self, config: TrainConfig) -> None:
        """Move every sampling EMA; call after `images` and `steps` were advanced."""
        values = list(self.net.state_dict().values())
        for ema in config.ema:
            beta = ema_beta(ema, config.batch, self.images, self.steps)
            ema_update_(list(self.averages[ema.name].values()), values, beta)

    @torch.no_grad()
    def update_target(self, mu: float) -> None:
        """theta- <- mu theta- + (1 - mu) theta."""
        assert self.target is not None
        ema_update_(
            list(self.target.state_dict().values()), list(self.net.state_dict().values()), mu
        )

    def save(self, folder: Path) -> None:
        """Write `state.safetensors` and, last, `state.json` with its digest."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = folder / "state.safetensors"
        save_file({k: v.contiguous() for k, v in self._tensors().items()}, weights)
        record = {
            "format": FORMAT,
            "images": self.images,
            "steps": self.steps,
            "scaler": self.scaler.state_dict(),
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        }
        (folder / "state.json").write_text(json.dumps(record))

    def restore(self, folder: Path) -> None:
        """Load in place what `save` wrote.

        Raises CheckpointError when a file is missing, altered, or has other tensors than this
        state: training must never go on from something else than it believes.
        """
        weights = folder / "state.safetensors"
        try:
            record = json.loads((folder / "state.json").read_text())
            digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: not a whole checkpoint: {error}") from error
        if record.get("format") != FORMAT:
            raise CheckpointError(f"{folder}: format {record.get('format')}, expected {FORMAT}")
        if record.get("sha256") != digest:
            raise CheckpointError(f"{weights}: content does not match its recorded sha256")
        saved = load_file(weights, device="cpu")
        self._restore_optimizer(saved)
        current = self._tensors()
        if saved.keys() != current.keys():
            odd = sorted(saved.keys() ^ current.keys())[:5]
            raise CheckpointError(f"{folder}: other tensors than this configuration's: {odd}")
        with torch.no_grad():
            for name, tensor in current.items():
                if tensor.shape != saved[name].shape:
                    raise CheckpointError(f"{folder}: {name} has shape {list(saved[name].shape)}")
                tensor.copy_(saved[name])
        self.images, self.steps = record["images"], record["steps"]
        self.scaler.load_state_dict(record["scaler"])

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"net/{k}": v for k, v in self.net.state_dict().items()}
        if self.target is not None:
            tensors |= {f"target/{k}": v for k, v in self.target.state_dict().items()}
        if self.head is not None:
            tensors |= {f"head/{k}": v for k, v in self.head.state_dict().items()}
        for name, average in self.averages.items():
            tensors |= {f"ema/{name}/{k}": v for k, v in average.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{k}": v for k, v in state.items()}
        return tensors

    def _restore_optimizer(self, saved: dict[str, Tensor]) -> None:
        """Give the optimizer its per-parameter slots, which a fresh one lacks.

        Each slot takes its parameter's memory layout: fused Adam walks both by address, and would
        pair the wrong elements of a channels-last weight and a contiguous moment, in silence.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for name in [name for name in saved if name.startswith("optimizer/")]:
            _, index, key = name.split("/", 2)
            if int(index) >= len(parameters):
                continue  # of another configuration, as `restore` is about to say
            value, parameter = saved[name], parameters[int(index)]
            if value.shape == parameter.shape:
                value = torch.empty_like(parameter, device="cpu").copy_(value)
            state.setdefault(int(index), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def make_optimizer(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """Adam or RAdam without weight decay; the learning rate is set by the loop at each step."""
    if config.optimizer == "radam":
        return torch.optim.RAdam(
            parameters, lr=config.lr, betas=config.betas, eps=config.eps, foreach=True
        )
    return torch.optim.Adam(
        parameters, lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )


def ema_beta(ema: EMAConfig, batch: int, images: int, steps: int) -> float:
    """The decay of one sampling EMA at this step (methods: constant, half-life, power)."""
    match ema:
        case ConstantEMA(beta=beta):
            return beta
        case HalfLifeEMA(images=half_life, ramp=ramp):
            return half_life_beta(batch, half_life, images, ramp)
        case PowerEMA(sigma_rel=sigma_rel):
            return power_beta(steps, gamma_from_sigma_rel(sigma_rel))
