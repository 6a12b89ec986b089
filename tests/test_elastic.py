"""A training begun by two workers, gone on with by one, ended by three: what one alone reaches.

Nodes come and go: the global batch, the data's order, the noise, the dropout masks and every
schedule must not notice. Only the order of sums over ranks may differ.
"""

import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from tests.every_kind import KINDS, deterministic, free_port, fresh, run, tensors

RELAY = ("teacher-weighted", "ect", "cd", "ict")
LEGS = ((2, 1), (1, 2), (3, 3))  # so many workers, up to this step


def leg(kind, path, until, **workers):
    """Go on from the checkpoint there is, up to a step; what is said on the way."""
    stage = fresh(deterministic(KINDS[kind]))
    folder = Path(path, kind)
    if folder.exists():
        stage.state.restore(folder)
    said = []
    steps = run(stage, **workers)
    while stage.state.steps < until:
        log = next(steps)
        said.append((log.images, log.steps, log.lr, log.metrics))
    if workers.get("rank", 0) == 0:
        folder.mkdir(exist_ok=True)
        stage.state.save(folder)
        torch.save(said, folder / f"said-{until}.pt")
    return stage


def _rank(rank, world_size, until, port, path):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    for kind in RELAY:
        leg(kind, path, until, rank=rank, world_size=world_size)
        torch.distributed.barrier()  # rank 0 has saved
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def relay(tmp_path_factory):
    path = tmp_path_factory.mktemp("relay")
    for world_size, until in LEGS:
        if world_size == 1:
            for kind in RELAY:
                leg(kind, path, until)
        else:
            mp.spawn(_rank, args=(world_size, until, free_port(), str(path)), nprocs=world_size)
    return path


@pytest.mark.parametrize("kind", RELAY)
def test_workers_that_come_and_go_reach_what_one_alone_reaches(kind, relay, tmp_path):
    assert kind == "teacher-weighted" or KINDS[kind].dropout > 0
    alone = leg(kind, tmp_path, LEGS[-1][1])
    carried = fresh(deterministic(KINDS[kind]))
    carried.state.restore(relay / kind)
    assert (carried.state.images, carried.state.steps) == (alone.state.images, alone.state.steps)
    found = tensors(carried)
    for name, value in tensors(alone).items():
        assert torch.allclose(found[name], value, atol=2e-5, rtol=2e-4), name
    said = [
        line
        for _, until in LEGS
        for line in torch.load(relay / kind / f"said-{until}.pt", weights_only=True)
    ]
    assert said == torch.load(tmp_path / kind / f"said-{LEGS[-1][1]}.pt", weights_only=True)
