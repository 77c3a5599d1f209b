"""A language model without half of its weights: which ones, and what is put right.

python experiments/studies/prune_language.py --seeds 0 1

SmolLM2-135M-Instruct; kernels of all projections are pruned to a half, or to 2 of every
4 inputs, by magnitude, Wanda and SparseGPT, on Grams of packed training rows of four
domains of text (`language_experts`), and split into a half and a part of low rank. A
seed draws 12 of 16 rows of each domain. Layers see what comes out of the dense ones
below. Losses on test rows in nats a token go to OUT/prune-smollm2.json.
"""

import argparse
import functools
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from language_experts import Experts, adapters_of, product, put, settings

from mtl_jax import merging, models, report, tree
from mtl_jax.train import causal_lm

POOL, ROWS, RANK, STEPS = 16, 12, 32, 4
Rule = Callable[[Any, Any], Any]


def grams(experts: Experts, seed: int) -> Any:
    """Grams of what every projection sees of a few rows of each domain, one task."""
    compute = causal_lm.token_losses(experts.model.module)
    capture = models.input_grams(
        lambda params, batch: compute(params, batch)[0],
        mask_fn=lambda batch: batch["segment_ids"],
    )
    drawn = np.random.default_rng(seed).permutation(POOL)[:ROWS]
    own = [experts.rows(name, "train", POOL) for name in experts.names]
    rows = [{k: np.stack([x[k][r] for x in own]) for k in own[0]} for r in drawn]
    batches = {k: jnp.stack([row[k] for row in rows]) for k in rows[0]}
    found = merging.mean_grams(capture, experts.base, batches)
    return jax.tree.map(lambda x: x[None], adapters_of(found, _pairs(experts.adapted)))


def _pairs(adapted: Any) -> Any:
    """The places of adapted kernels, as `adapters_of` finds them."""
    if not isinstance(adapted, dict):
        return {"a": None, "b": None}
    return {key: _pairs(value) for key, value in adapted.items()}


def _by_magnitude(taus: Any, gram: Any, pattern: Any) -> Any:
    if pattern is None:
        return merging.magnitude_masks(taus, density=0.5, scope="leaf")
    alike = jax.tree.map(
        lambda g: jnp.broadcast_to(jnp.eye(g.shape[-1]), g.shape), gram
    )
    return merging.wanda_masks(taus, alike, pattern=pattern)


def _kept(mask_fn: Callable[[Any, Any], Any]) -> Rule:
    def rule(taus, gram):
        return jax.tree.map(lambda x, m: jnp.where(m, x, 0), taus, mask_fn(taus, gram))

    return rule


def _split(steps: int) -> Rule:
    def rule(taus, gram):
        # Matrices of layers are tasks here: the rule splits leaves of two axes.
        flat = jax.tree.map(lambda x: x[0], taus)
        masks = jax.tree.map(lambda m: m[0], merging.wanda_masks(taus, gram))
        found = merging.sparse_low_rank(
            flat, masks, rank=RANK, steps=steps, svd="sketch"
        )
        named = [product(each) for each in found.adapters]
        low = jax.tree.map(lambda *x: jnp.stack(x), *named)
        return jax.tree.map(lambda s, y: (s + y)[None], found.sparse, low)

    return rule


def rules() -> dict[str, Rule]:
    """Name -> (kernels [1, ...], Grams) -> pruned kernels."""
    found: dict[str, Rule] = {"dense": lambda taus, gram: taus}
    for name, pattern in {"half": None, "2 of 4": (2, 4)}.items():
        part = functools.partial
        found[f"magnitude, {name}"] = _kept(part(_by_magnitude, pattern=pattern))
        found[f"Wanda, {name}"] = _kept(part(merging.wanda_masks, pattern=pattern))
        found[f"SparseGPT, {name}"] = part(merging.sparse_gpt, pattern=pattern)
    for steps in (0, STEPS):
        found[f"Wanda, half, and rank {RANK}, {steps} steps"] = _split(steps)
    return found


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results"))
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("work"))
    args = parser.parse_args()
    experts = Experts(settings(seeds=args.seeds), args.workdir, report.Progress())
    taus = jax.tree.map(lambda x: x[None], experts.adapted)
    rows: dict[str, dict[str, Any]] = {}
    for seed in args.seeds:
        gram = jax.block_until_ready(grams(experts, seed))
        for name, rule in rules().items():
            begin = time.monotonic()
            pruned = jax.block_until_ready(rule(taus, gram))
            seconds = time.monotonic() - begin
            kernels = jax.tree.map(lambda x: x[0], pruned)
            params = put(experts.base, kernels)
            losses = [experts.measure(params, d) for d in range(len(experts.names))]
            zeros = sum(int((x == 0).sum()) for x in jax.tree.leaves(kernels))
            rows.setdefault(name, {})[str(seed)] = {
                "losses": losses,
                "seconds": seconds,
                "zeros": zeros / tree.size(kernels),
            }
            mean = statistics.mean(losses)
            print(f"seed {seed}, {name}: {mean:.3f} nats, {seconds:.1f} s", flush=True)
    content = {
        "domains": list(experts.names),
        "rows": rows,
        "calibration_rows": ROWS * len(experts.names),
        "environment": report.environment(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "prune-smollm2.json"
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
