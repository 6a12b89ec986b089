"""Train, stop, resume and sample with torch alone: no Ray, no MLflow, no pipeline.

python docs/pure_training.py IMAGES.npy OUT [--labels LABELS.npy] [--size small] [--minutes 5]
    [--methods ect cd ict] [--device cuda] [--precision bf16] [--batch 256] [--peak 990]

IMAGES.npy: uint8 [N, H, W, C]; LABELS.npy: int64 [N]. Trains an EDM teacher, then each method from
it (iCT from scratch), `minutes` each; half-way a run is saved, rebuilt from nothing and restored.
OUT gets a log in JSON, PPM grids, checkpoints and OUT/METHOD, a model folder for `cmforge sample`,
`edit` and so on. `peak` (TFLOP/s of the device at that precision) turns images per second into MFU.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from consistency.config import NetworkConfig, NoiseConfig, PowerEMA, TeacherConfig, TrainConfig
from consistency.data import ImageStream
from consistency.evaluation.domain import extract, train_feature_net
from consistency.evaluation.frechet import GaussianStats, relative_frechet_percent
from consistency.loop import Workers, train
from consistency.method_config import (
    ConsistencyConfig,
    ConstantLevels,
    DoublingLevels,
    LognormalPairs,
    RatioPairs,
    SCMConfig,
    TargetEMA,
    UniformPairs,
)
from consistency.published import ModelDescription, PublishedModel, build_network
from consistency.stage import Stage, begin, describe, finish

NETWORKS = {
    "tiny": NetworkConfig(channels=8, channel_mult=(1, 2), num_blocks=1, attention=()),
    "medium": NetworkConfig(channels=32, channel_mult=(1, 2, 2), num_blocks=1, attention=(8,)),
    "small": NetworkConfig(channels=64, channel_mult=(1, 2, 2), num_blocks=2, attention=(16,)),
    "paper": NetworkConfig(),  # 55.7 M parameters at 32 x 32
}
# Forward passes of a training step, a backward counting two: for FLOPs.
UNITS = {"teacher": 3, "ect": 4, "ict": 4, "cd": 6, "scd": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--labels", type=Path)
    parser.add_argument("--size", choices=list(NETWORKS), default="small")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--steps", type=int, help="so many instead of minutes")
    parser.add_argument("--methods", nargs="*", default=["ect", "cd", "ict"], choices=list(UNITS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, help="instead of every method's own")
    parser.add_argument("--samples", type=int, default=2_000)
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    bench = Bench(arguments)
    teacher = bench.run("teacher", None)
    for method in arguments.methods:
        bench.run(method, None if method == "ict" else teacher)


class Bench:
    """The data, a yardstick, and one log line per method."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.images = np.load(arguments.images, mmap_mode="r")
        self.labels = None if arguments.labels is None else np.load(arguments.labels)
        self.classes = 0 if self.labels is None else int(self.labels.max()) + 1
        self.device = torch.device(arguments.device)
        shown = np.ascontiguousarray(self.images[:10_000])
        labels = (
            np.zeros(len(shown), np.int64) if self.labels is None else self.labels[: len(shown)]
        )
        self.net = train_feature_net(shown, labels, self.classes, steps=300, seed=0)
        self.net.to(self.device)
        self.reference = GaussianStats.from_features(extract(self.net, shown))

    def run(self, method: str, weights: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
        """Train, with a restart half-way; returns the weights of the sampling EMA."""
        steps = self.arguments.steps or self.steps_in(method, weights)
        config = self.config(method, steps)
        stage = self.begin(config, weights)
        began, losses = time.monotonic(), []
        for log in self.train(stage):
            losses.append(log.loss)
            if log.checked and log.steps >= steps // 2:
                break
        if stage.state.steps < steps:  # leave nothing but the files
            stage.state.save(self.arguments.out / f"{method}-checkpoint")
            stage = self.begin(config, weights)
            stage.state.restore(self.arguments.out / f"{method}-checkpoint")
            losses += [log.loss for log in self.train(stage)]
        self.synchronise()
        seconds = time.monotonic() - began
        rate = config.batch * len(losses) / seconds
        values = torch.stack(losses).tolist()
        line: dict[str, Any] = {
            "method": method,
            "steps": steps,
            "images_per_second": round(rate, 1),
            "loss": [sum(part) / len(part) for part in np.array_split(values, min(8, steps))],
            **self.utilisation(method, stage, rate),
        }
        model = finish(stage)
        model.function.to(self.device)
        for count in (18,) if method == "teacher" else (1, 2):
            line[f"fd_domain percent, {count} steps"] = self.score(model, method, count)
        print(json.dumps(line), flush=True)
        with (self.arguments.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        weights = {k: v.cpu() for k, v in stage.state.averages[config.ema[0].name].items()}
        write_model(self.arguments.out / method, stage.description, weights)
        return weights

    def config(self, method: str, steps: int) -> TrainConfig:
        config, lr = method_config(method, self.common(steps)), self.arguments.lr
        return config if lr is None else replace(config, lr=lr)

    def common(self, steps: int) -> dict[str, Any]:
        batch = self.arguments.batch
        return {
            "images": steps * batch,
            "batch": batch,
            "betas": (0.9, 0.99),
            "warmup_images": steps * batch // 12,
            "decay_from": 0.5,
            "precision": self.arguments.precision,
            "ema": (PowerEMA(sigma_rel=0.10),),
        }

    def begin(self, config: Any, weights: dict[str, torch.Tensor] | None) -> Stage:
        network = NETWORKS[self.arguments.size]
        about = describe(
            config,
            network=replace(network, class_conditional=self.classes > 1),
            noise=NoiseConfig(),
            size=self.images.shape[1],
            channels=self.images.shape[3],
            class_names=tuple(str(n) for n in range(self.classes)),
        )
        return begin(about, config, seed=0, device=self.device, teacher_weights=weights)

    def train(self, stage: Stage) -> Any:
        stream = ImageStream(self.images, self.labels if self.classes > 1 else None, seed=0)
        every = 1 if self.device.type == "cpu" else 50
        workers = Workers(device=self.device, check_every=every)
        return train(
            stage.state,
            stage.objective,
            stream,
            stage.config,
            teacher=stage.teacher,
            workers=workers,
        )

    def steps_in(self, method: str, weights: dict[str, torch.Tensor] | None) -> int:
        """Steps that fit the minutes, from the speed of a few."""
        stage = self.begin(self.config(method, 20), weights)
        for log in self.train(stage):
            if log.steps == 10:
                self.synchronise()
                began = time.monotonic()
        self.synchronise()
        return max(2, int(self.arguments.minutes * 60 / ((time.monotonic() - began) / 10)))

    def utilisation(self, method: str, stage: Stage, rate: float) -> dict[str, float]:
        """Model FLOPs per second, and their share of the peak."""
        flops = UNITS[method] * forward_flops(stage.description) * rate
        told = {"tflops": round(flops / 1e12, 2)}
        if self.arguments.peak:
            told["mfu"] = round(flops / 1e12 / self.arguments.peak, 3)
        if self.device.type == "cuda":
            told["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        return told

    def score(self, model: PublishedModel, method: str, steps: int) -> float:
        count = self.arguments.samples if model.description.kind != "denoiser" else 500
        images = model.generate(range(count), steps=steps, seed=0)
        write_grid(self.arguments.out / f"{method}-{steps}.ppm", images[:80])
        stats = GaussianStats.from_features(extract(self.net, images))
        return round(relative_frechet_percent(stats, self.reference), 3)

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def method_config(method: str, common: dict[str, Any]) -> TrainConfig:
    match method:
        case "teacher":
            return TeacherConfig(**common, lr=1e-3)
        case "ect":
            return ConsistencyConfig(
                **common,
                lr=1e-4,
                method="ect",
                init="teacher",
                pairs=RatioPairs(q=256.0, stages=1),
                path="noise",
                huber_c=1e-8,
                weight="inverse_gap",
                boundary=0.0,
            )
        case "cd":
            return ConsistencyConfig(
                **common,
                lr=2e-4,
                method="cd",
                init="teacher",
                pairs=UniformPairs(levels=ConstantLevels(N=18)),
                path="heun",
                target=TargetEMA(mu=0.95),
            )
        case "ict":
            return ConsistencyConfig(
                **common,
                lr=2e-4,
                method="ict",
                init="scratch",
                pairs=LognormalPairs(levels=DoublingLevels(s0=10, s1=160)),
                path="noise",
                weight="inverse_gap",
            )
        case _:
            return SCMConfig(
                **common,
                lr=1e-4,
                method="scd",
                init="teacher",
                path="teacher",
                P_std=1.8,
                tangent_warmup_images=common["images"] // 5,
            )


def forward_flops(description: ModelDescription) -> float:
    """Of one image, a multiplication and an addition counting two."""
    net = build_network(description)
    x = torch.zeros(1, description.channels, description.size, description.size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x, torch.zeros(1))
    return counter.get_total_flops()


def write_model(
    folder: Path, description: ModelDescription, weights: dict[str, torch.Tensor]
) -> None:
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "weights.safetensors")
    (folder / "config.json").write_text(description.to_json())


def write_grid(path: Path, images: np.ndarray[Any, Any], columns: int = 10) -> None:
    """uint8 [n, H, W, C] as a binary PPM."""
    n, height, width, channels = images.shape
    rows = n // columns
    tiles = images[: rows * columns].reshape(rows, columns, height, width, channels)
    sheet = tiles.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)
    sheet = np.repeat(sheet, 3 // channels, axis=2)
    header = f"P6 {columns * width} {rows * height} 255\n".encode()
    path.write_bytes(header + np.ascontiguousarray(sheet).tobytes())


if __name__ == "__main__":
    main()
