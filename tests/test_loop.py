"""The loop: resume is bitwise, workers do not matter, bad losses stop it."""

import os
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from consistency.config import (
    ConsistencyConfig,
    ConstantEMA,
    ConstantLevels,
    DoublingLevels,
    HalfLifeEMA,
    LognormalPairs,
    NetworkConfig,
    NoiseConfig,
    PowerEMA,
    RatioPairs,
    StopGradTarget,
    TargetEMA,
    TeacherConfig,
    UniformPairs,
)
from consistency.data import ImageStream
from consistency.loop import NonFiniteLoss, Workers, stop_if_not_finite, train
from consistency.objectives import ConsistencyObjective, DenoisingObjective
from consistency.parameterization import ConsistencyFunction, Denoiser
from consistency.published import ModelDescription, build_network
from consistency.state import CheckpointError, TrainState

NOISE = NoiseConfig()
ABOUT = ModelDescription(
    kind="consistency",
    network=NetworkConfig(
        channels=8, channel_mult=(1, 2), num_blocks=1, attention=(4,), class_conditional=True
    ),
    noise=NOISE,
    size=8,
    channels=1,
    class_names=("a", "b", "c"),
)
COMMON = {
    "images": 6 * 8,
    "batch": 8,
    "dropout": 0.2,
    "flip": True,
    "decay_from": 0.5,
    "warmup_images": 16,
    "grad_clip": 1.0,
    "ema": (ConstantEMA(beta=0.9), HalfLifeEMA(images=100), PowerEMA(sigma_rel=0.1)),
}
CONFIGS = {
    "teacher": TeacherConfig(**COMMON),
    "cd": ConsistencyConfig(
        **COMMON,
        method="cd",
        init="teacher",
        pairs=UniformPairs(levels=ConstantLevels(N=18)),
        path="heun",
        distance="squared_l2",
        target=TargetEMA(mu=0.9),
    ),
    "ict": ConsistencyConfig(
        **COMMON,
        method="ict",
        init="scratch",
        optimizer="radam",
        pairs=LognormalPairs(levels=DoublingLevels(s0=2, s1=16)),
        path="noise",
        weight="inverse_gap",
        target=StopGradTarget(),
    ),
    "ect": ConsistencyConfig(
        **COMMON,
        method="ect",
        init="teacher",
        pairs=RatioPairs(stages=3),
        path="noise",
        weight="inverse_gap",
    ),
}


def stream(count=20):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
    return ImageStream(images, random.integers(0, 3, count), seed=5, flip=True)


def fresh(config):
    torch.manual_seed(0)
    net = build_network(ABOUT, config.dropout)
    target = None
    if isinstance(config, ConsistencyConfig) and isinstance(config.target, TargetEMA):
        target = build_network(ABOUT, config.dropout)
    # Zero-initialised layers would hide most of the network from a six-step test.
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return TrainState.fresh(net, target, config)


ALONE = Workers()


def steps(state, config, workers=ALONE, data=None):
    if isinstance(config, TeacherConfig):
        objective = DenoisingObjective(NOISE.sigma_data, config.P_mean, config.P_std)
        return train(
            state,
            objective,
            data or stream(),
            config,
            preconditioned=lambda net: Denoiser(net, NOISE.sigma_data),
            workers=workers,
        )
    torch.manual_seed(1)
    teacher = Denoiser(build_network(ABOUT), NOISE.sigma_data).eval().requires_grad_(False)
    return train(
        state,
        ConsistencyObjective.of(config, NOISE),
        data or stream(),
        config,
        preconditioned=lambda net: ConsistencyFunction(net, 0.5, NOISE.sigma_min),
        teacher=teacher,
        workers=workers,
    )


def weights(state):
    return state._tensors()


@pytest.mark.parametrize("name", CONFIGS)
def test_resume_is_bitwise_the_uninterrupted_run(name, tmp_path):
    config = CONFIGS[name]
    whole = fresh(config)
    losses = [log.loss.item() for log in steps(whole, config)]

    first = fresh(config)
    run = steps(first, config)
    for _ in range(3):
        next(run)
    first.save(tmp_path / "checkpoint")
    torch.rand(17)  # whatever else a process may do with the global generator
    second = fresh(config)
    second.restore(tmp_path / "checkpoint")
    rest = [log.loss.item() for log in steps(second, config)]

    assert rest == losses[3:]
    assert (second.images, second.steps) == (whole.images, whole.steps) == (48, 6)
    expected, got = weights(whole), weights(second)
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        assert torch.equal(value, got[key]), key


@pytest.mark.parametrize("name", CONFIGS)
def test_every_step_moves_the_network_and_its_averages(name):
    config = CONFIGS[name]
    state = fresh(config)
    before = {k: v.clone() for k, v in weights(state).items()}
    run = steps(state, config)
    for _ in range(2):  # the first step of a warm-up has a learning rate of zero
        next(run)
    after = weights(state)
    moved = {key.split("/")[0] for key, v in before.items() if not torch.equal(v, after[key])}
    assert moved == {"net", "ema"} | ({"target"} if state.target is not None else set())


def test_a_finished_state_takes_no_more_steps():
    config = CONFIGS["teacher"]
    state = fresh(config)
    assert len(list(steps(state, config))) == 6
    assert list(steps(state, config)) == []


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched():
    config = CONFIGS["ict"]
    state = fresh(config)
    with torch.no_grad():
        next(iter(state.net.parameters())).fill_(float("nan"))
    before = {k: v.clone() for k, v in weights(state).items()}
    with pytest.raises(NonFiniteLoss, match=r"step 0 .*rank 0; sigma in \["):
        next(steps(state, config))
    assert state.steps == 0
    for key, value in weights(state).items():
        assert torch.equal(torch.nan_to_num(value), torch.nan_to_num(before[key]))


