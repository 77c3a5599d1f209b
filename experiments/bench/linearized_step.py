"""Cost of fine-tuning in the tangent space, as ratios to ordinary fine-tuning.

python experiments/bench/linearized_step.py [--layers 4 --width 256 --batch 16]

Times one AdamW step of the same encoder, ordinary and linearised, alternating in one
process, and reads the forward memory of both from the compiled programs. Writes
results/linearized_step.json beside this file.
"""

import argparse
import json
import pathlib
import platform
import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from mtl_jax import linearize, tree

STEP_GOAL = 2.5  # linearised step / ordinary step
MEMORY_GOAL = 2.0  # (linearised temporaries - base parameters) / ordinary temporaries


class Block(nn.Module):
    """A post-norm encoder layer."""

    width: int

    @nn.compact
    def __call__(self, x):
        """Maps [B, L, D] to [B, L, D]."""
        h = nn.MultiHeadDotProductAttention(self.width // 32)(x, x)
        x = nn.LayerNorm()(x + h)
        h = nn.gelu(nn.Dense(4 * self.width)(x), approximate=False)
        return nn.LayerNorm()(x + nn.Dense(self.width)(h))


class Encoder(nn.Module):
    """Token embeddings, blocks, mean pooling, a linear head."""

    layers: int
    width: int

    @nn.compact
    def __call__(self, ids):
        """Maps ids [B, L] to logits [B, 8]."""
        x = nn.Embed(1000, self.width)(ids)
        for _ in range(self.layers):
            x = Block(self.width)(x)
        return nn.Dense(8)(x.mean(1))


def make_step(apply_fn, tx):
    """One donated AdamW step."""

    def step(params0, params, state, ids, labels):
        def loss(p):
            logits = apply_fn(params0, p, ids)
            xent = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return xent.mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(1, 2))


def median_times(steps, params0, tx, ids, labels, repeats):
    """Median seconds of each step; the variants take turns."""
    states = {}
    for name, step in steps.items():
        params = jax.tree.map(jnp.copy, params0)
        states[name] = jax.block_until_ready(
            step(params0, params, tx.init(params), ids, labels)
        )
    times = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            states[name] = jax.block_until_ready(
                step(params0, *states[name], ids, labels)
            )
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main():
    """Runs, prints and writes the comparison."""
    parser = argparse.ArgumentParser()
    for name, default in (("layers", 4), ("width", 256), ("batch", 16), ("length", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    model = Encoder(args.layers, args.width)
    keys = jax.random.split(jax.random.key(0), 3)
    ids = jax.random.randint(keys[0], (args.batch, args.length), 0, 1000)
    labels = jax.random.randint(keys[1], (args.batch,), 0, 8)
    params0 = model.init(keys[2], ids)["params"]

    def apply_fn(params, ids):
        return model.apply({"params": params}, ids)

    def forward(params0, params, ids):
        del params0
        return apply_fn(params, ids)

    def forward_lin(params0, params, ids):
        return linearize.taylor1(apply_fn, params0)(params, ids)

    tx = optax.adamw(1e-4)
    variants = {"ordinary": forward, "linearised": forward_lin}
    steps = {name: make_step(f, tx) for name, f in variants.items()}
    seconds = median_times(steps, params0, tx, ids, labels, args.repeats)
    temp = {
        name: jax.jit(f)
        .lower(params0, params0, ids)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for name, f in variants.items()
    }
    params_bytes = tree.nbytes(params0)
    result = {
        "machine": f"{jax.devices()[0].device_kind} {platform.machine()}",
        "jax": jax.__version__,
        "sizes": vars(args),
        "parameters": tree.size(params0),
        "median_step_seconds": seconds,
        "step_ratio": seconds["linearised"] / seconds["ordinary"],
        "step_goal": STEP_GOAL,
        "forward_temp_bytes": temp,
        "base_parameter_bytes": params_bytes,
        "memory_ratio": (temp["linearised"] - params_bytes) / temp["ordinary"],
        "memory_goal": MEMORY_GOAL,
    }
    print(json.dumps(result, indent=2))
    out = pathlib.Path(__file__).parent / "results" / "linearized_step.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
