"""Mistakes met in other consistency-model code, each kept out by a test.

Where each of the 39 is tested; "here" is this file. They are grouped by what they spoil.

 1 an option that is parsed and never used       test_settings
 2 dropout shared by the CPU's generator only    here
 3 a loop without end, schedules past the budget here; test_loop (budget), test_schedules
 4 resume that counts steps twice, forgets       test_loop (bitwise), test_precision (scaler)
 5 a call with arguments that do not exist       test_end_to_end runs every stage
 6 noise for all samples drawn at once           test_sampling, test_published
 7 image sizes, class counts hard-wired          test_unet, test_sources
 8 half precision in fp32 runs                   test_precision
 9 c_in without its square root                  here; test_parameterization
10 f(x, sigma_min) is not x                      here; test_parameterization
11 N(k) advances on rank 0 only                  test_distributed
12 "module." in front of the weights' names      test_distributed
13 raw sigma to the network; EMA arguments swapped   here
14 pseudo-Huber per pixel                        test_distances
15, 16 zero-shot editing                         no editing here yet
17 infinities scrubbed from gradients            here; test_precision
18 EMA in half precision, per piece, after skips here; test_ema, test_precision
19 250 ln t in bf16                              test_precision
20 grid and solver in low precision              test_precision, test_schedules, test_solvers
21 sums of half values that overflow             test_distances, test_precision
22 target pass through DDP                       test_distributed
23 other noise, mask, labels for the second pass here; test_objectives
24 schedules by epochs or rank-local counters    test_loop (resume), test_distributed
25 N-dependent tensors out of step between ranks test_distributed
26 mu for another batch size                     the user's: mu is per step, as published
27 division by zero at the end of the ODE        here; test_schedules
28 direction of the index, meaning of a level    here; test_published
29 ECT at r = 0 asks the network; 0 x nan        here
30 pickles; units of the schedule                no pickle (lint); budgets are images everywhere
31 attention without a forward derivative        here
32 JVP under DDP                                 test_distributed
33 autocast's cache; dropout under the JVP       test_precision; here
34 a squared error squared again                 here
35 resume that fails in silence                  test_loop
36 one step too few; samples by world size       test_loop; test_published
37 unequal shards                                test_shards, test_shard (each rank reads them all)
38 checkpoints written in place                  here; test_loop
39 evaluation of other pixels, other weights     test_stage (average, eval mode), test_features
"""

import math
from dataclasses import replace

import pytest
import torch

from consistency import state as state_module
from consistency.config import ConstantEMA, NoiseConfig, PowerEMA
from consistency.loop import NonFiniteLoss
from consistency.method_config import (
    ConstantLevels,
    DoublingLevels,
    RatioPairs,
    SqrtLevels,
    UniformPairs,
)
from consistency.networks import blocks
from consistency.objectives import Progress
from consistency.objectives.consistency import consistency_target
from consistency.objectives.dropout import same_dropout
from consistency.objectives.jvp import directional_derivative
from consistency.objectives.mean_flow import power_loss
from consistency.objectives.pairs import draw_pairs, num_levels
from consistency.parameterization import noise_label
from consistency.randomness import BatchRandom
from consistency.schedules import ect_stage
from consistency.stage import finish
from consistency.state import CheckpointError
from tests.every_kind import BATCH, KINDS, Spied, fresh, run, tensors

PAIRS = ["ict", "cd", "ect", "tcm", "scd", "mean_flow"]  # of two passes each


def random(total, seed=0):
    return BatchRandom(torch.Generator().manual_seed(seed), total, 0, total)


# --- 2, 23, 33: both passes see the same masks and the same labels --------------------------------


@pytest.mark.parametrize("kind", PAIRS)
def test_both_passes_have_the_same_dropout_masks(kind, monkeypatch):
    masks = []

    def recorded(h, p, drop=blocks.drop):
        dropped = drop(h, p)
        masks.append((dropped == 0).detach())
        return dropped

    monkeypatch.setattr(blocks, "drop", recorded)
    stage = fresh(replace(KINDS[kind], dropout=0.5))
    next(run(stage))
    one_pass = sum(isinstance(layer, blocks.Block) for layer in stage.state.net.modules())
    assert len(masks) == one_pass * (4 if kind == "mean_flow" else 2)  # guidance asks two more
    for first, last in zip(masks[:one_pass], masks[-one_pass:], strict=True):
        assert torch.equal(first, last)
        assert 0.4 < first.float().mean() < 0.6
    assert not torch.equal(masks[0], masks[1])


