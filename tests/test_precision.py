"""fp32 masters whatever the precision; fp16's scaler in the right order; bf16 inside F alone."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from consistency.config import NoiseConfig
from consistency.loop import NonFiniteLoss
from consistency.method_config import ConstantLevels, UniformPairs
from consistency.objectives import Progress, jvp, mean_flow, scm
from consistency.objectives.pairs import draw_pairs
from consistency.parameterization import noise_label
from consistency.randomness import BatchRandom
from consistency.schedules import num_levels_sqrt
from tests.every_kind import BATCH, KINDS, Spied, deterministic, fresh, run, tensors


def at(precision, kind, **changes):
    return replace(deterministic(KINDS[kind]), precision=precision, warmup_images=0, **changes)


def overflow(stage, tries):
    """Gradients of the given tries (counted from 1) become infinite; returns the count so far."""
    counted = []

    def spoil(parameter):
        counted.append(len(counted) + 1)
        if tries is None or counted[-1] in tries:
            parameter.grad.fill_(float("inf"))

    next(iter(stage.state.net.parameters())).register_post_accumulate_grad_hook(spoil)
    return counted


# --- fp16: scale, unscale, look, clip, step ------------------------------------------------------


@pytest.mark.parametrize("kind", ["ct-2023", "scd"])
def test_a_step_whose_gradients_overflow_is_not_taken_and_tried_again(kind):
    stage = fresh(at("fp16", kind))
    seen = []

    def look(nets, batch, progress, terms):
        seen.append(
            (progress.images, terms.sigma.clone(), batch.images.clone(), tensors(stage),
             stage.state.scaler.get_scale())
        )  # fmt: skip

    overflow(stage, {2})
    logs = [log for _, log in zip(range(2), run(stage, Spied(stage.objective, look)), strict=False)]

    assert [try_[0] for try_ in seen] == [0, BATCH, BATCH]
    _, (_, sigma, pixels, before, scale), (_, sigma_again, pixels_again, after, halved) = seen
    assert torch.equal(sigma, sigma_again)
    assert torch.equal(pixels, pixels_again)
    assert (scale, halved) == (2.0**16, 2.0**15)
    for name, value in before.items():  # net, target, head, averages, both moments, step counters
        assert torch.equal(after[name], value), name
    assert [(log.images, log.steps) for log in logs] == [(BATCH, 1), (2 * BATCH, 2)]
    assert logs[-1].metrics["loss_scale"] == halved
    if kind == "ct-2023":
        N = [num_levels_sqrt(k * BATCH, 3 * BATCH, 2, 20) for k in range(2)]
        assert [log.metrics["N"] for log in logs] == N
    moved = {
        name.split("/")[0] for name, v in tensors(stage).items() if not torch.equal(v, after[name])
    }
    assert moved >= {"net", "ema", "optimizer"}


def test_the_first_step_of_all_may_overflow_too():
    stage = fresh(at("fp16", "teacher"))
    counted = overflow(stage, {1, 2, 3})
    log = next(run(stage))
    assert (log.steps, len(counted)) == (1, 4)
    assert stage.state.scaler.get_scale() == 2.0**13
    assert all(torch.isfinite(value).all() for value in tensors(stage).values())


def test_gradients_are_clipped_at_their_true_size():
    """Clipped while still scaled by 65536 they would end at the bound over 65536."""
    stage = fresh(at("fp16", "teacher", grad_clip=1e-3))
    next(run(stage))
    norms = [p.grad.norm() for p in stage.state.net.parameters()]
    assert torch.stack(norms).norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_overflow_without_end_stops_with_what_to_do():
    stage = fresh(at("fp16", "teacher"))
    before = tensors(stage)
    counted = overflow(stage, None)
    with pytest.raises(NonFiniteLoss, match=r"overflow fp16 at step 0 \(0 images\).*bf16 or fp32"):
        next(run(stage))
    assert len(counted) == 27  # from 2^16 to below 2^-10
    assert (stage.state.images, stage.state.steps) == (0, 0)
    after = tensors(stage)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_loss_that_overflows_is_no_matter_of_its_scale():
    """No scale mends the forward pass: named at once, also where looks at the loss are rare."""
    stage = fresh(at("fp16", "teacher"))

    def look(nets, batch, progress, terms):
        return replace(terms, per_sample=terms.per_sample / 0)

    with pytest.raises(NonFiniteLoss, match=r"loss is inf at step 0 \(0 images\)"):
        next(run(stage, Spied(stage.objective, look), check_every=100))
    assert stage.state.scaler.get_scale() >= 2.0**15


def test_the_scale_survives_a_checkpoint(tmp_path):
    stage = fresh(at("fp16", "ict"))
    overflow(stage, {1})
    logs = run(stage)
    next(logs)
    stage.state.save(tmp_path)
    restored = fresh(at("fp16", "ict"))
    restored.state.restore(tmp_path)
    scaler = restored.state.scaler.state_dict()
    assert scaler == stage.state.scaler.state_dict()
    assert (scaler["scale"], scaler["_growth_tracker"]) == (2.0**15, 1)
    expected, got = next(logs), next(run(restored))
    assert got.loss.item() == expected.loss.item()
    assert got.metrics == expected.metrics
    theirs = tensors(stage)
    assert all(torch.equal(theirs[name], value) for name, value in tensors(restored).items())


# --- both half precisions: only the inside of F is in it -----------------------------------------


class Precisions:
    """Dtypes of the network's inputs and of its first convolution, and the levels it was told."""

    def __init__(self, net):
        self.inputs, self.inside, self.told = set(), [], []
        net.register_forward_pre_hook(self._inputs)
        first = next(layer for layer in net.modules() if isinstance(layer, nn.Conv2d))
        first.register_forward_hook(lambda layer, args, out: self.inside.append(out.dtype))

    def _inputs(self, net, args):
        self.inputs |= {
            value.dtype for value in args if value is not None and value.is_floating_point()
        }
        self.told.append(args[1].detach().clone())


