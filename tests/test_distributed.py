"""Two ranks reach what one reaches, in every objective; both see the same errors.

One spawn of two gloo processes runs everything and writes what it saw; the tests read it.
"""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from consistency.data import ImageStream
from consistency.loop import FiniteCheck, NonFiniteLoss, Workers
from consistency.randomness import rank_rows
from tests.every_kind import (
    BATCH,
    KINDS,
    Spied,
    deterministic,
    free_port,
    fresh,
    images,
    run,
    tensors,
)

STEPS = 2
PIECES = ("teacher-weighted", "scd", "mean_flow")
ODD = 9  # shares of 4 and 5 images; in pieces of 4: one piece against two


def taken(config, **workers):
    """(tensors after two steps, gradients of the last one, logs) of one worker."""
    stage = fresh(config)
    logs = [log for _, log in zip(range(STEPS), run(stage, **workers), strict=False)]
    gradients = [p.grad.clone() for p in stage.state.net.parameters()]
    if stage.state.head is not None:
        gradients += [p.grad.clone() for p in stage.state.head.parameters()]
    said = [(log.images, log.steps, log.lr, log.metrics) for log in logs]
    return {
        "tensors": tensors(stage),
        "gradients": gradients,
        "said": said,
        "loss": [log.loss.item() for log in logs],
    }


def odd(config):
    return replace(config, batch=ODD, images=3 * ODD)


def overflowing(rank):
    """fp16: the gradients of rank 1's first try overflow."""
    stage = fresh(replace(deterministic(KINDS["ect"]), precision="fp16", warmup_images=0))
    tries = []

    def look(nets, batch, progress, terms):
        tries.append((progress.images, terms.sigma.tolist(), stage.state.scaler.get_scale()))
        if rank == 1 and len(tries) == 1:
            return replace(terms, per_sample=terms.per_sample * 1e30)
        return None

    steps = run(stage, Spied(stage.objective, look), rank=rank, world_size=2)
    log = next(steps)
    return {"tries": tries, "steps": log.steps, "tensors": tensors(stage)}


def bad_loss(rank):
    """Rank 1's loss is nan at step 1, noticed after step 4; what each rank says of it."""
    stage = fresh(replace(KINDS["ict"], images=8 * BATCH))

    def look(nets, batch, progress, terms):
        if rank == 1 and progress.images == BATCH:
            return replace(terms, per_sample=terms.per_sample * float("nan"))
        return None

    steps = run(stage, Spied(stage.objective, look), rank=rank, world_size=2, check_every=4)
    checked = []
    try:
        for log in steps:
            checked.append(log.checked)
    except NonFiniteLoss as error:
        return {"error": str(error), "checked": checked}
    return {"error": "", "checked": checked}


def finite_check(rank):
    """A good step, then rank 1's bad one."""
    check = FiniteCheck(Workers(rank, 2))
    passed = 0
    try:
        for step, loss in enumerate((1.0, (1.0, float("inf"))[rank])):
            check.note(torch.tensor(loss), torch.tensor([0.5, 2.0]) + rank, 7 + step, 56 + 8 * step)
            check.raise_if_not()
            passed += 1
    except NonFiniteLoss as error:
        return {"error": str(error), "passed": passed}
    return {"error": "", "passed": passed}


def counted(counts):
    """DDP's forward, counting its calls in `counts`."""
    forward = DistributedDataParallel.forward

    def count(self, *inputs, **named):
        counts.append(1)
        return forward(self, *inputs, **named)

    return count


