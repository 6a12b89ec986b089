"""THE training loop: one for every objective, on one worker or many.

It yields a StepLog after each optimiser step; when to log, save or stop is the caller's business.
The state is complete whenever it yields, so the caller may save it there (where `checked` says that
the losses so far were finite) and resume later with bitwise the same result (CPU, same workers).
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from consistency.config import TrainConfig
from consistency.data import ImageStream
from consistency.objectives import Nets, Objective, Progress
from consistency.randomness import BatchRandom, derive_seed, rank_rows, rows_of_batch
from consistency.schedules import lr_factor
from consistency.state import TrainState

SMALLEST_SCALE = 2.0**-10  # of fp16's loss: by then it is the network that overflows


class NonFiniteLoss(Exception):
    """The loss or its gradient became NaN or infinite; the text says where: step, sigma, rank."""


CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Workers:
    """This process among its peers, and how much it can hold.

    micro_batch: images of one forward and backward; gradients of the rank's share are accumulated,
    so it changes no schedule and no random number. check_every: steps between looks at whether
    the losses were finite; each look waits for the device, so take more than 1 on a GPU.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = CPU
    micro_batch: int | None = None
    check_every: int = 1


ALONE = Workers()


@dataclass(frozen=True)
class StepLog:
    """After one optimiser step. `loss` is this rank's share of the batch mean, `gradient_norm` that
    of the whole batch before clipping; both still on the device.

    checked: losses and gradients so far are known to be finite, so the state is worth saving.
    """

    images: int
    steps: int
    loss: Tensor
    gradient_norm: Tensor
    lr: float
    metrics: dict[str, float]
    checked: bool


def train(
    state: TrainState,
    objective: Objective,
    stream: ImageStream,
    config: TrainConfig,
    *,
    teacher: nn.Module | None = None,
    seed: int = 0,
    workers: Workers = ALONE,
) -> Iterator[StepLog]:
    """Train from `state.images` to `config.images`.

    `teacher` is the frozen inner network of the objective's teacher. Raises NonFiniteLoss, within
    `workers.check_every` steps and before any log that says `checked`.
    """
    networks = _Networks(state, objective, teacher, workers)
    start, stop = rank_rows(config.batch, workers.rank, workers.world_size)
    micro = workers.micro_batch or stop - start
    chunks = [(s, min(s + micro, stop)) for s in range(start, stop, micro)]
    finite = FiniteCheck(workers)

    while state.steps < config.steps:
        progress = Progress(state.images, config.images)
        loss = torch.zeros((), device=workers.device)
        metrics: dict[str, float] = {}
        state.optimizer.zero_grad(set_to_none=True)
        for first, last in chunks:
            # Every random number of a step is a function of (seed, images seen, row of the batch).
            torch.manual_seed(derive_seed(seed, "dropout", 0, state.images))
            generator = torch.Generator(workers.device)
            generator.manual_seed(derive_seed(seed, "noise", state.images))
            random = BatchRandom(generator, config.batch, first, last)
            batch = stream.batch(state.images, config.batch, first, last, workers.device)

            with (
                networks.gradients_shared(last == stop),
                rows_of_batch(first, last, config.batch),
            ):
                with torch.autocast(
                    workers.device.type,
                    dtype=DTYPES[config.precision],
                    enabled=config.precision != "fp32",
                    # Its cache would hand weights cast under no_grad to the pass that needs them
                    # with a graph.
                    cache_enabled=False,
                ):
                    terms = objective(networks.nets, batch, progress, random)
                # DDP averages gradients over ranks; this scale makes that the mean over the batch,
                # also when the ranks' shares differ.
                part = terms.per_sample.sum() * (workers.world_size / config.batch)
                state.scaler.scale(part).backward()  # type: ignore[no-untyped-call]
            finite.note(part, terms.sigma, state.steps, state.images)
            loss += part.detach()
            metrics = terms.metrics

        norm = state.gradient_norm(config.grad_clip)
        if config.precision != "fp16":  # whose gradients may overflow: that step is not taken
            finite.note_gradients(norm, state.steps, state.images)
        checked = (state.steps + 1) % workers.check_every == 0 or state.steps + 1 == config.steps
        if checked:
            finite.raise_if_not()  # before the weights are touched
        lr = config.lr * lr_factor(
            state.images,
            config.images,
            config.warmup_images,
            config.decay_from,
            inverse_sqrt_images=config.inverse_sqrt_images,
        )
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        if not state.step_optimizer():
            finite.raise_if_not()  # no scale mends a forward pass
            scale = state.scaler.get_scale()
            if scale < SMALLEST_SCALE:
                raise NonFiniteLoss(
                    f"gradients overflow fp16 at step {state.steps} ({state.images} images) even "
                    f"with the loss scaled by {scale:g}; use precision bf16 or fp32"
                )
            continue  # the same images again, with the lower scale

        mu = objective.target_decay(progress)
        if mu is not None:
            state.update_target(mu)
        state.images += config.batch
        state.steps += 1
        state.update_averages(config)
        if config.precision == "fp16":
            metrics = {**metrics, "loss_scale": state.scaler.get_scale()}
        yield StepLog(state.images, state.steps, loss, norm, lr, metrics, checked)


