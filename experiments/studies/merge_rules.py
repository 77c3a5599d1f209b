"""Every merge rule on one zoo of experts: one table, several seeds.

python experiments/studies/merge_rules.py text --seeds 0 1 2

Suites: text (eight real text tasks, MiniLM), vision (four real image tasks, a small
ViT), world (eight synthetic tasks, an MLP). A seed trains new experts. Each rule stands
at its defaults; its strength, one number, is chosen on validation rows from the grid of
its kind. Experts and accuracies are remembered, so a study that was stopped goes on.
The numbers go to OUT/merge_rules-SUITE.json, where rows of the same suite and seeds
that are not run again stay as they are; Markdown for experiments/RESULTS.md to the
terminal, the report with its plots to WORKDIR.
"""

import argparse
import collections
import json
import pathlib
import statistics
import sys
from typing import Any

import learned_rules
import routed_rules
import rule_table as table
from ml_collections import ConfigDict

from mtl_jax import report, tree, zoo
from mtl_jax.run import dispatch
from mtl_jax.run import study as study_lib
from mtl_jax.zoo import presets

STEPS = {"text": 50, "vision": 100, "world": 100}  # Of rules that learn from rows.
SUITES = {"text": presets.text, "vision": presets.vision, "world": presets.world}


def _shared(name: str, rule: table.Rule, scales: tuple[float, ...]) -> zoo.SharedModel:
    return zoo.SharedModel(name=name, delta=lambda taus, _: rule(taus), scales=scales)


def rows(base: Any, names: list[str], steps: int) -> tuple[zoo.Row, ...]:
    """One row per rule.

    Args:
      base: trained leaves of the base model.
      names: which; none for all.
      steps: of rules that learn from rows.

    Raises:
      SystemExit: a name that does not exist.
    """
    each = (
        *(_shared(name, rule, table.SUM) for name, rule in table.SUMS.items()),
        *(_shared(name, rule, table.MEAN) for name, rule in table.MEANS.items()),
        *(
            _shared(name, table.on_sphere(rule, base), table.MEAN)
            for name, rule in table.SPHERES.items()
        ),
        *table.task_models(base),
        *learned_rules.rows(steps),
        *routed_rules.rows(steps),
    )
    known = {row.name: row for row in each}
    if unknown := sorted(set(names) - set(known)):
        raise SystemExit(f"no rule {', '.join(unknown)}; known: {', '.join(known)}")
    chosen = (known[name] for name in names or known)
    return (zoo.zero_shot(), zoo.individual(), *chosen)


def one(suite: str, seed: int, args: argparse.Namespace, progress: Any) -> Any:
    """The study of one seed, run and written."""
    data, experts = SUITES[suite]()
    experts["seed"] = seed
    config = ConfigDict({"suite": data, "experts": experts, "study": {"seed": seed}})
    document = report.Report(f"Merge rules: {suite}, seed {seed}", config=config)
    encoder, tasks = dispatch.SUITES[data["name"]](dict(data["options"]), progress)
    opened = zoo.open_zoo(encoder, tasks, zoo.Settings(**experts), progress=progress)
    evaluator = zoo.Evaluator(opened, remember=True, progress=progress)
    study = study_lib.Study(opened, evaluator, config, document, progress)
    study.run(zoo.PostHoc(rows=rows(opened.base, args.rules, STEPS[suite])))
    study_lib.write(study, args.workdir / f"{suite}-{seed}")
    return study


def collect(studies: dict[int, Any]) -> dict[str, dict[str, Any]]:
    """Per row and seed the numbers of the leaderboard."""
    found = collections.defaultdict(dict)
    for seed, study in studies.items():
        for name, result in study.results.items():
            found[name][str(seed)] = {
                "accuracy": result.accuracy.tolist(),
                "normalised": result.normalised.tolist(),
                "chosen": list(result.chosen),
                "bytes": result.bits / 8,
                "seconds": result.seconds,
                **({"details": result.details} if result.details else {}),
            }
    return dict(found)


def leaderboard(found: dict[str, dict[str, Any]], names: tuple[str, ...]) -> Any:
    """Best first: normalised accuracy, accuracy per task, bytes, seconds."""

    def mean(name, read):
        return statistics.mean(read(r) for r in found[name].values())

    lines: list[tuple[Any, ...]] = []
    for name in found:
        each = [statistics.mean(r["normalised"]) for r in found[name].values()]
        seconds = [r["seconds"] for r in found[name].values() if r["seconds"]]
        spread = statistics.stdev(each) if len(each) > 1 else 0.0
        lines.append(
            (
                name,
                statistics.mean(each),
                spread,
                mean(name, lambda r: statistics.mean(r["accuracy"])),
                *(
                    mean(name, lambda r, t=t: r["accuracy"][t])
                    for t in range(len(names))
                ),
                mean(name, lambda r: r["bytes"]),
                statistics.mean(seconds) if seconds else None,
            )
        )
    percents = dict.fromkeys(("normalised", "sd", "accuracy", *names), ".1%")
    return report.Table(
        title="Merge rules, best first",
        columns=("rule", "normalised", "sd", "accuracy", *names, "storage", "seconds"),
        rows=tuple(sorted(lines, key=lambda line: line[1], reverse=True)),
        formats={**percents, "storage": "bytes", "seconds": ".1f"},
        caption="Means over seeds, sd of the normalised accuracy over seeds; storage "
        "of what serves all tasks; seconds of making, tuning and measuring. Rows of "
        "more than one model keep something for every task.",
    )


def main() -> None:
    """Runs, prints the table, writes the numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", choices=sorted(SUITES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rules", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--out", type=pathlib.Path, default="experiments/results")
    parser.add_argument("--workdir", type=pathlib.Path, default="runs/merge_rules")
    args = parser.parse_args()
    with report.Progress(args.suite, interval=60) as progress:
        studies = {s: one(args.suite, s, args, progress) for s in args.seeds}
    first = next(iter(studies.values()))
    content = {
        "config": first.config.to_dict(),
        "seeds": args.seeds,
        "trained_parameters": tree.size(first.zoo.base),
        "tasks": list(first.names),
    }
    path = args.out / f"merge_rules-{args.suite}.json"
    content["rows"] = kept(path, content) | collect(studies)
    content["environment"] = report.environment()
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    board = leaderboard(content["rows"], first.names)
    sys.stdout.write(board.to_markdown() + "\n")


def kept(path: pathlib.Path, content: dict[str, Any]) -> dict[str, Any]:
    """Rows of an earlier run of the same suite and seeds."""
    if not path.is_file():
        return {}
    old = json.loads(path.read_text())
    same = json.loads(json.dumps(content))
    return old["rows"] if all(old[key] == same[key] for key in same) else {}


if __name__ == "__main__":
    main()
