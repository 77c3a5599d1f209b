"""Four experts of one language model, merged by every rule: losses in nats.

python experiments/studies/merge_language.py --seeds 0 1

SmolLM2-135M-Instruct, an adapter of rank 8 on all projections for each of four
domains of text (`lm_demo.py:demo`); a seed trains new ones. Elementwise rules merge the
products of the factors, [in, out]; sums and rules of singular vectors merge what the
factors span, see `merging.lora_span` (WUDI by its exact solver: steps of Adam depend on
the axes). A rule's strength is chosen on validation texts by climbing on its grid until
both neighbours are worse, from the middle or from what another seed chose. *Normalised*
is the part of its own expert's gain over the base that a domain keeps.

Adapters are kept in WORKDIR; every row is written to OUT/merge_rules-smollm2.json as
soon as it is there, and rows that are there are not run again.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import rule_table as table
from language_experts import TEST, TOKENS, VALIDATION, Experts, product, settings

from mtl_jax import adapters, merging, report, tree, zoo
from mtl_jax.train import causal_lm


@dataclasses.dataclass(frozen=True)
class Row:
    """A rule of adapters: `make(loras, taus) -> delta` of the adapted leaves.

    Attributes:
      make: `taus()` makes the task vectors, for rules that want them.
      scales: see `rule_table`.
      rank: of the adapter that the result is; None for none of low rank.
    """

    make: Callable[[Any, Callable[[], Any]], Any]
    scales: tuple[float, ...]
    rank: int | None = None


def scaling_of(lora: causal_lm.LoraSettings) -> dict[str, Any]:
    """What turns factors into a difference of weights."""
    return {"alpha": lora.alpha, "rslora": lora.rslora}


def every(name: str, shape: tuple[int, ...]) -> bool:
    """All adapted leaves are matrices in their last two axes, layers before them."""
    del name, shape
    return True


def rows(base: Any, lora: causal_lm.LoraSettings, count: int) -> dict[str, Row]:
    """Every rule, the cheap ones first.

    Args:
      base: leaves that adapters change.
      lora: how the adapters were made.
      count: of experts.
    """
    scaling = scaling_of(lora)
    whole = count * lora.rank

    def spanned(rule, scales, side="both"):
        def make(loras, taus):
            del taus
            found = merging.lora_span(loras, rule, side=side, **scaling)
            return product(found)

        return Row(make, scales, whole)

    def dense(rule, scales):
        return Row(lambda loras, taus: rule(taus()), scales)

    spectral = {
        "TSV-M": merging.tsv_merge,
        "Iso-C": merging.iso_c,
        "Iso-CTS": merging.iso_cts,
        "SVC": merging.svc,
        "OPCM": merging.opcm,
        "WUDI": functools.partial(merging.wudi, solver="exact"),
    }
    own: dict[str, Row] = {
        "task arithmetic": Row(
            lambda loras, _: product(merging.lora_cat(loras, **scaling)),
            table.SUM,
            whole,
        ),
        "average": spanned(merging.average, table.MEAN),
        "Model Stock": spanned(merging.model_stock, table.MEAN),
        "adapters, SVD to one's rank": Row(
            lambda loras, _: product(
                merging.lora_svd(loras, rank=lora.rank, **scaling)
            ),
            table.SUM,
            lora.rank,
        ),
        "adapters, means of factors": Row(
            lambda loras, _: adapters.lora.delta(
                tree.combine(adapters.lora.stack(loras), [1 / count] * count),
                **scaling,
            ),
            table.MEAN,
            lora.rank,
        ),
        "KnOTS-TIES": spanned(
            functools.partial(merging.knots, matrices=every), table.MEAN, "out"
        ),
    }
    for name, rule in spectral.items():
        own[name] = spanned(functools.partial(rule, matrices=every), table.SUM)
    found = dict(own)
    for name, rule in table.SUMS.items():
        found.setdefault(name, dense(rule, table.SUM))
    for name, rule in table.MEANS.items():
        found.setdefault(name, dense(rule, table.MEAN))
    for name, rule in table.SPHERES.items():
        found[name] = dense(table.on_sphere(rule, base), table.MEAN)
    found["LiNeS"] = dense(
        lambda t: merging.lines(
            merging.task_arithmetic(t), first=0.3, last=1.0, stacked="."
        ),
        table.SUM,
    )
    return found


def climb(loss: Callable[[float], float], grid: Sequence[float], start: float) -> float:
    """The least of a grid, from near `start` until both neighbours are worse."""
    known: dict[int, float] = {}
    here = min(range(len(grid)), key=lambda i: abs(grid[i] - start))
    while True:
        near = range(max(here - 1, 0), min(here + 2, len(grid)))
        for i in near:
            if i not in known:
                known[i] = loss(grid[i])
        best = min(near, key=lambda i: known[i])
        if best == here:
            return grid[here]
        here = best


class Board:
    """Rows of one seed, measured and written one by one."""

    def __init__(self, experts: Experts, seed: int, content: dict, path: pathlib.Path):
        self.experts, self.seed, self.path = experts, seed, path
        self.content, self.rows = content, content["rows"]
        self.loras = experts.adapters(seed)
        self.count = len(self.loras)
        self._taus = None
        self.size, self.adapted = tree.size(experts.base), tree.size(experts.adapted)

    def taus(self) -> Any:
        """Task vectors of the adapted leaves, made when first asked for."""
        if self._taus is None:
            scaling = scaling_of(self.experts.lora)
            self._taus = jax.block_until_ready(
                tree.stack([adapters.lora.delta(x, **scaling) for x in self.loras])
            )
        return self._taus

    def has(self, name: str) -> bool:
        """Whether this row and seed were measured before."""
        return str(self.seed) in self.rows.get(name, {})

    def start(self, name: str, grid: Sequence[float]) -> float:
        """Where to begin to look for a strength."""
        others = [found["scale"] for found in self.rows.get(name, {}).values()]
        return others[0] if others else grid[len(grid) // 2]

    def write(self, name: str, losses: list[float], **more: Any) -> None:
        """Keeps a row, in the file too."""
        found = {"losses": losses, **more}
        self.rows.setdefault(name, {})[str(self.seed)] = found
        self.content["environment"] = report.environment()
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")
        mean = statistics.mean(losses)
        print(f"seed {self.seed}, {name}: {mean:.3f} nats {more}", flush=True)

    def references(self) -> None:
        """The base, and every expert on every domain's test texts."""
        domains = range(self.count)
        if not self.has("base"):
            found = [self.experts.measure(self.experts.base, d) for d in domains]
            self.write("base", found, bytes=4 * self.size)
        if not self.has("own expert"):
            own, every_one = [], []
            for lora in self.loras:
                params = self.experts.lora.merge(
                    {"base": self.experts.base, "lora": lora}
                )
                every_one.append([self.experts.measure(params, d) for d in domains])
            own = [every_one[d][d] for d in domains]
            storage = 4 * (self.size + sum(tree.size(x) for x in self.loras))
            self.write("own expert", own, bytes=storage, by_expert=every_one)

    def shared(self, name: str, row: Row) -> None:
        """One model for all domains."""
        begin = time.monotonic()
        taus = self.taus
        if row.rank is None:
            taus()
            begin = time.monotonic()
        delta = jax.block_until_ready(row.make(self.loras, taus))
        made = time.monotonic() - begin

        def loss(scale):
            return float(
                np.mean(self.experts.validate(self.experts.moved(delta, scale)))
            )

        scale = climb(loss, row.scales, self.start(name, row.scales))
        params = self.experts.moved(delta, scale)
        losses = [self.experts.measure(params, d) for d in range(self.count)]
        self.write(
            name,
            losses,
            scale=scale,
            bytes=4 * self.size,
            rank=row.rank,
            seconds=made,
            seconds_in_all=time.monotonic() - begin,
        )

    def task_models(self, row: zoo.TaskModels) -> None:
        """A model for each domain, from what all share."""
        taus = self.taus()
        begin = time.monotonic()
        state = jax.block_until_ready(row.prepare(taus, {}))
        made = time.monotonic() - begin
        losses, knobs = [], []
        for d in range(self.count):

            def params(knob, d=d):
                return self.experts.moved(row.delta(state, d, knob))

            def loss(knob, d=d, params=params):
                return float(self.experts.validate(params(knob))[d])

            grid = row.knobs
            middle = grid[len(grid) // 2]
            knob = climb(loss, grid, middle) if len(grid) > 1 else grid[0]
            knobs.append(knob)
            losses.append(self.experts.measure(params(knob), d))
        bits = row.bits(self.count, self.adapted, self.size - self.adapted)
        self.write(
            row.name,
            losses,
            scale=knobs,
            bytes=bits / 8,
            rank=None,
            seconds=made,
            seconds_in_all=time.monotonic() - begin,
        )


def leaderboard(content: dict[str, Any]) -> report.Table:
    """Best first: the part of the experts' gain that is kept, and losses."""
    found, names = content["rows"], content["domains"]
    seeds = [str(seed) for seed in content["seeds"]]
    base = {s: np.array(found["base"][s]["losses"]) for s in seeds}
    own = {s: np.array(found["own expert"][s]["losses"]) for s in seeds}
    lines: list[tuple[Any, ...]] = []
    for name, row in found.items():
        there = [s for s in seeds if s in row]
        losses = {s: np.array(row[s]["losses"]) for s in there}
        kept = [
            float(np.mean((base[s] - losses[s]) / (base[s] - own[s]))) for s in there
        ]
        chosen = [row[s].get("scale") for s in there]
        mean = np.mean(list(losses.values()), 0)
        making = [row[s]["seconds"] for s in there if "seconds" in row[s]]
        lines.append(
            (
                name,
                statistics.mean(kept),
                max(kept) - min(kept),
                float(mean.mean()),
                *map(float, mean),
                "; ".join(sorted({shown(x) for x in chosen})),
                statistics.mean(row[s]["bytes"] for s in there),
                statistics.mean(making) if making else None,
            )
        )
    nats = dict.fromkeys(("loss", *names), ".3f")
    return report.Table(
        title="Merge rules on a language model, best first",
        columns=(
            *("rule", "normalised", "range", "loss"),
            *names,
            *("scale", "storage", "seconds"),
        ),
        rows=tuple(sorted(lines, key=lambda line: line[1], reverse=True)),
        formats={**nats, "normalised": ".1%", "range": ".1%"}
        | {"storage": "bytes", "seconds": ".1f"},
        caption="Losses in nats a token, means over seeds; normalised: the part of the "
        "expert's gain over the base that is kept, mean over domains, and its range "
        "over seeds; scales as chosen; storage of what serves all domains; seconds of "
        "making the merge, compilation included.",
    )


def shown(scale: Any) -> str:
    """A chosen scale, or one for each domain."""
    if isinstance(scale, list):
        return "/".join(f"{x:g}" for x in scale)
    return "" if scale is None else f"{scale:g}"


def opened(config: Any, path: pathlib.Path) -> dict[str, Any]:
    """What was measured before with the same settings, or nothing yet."""
    content = {
        "config": json.loads(config.to_json_best_effort()),
        "rows_of_tokens": [VALIDATION, TEST, TOKENS],
        "domains": list(config.domains),
        "seeds": list(config.seeds),
    }
    if path.is_file():
        old = json.loads(path.read_text())
        if all(old[key] == content[key] for key in content):
            return old
    return {**content, "rows": {}}


def main() -> None:
    """Runs what is missing, and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rules", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--skip", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--out", type=pathlib.Path, default="experiments/results")
    parser.add_argument("--workdir", type=pathlib.Path, default="runs/merge_language")
    args = parser.parse_args()
    config = settings(seeds=args.seeds)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "merge_rules-smollm2.json"
    content = opened(config, path)
    with report.Progress("experts", interval=60) as progress:
        experts = Experts(config, args.workdir, progress)
        for seed in args.seeds:
            board = Board(experts, seed, content, path)
            board.references()
            every_row = rows(experts.adapted, experts.lora, board.count)
            restored = {x.name: x for x in table.task_models(experts.adapted)}
            for name in args.rules or (*every_row, *restored):
                if name in args.skip or board.has(name):
                    continue
                if name in every_row:
                    board.shared(name, every_row[name])
                else:
                    board.task_models(restored[name])
    sys.stdout.write(leaderboard(content).to_markdown() + "\n")


if __name__ == "__main__":
    main()
