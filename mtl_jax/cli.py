"""The command line: experiments, generation, checkpoints, the catalogue.

A mistake of the user ends in one line on standard error and exit code 2; the
traceback appears with `--debug` only. Everything heavy is imported where needed.
"""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mtl_jax import cli_arguments, cli_checkpoints, host

if TYPE_CHECKING:
    from mtl_jax import catalog

__all__ = ["main"]

_USER_ERRORS = (ValueError, OSError)
_TPU_PACKAGES = ("libtpu",)


def _overrides(extra: Sequence[str]) -> dict[str, str]:
    """Dotted key -> text, from the arguments `--config.key=value`."""
    found = {}
    for argument in extra:
        key, equals, value = argument.removeprefix("--config.").partition("=")
        if not argument.startswith("--config."):
            raise ValueError(f"unknown argument {argument!r}")
        if not equals or not key:
            raise ValueError(
                f"{argument!r}: wants --config.KEY=VALUE, with an equals sign"
            )
        found[key] = value
    return found


@contextlib.contextmanager
def _workdir(name: str) -> Iterator[str]:
    """Makes the directory, or fails early; removes it again if nothing came of it."""
    if "://" in name:
        from etils import epath

        try:
            epath.Path(name)
        except (KeyError, ValueError):
            raise ValueError(f"workdir {name}: no such kind of file system") from None
        yield name
        return
    path = pathlib.Path(name)
    missing = [p for p in (path, *path.parents) if not p.exists()]
    try:
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / ".writable"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise ValueError(
                f"workdir {name}: cannot write there ({error.strerror or error})"
            ) from error
        yield name
    except BaseException:
        for folder in missing:
            # Not empty: results of value, kept for a resume.
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _run(args: argparse.Namespace, extra: Sequence[str]) -> int:
    host.use_cpu_if_alone()
    from mtl_jax import configs

    config = configs.load_config(args.config, _overrides(extra))
    path, variant = configs.split_spec(args.config)
    from mtl_jax import run as runner
    from mtl_jax.report.progress import Progress

    host.keep_compiled_programs()
    default = f"runs/{path.stem}-{variant or 'demo'}"
    with (
        host.ends_on_sigterm("mtl-jax run"),
        _workdir(args.workdir or default) as workdir,
        Progress() as progress,
    ):
        runner.run(config, workdir=workdir, progress=progress)
    return 0


def _mesh(text: str | None) -> dict[str, int] | None:
    if text is None:
        return None
    mesh = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        try:
            mesh[axis.strip()] = int(size)
        except ValueError:
            raise ValueError(f"--mesh: wants AXIS=N,AXIS=N; found {text!r}") from None
    return mesh


def _preflight(args: argparse.Namespace, extra: Sequence[str]) -> int:
    host.use_cpu_if_alone()
    from mtl_jax import configs

    mesh = _mesh(args.mesh)
    config = configs.load_config(args.config, _overrides(extra))
    from mtl_jax import run as runner

    result = runner.preflight(
        config, topology=args.topology, mesh=mesh, method=args.method
    )
    sys.stdout.write(result.to_text().rstrip() + "\n")
    return 0 if result.passed else 1


def _generate(args: argparse.Namespace) -> int:
    host.use_cpu_if_alone()
    from mtl_jax.run import generate

    host.keep_compiled_programs()
    generate.main(args)
    return 0