@pytest.mark.parametrize(
    ("precision", "kind"),
    [("bf16", kind) for kind in KINDS] + [("fp16", kind) for kind in ("teacher", "cd", "scd")],
)
def test_only_the_inside_of_the_network_is_in_half_precision(precision, kind):
    stage = fresh(at(precision, kind))
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    seen = Precisions(stage.state.net)
    losses = []

    def look(nets, batch, progress, terms):
        losses.append(terms.per_sample)
        # Rounded to bfloat16, 72, 75 and 80 would be nearly one level.
        if kind != "mean_flow":
            noise = stage.description.noise
            exact = noise_label(terms.sigma, noise.sigma_data, noise.c_noise)
            assert torch.allclose(seen.told[0], exact, rtol=1e-6, atol=1e-7)

    next(run(stage, Spied(stage.objective, look)))
    assert seen.inputs == {torch.float32}
    assert seen.inside[0] == half  # it is really used
    forward_mode = kind in ("scd", "sct", "mean_flow")
    assert seen.inside[-1] == (torch.float32 if forward_mode else half)
    assert losses[0].dtype == torch.float32
    assert {value.dtype for value in tensors(stage).values()} == {torch.float32}


def test_a_pass_without_a_gradient_leaves_no_rounded_weights_behind():
    """Autocast's cache would hand them to the pass that needs a gradient; that of torch 2.13 was
    not seen to, older ones do."""

    class Before(Spied):
        def __call__(self, nets, batch, progress, random):
            assert not torch.is_autocast_cache_enabled()
            with torch.no_grad():
                nets.detached(batch.images, torch.ones(len(batch.images)), batch.labels)
            return super().__call__(nets, batch, progress, random)

    stage = fresh(at("bf16", "ect"))
    next(run(stage, Before(stage.objective, lambda *_: None)))
    assert all(p.grad is not None for p in stage.state.net.parameters())


