"""Every gradient and loss weighting on one real problem: one table, several seeds.

python experiments/studies/gradient_methods.py digits --seeds 0 1 2

Problems: digits (two overlaid digits), census (three questions about one person),
texts (six text tasks on MiniLM), schools (one regression per school). Trainings are
remembered, so a study that was stopped goes on. The numbers go to
OUT/gradient_methods-PROBLEM.json, Markdown for experiments/RESULTS.md to the terminal,
the report with its plots to WORKDIR. Methods that compare two batches or hold one out
get two batches of training rows each step.
"""

import argparse
import json
import math
import pathlib
import sys

from ml_collections import ConfigDict

from mtl_jax import aggregation, bilevel, multitask, report, weighting
from mtl_jax.multitask import presets
from mtl_jax.run import compare

PROBLEMS = {
    "digits": presets.digits,
    "census": presets.census,
    "schools": presets.schools,
    "texts": presets.texts,
}
AGGREGATORS = {
    "MGDA": (aggregation.mgda, {}),
    "PCGrad": (aggregation.pcgrad, {}),
    "GradVac": (aggregation.grad_vac, {}),
    "CAGrad": (aggregation.cagrad, {}),
    "IMTL-G": (aggregation.imtl_g, {}),
    "Nash-MTL": (aggregation.nash_mtl, {}),
    "FairGrad": (aggregation.fair_grad, {}),
    "Aligned-MTL": (aggregation.aligned_mtl, {}),
    "UPGrad": (aggregation.upgrad, {}),
    "DualProj": (aggregation.dual_proj, {}),
    "ConFIG": (aggregation.config, {}),
    "GradDrop": (aggregation.grad_drop, {}),
    "MoCo": (aggregation.moco, {}),
    "DB-MTL": (aggregation.db_mtl, {}),
    "ExcessMTL": (aggregation.excess_mtl, {}),
}
WEIGHTINGS = {
    "RLW": (weighting.random, {}),
    "UW": (weighting.uncertainty, {}),
    "IMTL-L": (weighting.imtl_l, {}),
    "DWA": (weighting.dwa, {"window": 100}),
    "GLS": (weighting.geometric_mean, {}),
    "FAMO": (weighting.famo, {}),
    "STCH": (weighting.stch, {}),
    "GradNorm": (weighting.grad_norm, {}),
}
TWO_BATCHES = {
    "MoDo": aggregation.modo,
    "SDMGrad": aggregation.sdm_grad,
}
BILEVEL = {
    "Auto-Lambda": bilevel.auto_lambda,
    "MOML": bilevel.moml,
    "FORUM": bilevel.forum,
}


def rows(names: list[str], rate: float) -> tuple[multitask.Row, ...]:
    """One row per method, at its defaults.

    Args:
      names: which; none for all.
      rate: of the model's optimizer, by which Auto-Lambda looks ahead.
    """
    known = {
        name: multitask.aggregated(name, factory, **options)
        for name, (factory, options) in {**AGGREGATORS, **WEIGHTINGS}.items()
    }
    for name, factory in TWO_BATCHES.items():
        known[name] = multitask.aggregated(name, factory, draws=2)
    for name, factory in BILEVEL.items():
        options = {"inner_rate": rate} if name == "Auto-Lambda" else {}
        known[name] = multitask.bilevel(name, factory, **options)
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise SystemExit(f"no method {', '.join(unknown)}; known: {', '.join(known)}")
    return tuple(
        multitask.Row(name=name, candidates=(known[name],)) for name in names or known
    )


def main() -> None:
    """Trains, prints the table, writes the numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("problem", choices=sorted(PROBLEMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--steps", type=int, help="of every training")
    parser.add_argument("--tuning-steps", type=int, default=5)
    parser.add_argument("--reuse", choices=multitask.REUSE, default=multitask.REUSE[0])
    parser.add_argument("--out", type=pathlib.Path, default="experiments/results")
    parser.add_argument("--workdir", type=pathlib.Path, default="runs/gradient_methods")
    args = parser.parse_args()
    options = {} if args.steps is None else {"steps": args.steps}
    problem, model, training = PROBLEMS[args.problem](**options)
    config = ConfigDict(
        {
            "problem": problem,
            "model": model,
            "training": training,
            "seeds": tuple(args.seeds),
            "study": {"tuning_steps": args.tuning_steps},
        }
    )
    document = report.Report(f"Gradient methods: {args.problem}", config=config)
    with report.Progress(args.problem, interval=60) as progress:
        bench = multitask.Bench(
            multitask.assemble(**problem, model=model, progress=progress),
            multitask.Settings(**training),
            reuse=args.reuse,
            progress=progress,
        )
        found = compare.Comparison(bench, config, document, progress)
        contest = rows(args.methods, training["optimizer"]["peak"])
        found.run(multitask.Contest(rows=contest))
        compare.write(found, args.workdir / args.problem)
    save(found, args.out / f"gradient_methods-{args.problem}.json")
    sys.stdout.write(document.tables[0].to_markdown() + "\n")


def save(found: compare.Comparison, path: pathlib.Path) -> None:
    """Every number of every seed; no conflicts where no task gradients were had."""
    content = {
        "config": found.config.to_dict(),
        "environment": report.environment(),
        "rows": {
            name: {
                "delta": result.delta.tolist(),
                "chosen": result.chosen,
                "test": [dict(outcome.test) for outcome in result.outcomes],
                "step_seconds": [outcome.step_seconds for outcome in result.outcomes],
                "conflict_rate": [
                    None if math.isnan(rate) else rate
                    for rate in result.last("conflict_rate").tolist()
                ],
            }
            for name, result in found.results.items()
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