def _columns(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns; the last is cut to the width of a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    limit = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    lines = []
    for row in rows:
        cells = [cell.ljust(w) for cell, w in zip(row, widths, strict=True)]
        line = "  ".join(cells).rstrip()
        if limit and len(line) > limit:
            line = line[: limit - 1] + "…"
        lines.append(line)
    return "\n".join(lines)


def _list(args: argparse.Namespace) -> int:
    from mtl_jax import catalog

    chosen = catalog.select(family=args.family, uses=args.uses, status=args.status)
    if args.json:
        text = json.dumps([entry.to_json() for entry in chosen], indent=1)
    elif not chosen:
        text = "no system meets these conditions"
    else:
        rows = [("NAME", "FAMILY", "YEAR", "STATUS", "TITLE")]
        rows += [
            (e.name, e.spec.family, str(e.spec.year), e.status, e.spec.title)
            for e in chosen
        ]
        working = sum(entry.status == "working" for entry in chosen)
        text = f"{_columns(rows)}\n\n{len(chosen)} systems, {working} working"
    sys.stdout.write(text + "\n")
    return 0


def _describe(entry: "catalog.Entry") -> str:
    spec = entry.spec
    where = entry.venue
    if str(spec.year) not in where:
        where = f"{spec.year}; {where}" if where else str(spec.year)

    def paragraph(text: str) -> str:
        return textwrap.fill(text, 88)

    lines = [
        paragraph(f"{spec.title} ({where})"),
        "",
        paragraph(spec.summary),
        "",
        f"name       {spec.name}",
        f"family     {spec.family}",
        f"kind       {spec.kind}",
        f"status     {entry.status}",
    ]
    if entry.code:
        lines.append(f"paper code https://github.com/{entry.code}")
    if entry.status == "working":
        lines += [f"module     {entry.module}", "", "primitives"]
        lines += [f"  {use}" for use in spec.uses]
        if spec.deviations:
            lines += ["", "where it differs from the paper"]
            lines += [
                textwrap.fill(text, 88, initial_indent="  - ", subsequent_indent="    ")
                for text in spec.deviations
            ]
        lines += ["", "run it", f"  mtl-jax run {entry.config}:demo"]
    lines += ["", spec.reference.strip()]
    return "\n".join(lines)


def _show(args: argparse.Namespace) -> int:
    from mtl_jax import catalog

    sys.stdout.write(_describe(catalog.get(args.system)) + "\n")
    return 0


def _report(args: argparse.Namespace) -> int:
    host.use_cpu_if_alone()
    from etils import epath

    from mtl_jax import report

    folder = epath.Path(args.workdir)
    if not folder.exists():
        raise ValueError(f"report: no directory {args.workdir}")
    found = report.read_report(folder)
    inner = folder / "report"
    target = inner if (inner / "results.json").exists() else folder
    page = found.write(target)
    found.print()
    sys.stdout.write(f"{page}\n")
    return 0


def _dispatch(args: argparse.Namespace, extra: Sequence[str]) -> int:
    if args.command == "run":
        return _run(args, extra)
    if args.command == "preflight":
        return _preflight(args, extra)
    if extra:
        raise ValueError(f"unknown argument {extra[0]!r}")
    commands = {"generate": _generate, "list": _list, "show": _show, "report": _report}
    return {**commands, **cli_checkpoints.COMMANDS}[args.command](args)


def _explain(error: BaseException) -> tuple[str, int]:
    """One line for a person, and the exit code."""
    line = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith(
        "mtl_jax"
    ):
        package = str(error.name).partition(".")[0]
        extra = "tpu" if package in _TPU_PACKAGES else "demo"
        return (
            f"this needs the package {package}; install it with "
            f"pip install 'mtl_jax[{extra}]'",
            2,
        )
    if isinstance(error, _USER_ERRORS):
        return line, 2
    return f"internal error: {type(error).__name__}: {line} (see --debug)", 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: arguments without the program's name; None takes the process's.

    Returns:
      Exit code: 0; 1 for an internal error or an experiment that does not fit;
      2 for a mistake of the user; 130 when interrupted.
    """
    args, extra = cli_arguments.parser().parse_known_args(argv)
    try:
        return _dispatch(args, extra)
    except BrokenPipeError:
        # The reader of our output went away, as in `mtl-jax list | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        if args.debug:
            raise
        sys.stderr.write(f"mtl-jax {args.command}: interrupted\n")
        return 130
    except Exception as error:
        if args.debug:
            raise
        message, code = _explain(error)
        message = message.removeprefix(f"{args.command}: ")  # It is said already.
        sys.stderr.write(f"mtl-jax {args.command}: {message}\n")
        return code


if __name__ == "__main__":
    sys.exit(main())
