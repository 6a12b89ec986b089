"""What a recipe will cost, held against real steps, published sizes and the recipes' headers."""

import re
import shlex
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from consistency.config import NetworkConfig, NoiseConfig, TeacherConfig
from consistency.data import ImageStream
from consistency.flops import lpips_cost, network_cost
from consistency.loop import train
from consistency.published import ModelDescription, build_network
from consistency.stage import begin, describe
from infra.errors import UserError
from pipelines import cli, estimate
from pipelines.config import load_cluster
from pipelines.estimate import DEVICES, GIB, USABLE, Device, load_recipe

ROOT = Path(__file__).parent.parent
LAPTOP = load_cluster("laptop")
H200 = DEVICES[0]
PAPER_SIZED = ["cifar10", "cifar10-scm", "imagenet64", "lsun256"]

ADM = NetworkConfig(
    architecture="adm",
    channels=192,
    channel_mult=(1, 2, 3, 4),
    num_blocks=3,
    attention=(32, 16, 8),
    class_conditional=True,
)


def describing(network: NetworkConfig, size: int, classes: int = 0, channels: int = 3):
    return ModelDescription(
        kind="denoiser",
        network=network,
        noise=NoiseConfig(),
        size=size,
        channels=channels,
        class_names=("",) * classes,
    )


def tiny(*overrides: str):
    """digits with a small network and batch."""
    return load_recipe(
        "quickstart",
        ["teacher.batch=4", "distill.batch=4", "isolate.batch=4", *overrides],
    )


# --- one network ---------------------------------------------------------------------------------


def test_the_forward_pass_of_the_cifar_network_is_the_published_one():
    cost = network_cost(describing(NetworkConfig(), 32))
    assert cost.parameters == pytest.approx(55.73e6, rel=1e-3)
    assert cost.forward == pytest.approx(42.4e9, rel=0.01)


def test_the_forward_pass_of_the_imagenet_network_is_the_published_one():
    cost = network_cost(describing(ADM, 64, classes=1000))
    assert cost.parameters == pytest.approx(295.9e6, rel=1e-3)
    assert cost.forward == pytest.approx(219e9, rel=0.02)


def test_convolutions_grow_with_the_area_and_attention_with_its_square():
    network = NetworkConfig(channels=16, channel_mult=(1,), num_blocks=1, attention=())
    rest = []  # without the one attention: two products of side^4 x channels multiply-adds
    for side in (8, 16, 32):
        rest.append(network_cost(describing(network, side)).forward - 2 * 2 * side**4 * 16)
    assert rest[2] - rest[1] == 4 * (rest[1] - rest[0])


def test_lpips_costs_two_passes_of_vgg_at_224():
    assert lpips_cost(32, 3).forward == pytest.approx(2 * 30.7e9, rel=0.01)  # VGG16: 15.35 GMAC
    assert lpips_cost(32, 3).parameters == pytest.approx(14.715e6, rel=1e-3)


