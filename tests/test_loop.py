"""The loop: resume is bitwise, a batch may be cut, bad losses stop it, a step never waits."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from consistency.config import NetworkConfig
from consistency.loop import NonFiniteLoss
from consistency.method_config import ConstantLevels
from consistency.state import CheckpointError
from tests.every_kind import (
    BATCH,
    KINDS,
    Spied,
    deterministic,
    fresh,
    images,
    run,
    tensors,
)


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bitwise_the_uninterrupted_run(kind, tmp_path):
    whole = fresh(KINDS[kind])
    logs = [(log.loss.item(), log.lr, log.metrics) for log in run(whole)]

    first = fresh(KINDS[kind])
    steps = run(first)
    next(steps)
    early = tensors(first)
    next(steps)
    first.state.save(tmp_path / "checkpoint")
    torch.rand(17)  # whatever else a process may do with the global generator
    second = fresh(KINDS[kind])
    second.state.restore(tmp_path / "checkpoint")
    rest = [(log.loss.item(), log.lr, log.metrics) for log in run(second)]

    assert rest == logs[2:]
    assert (second.state.images, second.state.steps) == (3 * BATCH, 3)
    late = tensors(second)
    assert_equal(late, tensors(whole))

    moved = {name.split("/")[0] for name, v in early.items() if not torch.equal(v, late[name])}
    expected = {"net", "ema", "optimizer"}
    expected |= {"target"} if kind in ("cd", "ct-2023") else set()
    expected |= {"head"} if getattr(KINDS[kind], "adaptive_weight", False) else set()
    assert moved == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_taken_in_pieces_is_the_whole_batch(kind):
    """3 does not divide 8: the pieces are 3, 3 and 2 images."""
    config = deterministic(KINDS[kind])
    whole, pieces = fresh(config), fresh(config)
    steps = zip(run(whole), run(pieces, micro_batch=3), strict=True)
    for _, (expected, got) in zip(range(2), steps, strict=False):
        assert (got.images, got.steps, got.lr) == (expected.images, expected.steps, expected.lr)
        assert got.metrics == expected.metrics  # N(k), mu(k), ...
        assert got.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5, abs=1e-6)
    theirs = tensors(whole)
    for name, value in tensors(pieces).items():
        assert torch.allclose(value, theirs[name], atol=1e-6, rtol=1e-5), name


def test_a_finished_stage_takes_no_more_steps():
    stage = fresh(KINDS["teacher"])
    assert len(list(run(stage))) == 3
    assert list(run(stage)) == []


def test_a_budget_that_is_no_multiple_of_the_batch_is_rounded_up():
    config = replace(KINDS["ct-2023"], images=2 * BATCH + 1)
    logs = list(run(fresh(config)))
    assert [log.images for log in logs] == [BATCH, 2 * BATCH, 3 * BATCH]
    assert logs[-1].metrics["N"] <= 21


def nan_at(step, row=0):
    def look(nets, batch, progress, terms):
        if progress.images != step * BATCH:
            return None
        spoilt = terms.per_sample.clone()
        spoilt[row] = float("nan")
        return replace(terms, per_sample=spoilt)

    return look


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched():
    stage = fresh(KINDS["ict"])
    before = tensors(stage)
    with pytest.raises(NonFiniteLoss, match=r"step 0 \(0 images\) on rank 0; sigma in \["):
        next(run(stage, Spied(stage.objective, nan_at(0))))
    assert stage.state.steps == 0
    assert_equal(tensors(stage), before)


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_a_bad_loss_is_named_by_its_step_though_noticed_later(micro_batch):
    config = replace(KINDS["ict"], images=8 * BATCH)
    stage = fresh(config)
    steps = run(stage, Spied(stage.objective, nan_at(4)), check_every=4, micro_batch=micro_batch)
    seen = []
    with pytest.raises(NonFiniteLoss, match=r"loss is nan at step 4 \(32 images\) on rank 0"):
        seen.extend((log.steps, log.checked) for log in steps)
    assert seen == [
        (1, False),
        (2, False),
        (3, False),
        (4, True),
        (5, False),
        (6, False),
        (7, False),
    ]


def test_the_last_step_is_always_checked():
    stage = fresh(KINDS["ict"])
    logs = [(log.steps, log.checked) for log in run(stage, check_every=2)]
    assert logs == [(1, False), (2, True), (3, True)]
    stage = fresh(KINDS["ict"])
    steps = run(stage, Spied(stage.objective, nan_at(2)), check_every=100)
    for _ in range(2):
        next(steps)
    with pytest.raises(NonFiniteLoss, match="step 2 "):
        next(steps)


# --- what a step costs a GPU --------------------------------------------------------------------

WAITS = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2"}


class Count(TorchDispatchMode):
    """Kernels (views and allocations are none), and calls whose result the host waits for."""

    def __init__(self):
        super().__init__()
        self.kernels = 0
        self.waits = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if name in WAITS:
            self.waits.append(name)
        elif not function.is_view and not name.startswith("empty"):
            self.kernels += 1
        return function(*args, **(kwargs or {}))


QUICKSTART = NetworkConfig(
    channels=32, channel_mult=(1, 2), num_blocks=1, attention=(4,), class_conditional=True
)


def second_step(config, network=None):
    """Count of a step in the middle of a run."""
    config = replace(config, optimizer="adam")
    if config == replace(KINDS["ict"], optimizer="adam"):
        # Its law over a new grid is looked at once, on the CPU; then it is remembered.
        config = replace(config, pairs=replace(config.pairs, levels=ConstantLevels(N=18)))
    stage = fresh(config) if network is None else fresh(config, network=network)
    steps = run(stage, check_every=100)
    next(steps)
    with Count() as count:
        next(steps)
    return count


# Counted with torch 2.13; views and allocations are none. EDM's own teacher step dispatches 3980 at
# four times the layers, ECT's 3720.
KERNELS = {"teacher": 447, "ect": 684, "cd": 1030, "scd": 3054, "mean_flow": 3253}


@pytest.mark.parametrize(("kind", "kernels"), KERNELS.items())
def test_a_step_of_the_quickstart_network_launches_few_kernels(kind, kernels):
    """A small network on a GPU is bound by launches: each takes 5 to 8 microseconds."""
    config = replace(KINDS[kind], grad_clip=0.0, dropout=0.0, ema=KINDS[kind].ema[:1])
    if kind == "cd":
        config = replace(config, guidance=1.0)
    count = second_step(config, QUICKSTART)
    assert count.waits == []
    assert count.kernels <= 1.1 * kernels


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in KERNELS])
def test_no_step_waits_for_the_device(kind):
    """With Adam: its fused kernel reads nothing on the host, on the CPU neither. RAdam reads its
    step counters (5 times per parameter); they lie on the CPU, where that stops no device."""
    assert second_step(KINDS[kind]).waits == []


# --- checkpoints --------------------------------------------------------------------------------


def test_restored_optimizer_slots_lie_in_memory_as_their_parameters_do(tmp_path):
    """Fused Adam pairs the elements of both by address."""
    saved = fresh(KINDS["teacher"])
    assert saved.state.optimizer.defaults["fused"]
    steps = run(saved)
    for _ in range(2):
        next(steps)
    saved.state.save(tmp_path)
    restored = fresh(KINDS["teacher"])
    restored.state.restore(tmp_path)
    permuted = 0
    networks = saved.state.net.parameters(), restored.state.net.parameters()
    for parameter, twin in zip(*networks, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            slot = restored.state.optimizer.state[twin][key]
            assert slot.stride() == twin.stride() == parameter.stride()
            assert torch.equal(slot, saved.state.optimizer.state[parameter][key])
        permuted += not twin.is_contiguous()
    assert permuted > 0  # else the network is not channels last, and nothing was tested


def test_damaged_checkpoints_are_refused_by_name(tmp_path):
    stage = fresh(KINDS["teacher"])
    next(run(stage))
    stage.state.save(tmp_path / "good")
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
            fresh(KINDS["teacher"]).state.restore(tmp_path / name)
    (tmp_path / "cut" / "state.json").unlink()
    for folder in ("cut", "never written"):
        with pytest.raises(CheckpointError, match="not a whole checkpoint"):
            fresh(KINDS["teacher"]).state.restore(tmp_path / folder)


@pytest.mark.parametrize(("saved", "restored"), [("cd", "ict"), ("ict", "cd"), ("sct", "ect")])
def test_a_checkpoint_of_another_configuration_is_refused(saved, restored, tmp_path):
    stage = fresh(KINDS[saved])
    next(run(stage))
    stage.state.save(tmp_path)
    with pytest.raises(CheckpointError, match="other tensors"):
        fresh(KINDS[restored]).state.restore(tmp_path)


# --- data ---------------------------------------------------------------------------------------


def test_the_stream_is_a_permutation_per_epoch_and_a_function_of_position():
    data = images(20)
    epochs = [data.indices(20 * epoch, 20).tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert data.indices(15, 10).tolist() == epochs[0][15:] + epochs[1][:5]
    assert data.indices(7, 50).tolist() == [*epochs[0], *epochs[1], *epochs[2]][7:57]


def test_flips_are_mirror_images_of_about_half():
    data = images(20)
    plain = replace(data, flip=False)
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
    data = images(20)
    before = data.images.copy()
    data.batch(0, 20, 0, 20, torch.device("cpu"))
    assert (before == data.images).all()