@pytest.mark.parametrize(("kind", "module"), [("scd", scm), ("sct", scm), ("mean_flow", mean_flow)])
def test_forward_mode_derivatives_are_those_of_fp32(kind, module, monkeypatch):
    derivatives = {}

    def record(function, inputs, tangents):
        output, derivative = jvp.directional_derivative(function, inputs, tangents)
        assert {value.dtype for value in (*inputs, *tangents)} == {torch.float32}
        derivatives.setdefault(precision, (output, derivative))
        return output, derivative

    monkeypatch.setattr(module, "directional_derivative", record)
    for precision in ("fp32", "bf16"):
        # Unguided, so that the tangents do not come from a network in bf16 themselves.
        changes = {"guidance": 1.0, "kappa": 0.0} if kind == "mean_flow" else {"path": "noise"}
        config = at(precision, kind, **({**changes, "guidance": 1.0}))
        next(run(fresh(config)))
    for exact, got in zip(derivatives["fp32"], derivatives["bf16"], strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, exact)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_gradients_reach_every_parameter_and_point_where_those_of_fp32_do(kind):
    """Not so where a weight that autocast rounded under no_grad is handed to the online pass."""
    gradients = {}
    for precision in ("fp32", "bf16"):
        stage = fresh(at(precision, kind))
        next(run(stage))
        head = [] if stage.state.head is None else [*stage.state.head.parameters()]
        parameters = [*stage.state.net.parameters(), *head]
        trained = [p for group in stage.state.optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in parameters} == {id(p) for p in trained}
        for parameter in parameters:
            assert parameter.grad is not None
            assert parameter.grad.dtype == torch.float32
            assert parameter.grad.abs().max() > 0
        gradients[precision] = torch.cat([p.grad.flatten() for p in parameters]).double()
    cosine = torch.cosine_similarity(*gradients.values(), dim=0)
    assert 0.99 < cosine < 1


# --- fp32 itself ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cd", "scd", "mean_flow"])
def test_an_fp32_run_holds_no_half_precision(kind):
    seen = set()

    class Dtypes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            outs = out if isinstance(out, list | tuple) else [out]
            seen.update(value.dtype for value in outs if isinstance(value, torch.Tensor))
            return out

    steps = run(fresh(KINDS[kind]))
    with Dtypes():
        next(steps)
    assert torch.float32 in seen
    assert not seen & {torch.float16, torch.bfloat16}


def test_high_noise_levels_stay_apart_in_bf16():
    """250 ln t of 70, 72, 75 and 80 lies 8 apart in bfloat16."""
    levels = torch.tensor([70.0, 72.0, 75.0, 80.0])
    stage = fresh(KINDS["teacher"])
    embedded = []
    stage.state.net.map_layer1.register_forward_hook(lambda m, args, out: embedded.append(out))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        stage.objective.function(stage.state.net)(torch.zeros(4, 1, 8, 8), levels)
    (out,) = embedded
    assert out.dtype == torch.float32
    assert len(out.unique(dim=0)) == 4
    assert len(noise_label(levels, 0.5).unique()) == 4


@pytest.mark.parametrize("N", [18, 151, 1281])
def test_gaps_of_the_training_grid_keep_their_digits(N):
    """At N = 1281 the smallest is 3.9e-5 and the weight of iCT is one over it."""
    random = BatchRandom(torch.Generator().manual_seed(0), 20_000, 0, 20_000)
    levels = UniformPairs(levels=ConstantLevels(N=N))
    pairs = draw_pairs(levels, NoiseConfig(), Progress(0, 1), random)
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    ramp = torch.arange(N, dtype=torch.float64) / (N - 1)
    grid = (low + ramp * (high - low)) ** 7
    index = (pairs.r[:, None].double() - grid).abs().argmin(1)
    exact = grid[index + 1] - grid[index]
    assert index.min() == 0
    assert torch.allclose((pairs.t - pairs.r).double(), exact, rtol=2e-3)
    smallest = exact.argmin()
    assert (pairs.t - pairs.r)[smallest].item() == pytest.approx(exact[smallest].item(), rel=1e-4)
