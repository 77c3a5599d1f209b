"""The commands of the command line and their arguments."""

import argparse
import textwrap
from collections.abc import Callable
from typing import NoReturn

from mtl_jax import cli_checkpoints

__all__ = ["parser"]


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


_CONFIG_HELP = (
    "config file; any value of it can be replaced by --config.KEY=VALUE, "
    "such as --config.experts.optimizer.peak=1e-4"
)


def _add_experiments(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The commands that take a config."""
    run = add(
        "run",
        "run an experiment, or resume it where it stopped",
        """\
        mtl-jax run experiments/configs/tall_masks.py:demo
        mtl-jax run experiments/configs/tall_masks.py:tiny --workdir /tmp/try
        mtl-jax run experiments/configs/tall_masks.py:demo --config.experts.seed=1""",
    )
    run.add_argument("config", metavar="CONFIG[:VARIANT]", help=_CONFIG_HELP)
    run.add_argument(
        "--workdir",
        metavar="DIR",
        help="where the report and its results go, also gs:// (default: "
        "runs/CONFIG-VARIANT); experts and their checkpoints are kept in the "
        "package cache, $MTL_JAX_CACHE or ~/.cache/mtl_jax",
    )

    preflight = add(
        "preflight",
        "compile an experiment for a TPU that is not here, and say whether it fits",
        """\
        mtl-jax preflight experiments/configs/tall_masks.py:paper --topology v5e:4x4
        mtl-jax preflight CONFIG --topology v5p:2x2x2 --mesh data=4,model=2
        mtl-jax preflight experiments/configs/lm_demo.py:llama3_8b_lora \\
            --topology v5e:4x4""",
    )
    preflight.add_argument("config", metavar="CONFIG[:VARIANT]", help=_CONFIG_HELP)
    preflight.add_argument(
        "--topology",
        required=True,
        metavar="CHIP:AxB[xC]",
        help="such as v5e:4x4, v4:2x2x1, v6e:4x4",
    )
    preflight.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help="mesh axes; -1 takes the devices that are left (default: the config's)",
    )
    preflight.add_argument(
        "--method",
        metavar="NAME",
        help="of a comparison: which row, or ROW/CANDIDATE (default: the system's own)",
    )


def _add_readers(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The commands that only read."""
    catalogue = add(
        "list",
        "list the systems of the catalogue",
        """\
        mtl-jax list --family merging
        mtl-jax list --uses merging.ties --json""",
    )
    catalogue.add_argument("--family", help="only this family, such as merging")
    catalogue.add_argument(
        "--uses", metavar="PRIMITIVE", help="only systems composed of this primitive"
    )
    catalogue.add_argument("--status", help="only 'working' or only 'planned'")
    catalogue.add_argument("--json", action="store_true", help="print JSON")

    show = add("show", "describe one system", "mtl-jax show tall-masks")
    show.add_argument("system", metavar="SYSTEM", help="name, as `mtl-jax list` shows")

    report = add(
        "report",
        "draw the report of a finished run again, and print its tables",
        "mtl-jax report runs/tall_masks-demo",
    )
    report.add_argument("workdir", metavar="WORKDIR", help="directory of the run")


def _add_generate(add: Callable[..., argparse.ArgumentParser]) -> None:
    generate = add(
        "generate",
        "continue a text with a language model",
        """\
        mtl-jax generate smollm2-135m-instruct --prompt "The capital of France is"
        mtl-jax generate model.gguf --chat --prompt "Who are you?" --temperature 0.7
        mtl-jax generate folder/ --prompt - --beam 4 < prompt.txt""",
    )
    generate.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a GGUF file, a folder with one, or with config.json, tokenizer.json and "
        "safetensors weights, or smollm2-135m-instruct, which is fetched",
    )
    generate.add_argument(
        "--prompt", required=True, help="the text to continue; - reads standard input"
    )
    generate.add_argument(
        "--chat",
        action="store_true",
        help="the prompt is a message, to be answered in the model's chat format",
    )
    generate.add_argument(
        "--system", metavar="TEXT", help="with --chat: a message that comes first"
    )
    numbers = (
        ("--max-new-tokens", "N", int, 128, "how many tokens at most"),
        ("--temperature", "T", float, 0.0, "of sampling; 0 = the likeliest token"),
        ("--top-k", "K", int, None, "sample among the K likeliest tokens"),
        ("--top-p", "P", float, None, "sample among tokens that make up mass P"),
        ("--min-p", "P", float, None, "sample what is at least P times the best"),
        ("--repetition-penalty", "R", float, None, "above 1 discourages repetition"),
        ("--seed", "N", int, 0, "of sampling"),
        ("--beam", "K", int, None, "beam search among K texts, ranked by mean log p"),
    )
    for name, metavar, kind, default, text in numbers:
        shown = "" if default is None else f" (default: {default})"
        generate.add_argument(
            name, metavar=metavar, type=kind, default=default, help=text + shown
        )
    generate.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of weights and computation (default: float32); 16 bits take half the "
        "memory, but on most CPUs more time",
    )
    generate.add_argument(
        "--stop",
        metavar="TEXT",
        action="append",
        default=[],
        help="end before this text; may be given more than once",
    )


def parser() -> argparse.ArgumentParser:
    """The parser of `mtl-jax`; a wrong command line exits with code 2."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--debug", action="store_true", help="show the traceback of an error"
    )
    top = _Parser(
        prog="mtl-jax",
        description="Multi-task learning and model editing in JAX.",
        allow_abbrev=False,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help: str, examples: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            parents=[shared],
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog="examples:\n" + textwrap.indent(textwrap.dedent(examples), "  "),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    _add_experiments(add)
    _add_generate(add)
    cli_checkpoints.add_commands(add)
    _add_readers(add)
    return top
