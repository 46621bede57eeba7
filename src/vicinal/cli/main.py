"""The entry point: finds the command, runs it, and turns a user's mistake into one sentence.

Arguments are read with argparse, so that `vicinal --help` imports nothing but the standard library; each command
imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from vicinal.version import __version__

BAD_REQUEST, BROKEN_PIPE, INTERRUPTED = 2, 1, 130
"""Exit codes: what was asked cannot be done; nobody reads the output any more; Ctrl-C."""

PATTERN_HELP = """
A pattern is written as in Python: an axis kind for all axes, a tuple of one per axis, or a combination.
  Near(7), Near(7, dilation=8), Near(7, stride=2), Near(7, causal=True), Near(7, border="wrap")
  Window(7), Window(7, shift=3), Halo(8, 4), Grid(7), Full(), Full(causal=True), Same()
  "(Same(), Full())", "heads(Near(7), (Full(), Window(4)))", "union((Same(), Full()), (Full(), Same()))"
"""


class Parser(argparse.ArgumentParser):
    """A parser whose complaint is one sentence."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where to read how it is done; exit with code 2."""
        self.exit(BAD_REQUEST, f"{self.prog}: {message}; see {self.prog} --help\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse does it, but KEY=VALUE may also follow an option, where argparse takes no more of a list."""
        options, rest = super().parse_known_args(args, namespace)
        changes = [word for word in rest if "=" in word and not word.startswith("-")]
        if changes and isinstance(getattr(options, "changes", None), list):
            options.changes += changes
            rest = [word for word in rest if word not in changes]
        return options, rest


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the `vicinal` command; returns its exit code."""
    try:
        options = _parser().parse_args(arguments)
        return _guarded(options.run, options)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # what is left in the buffer has no reader either; without this Python complains while it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _guarded(run: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    try:
        run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if not _is_users_mistake(error):
            raise
        print(f"vicinal {options.command}: {_sentence(error)}", file=sys.stderr)
        return BAD_REQUEST
    return 0


def _is_users_mistake(error: Exception) -> bool:
    """Whether to answer with a sentence; of anything else the traceback is wanted."""
    from vicinal.ops.backend import BackendRefused
    from vicinal.tour.extras import MissingExtra
    from vicinal.training.drawing import NothingToDrawWith

    if isinstance(error, BackendRefused | MissingExtra | NothingToDrawWith | OSError):
        return True
    # our own checks raise ValueError for the user; one that comes out of another library is a bug of ours
    raised_in = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return isinstance(error, ValueError) and raised_in[-1].startswith("vicinal.")


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        place = "" if error.filename is None else f": {error.filename}"
        return f"{error.strerror}{place}"
    return " ".join(str(error).split())


def _parser() -> Parser:
    parser = Parser(prog="vicinal", description="Local attention for images, video and sequences.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"vicinal {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    _add_explain(commands)
    _add_simulate(commands)
    _add_tune(commands)
    _add_show(commands)
    _add_tour(commands)
    _add_weights(commands)
    _add_train(commands)
    _add_trained(commands)
    _add_segment(commands)
    _add_data(commands)
    _add_distance(commands)
    _add_generate(commands)
    return parser


def _add(commands: Any, name: str, summary: str, run: Callable[[argparse.Namespace], None], epilog: str = "") -> Parser:
    parser: Parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_explain(commands: Any) -> None:
    def run(options: argparse.Namespace) -> None:
        from vicinal.cli import explain

        explain.run(options)

    summary = "which back end an attention call would use, why not the others, and what it costs"
    parser = _add(commands, "explain", summary, run, PATTERN_HELP)
    what = parser.add_argument_group("who sees whom (either --kernel or --pattern)")
    what.add_argument("--pattern", help="a pattern, see below")
    what.add_argument("--kernel", type=int, nargs="+", metavar="K", help="kernel size, of all axes or one per axis")
    what.add_argument("--dilation", type=int, nargs="+", metavar="D", help="with --kernel; 1 by default")
    what.add_argument("--stride", type=int, nargs="+", metavar="S", help="with --kernel; 1 by default")
    what.add_argument(
        "--causal", nargs="*", choices=("true", "false"), metavar="true|false", help="with --kernel; alone: every axis"
    )
    sizes = parser.add_argument_group("sizes")
    sizes.add_argument("--grid", type=int, nargs="+", required=True, metavar="N", help="of the queries, 1 to 3 axes")
    sizes.add_argument("--key-grid", type=int, nargs="+", metavar="N", help="of the keys, where it differs")
    sizes.add_argument("--batch", type=int, default=1, metavar="B")
    sizes.add_argument("--heads", type=int, default=1, metavar="H")
    sizes.add_argument("--kv-heads", type=int, metavar="H", help="heads of key and value, where fewer")
    sizes.add_argument("--head-dim", type=int, default=32, metavar="D")
    sizes.add_argument("--value-dim", type=int, metavar="D", help="head dim of value, where it differs")
    sizes.add_argument("--extra-tokens", type=int, default=0, metavar="T", help="extra keys that every query sees")
    sizes.add_argument("--bias", action="store_true", help="with a relative position bias")
    where = parser.add_argument_group("where")
    where.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16", "float64"))
    where.add_argument("--device", default="cpu", help="cpu, cuda, ...; this machine need not have it")
    where.add_argument("--backend", help="ask for one by name instead of the automatic choice")
    where.add_argument("--json", action="store_true", help="print the answer as JSON and nothing else")


def _add_simulate(commands: Any) -> None:
    def run(options: argparse.Namespace) -> None:
        from vicinal.cli import simulate

        simulate.run(options)

    summary = "how much faster than dense attention a pattern can be on a kernel that works in tiles"
    parser = _add(commands, "simulate", summary, run, PATTERN_HELP)
    parser.add_argument("--grid", type=int, nargs="+", required=True, metavar="N", help="of the tokens, 1 to 3 axes")
    parser.add_argument("--pattern", help="a pattern, see below; or give --window")
    parser.add_argument("--window", type=int, nargs="+", metavar="K", help="kernel size per axis; -1: the whole axis")
    parser.add_argument("--stride", type=int, nargs="+", metavar="S", help="with --window; 1 by default")
    parser.add_argument("--dilation", type=int, nargs="+", metavar="D", help="with --window; 1 by default")
    parser.add_argument("--query-tile", type=int, nargs="+", required=True, metavar="T", help="queries of a tile")
    parser.add_argument("--key-tile", type=int, nargs="+", required=True, metavar="T", help="keys of a tile")
    parser.add_argument(
        "--attention-share", type=float, metavar="P", help="part of a model's time that dense attention takes, 0 to 1"
    )
    parser.add_argument(
        "--search", action="store_true", help="also find the best strides and tiles (of as many tokens) for the window"
    )
    parser.add_argument("--json", action="store_true", help="print the answer as JSON and nothing else")


def _add_tune(commands: Any) -> None:
    def run(options: argparse.Namespace) -> None:
        from vicinal.cli import tune

        tune.run(options)

    summary = "a short search for faster tiles of the GPU kernels for one kind of call; the answer is kept on disk"
    parser = _add(commands, "tune", summary, run, PATTERN_HELP)
    parser.add_argument("--grid", type=int, nargs="+", required=True, metavar="N", help="of the tokens, 1 to 3 axes")
    parser.add_argument("--pattern", required=True, help="a pattern without heads and union, see below")
    parser.add_argument("--batch", type=int, default=8, metavar="B", help="to measure with; 8 by default")
    parser.add_argument("--heads", type=int, default=8, metavar="H", help="to measure with; 8 by default")
    parser.add_argument("--head-dim", type=int, default=32, metavar="D")
    parser.add_argument("--bias", action="store_true", help="with a relative position bias")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--most", type=int, default=12, metavar="N", help="boxes to try for each pass; 12 by default")
    parser.add_argument("--seconds", type=float, default=2.0, help="to measure each pass, compiling apart")
    parser.add_argument("--json", action="store_true", help="print the answer as JSON and nothing else")


def _add_show(commands: Any) -> None:
    def run(options: argparse.Namespace) -> None:
        from vicinal.cli import show

        show.run(options)

    summary = "a pattern on a grid: the keys one query sees, how far layers reach, how tiles fall"
    parser = _add(commands, "show", summary, run, PATTERN_HELP)
    parser.add_argument("pattern", nargs="?", help="a pattern, see below")
    parser.add_argument("--grid", type=int, nargs="+", required=True, metavar="N", help="of the queries, 1 to 3 axes")
    parser.add_argument("--key-grid", type=int, nargs="+", metavar="N", help="of the keys, where it differs")
    parser.add_argument("--query", type=int, nargs="+", metavar="I", help="which query; the middle one by default")
    parser.add_argument(
        "--schedule", nargs="+", metavar="PATTERN", help="the receptive field over these layers, first layer first"
    )
    parser.add_argument(
        "--tiles", type=int, nargs="+", metavar="Q", help="classes of tiles of so many queries, per axis or for all"
    )
    parser.add_argument("--key-tile", type=int, nargs="+", metavar="K", help="keys of a tile; like --tiles by default")
    parser.add_argument("--save", metavar="FILE", help="draw a picture instead (.png; needs vicinal[plot])")


def _add_tour(commands: Any) -> None:
    def run(options: argparse.Namespace) -> None:
        from vicinal.cli import tour

        tour.run(options)

    parser = _add(commands, "tour", "build a page that shows what the library does, on a photograph", run)
    parser.add_argument("--out", default="demo", metavar="FOLDER", help="where index.html goes (demo by default)")
    parser.add_argument("--quick", action="store_true", help="smaller pictures and fewer rounds, in a few seconds")


def _add_weights(commands: Any) -> None:
    def run(options: argparse.Namespace) -> None:
        from vicinal.cli import weights

        weights.run(options)

    parser = _add(commands, "weights", "which model a checkpoint is of, in which layout, and whether it fits", run)
    parser.add_argument("file", metavar="FILE", help="a .safetensors file, or a torch file of nothing but weights")
    parser.add_argument("--json", action="store_true", help="print the answer as JSON and nothing else")


CHANGES_HELP = """
A change is KEY=VALUE, with dots into parts: loop.epochs=2 optimizers.main.learning_rate=0.001 task.model.dim=48
"""


def _add_train(commands: Any) -> None:
    def run(options: argparse.Namespace) -> None:
        from vicinal.cli import train

        train.run(options)

    parser = _add(
        commands, "train", "run a recipe, or go on with a run; without one, list the recipes", run, CHANGES_HELP
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a name, or your own file.py:function")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="changes to the recipe")
    parser.add_argument("--out", metavar="FOLDER", help="the run's folder (runs/RECIPE by default)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the folder")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="on this machine (1 by default)")
    parser.add_argument("--show", action="store_true", help="print the recipe with its changes, and train nothing")
    parser.add_argument("--json", action="store_true", help="one line of JSON for each event, and nothing else")


def _add_trained(commands: Any) -> None:
    def evaluate(options: argparse.Namespace) -> None:
        from vicinal.cli import evaluate

        evaluate.run(options)

    def predict(options: argparse.Namespace) -> None:
        from vicinal.cli import predict

        predict.run(options)

    parser = _add(commands, "evaluate", "measure a trained model on its test split", evaluate, CHANGES_HELP)
    parser.add_argument("model", metavar="MODEL", help="a run folder, or a model.safetensors of one")
    parser.add_argument(
        "changes", nargs="*", metavar="KEY=VALUE", help="changes to its recipe, such as data.folder=..."
    )
    of = parser.add_argument_group("of generators: Fréchet distance, precision and recall")
    of.add_argument(
        "--inception", metavar="FILE", help="weights of pytorch-fid's Inception; EfficientNet-Lite0 without"
    )
    of.add_argument("--size", type=int, metavar="N", help="pixels a side that EfficientNet-Lite0 looks at (224)")
    of.add_argument("--count", type=int, metavar="N", help="pictures, and as many real ones (10000)")
    of.add_argument("--split", choices=("test", "train"), help="where the real ones are from (test)")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON and nothing else")
    parser = _add(commands, "predict", "what a trained model takes pictures for", predict)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="pictures, or folders of them")
    parser.add_argument("--model", required=True, help="a run folder, or a model.safetensors of one")
    parser.add_argument("--top", type=int, default=3, metavar="K", help="how many classes (3 by default)")
    parser.add_argument("--save", metavar="FILE", help="also draw the pictures with their best class (.png)")
    parser.add_argument("--json", action="store_true", help="print the answer as JSON and nothing else")


def _add_segment(commands: Any) -> None:
    def run(options: argparse.Namespace) -> None:
        from vicinal.cli import segment

        segment.run(options)

    parser = _add(commands, "segment", "what is where in pictures and videos: overlays, masks and JSON", run)
    parser.add_argument("places", nargs="+", metavar="PLACE", help="pictures, videos, or folders of them")
    parser.add_argument(
        "--task", default="panoptic", choices=("panoptic", "semantic", "instance"), help="panoptic by default"
    )
    what = parser.add_argument_group("model")
    what.add_argument(
        "--weights", metavar="FILE", help="a run folder or weights file; the library's small one by default"
    )
    what.add_argument("--model", metavar="NAME", help="with published weights: the name in the list of models")
    what.add_argument("--names", metavar="FILE", help="with --model: names of classes, one a line, * before things")
    what.add_argument("--score", type=float, metavar="S", help="the least score that counts; as published by default")
    how = parser.add_argument_group("how")
    how.add_argument("--size", type=int, metavar="N", help="pixels of the short side that the model sees")
    how.add_argument("--scales", type=float, nargs="+", default=[1.0], metavar="F", help="several sizes (semantic)")
    how.add_argument("--flip", action="store_true", help="mirrored too (semantic)")
    parser.add_argument("--out", default="segmented", metavar="FOLDER", help="where files go (segmented by default)")
    parser.add_argument("--json", action="store_true", help="print the answer as JSON and nothing else")


def _add_data(commands: Any) -> None:
    def run(options: argparse.Namespace) -> None:
        from vicinal.cli import data

        data.run(options)

    parser = _add(commands, "data", "where a data set is looked for, what is there, and what to do if nothing is", run)
    parser.add_argument("name", nargs="?", metavar="NAME", help="a data set; all of them by default")
    parser.add_argument(
        "changes", nargs="*", metavar="KEY=VALUE", help="changes to the description, such as folder=..."
    )
    parser.add_argument("--check", action="store_true", help="read every sample and name those that cannot be read")
    parser.add_argument("--json", action="store_true", help="print the answer as JSON and nothing else")


def _add_distance(commands: Any) -> None:
    def run(options: argparse.Namespace) -> None:
        from vicinal.cli import distance

        distance.run(options)

    parser = _add(commands, "distance", "how far generated pictures are from real ones: Fréchet distance and more", run)
    parser.add_argument("real", metavar="REAL", help="a folder of pictures")
    parser.add_argument("generated", metavar="GENERATED", help="another")
    parser.add_argument(
        "--inception",
        metavar="FILE",
        help="weights of pytorch-fid's Inception, for published distances; EfficientNet-Lite0 without",
    )
    parser.add_argument("--size", type=int, metavar="N", help="pixels a side that EfficientNet-Lite0 looks at (224)")
    parser.add_argument("--k", type=int, default=3, metavar="K", help="neighbors of precision and recall (3)")
    parser.add_argument("--batch-size", type=int, default=50, metavar="N", help="pictures at a time (50)")
    parser.add_argument("--json", action="store_true", help="print the answer as JSON and nothing else")


GENERATE_HELP = """
A seed gives the same PNG, bit for bit, on one machine with one --batch-size and one number of threads.
A change is KEY=VALUE and needs --model: --model stylenat_ffhq256 --weights FILE image_size=64
"""


def _add_generate(commands: Any) -> None:
    def run(options: argparse.Namespace) -> None:
        from vicinal.cli import generate

        generate.run(options)

    parser = _add(commands, "generate", "draw pictures from a generator", run, GENERATE_HELP)
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="changes to the model's configuration")
    parser.add_argument("--weights", metavar="FILE", help="those that come with the library by default")
    parser.add_argument("--model", metavar="NAME", help="the model's name, where the weights do not tell it")
    parser.add_argument("--untrained", action="store_true", help="fresh weights: noise, to see what --model costs")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the first picture (0)")
    parser.add_argument("--count", type=int, default=16, metavar="N", help="pictures, one seed each (16)")
    parser.add_argument("--truncation", type=float, default=1.0, metavar="T", help="0 .. 1; off (1) by default")
    parser.add_argument("--batch-size", type=int, metavar="N", help="pictures at once (16 for small ones, else 1)")
    parser.add_argument("--device", help="cpu, cuda, ... (cuda where there is one)")
    out = parser.add_argument_group("what to write (files in the folder `generated` if nothing is said)")
    out.add_argument("--out", metavar="FOLDER", help="a file SEED.png for each")
    out.add_argument("--grid", metavar="FILE", help="all of them on one sheet (.png)")
    out.add_argument("--columns", type=int, metavar="N", help="of the sheet (as many as rows by default)")
    out.add_argument("--video", metavar="FILE", help="a walk through the seeds: .mp4 (vicinal[video]), .gif or .png")
    out.add_argument("--seconds", type=float, default=1.0, metavar="S", help="of the walk from seed to seed (1)")
    out.add_argument("--fps", type=float, default=24, metavar="N", help="frames a second (24)")
    out.add_argument("--attention", metavar="FILE", help="where the head groups look in the first picture (.png)")
    out.add_argument("--zoom", type=int, metavar="N", help="enlarge on sheets and in films (small ones to 128 pixels)")
    out.add_argument("--json", action="store_true", help="print the answer as JSON and nothing else")


if __name__ == "__main__":
    sys.exit(main())
