"""The command `cmforge`: what can be typed, and how it ends. `*commands` do it."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from infra.errors import UserError
from pipelines import commands, model_commands

EXIT_CODES = """\
exit codes:
  0    done
  1    a stage failed, or a check of `doctor` did
  2    the command, recipe, data or workspace needs mending (one line says how)
  3    asked to stop (SIGTERM), and everything is saved; the same command goes on where it stopped
  130  interrupted; the same command goes on where it stopped
  141  nobody reads the output any more (`cmforge plan | head`)
"""

MODEL = (
    "models:/NAME@ALIAS, a model folder or file, or teacher, distill, isolate, truncate of the "
    "workspace (default: the model registered from it)"
)

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse gives up on positionals that follow an option: `run digits --cluster auto a.b=1`.
    if rest and hasattr(arguments, "overrides") and all("=" in r and r[0] != "-" for r in rest):
        arguments.overrides = [*arguments.overrides, *rest]
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    command: Command = arguments.command
    try:
        code = command(arguments)
        sys.stdout.flush()  # here, where a closed pipe is still ours to handle
        return code
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, as other tools: a run cut short must not pass for done
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cmforge",
        description="From images to a registered few-step generator, by consistency models.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top = parser.add_subparsers(required=True, metavar="COMMAND")

    def described(name: str, text: str, among: Any = top) -> Any:
        return among.add_parser(
            name,
            help=text,
            description=text,
            epilog=EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def add(name: str, command: Command, text: str, among: Any = top) -> Any:
        sub = described(name, text, among)
        sub.set_defaults(command=command)
        sub.add_argument(
            "--workspace", metavar="URL", help="folder or fsspec URL of results and registry"
        )
        sub.add_argument("--cluster", metavar="NAME", help="laptop, one-gpu, auto, or a YAML file")
        return sub

    def add_recipe(sub: argparse.ArgumentParser, optional: bool) -> None:
        sub.add_argument(
            "recipe",
            nargs="?" if optional else None,
            help="a recipe's name or YAML file"
            + (" (default: the one last run in the workspace)" if optional else ""),
        )
        sub.add_argument(
            "overrides",
            nargs="*",
            metavar="key=value",
            help="dotted overrides: teacher.images=200_000, cluster.workers=2",
        )

    def add_tuning(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--tune", action="store_true", help="search a stage's settings before it is trained"
        )
        sub.add_argument(
            "--sweep",
            action="append",
            default=[],
            metavar="NAME",
            help="with --tune: isolation (default), distillation, or a YAML file; repeatable",
        )

    run = add(
        "run", commands.run, "run what is not done yet, up to a registered model and its report"
    )
    add_recipe(run, optional=False)
    run.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    waiting = "where another driver has the workspace, wait for it"
    run.add_argument("--wait", action="store_true", help=waiting)
    add_tuning(run)
    run.add_argument(
        "--force", action="append", default=[], metavar="STEP", help="run this step again"
    )
    plan = add("plan", commands.plan, "print what a run would reuse and do, with the reasons")
    add_recipe(plan, optional=False)
    add_tuning(plan)
    text = "search the settings of a stage with Ray Tune, and print the winner's"
    tune = add("tune", commands.tune, text)
    add_recipe(tune, optional=True)
    tune.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="NAME",
        help="isolation (default), distillation, or a YAML file; its keys as sweep.trials=32",
    )
    tune.add_argument("--dry-run", action="store_true", help="print space and cost, and stop")
    tune.add_argument("--wait", action="store_true", help=waiting)
    tune.add_argument("--status", action="store_true", help="print how every trial stands")
    tune.add_argument(
        "--extend", type=int, metavar="N", help="so many trials more than there have been"
    )
    status = add("status", commands.status, "print how far the workspace is")
    add_recipe(status, optional=True)
    report = add("report", commands.report, "print where the report is, or copy it")
    add_recipe(report, optional=True)
    report.add_argument("--out", metavar="FILE", help="copy the page there")

    sample = add("sample", model_commands.sample, "draw images from a model")
    sample.add_argument(
        "model",
        nargs="?",
        help=MODEL,
    )
    sample.add_argument("--num", type=int, default=40, help="how many images (default 40)")
    sample.add_argument("--steps", type=int, help="evaluations (default 1; a teacher: 18 of Heun)")
    sample.add_argument(
        "--levels",
        metavar="80,0.8",
        help="one evaluation at each of these noise levels (of a MeanFlow: times, from 1)",
    )
    sample.add_argument(
        "--guidance", type=float, default=1.0, help="of a teacher, towards the class (default 1)"
    )
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--class", dest="label", type=int, help="class number (default: all)")
    sample.add_argument("--out", default="samples.png", metavar="FILE")

    text = "take a model of another project, or of ours from elsewhere, as a model folder"
    take = described("import", text)
    take.set_defaults(command=model_commands.import_model)
    take.add_argument(
        "source", metavar="SOURCE", help="a .pt, .pkl or .safetensors file, a folder, or a URL"
    )
    take.add_argument("--out", required=True, metavar="URI", help="the folder to be made")
    take.add_argument(
        "--kind", choices=("denoiser", "consistency"), help="where neither file nor name tells"
    )
    take.add_argument("--size", type=int, metavar="N", help="side of the images, likewise")
    take.add_argument(
        "--head-channels", type=int, metavar="N", help="width of the attention heads, likewise (64)"
    )
    take.add_argument(
        "--classes", metavar="FILE|a,b,c", help="names of the classes (default: their numbers)"
    )
    _add_edits(described("edit", "change images with a model that never learned to"), add)
    text = "write a model for other programs: a model folder, diffusers, ONNX or torch.export"
    out = add("export", model_commands.export, text)
    out.add_argument("model", nargs="?", help=MODEL)
    out.add_argument(
        "--format",
        required=True,
        choices=("safetensors", "diffusers", "onnx", "pt2"),
        help="safetensors and diffusers make a folder, onnx and pt2 a file",
    )
    out.add_argument("--out", required=True, metavar="PATH", help="path or fsspec URL to write to")
    cost = add(
        "estimate", commands.estimate, "print FLOPs, GPU-hours and memory before anything starts"
    )
    add_recipe(cost, optional=False)
    cost.add_argument("--mfu", type=float, default=0.4, help="share of the devices' peak (0.4)")
    for what in ("size", "channels", "classes"):
        cost.add_argument(f"--{what}", type=int, help=f"{what} of images the recipe leaves open")

    text = "sample two models with the same noise; score both as the workspace's recipe would"
    pair = add("compare", commands.compare, text)
    pair.add_argument("a", metavar="A", help="a model, named as for `sample`")
    pair.add_argument("b", metavar="B", help="the other")
    pair.add_argument(
        "--samples", type=int, metavar="N", help="per seed block (default: the recipe's)"
    )
    pair.add_argument("--out", default="compare.png", metavar="FILE", help="sheet of samples")

    reference = described("reference", "the statistics of the real images")
    what = reference.add_subparsers(required=True, metavar="WHAT")
    text = "write those of the recipe last run in the workspace (mu, sigma)"
    export = add("export", commands.reference_export, text, among=what)
    export.add_argument("file", metavar="FILE.npz")

    weights = described("weights", "the files of the feature networks that measure quality")
    what = weights.add_subparsers(required=True, metavar="WHAT")
    listing = described("list", "print which are at hand", among=what)
    listing.set_defaults(command=commands.weights_list)
    text = "download one into the cache (no other command asks the network for weights)"
    fetch = described("fetch", text, among=what)
    fetch.set_defaults(command=commands.weights_fetch)
    fetch.add_argument("name", metavar="NAME", help="one of `cmforge weights list`")
    take = described("import", "copy a file into the cache", among=what)
    take.set_defaults(command=commands.weights_import)
    take.add_argument("path", metavar="PATH")
    take.add_argument(
        "--as", dest="name", metavar="NAME", help="whose weights they are, where no hash tells"
    )

    text = "list what the workspace no longer needs (leftovers of what was killed), or remove it"
    collect = add("gc", commands.gc, text)
    collect.add_argument("--delete", action="store_true", help="remove it")
    collect.add_argument(
        "--older-than",
        default="24h",
        metavar="AGE",
        help="only what was last written so long ago: 30m, 24h (default), 7d",
    )

    add("doctor", commands.doctor, "check this machine, the installation and the workspace")
    return parser


def _add_edits(edit: argparse.ArgumentParser, add: Callable[..., Any]) -> None:
    """`edit TASK MODEL [IMAGE]`; docs/editing.md shows each."""
    tasks = edit.add_subparsers(required=True, metavar="TASK")
    model = MODEL.split(" (default")[0]

    def task(name: str, text: str, image: str | None) -> Any:
        sub = add(name, model_commands.edit, text, among=tasks)
        sub.set_defaults(task=name)
        sub.add_argument("model", metavar="MODEL", help=model)
        if image is not None:
            sub.add_argument("image", metavar="IMAGE", help=f"{image} (PNG, JPEG or WebP)")
            sub.add_argument("--seed", type=int, default=0)
        if image is not None and name != "superres":
            sub.add_argument(
                "--resize", action="store_true", help="take the centre square at the model's size"
            )
        sub.add_argument(
            "--steps",
            type=int,
            help="1 to 40 evaluations (default 8; stroke 2; denoise, interpolate 1)",
        )
        sub.add_argument(
            "--sigmas", metavar="80,24,5", help="at these noise levels, instead of the preset's"
        )
        sub.add_argument(
            "--class", dest="label", type=int, help="class number, where there are any"
        )
        sub.add_argument("--num", type=int, default=1, help="so many results (default 1)")
        sub.add_argument("--out", default="edited.png", metavar="FILE")
        return sub

    inpaint = task("inpaint", "fill in what a mask marks", "what to keep the rest of")
    inpaint.add_argument(
        "--mask",
        metavar="FILE",
        help="white (> 127) is filled in (default: where the image is transparent)",
    )
    task("colorize", "colour a grey image", "its luma is kept")
    superres = task("superres", "a sharper image of the model's size", "the small image")
    superres.add_argument(
        "--factor",
        type=int,
        help="of an image that already has the model's size: its pixels are so wide",
    )
    task("stroke", "an image after a rough sketch in colour (SDEdit)", "the sketch")
    denoise = task("denoise", "take noise of a known level away", "the noisy image")
    denoise.add_argument(
        "--sigma", type=float, help="standard deviation of the noise, where black is -1 and white 1"
    )
    between = task("interpolate", "a strip of images from one sample to another", None)
    between.add_argument("--seeds", default="0,1", metavar="0,1", help="of the samples at the ends")
    between.add_argument("--frames", type=int, default=9, help="images in a row (default 9)")