def test_the_generator_rewound_is_that_of_the_tensors_device(monkeypatch):
    gpu = {"state": torch.tensor([7])}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: gpu["state"])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda new, device: gpu.update(state=new))
    cpu = torch.get_rng_state()
    with same_dropout(torch.device("cuda")) as rewind:
        gpu["state"] = torch.tensor([8])  # the online pass
        torch.rand(3)
        rewind()
        assert gpu["state"].item() == 7
        gpu["state"] = torch.tensor([9])  # a target pass that draws another number
    assert gpu["state"].item() == 8
    assert not torch.equal(torch.get_rng_state(), cpu)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_masks_are_shared_on_a_gpu():
    x = torch.ones(1000, device="cuda")
    with same_dropout(x.device) as rewind:
        online = torch.nn.functional.dropout(x, 0.5)
        rewind()
        assert torch.equal(online, torch.nn.functional.dropout(x, 0.5))


def told(net):
    """(network input, c_noise, labels) of every call to come."""
    calls = []
    net.register_forward_pre_hook(lambda net, args: calls.append(args[:3]))
    return calls


@pytest.mark.parametrize("kind", PAIRS)
def test_every_pass_is_told_the_same_labels(kind):
    unguided = {"mean_flow": {"guidance": 1.0, "kappa": 0.0}, "tcm": {}, "ict": {}, "ect": {}}
    stage = fresh(replace(KINDS[kind], **unguided.get(kind, {"guidance": 1.0})))
    networks = [stage.state.net, stage.state.target, stage.teacher]
    calls = [told(net) for net in networks if net is not None]
    next(run(stage))
    labels = [call[2] for of_network in calls for call in of_network]
    assert len(labels) >= 2
    assert all(torch.equal(label, labels[0]) for label in labels)
    assert len(labels[0].unique()) > 1
    assert bool((labels[0] == -1).any()) == (kind == "mean_flow")  # its label_dropout


def test_the_target_drops_out_and_the_teacher_does_not():
    stage = fresh(KINDS["cd"])
    stage.teacher.train()
    stage.state.target.eval()
    next(run(stage))
    assert stage.state.target.training
    assert stage.state.net.training
    assert not stage.teacher.training


# --- 3: past the budget ---------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [SqrtLevels(s0=2, s1=20), DoublingLevels(s0=2, s1=16)])
def test_schedules_stay_where_the_budget_left_them(levels):
    last = num_levels(levels, Progress(1000, 1000))
    assert last == levels.s1 + 1
    assert [num_levels(levels, Progress(k, 1000)) for k in (1001, 1200, 10**9)] == [last] * 3
    assert [ect_stage(k, 1000, 8) for k in (1000, 1200, 10**9)] == [7] * 3


# --- 9, 10, 13, 28: what the network is told, and f at the boundary -------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mean_flow"])
def test_the_network_sees_unit_variance_and_the_label_of_its_level(kind):
    stage = fresh(KINDS[kind])
    noise, calls, levels = stage.description.noise, told(stage.state.net), []

    def look(nets, batch, progress, terms):
        levels.append((terms.sigma, batch.images))

    next(run(stage, Spied(stage.objective, look)))
    (sigma, images), (x, label, _) = levels[0], calls[0]
    assert torch.allclose(label, noise_label(sigma, 0.5, noise.c_noise))
    power = (images.square().flatten(1).mean(1) + sigma**2) / (0.25 + sigma**2)
    assert torch.allclose(x.square().flatten(1).mean(1), power, rtol=0.75)
    f = stage.objective.function(stage.state.net)
    if kind not in ("scd", "sct"):
        f(torch.full((1, 1, 8, 8), 80.0), torch.tensor([80.0]))
        assert calls[-1][0].mean().item() == pytest.approx(80 / math.sqrt(80**2 + 0.25))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["cd", "ict", "ect", "sct", "tcm"])