class NormsInSinglePrecision(TorchFunctionMode):
    """What CUDA's autocast does and the CPU's does not."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.group_norm:
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("architecture", ["ddpmpp", "ncsnpp", "adm"])
def test_the_bytes_kept_for_backward_are_those_of_a_real_pass(architecture, dropout, half):
    about = describing(
        NetworkConfig(
            architecture=architecture,
            channels=32,
            channel_mult=(1, 2),
            num_blocks=1,
            attention=(8,),
            class_conditional=True,
        ),
        16,
        classes=3,
    )
    net = build_network(about, dropout, 8).train()
    own = {p.data_ptr() for p in [*net.parameters(), *net.buffers()]}

    def saved(batch: int) -> int:
        storages: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False),
            NormsInSinglePrecision() if half else nullcontext(),
        ):
            output = net(
                torch.randn(batch, 3, 16, 16), torch.zeros(batch), torch.zeros(batch).long()
            )
        total = sum(t.untyped_storage().nbytes() for key, t in storages.items() if key not in own)
        del output
        return total

    cost = network_cost(about, dropout=dropout, dropout_max_side=8, half=half)
    three, five = saved(3), saved(5)
    assert cost.saved == (five - three) // 2
    assert cost.kept == three - 3 * cost.saved


# --- a stage, against a real step of it ----------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "overrides"),
    [
        ("teacher", []),
        ("distill", []),  # Heun, EMA target
        ("distill", ["distill.path=euler", "distill.target={kind: stop_grad}"]),
        ("distill", ["distill.guidance=2", "teacher.label_dropout=0.1"]),
        ("distill", ["distill.method=scd"]),
        ("distill", ["distill.method=scd", "distill.guidance=2", "teacher.label_dropout=0.1"]),
        ("isolate", []),  # iCT
        ("isolate", ["isolate.method=ect"]),
        ("isolate", ["isolate.method=sct"]),
        ("isolate", ["isolate.method=mean-flow"]),
        (
            "isolate",
            ["isolate.method=mean-flow", "isolate.guidance=2", "isolate.label_dropout=0.1"],
        ),
        (
            "truncate",
            [
                "isolate.method=ect",
                "truncate.method=tcm",
                "truncate.images=400",
                "truncate.batch=4",
            ],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:2]) or "preset",
)
def test_flops_and_memory_of_a_stage_are_those_of_a_real_step(section, overrides):
    recipe = tiny(*overrides)
    training = getattr(recipe, section)
    stage_cost = next(s for s in estimate.estimate(recipe).stages if s.name == section)
    about = describe(
        training,
        network=recipe.network,
        noise=recipe.noise,
        size=8,
        channels=1,
        class_names=("",) * 10,
    )
    needs_teacher = not isinstance(training, TeacherConfig) and training.uses_teacher
    stage = begin(
        about,
        training,
        seed=0,
        teacher_weights=build_network(about).state_dict() if needs_teacher else None,
    )
    images = torch.randint(0, 256, (20, 8, 8, 1), dtype=torch.uint8).numpy()
    stream = ImageStream(images, torch.arange(20).remainder(10).numpy(), 0, False)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        next(train(stage.state, stage.objective, stream, training, teacher=stage.teacher))
    per_image = sum(work.flops for _, _, work in stage_cost.parts)
    # Nobody asks for the gradient of the image, nor for that of the product behind the embedding.
    assert counter.get_total_flops() / training.batch == pytest.approx(per_image, rel=0.01)

    state = stage.state
    tensors = [*state._tensors().values(), *(p.grad for p in state.net.parameters())]
    tensors += [] if stage.teacher is None else [*stage.teacher.state_dict().values()]
    kept = network_cost(about).kept
    assert stage_cost.resident - kept == pytest.approx(sum(t.nbytes for t in tensors), rel=0.005)


def test_lpips_counts_where_it_is_the_distance():
    plain, perceptual = (
        estimate.estimate(load_recipe("cifar10", overrides)).stages[1]
        for overrides in ([], ["distill.distance=lpips", "distill.lpips=file"])
    )
    added = sum(w.flops for w in perceptual.work) - sum(w.flops for w in plain.work)
    assert added == pytest.approx(plain.images * 3 * 30.7e9, rel=0.01)  # one is not trained through
    assert perceptual.saved > plain.saved + 224 * 224 * 64 * 4


# --- a recipe ------------------------------------------------------------------------------------


def test_everything_is_proportional_to_the_images():
    once, twice = (
        estimate.estimate(tiny(f"teacher.images={images}")).stages[0] for images in (4000, 8000)
    )
    assert (once.steps, twice.steps) == (1000, 2000)
    assert twice.work[0].flops == 2 * once.work[0].flops
    assert H200.hours(twice.work, 0.4) == pytest.approx(2 * H200.hours(once.work, 0.4))
    assert H200.hours(once.work, 0.2) == pytest.approx(2 * H200.hours(once.work, 0.4))


def test_the_hour_of_ect_is_seven_minutes_of_an_h200():
    recipe = load_recipe(
        "cifar10",
        [
            "isolate.method=ect-1hour",
            "isolate.images=1_024_000",
            "isolate.batch=128",
            "isolate.precision=bf16",
        ],
    )
    work = estimate.estimate(recipe).stages[2].work
    measured = Device("as measured", 790e12, 0, 141)  # matrix products, of 989.5 in the data sheet
    assert 60 * measured.hours(work, 0.5) == pytest.approx(7.3, rel=0.01)
    assert 60 * H200.hours(work, 0.4) == pytest.approx(7.3, rel=0.01)


def test_precision_decides_which_peak_counts_and_a_jvp_stays_in_fp32():
    device = Device("round", half=100.0, single=1.0, gib=1)
    single, half = (
        estimate.estimate(tiny("isolate.method=sct", f"isolate.precision={p}")).stages[2]
        for p in ("fp32", "bf16")
    )
    forward = half.parts[0][2].flops / 3 * half.images / 3600
    assert device.hours(single.work, 1.0) == pytest.approx(5 * forward)
    assert device.hours(half.work, 1.0) == pytest.approx(3 * forward / 100 + 2 * forward)
    assert replace(device, has_bf16=False).hours(half.work, 1.0) == float("inf")
    assert half.saved < single.saved


def test_the_largest_micro_batch_fits_and_one_more_does_not():
    stage = estimate.estimate(load_recipe("cifar10", [])).stages[1]
    for device in DEVICES:
        most = stage.largest_micro_batch(device)
        assert stage.bytes_at(most) <= USABLE * device.gib * GIB < stage.bytes_at(most + 1)
    assert stage.largest_micro_batch(Device("small", 1.0, 1.0, 1)) == 0


def test_the_evaluation_is_counted_in_network_calls():
    found = estimate.estimate(load_recipe("quickstart", []))
    candidates, teacher = 3 * 2 * 2000 * (1 + 2), 3 * 2000 * (1 + 3)  # three seed blocks
    assert found.evaluations == candidates + teacher + 500 * 35
    overrides = ["teacher.label_dropout=0.1", "evaluate.teacher_guidance=2"]
    guided = estimate.estimate(load_recipe("quickstart", overrides))
    assert guided.evaluations == candidates + 2 * (teacher + 500 * 35)
    overrides = [
        "select_ema.samples=100",
        "select_ema.sigma_rel=[0.05, 0.2]",
        "isolate.ema=[{kind: power, sigma_rel: 0.05}, {kind: power, sigma_rel: 0.10}]",
        "isolate.snapshots=4",
        "distill.ema=[{kind: power, sigma_rel: 0.10}, {kind: constant, beta: 0.99}]",
    ]
    selected = estimate.estimate(load_recipe("quickstart", overrides))
    assert selected.evaluations == found.evaluations + 2 * 100 + 3 * 100
    keys = ["steps=3", "samples=100", "confirm_samples=200", "confirm_blocks=2", "evaluations=20"]
    searched = estimate.estimate(load_recipe("quickstart", [f"search_sigmas.{k}" for k in keys]))
    calls = (20 * 100 + 3 * 2 * 200) * (2 + 3)  # the default and two others are confirmed
    assert searched.evaluations == found.evaluations + 2 * calls


# --- what the recipes say of themselves ----------------------------------------------------------


def commands(recipe: str) -> list[list[str]]:
    """The `cmforge estimate` lines of a recipe's header, as arguments."""
    text = (ROOT / "configs" / "recipes" / f"{recipe}.yaml").read_text()
    joined = re.sub(r" \\\n# +", " ", text)
    return [shlex.split(line)[2:] for line in re.findall(r"^#   (cmforge est.*)$", joined, re.M)]


