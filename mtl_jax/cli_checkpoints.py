"""Commands on checkpoint folders: their arguments, and what carries them out."""

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator

from mtl_jax import host

__all__ = ["COMMANDS", "add_commands"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_ROWS = 40


def _bytes(text: str) -> int:
    """Bytes of a size such as 5GB, 500M or 1000."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if not size:
        raise argparse.ArgumentTypeError(f"wants a size such as 5GB, found {text!r}")
    return size


def _add_writing(command: argparse.ArgumentParser) -> None:
    """What all commands that write a folder take."""
    command.add_argument(
        "--shard-size",
        type=_bytes,
        default=5 * 10**9,
        metavar="SIZE",
        help="at most so much in a file, or one tensor (default: 5GB)",
    )
    command.add_argument(
        "--overwrite", action="store_true", help="replace what is in OUT"
    )


def _add_merge(add: Callable[..., argparse.ArgumentParser]) -> None:
    command = add(
        "merge",
        "merge checkpoints as a recipe says, or resume where it stopped",
        """\
        mtl-jax merge ties.yaml merged/
        mtl-jax merge ties.yaml merged/ --dry-run
        mtl-jax merge mergekit.yaml merged/ --dtype bfloat16 --shard-size 2GB""",
    )
    command.add_argument(
        "recipe",
        metavar="RECIPE",
        help="YAML of mergekit, or with rules of ours; models are local folders, "
        "looked for here and beside the recipe",
    )
    command.add_argument("out", metavar="OUT", help="folder to make")
    command.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of rules that draw"
    )
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the output (default: as the recipe says, else as the models are)",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="verify everything, and write nothing"
    )
    command.add_argument(
        "--no-check-finite",
        action="store_true",
        help="let NaN and infinities through, which are refused otherwise",
    )
    _add_writing(command)


def _add_diff(add: Callable[..., argparse.ArgumentParser]) -> None:
    command = add(
        "diff",
        "compare two checkpoints tensor by tensor",
        """\
        mtl-jax diff base/ fine-tuned/
        mtl-jax diff one/ other/ --base base/ --out runs/diff
        mtl-jax diff one/ other/ --filter 'mlp.*weight$' --sort cosine --limit 0""",
    )
    command.add_argument("a", metavar="A", help="a checkpoint folder or file")
    command.add_argument("b", metavar="B", help="another")
    command.add_argument(
        "--base",
        metavar="C",
        help="what both were fine-tuned from: cosines and signs are of the changes",
    )
    command.add_argument(
        "--out", metavar="DIR", help="write report/index.html with plots, and diff.json"
    )
    command.add_argument(
        "--sort",
        metavar="COLUMN",
        default="relative",
        help="relative (default), cosine, signs, max, changed, norm_a, norm_b, "
        "norm_diff, change_a, change_b, broken_a, broken_b, size or name",
    )
    command.add_argument(
        "--filter", metavar="REGEX", help="only tensors in whose name it is found"
    )
    command.add_argument(
        "--limit",
        type=int,
        default=_ROWS,
        metavar="N",
        help=f"rows of the table (default: {_ROWS}; 0 = all)",
    )
    command.add_argument("--json", action="store_true", help="print JSON, all rows")


def _add_compress(add: Callable[..., argparse.ArgumentParser]) -> None:
    command = add(
        "compress",
        "keep several fine-tunings of one base in a bank, each to be restored",
        """\
        mtl-jax compress base/ math/ code/ chat/ bank/ --method tall --scale 0.4
        mtl-jax compress base/ math/ code/ bank/ --method rmm --rank 32 --basis 1
        mtl-jax compress base/ math/ code/ bank/ --method bitdelta --names m,c""",
    )
    command.add_argument("base", metavar="BASE", help="what they were fine-tuned from")
    command.add_argument(
        "experts",
        metavar="EXPERT",
        nargs="+",
        help="a fine-tuning, or with rmm an adapter folder of PEFT",
    )
    command.add_argument("out", metavar="OUT", help="folder to make")
    command.add_argument(
        "--method",
        choices=("tall", "rmm", "bitdelta"),
        default="tall",
        help="tall: one merged change and a bit per entry and task (default); rmm: "
        "low-rank changes over a shared basis; bitdelta: a bit per entry and task, and "
        "a number per matrix",
    )
    command.add_argument(
        "--names", metavar="A,B", help="of the tasks (default: of their folders)"
    )
    command.add_argument(
        "--scale",
        metavar="L[,L]",
        help="tall: lambda, one or one per task, chosen on validation data "
        "(default: 0.4)",
    )
    command.add_argument(
        "--rank", type=int, metavar="R", help="rmm: of the changes (default: 16)"
    )
    command.add_argument(
        "--basis", type=int, metavar="P", help="rmm: vectors of the basis (default: 2)"
    )
    command.add_argument(
        "--svd",
        choices=("gram", "svd", "sketch"),
        help="rmm: how singular vectors are found (default: gram)",
    )
    command.add_argument(
        "--align",
        action="store_true",
        default=None,
        help="rmm: turn the factors towards the first task's",
    )
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="tall, rmm: of what is stored (default: the experts')",
    )
    _add_writing(command)


def _add_extract(add: Callable[..., argparse.ArgumentParser]) -> None:
    command = add(
        "extract",
        "restore the checkpoint of one task from a bank and its base",
        """\
        mtl-jax extract bank/ --list
        mtl-jax extract bank/ math restored/
        mtl-jax extract bank/ math restored/ --base /elsewhere/base""",
    )
    command.add_argument("bank", metavar="BANK", help="folder that compress made")
    command.add_argument("task", metavar="TASK", nargs="?", help="its name")
    command.add_argument("out", metavar="OUT", nargs="?", help="folder to make")
    command.add_argument(
        "--base", metavar="BASE", help="the base, if it is not where it was"
    )
    command.add_argument(
        "--list", action="store_true", help="show what the bank holds, and end"
    )
    _add_writing(command)


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the commands on checkpoint folders to a parser."""
    _add_merge(add)
    _add_diff(add)
    _add_compress(add)
    _add_extract(add)


@contextlib.contextmanager
def _steps(command: str, what: str) -> Iterator[Callable[[int, int], None]]:
    """Progress on standard error from the first step on, a clean end on SIGTERM."""
    from mtl_jax.report.progress import Progress

    with (
        host.ends_on_sigterm(f"mtl-jax {command}"),
        contextlib.ExitStack() as stack,
    ):
        task = None

        def step(done: int, total: int) -> None:
            nonlocal task
            if task is None:
                shown = stack.enter_context(Progress())
                task = stack.enter_context(shown.task(what, total))
            task(done, total)

        yield step


def _print_table(table) -> None:
    from mtl_jax import report

    page = report.Report("", environment={})
    page.add_table(table)
    page.print()


def _mebibytes(done: int, total: int) -> tuple[int, int]:
    """For a bar: full at the end, and not before."""
    most = max(total >> 20, 1)
    return (most if done == total else min(done >> 20, most - 1)), most


def _merge(args: argparse.Namespace) -> int:
    host.use_cpu_if_alone()
    with host.imports():
        from mtl_jax.checkpoints import merge

    plan = merge.make_plan(args.recipe, dtype=args.dtype)
    writing = {
        "seed": args.seed,
        "shard_bytes": args.shard_size,
        "overwrite": args.overwrite,
    }
    merge.check_out(plan, args.out, **writing)
    _print_table(merge.plan_table(plan))
    if args.dry_run:
        return 0
    host.keep_compiled_programs()
    sys.stdout.flush()
    with _steps("merge", "MiB written") as task:
        done = merge.merge(
            plan,
            args.out,
            **writing,
            check_finite=not args.no_check_finite,
            progress=lambda done, total: task(*_mebibytes(done, total)),
        )
    _print_table(done.table())
    return 0


def _diff(args: argparse.Namespace) -> int:
    host.use_cpu_if_alone()
    with host.imports():
        from etils import epath

        from mtl_jax.checkpoints import _diff_report
        from mtl_jax.checkpoints.diff import diff
        from mtl_jax.checkpoints.source import open_source

    _diff_report.check_column(args.sort)
    if args.limit < 0:
        raise ValueError(f"--limit is {args.limit}, wanted 0 or more")
    a, b = open_source(args.a), open_source(args.b)
    base = None if args.base is None else open_source(args.base)
    with _steps("diff", "tensors") as progress:
        found = diff(a, b, base, pattern=args.filter, progress=progress)
    data = json.dumps(_diff_report.to_json(found), indent=1, allow_nan=False)
    if args.json:
        sys.stdout.write(data + "\n")
    else:
        _print_table(
            _diff_report.table(found, column=args.sort, limit=args.limit or None)
        )
        sys.stdout.write("\n".join(_diff_report.summary(found)) + "\n")
    if args.out is not None:
        page = _diff_report.to_report(
            found, a=args.a, b=args.b, base=args.base, column=args.sort
        )
        index = page.write(epath.Path(args.out) / "report")
        (epath.Path(args.out) / "diff.json").write_text(data + "\n")
        sys.stderr.write(f"{index}\n")
    return 0


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option}: wants numbers, found {text!r}") from None


