"""In-loop evaluation: the distance of a model that is still training, every so many images.

It changes nothing that comes out of the training: it draws no number of the training's generators,
and what depends on the clock (which probes were skipped to keep within the share) only ever reaches
the curve, the best weights kept beside the last, and the decision to stop what diverges.
"""

import json
import math
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from consistency.evaluation.protocol import Protocol
from infra import storage
from pipelines.blocks import Block, Item, Part, cut
from pipelines.measuring import WatchConfig
from pipelines.scoring import in_order, sample_part
from pipelines.yardstick import Yardstick

if TYPE_CHECKING:
    from consistency.published import ModelDescription
    from consistency.state import TrainState

LOG = "watch.jsonl"


class Diverged(Exception):
    """The distance went up and stays there; the text says from where to where."""


@dataclass(frozen=True, kw_only=True)
class WatchJob:
    """What a training stage watches itself with; no part of its identity."""

    config: WatchConfig
    reference: str  # home of the reference step, which may still be running
    mid_sigma: float
    teacher_steps: int
    # Of a trial: the images at which it is looked at, and nowhere else; the share does not count.
    marks: tuple[int, ...] | None = None


@dataclass
class Watch:
    """One rank's half of it. Every rank calls `probe` at the same steps."""

    job: WatchJob
    about: "ModelDescription"
    step: str  # the stage, for messages
    emas: tuple[str, ...]
    rank: int
    world_size: int
    device: Any
    history: list[dict[str, Any]] = field(default_factory=list)  # one line per number
    seen: int = 0  # images at the last question whether a probe is due
    spent: float = 0.0  # seconds
    last_cost: float = 0.0
    _yardstick: Yardstick | None = None
    _tools: Any = None

    def due(self, images: int) -> bool:
        """Whether training crossed the cadence since the last time it was asked."""
        every, before = self.job.config.every_images, self.seen
        self.seen = images
        if self.job.marks is not None:
            return any(before < mark <= images for mark in self.job.marks)
        return images // every > before // every

    def ready(self) -> bool:
        """Whether the reference is there: training does not wait for it."""
        if self._yardstick is None:
            self._yardstick = Yardstick.at(self.job.reference, self.about)
        return self._yardstick is not None

    def affordable(self, elapsed: float, trained: int) -> bool:
        """Whether one more probe keeps within the share of `elapsed` seconds of training, in which
        `trained` images were seen."""
        if self.job.marks is not None:
            return True
        # Before the first one: a sample costs a forward pass per evaluation, a third of a step.
        guess = self.evaluations() * elapsed / (3 * max(trained, 1))
        cost = self.last_cost if self.spent else guess
        return self.spent + cost <= self.job.config.share * elapsed

    def evaluations(self) -> int:
        """Forward passes of one probe."""
        per_sample = sum(self.about.evaluations(steps) for steps in self.steps())
        return self.job.config.samples * len(self.emas) * per_sample

    def steps(self) -> tuple[int, ...]:
        return (self.job.teacher_steps,) if self.about.kind == "denoiser" else (1, 2)

    def probe(self, state: "TrainState", images: int, seconds: float = 0.0) -> list[dict[str, Any]]:
        """Score every sampling EMA, after `seconds` of training; returns the new lines, the same on
        every rank (but for the seconds)."""
        started = time.monotonic()
        if self._tools is None:
            assert self._yardstick is not None, "ready() said so"
            self._tools = _Tools(self.job, self.about, self.steps(), self._yardstick, self.device)
        lines = [
            {
                "images": images,
                "ema": name,
                "steps": steps,
                "name": protocol.name,
                "value": self._measure(state.averages[name], protocol),
                "digest": protocol.digest,
                "seconds": round(seconds, 3),
            }
            for name in self.emas
            for steps, protocol in self._tools.protocols.items()
        ]
        self.history += lines
        self.last_cost = time.monotonic() - started
        self.spent += self.last_cost
        return lines

    def best(self) -> dict[str, Any] | None:
        """The line of the lowest distance at the fewest steps so far; the first of equals."""
        judged = [line for line in self._judged() if math.isfinite(line["value"])]
        return min(judged, key=lambda line: line["value"], default=None)

    def raise_if_diverged(self) -> None:
        """Diverged when the last `patience` probes are all above `stop_above` times the best."""
        config, best = self.job.config, self.best()
        if config.stop_above is None or best is None:
            return
        lowest: dict[int, float] = {}
        for line in self._judged():
            value = line["value"] if math.isfinite(line["value"]) else math.inf
            lowest[line["images"]] = min(value, lowest.get(line["images"], math.inf))
        last = list(lowest.items())[-config.patience :]
        if len(last) < config.patience or any(
            value <= config.stop_above * best["value"] for _, value in last
        ):
            return
        images, value = last[-1]
        raise Diverged(
            f"{self.step} diverges: {best['name']} was {best['value']:.4g} at "
            f"{best['images']:,} images and is {value:.4g} at {images:,}, above "
            f"{config.stop_above:g} times its best in {config.patience} evaluations running; lower "
            f"{self.step}.lr, or set watch.stop_above=null to train on"
        )

    def text(self) -> str:
        return "".join(json.dumps(line) + "\n" for line in self.history)

    def restore(self, text: str) -> None:
        self.history = [json.loads(line) for line in text.splitlines()]

    def _judged(self) -> list[dict[str, Any]]:
        """In the fewest steps, and under the protocol of the last probe: others do not compare."""
        fewest = min((line["steps"] for line in self.history), default=0)
        lines = [line for line in self.history if line["steps"] == fewest]
        return [line for line in lines if line["digest"] == lines[-1]["digest"]]

    def _measure(self, weights: Any, protocol: Protocol) -> float:
        """The items are dealt to the ranks and merged in their order on each of them. Infinite when
        the samples are not even numbers: the loss will say so soon."""
        from consistency.sampling import NotFinite

        block = Block(None, 0, protocol.samples)
        items = cut(0, [block])
        tools = self._tools
        tools.model.function.net.load_state_dict(weights)
        own: list[tuple[int, Part]] | None
        try:
            own = [
                (number, tools.part(item, protocol))
                for number, item in enumerate(items)
                if number % self.world_size == self.rank
            ]
        except NotFinite:
            own = None
        parts: list[list[tuple[int, Part]] | None] = [own]
        if self.world_size > 1:
            import torch.distributed as dist

            parts = [None] * self.world_size
            dist.all_gather_object(parts, own)
        finite = [of_rank for of_rank in parts if of_rank is not None]
        if len(finite) < len(parts):
            return math.inf

        def take(number: int, part: Part) -> None:
            block.add(items[number], part)

        in_order((pair for of_rank in finite for pair in of_rank), len(items), take=take)
        block.settle(tools.value)
        return block.value