def test_a_published_consistency_function_is_the_identity_at_its_boundary(kind, dtype):
    stage = fresh(KINDS[kind])
    f = finish(stage).function
    x = (3 * torch.randn(4, 1, 8, 8)).to(dtype)
    level = torch.full((4,), stage.description.boundary)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), torch.no_grad():
            assert torch.equal(f(x, level).to(dtype), x)
    with torch.no_grad():
        assert not torch.equal(f(x, level + 1).to(dtype), x)


@pytest.mark.parametrize("kind", ["cd", "ct-2023", "ict", "ect", "tcm"])
def test_the_target_is_asked_at_the_cleaner_level(kind):
    stage = fresh(replace(KINDS[kind], **({"guidance": 1.0} if kind == "cd" else {})))
    online = told(stage.state.net)
    target = online if stage.state.target is None else told(stage.state.target)
    teacher = [] if stage.teacher is None else told(stage.teacher)
    next(run(stage))
    t, r = online[0][1], target[-1][1]
    assert bool((r < t).all())
    if kind == "cd":  # Heun: the teacher is asked where the step starts and where it ends
        assert [torch.equal(call[1], level) for call, level in zip(teacher, (t, r), strict=True)]


# --- 17, 18: gradients and averages ---------------------------------------------------------------


def test_a_gradient_that_is_not_finite_is_not_scrubbed():
    stage = fresh(replace(KINDS["ict"], warmup_images=0, grad_clip=0.0))
    first = next(iter(stage.state.net.parameters()))

    def spoil(parameter):
        parameter.grad.fill_(float("nan"))

    first.register_post_accumulate_grad_hook(spoil)
    before = {name: value.clone() for name, value in stage.state.net.state_dict().items()}
    with pytest.raises(NonFiniteLoss, match="gradient's norm is nan at step 0 "):
        next(run(stage))
    for name, value in stage.state.net.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_an_average_moves_once_per_step_towards_the_network(micro_batch):
    averages = (ConstantEMA(beta=0.75), PowerEMA(sigma_rel=0.1))
    stage = fresh(replace(KINDS["ict"], ema=averages, warmup_images=0))
    steps = run(stage, micro_batch=micro_batch)
    next(steps)
    own = stage.state.net.state_dict()
    assert all(torch.equal(stage.state.averages["power-0.1"][k], own[k]) for k in own)  # beta_1 = 0
    before = {k: v.clone() for k, v in stage.state.averages["constant-0.75"].items()}
    next(steps)
    for name, value in stage.state.net.state_dict().items():
        expected = 0.75 * before[name] + 0.25 * value
        assert torch.allclose(stage.state.averages["constant-0.75"][name], expected, atol=1e-7)


def test_averages_do_not_touch_what_is_trained():
    weights = []
    for ema in ((ConstantEMA(beta=0.0),), (PowerEMA(sigma_rel=0.05), ConstantEMA(beta=0.999))):
        stage = fresh(replace(KINDS["cd"], ema=ema))
        list(run(stage))
        weights.append({k: v for k, v in tensors(stage).items() if not k.startswith("ema/")})
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())


def test_an_average_in_half_precision_is_refused():
    stage = fresh(KINDS["teacher"])
    average = stage.state.averages["constant-0.9"]
    name = next(iter(average))
    average[name] = average[name].half()
    with pytest.raises(ValueError, match="must be float32"):
        next(run(stage))


# --- 27, 29: level zero ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["heun", "euler"])
@pytest.mark.parametrize("N", [2, 18])
def test_distillation_never_divides_by_zero(path, N):
    config = replace(KINDS["cd"], path=path, pairs=UniformPairs(levels=ConstantLevels(N=N)))
    drawn = draw_pairs(config.pairs, NoiseConfig(), Progress(0, 1), random(500))
    assert drawn.r.min() == torch.tensor(0.002)  # the lowest level is among them, and 0 is not
    stage = fresh(config)
    next(run(stage))  # raises on a loss that is not finite
    assert all(torch.isfinite(p.grad).all() for p in stage.state.net.parameters())


