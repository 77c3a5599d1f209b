"""One experiment over several seeds: mean and spread of every row, and of every claim.

python experiments/studies/seeds.py experiments/configs/tall_masks.py:world \
    --key suite.options.seed --seeds 0 1 2 3 4 --out experiments/results

Writes OUT/<config>-<variant>.json and prints Markdown for experiments/RESULTS.md.
"""

import argparse
import contextlib
import io
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence

from mtl_jax import configs, report, run


def one(
    config: str,
    key: str,
    seed: int,
    progress: report.Progress,
    titles: Sequence[str] = (),
) -> dict:
    """Rows, claims and other tables of one run, as numbers."""
    resolved = configs.load_config(config, {key: str(seed)})
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as workdir,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        document = run.run(resolved, workdir=workdir, progress=progress)
    tables = {table.title: table for table in document.tables}
    accuracy = tables["Test accuracy"]
    columns = [accuracy.columns.index(name) for name in ("mean", "normalised")]
    claims = tables["What the papers claim, and what was measured here"]
    return {
        "seed": seed,
        "seconds": round(time.monotonic() - began, 1),
        "rows": {row[0]: [row[c] for c in columns] for row in accuracy.rows},
        "claims": {row[0]: [row[1], row[2]] for row in claims.rows},
        "tables": {
            title: [tables[title].columns, *tables[title].rows] for title in titles
        },
    }


def markdown(config: str, runs: list[dict], environment: dict) -> str:
    """A table of rows, then a table of claims."""

    def spread(values):
        mean = statistics.mean(values)
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{100 * mean:.1f} ± {100 * deviation:.1f}"

    seeds = ", ".join(str(found["seed"]) for found in runs)
    seconds = statistics.median(found["seconds"] for found in runs)
    lines = [
        f"`{config}`, seeds {seeds}; {seconds:.0f} s a seed (median; what was cached "
        f"cost nothing); {environment['machine']}, "
        f"jax {environment['jax']}, {environment['time'][:10]}.",
        "",
        "| method | accuracy % | normalised % |",
        "|:---|---:|---:|",
    ]
    for name in runs[0]["rows"]:
        columns = zip(*(found["rows"][name] for found in runs), strict=True)
        lines.append(f"| {name} | {' | '.join(spread(c) for c in columns)} |")
    lines += ["", "| claim | holds | measured, by seed |", "|:---|:---:|:---|"]
    for claim in runs[0]["claims"]:
        held = [found["claims"][claim][1] for found in runs]
        texts = "; ".join(_brief(found["claims"][claim][0]) for found in runs)
        lines.append(f"| {claim} | {sum(held)} of {len(held)} | {texts} |")
    return "\n".join(lines)


def _brief(measured: str) -> str:
    for words in (" normalised accuracy", "target accuracy "):
        measured = measured.replace(words, "")
    return measured


def main() -> None:
    """Runs the seeds one after another."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG:VARIANT")
    parser.add_argument("--key", default="experts.seed", help="what a seed sets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tables", nargs="+", default=[], metavar="TITLE")
    parser.add_argument("--out", type=pathlib.Path, default="experiments/results")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with report.Progress(args.config, interval=60) as progress:
        runs = [
            one(args.config, args.key, seed, progress, args.tables)
            for seed in args.seeds
        ]
    environment = report.environment()
    path, variant = configs.split_spec(args.config)
    args.out.mkdir(parents=True, exist_ok=True)
    target = args.out / f"{path.stem}-{variant}.json"
    content = {"config": args.config, "key": args.key, "environment": environment}
    target.write_text(
        json.dumps({**content, "runs": runs}, indent=1, default=float) + "\n"
    )
    sys.stdout.write(markdown(args.config, runs, environment) + "\n")


if __name__ == "__main__":
    main()