class _Networks:
    """The networks of a step, behind DDP where there are several workers."""

    def __init__(
        self, state: TrainState, objective: Objective, teacher: nn.Module | None, workers: Workers
    ) -> None:
        function = objective.function(state.net).train()
        self.online: nn.Module = _Online(function, state.head)
        if workers.world_size > 1:
            # Buffers are constants, equal on all ranks.
            self.online = DistributedDataParallel(
                self.online, gradient_as_bucket_view=True, broadcast_buffers=False
            )
        target = None if state.target is None else objective.function(state.target).train()
        self.nets = Nets(
            online=lambda *inputs: self.online(None, *inputs)[0],
            detached=function,
            target=target,
            teacher=None if teacher is None else objective.teacher_function(teacher.eval()),
            weighted=None if state.head is None else self.online,
        )

    def gradients_shared(self, now: bool) -> Any:
        """Ranks exchange gradients in the last backward of a step only."""
        if now or not isinstance(self.online, DistributedDataParallel):
            return nullcontext()
        return self.online.no_sync()


class _Online(nn.Module):
    """The trained function and the loss-weight head in one module, so that DDP sees both."""

    def __init__(self, function: nn.Module, head: nn.Module | None) -> None:
        super().__init__()
        self.function, self.head = function, head

    def forward(self, sigma: Tensor | None, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        output = self.function(*inputs)
        return output, None if self.head is None or sigma is None else self.head(sigma)


LOSS, GRADIENT = 1.0, 2.0


@dataclass
class FiniteCheck:
    """Remembers on the device what first was not finite; looks when it is asked to."""

    workers: Workers
    # What is wrong (0: nothing), at which step and images, its value, sigma from and to; float64.
    first: Tensor | None = field(default=None, init=False)

    def note(self, loss: Tensor, sigma: Tensor, steps: int, images: int) -> None:
        self._keep(LOSS, loss, steps, images, *sigma.double().aminmax())

    def note_gradients(self, norm: Tensor, steps: int, images: int) -> None:
        self._keep(GRADIENT, norm, steps, images, norm, norm)

    def _keep(
        self, what: float, value: Tensor, steps: int, images: int, low: Tensor, high: Tensor
    ) -> None:
        value = value.detach().double()
        wrong = torch.where(value.isfinite(), 0.0, what)
        when = value.new_full((), steps), value.new_full((), images)
        own = torch.stack([wrong.double(), *when, value, low.double(), high.double()])
        self.first = own if self.first is None else torch.where(self.first[0] > 0, self.first, own)

    def raise_if_not(self) -> None:
        """Raise NonFiniteLoss on every rank, naming what was not finite first, and where."""
        assert self.first is not None
        ranks = [self.first]
        if self.workers.world_size > 1:
            ranks = [torch.empty_like(self.first) for _ in range(self.workers.world_size)]
            dist.all_gather(ranks, self.first)
        seen = enumerate(torch.stack(ranks).tolist())
        # The earliest step, and there a loss: its gradients spread to every rank.
        wrong = [(steps, what, rank, *rest) for rank, (what, steps, *rest) in seen if what]
        if not wrong:
            return
        steps, what, rank, images, value, low, high = min(wrong)
        where = f"at step {steps:.0f} ({images:.0f} images)"
        if what == GRADIENT:
            raise NonFiniteLoss(f"the gradient's norm is {value} {where}; lower lr")
        raise NonFiniteLoss(
            f"loss is {value} {where} on rank {rank}; "
            f"sigma in [{low:.4g}, {high:.4g}]; lower lr, or set grad_clip"
        )