@pytest.mark.parametrize("boundary", [0.0, 0.002])
def test_at_the_boundary_the_target_is_the_image_whatever_the_network_says(boundary):
    x, r = torch.randn(4, 1, 2, 2), torch.tensor([0.0, boundary, 0.5, 2.0])
    asked = []

    def f(x, sigma, labels):
        asked.append(sigma)
        return torch.full_like(x, float("nan")).where(sigma.view(-1, 1, 1, 1) < 0.1, 2 * x)

    target = consistency_target(f, x, r, None, boundary)
    assert torch.equal(target[:2], x[:2])  # masked, not multiplied: 0 x nan is nan
    assert torch.equal(target[2:], 2 * x[2:])
    assert asked[0].min() > 0  # never ln 0


def test_the_first_stage_of_ect_has_targets_at_zero_and_finite_gradients():
    config = replace(KINDS["ect"], pairs=RatioPairs(P_mean=-3.0, P_std=0.5, stages=3))
    drawn = draw_pairs(config.pairs, NoiseConfig(), Progress(0, 24), random(BATCH))
    assert (drawn.r == 0).all()
    stage = fresh(config)
    next(run(stage))
    assert all(torch.isfinite(p.grad).all() for p in stage.state.net.parameters())


# --- 31, 33, 34: forward mode ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["scd", "mean_flow"])
def test_forward_mode_through_attention_and_dropout_is_the_derivative(kind):
    net = fresh(replace(KINDS[kind], dropout=0.5)).state.net.double().train()
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 1, 8, 8, generator=generator), torch.tensor([0.3, 1.2])]
    inputs += [torch.tensor([0.1, 0.5])] if kind == "mean_flow" else []
    inputs = [value.double() for value in inputs]
    along = [torch.randn(v.shape, generator=generator, dtype=torch.float64) for v in inputs]

    def function(x, c_noise, *gap):
        torch.manual_seed(0)
        return net(x, c_noise, None, *gap)

    output, derivative = directional_derivative(function, inputs, along)
    with torch.no_grad():
        assert torch.allclose(output, function(*inputs), atol=1e-12)
        h = 1e-5
        ahead = function(*(x + h * v for x, v in zip(inputs, along, strict=True)))
        behind = function(*(x - h * v for x, v in zip(inputs, along, strict=True)))
    assert derivative.abs().max() > 0.1
    assert torch.allclose(derivative, (ahead - behind) / (2 * h), atol=1e-6)


def test_the_power_loss_takes_the_square_once():
    squares = torch.tensor([4.0, 0.25, 0.0], requires_grad=True)
    assert torch.equal(power_loss(squares, 0.0, 1e-3), squares)
    loss = power_loss(squares, 0.5, 1e-3)
    assert torch.allclose(loss, squares / (squares + 1e-3).sqrt())
    loss.sum().backward()  # the denominator is a constant
    assert torch.allclose(squares.grad, (squares.detach() + 1e-3) ** -0.5)


# --- 38: writing ----------------------------------------------------------------------------------


def test_a_checkpoint_cut_off_while_written_is_refused(tmp_path, monkeypatch):
    """Also over an older whole one: its record does not fit the new bytes."""
    stage = fresh(KINDS["teacher"])
    next(run(stage))
    save_file = state_module.save_file

    def cut(tensors, path):
        save_file(tensors, path)
        path.write_bytes(path.read_bytes()[:-100])
        raise OSError("no space left on device")

    for folder in ("empty", "older"):
        if folder == "older":
            stage.state.save(tmp_path / folder)
        with monkeypatch.context() as patch:
            patch.setattr(state_module, "save_file", cut)
            with pytest.raises(OSError, match="no space"):
                stage.state.save(tmp_path / folder)
        with pytest.raises(CheckpointError):
            fresh(KINDS["teacher"]).state.restore(tmp_path / folder)


def test_training_does_not_depend_on_the_global_generator():
    weights = []
    for noise in (0, 1):
        stage = fresh(KINDS["cd"])
        torch.manual_seed(noise)
        next(run(stage))
        weights.append(tensors(stage))
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
