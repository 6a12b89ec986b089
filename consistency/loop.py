"""THE training loop: one for every objective, on one worker or many.

It yields a StepLog after each optimiser step; when to log, save or stop is the caller's business.
The state is complete whenever it yields, so the caller may save it there and resume later with
bitwise the same result (CPU, same worker count).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from consistency.config import TrainConfig
from consistency.data import ImageStream
from consistency.objectives import Nets, Objective, Progress
from consistency.objectives.base import Function
from consistency.randomness import BatchRandom, derive_seed, rank_rows
from consistency.schedules import lr_factor
from consistency.state import TrainState


class NonFiniteLoss(Exception):
    """The loss became NaN or infinite; the text says at which step, noise levels and rank."""


CPU = torch.device("cpu")


@dataclass(frozen=True)
class Workers:
    """This process among its peers."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = CPU


ALONE = Workers()


@dataclass(frozen=True)
class StepLog:
    """After one optimiser step. `loss` is this rank's share of the batch mean, still on device."""

    images: int
    steps: int
    loss: Tensor
    lr: float
    metrics: dict[str, float]


def train(
    state: TrainState,
    objective: Objective,
    stream: ImageStream,
    config: TrainConfig,
    *,
    preconditioned: Callable[[nn.Module], nn.Module],
    teacher: Function | None = None,
    seed: int = 0,
    workers: Workers = ALONE,
) -> Iterator[StepLog]:
    """Train from `state.images` to `config.images`.

    `preconditioned` wraps the inner network F into the function that is trained (D or f). Raises
    NonFiniteLoss, before the weights are touched by it.
    """
    function = preconditioned(state.net).train()
    online: nn.Module = function
    if workers.world_size > 1:
        online = DistributedDataParallel(function, gradient_as_bucket_view=True)
    target = None if state.target is None else preconditioned(state.target).train()
    nets = Nets(online, function, target, teacher)
    start, stop = rank_rows(config.batch, workers.rank, workers.world_size)

    while state.steps < config.steps:
        # Every random number of this step is a function of (seed, images seen[, rank]).
        torch.manual_seed(derive_seed(seed, "dropout", workers.rank, state.images))
        generator = torch.Generator(workers.device)
        generator.manual_seed(derive_seed(seed, "noise", state.images))
        random = BatchRandom(generator, config.batch, start, stop)
        batch = stream.batch(state.images, config.batch, start, stop, workers.device)
        progress = Progress(state.images, config.images)

        with torch.autocast(
            workers.device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16"
        ):
            terms = objective(nets, batch, progress, random)
        # DDP averages gradients over ranks; this scale makes that the mean over the batch, also
        # when the ranks' shares differ.
        loss = terms.per_sample.sum() * (workers.world_size / config.batch)
        stop_if_not_finite(loss, terms.sigma, state, workers)

        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if config.grad_clip > 0:
            nn.utils.clip_grad_norm_(state.net.parameters(), config.grad_clip)
        lr = config.lr * lr_factor(
            state.images, config.images, config.warmup_images, config.decay_from
        )
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        state.optimizer.step()

        mu = objective.target_decay(progress)
        if mu is not None:
            state.update_target(mu)
        state.images += config.batch
        state.steps += 1
        state.update_averages(config)
        yield StepLog(state.images, state.steps, loss.detach(), lr, terms.metrics)


def stop_if_not_finite(loss: Tensor, sigma: Tensor, state: TrainState, workers: Workers) -> None:
    """Raise NonFiniteLoss on every rank, naming the first one whose loss is not finite."""
    loss, (low, high) = loss.detach().float(), sigma.float().aminmax()
    own = torch.stack([(~torch.isfinite(loss)).float(), loss, low, high])
    ranks = [own]
    if workers.world_size > 1:
        ranks = [torch.empty_like(own) for _ in range(workers.world_size)]
        dist.all_gather(ranks, own)
    for rank, (bad, value, smallest, largest) in enumerate(torch.stack(ranks).tolist()):
        if bad:
            raise NonFiniteLoss(
                f"loss is {value} at step {state.steps} ({state.images} images) on rank {rank}; "
                f"sigma in [{smallest:.4g}, {largest:.4g}]; lower lr, or set grad_clip"
            )