@pytest.mark.parametrize("recipe", PAPER_SIZED)
def test_every_command_in_a_header_is_a_recipe(recipe):
    assert commands(recipe) or recipe == "cifar10-scm"
    for name, *overrides in commands(recipe):
        assert name == recipe
        assert load_recipe(name, overrides) != load_recipe(name, [])


@pytest.mark.parametrize("recipe", PAPER_SIZED)
def test_a_header_says_the_hours_that_estimate_says(recipe):
    text = (ROOT / "configs" / "recipes" / f"{recipe}.yaml").read_text().replace("\n# ", " ")
    said = re.search(r"40 % of the peak: ([\d,]+) H200-hours .*?, ([\d,]+) on A100", text)
    assert said is not None
    work = estimate.estimate(load_recipe(recipe, [])).work
    for hours, device in zip(said.groups(), (H200, DEVICES[2]), strict=True):
        assert float(hours.replace(",", "")) == pytest.approx(device.hours(work, 0.4), rel=0.01)


# --- the command ---------------------------------------------------------------------------------


def test_the_command_prints_stages_devices_and_micro_batches(capsys):
    arguments = ["estimate", "quickstart", "cluster.micro_batch=16", "cluster.workers=2"]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert "8x8x1, 10 classes, 0.7 M parameters" in text
    assert re.search(
        r"^distill +19,200 +300 +64 .* student 3F \+ target 1F \+ teacher 2F$", text, re.M
    )
    assert all(device.name in text for device in DEVICES)
    assert "40 % of the dense peak (assumed" in text
    assert "teacher at micro-batch 16: " in text


def test_what_a_recipe_leaves_open_is_assumed_aloud_or_asked_for(capsys):
    small = ["network.channels=32", "network.channel_mult=[1,1]", "network.num_blocks=1"]
    small += ["network.attention=[]"]
    assert cli.main(["estimate", "imagenet64", *small]) == 0
    assert "assumed: 3 channels (--channels), 1000 classes (--classes)" in capsys.readouterr().out
    given = ["--channels", "1", "--classes", "7", "--size", "32"]
    assert cli.main(["estimate", "imagenet64", *small, *given]) == 0
    text = capsys.readouterr().out
    assert "32x32x1, 7 classes" in text
    assert "assumed:" not in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["cifra10"], "unknown recipe 'cifra10', did you mean 'cifar10'?"),
        (["cifar10", "data.source=npz", "data.path=x"], "data.size: only the data says how large"),
        (["cifar10", "--size", "30"], "network.channel_mult: [2, 2, 2] halves the image 2 times"),
        (["cifar10", "--size", "0"], "--size 0: must be at least 1"),
        (["cifar10", "--mfu", "40"], "--mfu 40.0: a share of the peak in (0, 1]"),
        (["cifar10", "teacher.imges=3"], "teacher.imges: unknown key, did you mean 'images'?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, arguments, said):
    assert cli.main(["estimate", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert len(captured.err.splitlines()) == 1


def test_data_that_is_not_there_is_not_missed_but_another_mistake_is():
    assert load_recipe("cifar10", []).data.source == "cifar10"
    with pytest.raises(UserError, match=r"^override 'teacher.lr=-1': teacher.lr: "):
        load_recipe("cifar10", ["teacher.lr=-1"])


def test_an_estimate_starts_neither_ray_nor_mlflow():
    code = (
        "import sys; from pipelines import cli; cli.main(['estimate', 'quickstart']);"
        "print(sorted({'ray', 'mlflow', 'webdataset'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"