def _rank(rank, port, path):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    ours = {"rank": rank, "world_size": 2}
    calls = []
    DistributedDataParallel.forward = counted(calls)
    plain, ddp = {}, {}
    for kind, config in KINDS.items():
        calls.clear()
        plain[kind] = taken(deterministic(config), **ours)
        ddp[kind] = len(calls)
    seen = {
        "plain": plain,
        "ddp": ddp,
        "pieces": {
            kind: taken(odd(deterministic(KINDS[kind])), micro_batch=4, **ours) for kind in PIECES
        },
        "overflow": overflowing(rank),
        "bad loss": bad_loss(rank),
        "finite check": finite_check(rank),
    }
    torch.save(seen, Path(path) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, args=(free_port(), str(path)), nprocs=2)
    return [torch.load(path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def assert_as_alone(ranks, run_name, kind, config):
    one, other = (rank[run_name][kind] for rank in ranks)
    alone = taken(config)
    assert one["said"] == other["said"] == alone["said"]  # lr, N(k), mu(k) on every rank
    assert one["tensors"].keys() == alone["tensors"].keys()  # no "module." in front
    for name, value in alone["tensors"].items():
        assert torch.equal(one["tensors"][name], other["tensors"][name]), name
        assert torch.allclose(one["tensors"][name], value, atol=1e-5, rtol=1e-4), name
    for mine, theirs, whole in zip(
        one["gradients"], other["gradients"], alone["gradients"], strict=True
    ):
        assert torch.equal(mine, theirs)
        assert torch.allclose(mine, whole, atol=1e-5, rtol=1e-3)
    mean = [(a + b) / 2 for a, b in zip(one["loss"], other["loss"], strict=True)]
    assert mean == pytest.approx(alone["loss"], rel=1e-4)
    assert one["loss"] != other["loss"]  # they do see other images


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_reach_what_one_rank_reaches(kind, ranks):
    assert_as_alone(ranks, "plain", kind, deterministic(KINDS[kind]))


@pytest.mark.parametrize("kind", PIECES)
def test_unequal_shares_in_unequal_pieces_reach_it_too(kind, ranks):
    assert_as_alone(ranks, "pieces", kind, odd(deterministic(KINDS[kind])))


def test_only_the_pass_with_a_gradient_goes_through_ddp(ranks):
    """Target, teacher and forward-mode passes take the module inside: DDP's hooks want no part."""
    for rank in ranks:
        assert rank["ddp"] == dict.fromkeys(KINDS, STEPS)


def test_gradients_that_overflow_on_one_rank_are_skipped_by_all(ranks):
    for rank in ranks:
        (first, first_sigma, scale), (again, again_sigma, halved) = rank["overflow"]["tries"]
        assert (first, again) == (0, 0)
        assert first_sigma == again_sigma
        assert (scale, halved) == (65536, 32768)
        assert rank["overflow"]["steps"] == 1
    for name, value in ranks[0]["overflow"]["tensors"].items():
        assert torch.isfinite(value).all()
        assert torch.equal(value, ranks[1]["overflow"]["tensors"][name])


def test_every_rank_stops_and_names_the_step_and_the_rank_where_it_began(ranks):
    """A step later the gradients have carried rank 1's nan to rank 0, which comes first."""
    for rank in ranks:
        assert rank["bad loss"]["checked"] == [False, False, False]
        assert rank["bad loss"]["error"].startswith("loss is nan at step 1 (8 images) on rank 1; ")


def test_every_rank_names_the_first_bad_one_with_its_loss_and_its_sigmas(ranks):
    said = "loss is inf at step 8 (64 images) on rank 1; sigma in [1.5, 3]; "
    for rank in ranks:
        assert rank["finite check"]["passed"] == 1
        assert rank["finite check"]["error"].startswith(said)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_shares_are_the_batch_in_order(world_size):
    data = images(20)
    assert isinstance(data, ImageStream)
    device = torch.device("cpu")
    whole = data.batch(7, ODD, 0, ODD, device)
    rows = [rank_rows(ODD, rank, world_size) for rank in range(world_size)]
    parts = [data.batch(7, ODD, start, stop, device) for start, stop in rows]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
    sizes = [stop - start for start, stop in rows]
    assert max(sizes) - min(sizes) <= 1