def _compress(args: argparse.Namespace) -> int:
    host.use_cpu_if_alone()
    with host.imports():
        from mtl_jax import report
        from mtl_jax.checkpoints.compress import compress

    host.keep_compiled_programs()
    options = {
        name: getattr(args, name)
        for name in ("rank", "basis", "svd", "align", "dtype")
        if getattr(args, name) is not None
    }
    if args.scale is not None:
        options["scale"] = _numbers("--scale", args.scale)
    with _steps("compress", "tensors") as progress:
        done = compress(
            args.base,
            args.experts,
            args.out,
            method=args.method,
            names=None if args.names is None else args.names.split(","),
            overwrite=args.overwrite,
            shard_bytes=args.shard_size,
            progress=progress,
            **options,
        )
    _print_table(done.bank.table())
    before, after = done.experts_nbytes, done.nbytes
    sys.stdout.write(
        f"{report.format_bytes(before)} of experts in {report.format_bytes(after)}, "
        f"{after / max(before, 1):.1%}, beside the base; {done.seconds:.1f} s\n"
    )
    return 0


def _extract(args: argparse.Namespace) -> int:
    host.use_cpu_if_alone()
    with host.imports():
        from mtl_jax import report
        from mtl_jax.checkpoints.extract import extract, read_bank

    if args.list:
        bank, _ = read_bank(args.bank)
        _print_table(bank.table())
        sys.stdout.write(f"base: {bank.base}\n")
        return 0
    if args.task is None or args.out is None:
        raise ValueError("wants BANK TASK OUT, or BANK --list")
    host.keep_compiled_programs()
    with _steps("extract", "tensors") as progress:
        done = extract(
            args.bank,
            args.task,
            args.out,
            base=args.base,
            overwrite=args.overwrite,
            shard_bytes=args.shard_size,
            progress=progress,
        )
    sys.stdout.write(
        f"{args.out}: {done.tensors} tensors, {report.format_bytes(done.nbytes)}; "
        f"{done.seconds:.1f} s\n"
    )
    return 0


COMMANDS = {
    "merge": _merge,
    "diff": _diff,
    "compress": _compress,
    "extract": _extract,
}
