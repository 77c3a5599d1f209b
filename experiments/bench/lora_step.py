"""A LoRA step on SmolLM2-135M against `peft` on torch, seconds per step.

python experiments/bench/lora_step.py [--threads 2 --rank 8]

Rank 8 on all seven projections of a layer, float32, Adam, rows of one segment without
padding; the same weights, factors and rows. Ours written out, scanned over its layers,
and scanned with `remat="products"`. They take turns in one process on as many threads
each; each repeat gives one ratio. Refused unless the losses of the first three steps
agree. Writes results/lora_step.json beside this file.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import time

import decode_tokens
import jax
import numpy as np
import optax

from mtl_jax import models, train, tree, zoo
from mtl_jax.train import causal_lm

SIZES = ((4, 64), (4, 256))
RULES = (r"attention/(query|key|value|out)/kernel$", r"mlp/(gate|in|out)/kernel$")
THEIR_NAMES = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.o_proj",
    "mlp/gate": "mlp.gate_proj",
    "mlp/in": "mlp.up_proj",
    "mlp/out": "mlp.down_proj",
}
LEARNING_RATE = 1e-3


class Ours:
    """One step of the trainer, again and again."""

    def __init__(self, module, params, start, settings, ids):
        trainable = causal_lm.causal_lm(
            module, params, tx=optax.adam(LEARNING_RATE), lora=settings
        )
        trainer = train.Trainer(
            trainable, mesh=train.make_mesh(devices=jax.devices()[:1])
        )
        self.batch = train.shard_batch(trainer.mesh, {"input_ids": ids})
        self.state = trainer.init_state(params=start)
        begin = time.perf_counter()
        self.compiled = trainer.compiled_step.lower(self.state, self.batch).compile()
        self.compile_seconds = time.perf_counter() - begin
        memory = self.compiled.memory_analysis()
        self.temporary_bytes = memory.temp_size_in_bytes

    def __call__(self):
        """Runs, waits, returns the loss."""
        self.state, metrics = self.compiled(self.state, self.batch)
        jax.block_until_ready(self.state)
        return float(metrics["loss"])


class Theirs:
    """The same in `peft`."""

    def __init__(self, model, start, settings, ids, threads):
        import peft

        self.torch, peer = decode_tokens.theirs(model, threads)
        config = peft.LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=0.0,
            target_modules=[name.split(".")[1] for name in THEIR_NAMES.values()],
        )
        self.model = peft.get_peft_model(peer.train(), config)
        state = dict(self.model.named_parameters())
        pairs = zip(
            tree.paths(start["lora"]), jax.tree.leaves(start["lora"]), strict=True
        )
        for path, leaf in pairs:
            layer, *part, _, factor = path.split("/")
            name = (
                f"{layer.replace('layers_', 'layers.')}.{THEIR_NAMES['/'.join(part)]}"
            )
            name = f"base_model.model.model.{name}.lora_{factor.upper()}.default.weight"
            state[name].data.copy_(self.torch.tensor(np.asarray(leaf).T))
        own = [p for p in self.model.parameters() if p.requires_grad]
        self.trained = sum(p.numel() for p in own)
        self.optimizer = self.torch.optim.Adam(own, lr=LEARNING_RATE)
        self.ids = self.torch.tensor(ids).long()

    def __call__(self):
        """Runs one step, returns the loss."""
        self.optimizer.zero_grad()
        loss = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        self.optimizer.step()
        return loss.item()


def measure(model, shape, args):
    """One row of the result."""
    settings = causal_lm.LoraSettings(rules=RULES, rank=args.rank, mode="intercept")
    ids = np.random.default_rng(0).integers(100, 40000, shape).astype(np.int32)
    start = settings.start(jax.random.key(0), model.params)
    stacked = models.stack_layers(model.params)
    scanned = {
        "base": stacked,
        "lora": models.stack_layers(start["lora"]),
    }
    steps = {
        "mtl_jax": Ours(model.module, model.params, start, settings, ids),
        "mtl_jax, scanned": Ours(
            model.module.clone(scan=True), stacked, scanned, settings, ids
        ),
        "mtl_jax, scanned, products kept": Ours(
            model.module.clone(scan=True, remat="products"),
            stacked,
            scanned,
            settings,
            ids,
        ),
        "peft": Theirs(model, start, settings, ids, args.threads),
    }
    assert steps["peft"].trained == tree.size(start["lora"])
    losses = {name: [step() for _ in range(3)] for name, step in steps.items()}
    for name, found in losses.items():
        np.testing.assert_allclose(found, losses["peft"], rtol=1e-3, err_msg=name)
    times = {name: [] for name in steps}
    for _ in range(args.repeats):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - begin)
    ours = {name: v for name, v in times.items() if name != "peft"}
    ratios = {
        name: sorted(a / b for a, b in zip(times["peft"], v, strict=True))
        for name, v in ours.items()
    }
    return {
        "rows": shape[0],
        "tokens_of_a_row": shape[1],
        "median_seconds": {n: statistics.median(v) for n, v in times.items()},
        "speed_over_peft": {
            n: {"median": statistics.median(v), "smallest": v[0], "largest": v[-1]}
            for n, v in ratios.items()
        },
        "first_losses": losses,
        "compile_seconds": {n: steps[n].compile_seconds for n in ours},
        "temporary_bytes": {n: steps[n].temporary_bytes for n in ours},
    }


def main():
    """Runs, prints and writes the comparison."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    model = zoo.smollm2()
    result = {
        "machine": f"{jax.devices()[0].device_kind} {platform.machine()}",
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "jax": jax.__version__,
        "sizes": vars(args),
        "rows": [],
    }
    out = pathlib.Path(__file__).parent / "results" / "lora_step.json"
    out.parent.mkdir(exist_ok=True)
    for shape in SIZES:
        row = measure(model, shape, args)
        print(json.dumps(row, indent=2), flush=True)
        result["rows"].append(row)
        out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