def _bad_rank(rank, port, path):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    state = SimpleNamespace(steps=7, images=56)
    try:
        for loss in (1.0, (1.0, float("inf"))[rank]):  # a good step, then rank 1's bad one
            sigma = torch.tensor([0.5, 2.0]) + rank
            stop_if_not_finite(torch.tensor(loss), sigma, state, Workers(rank, 2))
            Path(path, f"{rank}-passed").touch()
    except NonFiniteLoss as error:
        Path(path, f"{rank}").write_text(str(error))
    torch.distributed.destroy_process_group()


def test_every_rank_names_the_first_bad_one_with_its_loss_and_its_sigmas(tmp_path):
    mp.spawn(_bad_rank, args=(free_port(), str(tmp_path)), nprocs=2)
    said = "loss is inf at step 7 (56 images) on rank 1; sigma in [1.5, 3]; "
    for rank in (0, 1):
        assert (tmp_path / f"{rank}-passed").exists()
        assert (tmp_path / f"{rank}").read_text().startswith(said)


def test_restored_optimizer_slots_lie_in_memory_as_their_parameters_do(tmp_path):
    """Fused Adam pairs the elements of both by address."""
    config = CONFIGS["teacher"]
    saved = fresh(config)
    assert saved.optimizer.defaults["fused"]
    run = steps(saved, config)
    for _ in range(2):
        next(run)
    saved.save(tmp_path)
    restored = fresh(config)
    restored.restore(tmp_path)
    permuted = 0
    for parameter, twin in zip(saved.net.parameters(), restored.net.parameters(), strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            slot = restored.optimizer.state[twin][key]
            assert slot.stride() == twin.stride() == parameter.stride()
            assert torch.equal(slot, saved.optimizer.state[parameter][key])
        permuted += not twin.is_contiguous()
    assert permuted > 0  # else the network is not channels last, and nothing was tested


def test_damaged_checkpoints_are_refused_by_name(tmp_path):
    config = CONFIGS["teacher"]
    state = fresh(config)
    next(steps(state, config))
    state.save(tmp_path / "good")
    data = (tmp_path / "good" / "state.safetensors").read_bytes()

    for name, damaged in {
        "flipped": data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
        "cut": data[: len(data) // 2],
        "empty": b"",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.safetensors").write_bytes(damaged)
        (tmp_path / name / "state.json").write_bytes(
            (tmp_path / "good" / "state.json").read_bytes()
        )
        with pytest.raises(CheckpointError, match=r"state\.safetensors"):
            fresh(config).restore(tmp_path / name)
    (tmp_path / "cut" / "state.json").unlink()
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        fresh(config).restore(tmp_path / "cut")


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    state = fresh(CONFIGS["cd"])
    next(steps(state, CONFIGS["cd"]))
    state.save(tmp_path)
    with pytest.raises(CheckpointError, match="other tensors"):
        fresh(CONFIGS["ict"]).restore(tmp_path)


def test_the_stream_is_a_permutation_per_epoch_and_a_function_of_position():
    data = stream(20)
    epochs = [data.indices(20 * epoch, 20).tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert data.indices(15, 10).tolist() == epochs[0][15:] + epochs[1][:5]
    assert data.indices(7, 50).tolist() == [*epochs[0], *epochs[1], *epochs[2]][7:57]


def test_flips_are_mirror_images_of_about_half():
    data = stream(20)
    plain = ImageStream(data.images, data.labels, data.seed, flip=False)
    device = torch.device("cpu")
    flipped = 0
    for position in range(0, 400, 20):
        a = plain.batch(position, 20, 0, 20, device).images
        b = data.batch(position, 20, 0, 20, device).images
        mirrored = [not torch.equal(x, y) for x, y in zip(a, b, strict=True)]
        assert torch.equal(a[mirrored].flip(-1), b[mirrored])
        flipped += sum(mirrored)
    assert 150 < flipped < 250


def test_the_data_set_is_not_changed_by_flipping():
    data = stream(20)
    before = data.images.copy()
    data.batch(0, 20, 0, 20, torch.device("cpu"))
    assert np.array_equal(before, data.images)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank(rank, port, world_size, name, path):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    config = no_dropout(CONFIGS[name])
    state = fresh(config)
    list(steps(state, config, Workers(rank, world_size)))
    torch.save({k: v for k, v in weights(state).items() if k[:3] == "net"}, f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


def no_dropout(config):
    from dataclasses import replace

    return replace(config, dropout=0.0)


def test_three_ranks_reach_what_one_rank_reaches(tmp_path):
    name = "cd"
    # A batch of 8 over 3 ranks: uneven shares (2, 3, 3) must still be one mean.
    mp.spawn(_rank, args=(free_port(), 3, name, str(tmp_path)), nprocs=3)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    config = no_dropout(CONFIGS[name])
    alone = fresh(config)
    list(steps(alone, config))
    for key, value in weights(alone).items():
        if key.startswith("net"):
            assert torch.equal(ranks[0][key], ranks[1][key])
            assert torch.equal(ranks[0][key], ranks[2][key])
            assert torch.allclose(ranks[0][key], value, atol=2e-5), key
