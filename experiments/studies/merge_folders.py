"""Two experts of a language model as checkpoint folders, merged by the command line.

python experiments/studies/merge_folders.py --workdir runs/merge_language

SmolLM2 and two of the experts of `merge_language.py` are written as `transformers` has
them, float32. `mtl-jax merge` merges them by TIES and as a mean, `mtl-jax generate`
writes with the result, and its test losses and weights are compared with those of the
same merge in memory. Numbers go to OUT/merge_folders-smollm2.json.
"""

import argparse
import contextlib
import io as text_io
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from language_experts import Experts, adapters_of, settings

from mtl_jax import cli, io, merging, report, tree
from mtl_jax.run import generate

NAMES = ("hpo_branch", "esco_kind")
PROMPT = "Abnormality of the"
RECIPES = {
    "ties": """\
merge_method: ties
base_model: base
models:
  - {model: hpo_branch, parameters: {weight: 1.0, density: 0.2}}
  - {model: esco_kind, parameters: {weight: 1.0, density: 0.2}}
parameters: {normalize: true, scope: tensor}
dtype: float32
""",
    "linear": """\
merge_method: linear
models:
  - {model: hpo_branch, parameters: {weight: 1.0}}
  - {model: esco_kind, parameters: {weight: 1.0}}
dtype: float32
""",
}


def described(experts: Experts) -> dict[str, Any]:
    """The `config.json` of the model."""
    module, special = experts.model.module, experts.model.special
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": module.vocab_size,
        "hidden_size": module.width,
        "intermediate_size": module.mlp_dim,
        "num_hidden_layers": module.depth,
        "num_attention_heads": module.num_heads,
        "num_key_value_heads": module.num_kv_heads,
        "max_position_embeddings": module.max_positions,
        "rms_norm_eps": module.norm_eps,
        "rope_theta": module.rotary_base,
        "hidden_act": module.activation,
        "tie_word_embeddings": module.tied,
        "torch_dtype": "float32",
        "bos_token_id": special["bos"],
        "eos_token_id": special["eos"],
    }


def write(experts: Experts, params: Any, folder: pathlib.Path) -> None:
    """A folder of the model with these parameters, and its tokenizer."""
    config = described(experts)
    io.save_pretrained(folder, params, io.names.llama, config=config)
    experts.model.tokenizer.save(str(folder / "tokenizer.json"))


def in_memory(taus: Any) -> dict[str, Any]:
    """The same merges of task vectors, every layer's kernel a leaf of its own."""

    def ties(tau):
        layers = {str(i): tau[:, i] for i in range(tau.shape[1])}
        merged = merging.ties(layers, density=0.2, scope="leaf")
        return jnp.stack([merged[str(i)] for i in range(tau.shape[1])])

    return {"ties": jax.tree.map(ties, taus), "linear": merging.average(taus)}


def command(*arguments: str) -> tuple[str, float]:
    """What `mtl-jax` prints, and its seconds; SystemExit where it fails."""
    out, begin = text_io.StringIO(), time.monotonic()
    with contextlib.redirect_stdout(out):
        code = cli.main(list(arguments))
    if code:
        raise SystemExit(f"mtl-jax {' '.join(arguments)}: exit code {code}")
    return out.getvalue(), time.monotonic() - begin


def largest(one: Any, other: Any) -> float:
    """Of the differences of all weights."""
    found = jax.tree.map(lambda x, y: jnp.max(jnp.abs(x - y)), one, other)
    return float(max(jax.tree.leaves(found)))


def differing(one: Any, other: Any, by: float = 1e-6) -> int:
    """How many weights differ by more: with TIES, entries as large as the cut."""
    found = jax.tree.map(lambda x, y: jnp.sum(jnp.abs(x - y) > by), one, other)
    return int(sum(jax.tree.leaves(found)))


def compare(experts: Experts, name: str, delta: Any, root: pathlib.Path) -> dict:
    """One recipe by the command line, beside the same merge in memory."""
    recipe, folder = root / f"{name}.yaml", root / f"merged-{name}"
    recipe.write_text(RECIPES[name])
    _, seconds = command("merge", str(recipe), str(folder), "--overwrite")
    read = generate.open_checkpoint(str(folder))
    kept = experts.moved(delta)
    domains = range(len(NAMES))
    found = {
        "losses": [experts.measure(read.params, d) for d in domains],
        "losses_in_memory": [experts.measure(kept, d) for d in domains],
        "losses_of_base": [experts.measure(experts.base, d) for d in domains],
        "largest_difference": largest(read.params, kept),
        "differing": differing(read.params, kept),
        "weights": tree.size(experts.adapted),
        "largest_change": largest(kept, experts.base),
        "seconds": seconds,
    }
    asked = ("--prompt", PROMPT, "--max-new-tokens", "24")
    text, _ = command("generate", str(folder), *asked)
    return {**found, "prompt": PROMPT, "continuation": text}


def main() -> None:
    """Writes, merges, reads and compares."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, default="experiments/results")
    parser.add_argument("--workdir", type=pathlib.Path, default="runs/merge_language")
    args = parser.parse_args()
    root = args.workdir / "folders"
    with report.Progress("folders", interval=60) as progress:
        experts = Experts(settings(NAMES, (0,)), args.workdir, progress)
        loras = experts.adapters(0)
        changed = []
        write(experts, experts.base, root / "base")
        for name, lora in zip(NAMES, loras, strict=True):
            params = experts.lora.merge({"base": experts.base, "lora": lora})
            write(experts, params, root / name)
            changed.append(adapters_of(params, lora))
        # Of the weights as they are written, rounded.
        taus = merging.task_vectors(experts.adapted, changed)
        found = {
            name: compare(experts, name, delta, root)
            for name, delta in in_memory(taus).items()
        }
    content = {"experts": NAMES, "rows": found, "environment": report.environment()}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "merge_folders-smollm2.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    for row in found.values():
        np.testing.assert_allclose(row["losses"], row["losses_in_memory"], rtol=1e-5)


if __name__ == "__main__":
    main()