class _Tools:
    """What a probe needs beside the weights, loaded at the first one."""

    def __init__(
        self,
        job: WatchJob,
        about: "ModelDescription",
        steps: tuple[int, ...],
        yardstick: Yardstick,
        device: Any,
    ) -> None:
        import torch

        from consistency import published

        with torch.random.fork_rng(devices=[]):  # a new network draws its weights, on the CPU
            about = replace(about, mid_sigma=job.mid_sigma)
            self.model = published.build(about, published.build_network(about).state_dict())
            self.extractor = yardstick.network.load(str(device))
        self.model.function.to(device)
        self.value = partial(yardstick.value, yardstick.statistics())
        self.protocols = {
            count: yardstick.protocol(
                samples=job.config.samples,
                seed_blocks=1,
                seed=job.config.seed,  # common noise: every probe samples the same z
                steps=count,
                allow_rank_deficient=job.config.allow_rank_deficient,
            )
            for count in steps
        }

    def part(self, item: Item, protocol: Protocol) -> Part:
        indices = range(item.start, item.stop)
        part = sample_part(
            self.model,
            self.extractor,
            indices,
            steps=protocol.steps,
            seed=protocol.seed,
            judge=False,
        )
        return replace(part, sheet=None, features=None)


def write_best(folder: str, weights: bytes, about: str, line: dict[str, Any]) -> None:
    """A model folder of the best weights so far; its line says how good, and is written last."""
    storage.write_bytes(storage.join(folder, "weights.safetensors"), weights)
    storage.write_bytes(storage.join(folder, "config.json"), about.encode())
    storage.write_bytes(storage.join(folder, "watch.json"), json.dumps(line).encode())
