"""Greedy decoding of SmolLM2-135M against `transformers`, tokens per second.

python experiments/bench/decode_tokens.py [--prompt 32 --new 64 --threads 2]

Same weights in float32, same prompts, same number of new tokens; the two take turns in
one process, on as many threads each. Each repeat gives one ratio. What is timed is the
whole call: the prompts are read, the tokens chosen. The floor of one row is the bytes
of the weights, read once for each token, over the bandwidth of a sum over as many
bytes, measured beside it. Logits of both over the prompts are compared too, and the
tokens. Writes results/decode_tokens.json beside this file.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import decoding, tree, zoo
from mtl_jax.io import names

BATCHES = (1, 8)


def theirs(model, threads):
    """The same weights in `transformers`."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    module = model.module
    config = transformers.LlamaConfig(
        vocab_size=module.vocab_size,
        hidden_size=module.width,
        num_hidden_layers=module.depth,
        num_attention_heads=module.num_heads,
        num_key_value_heads=module.num_kv_heads,
        head_dim=module.dim_of_head,
        intermediate_size=module.mlp_dim,
        max_position_embeddings=module.max_positions,
        rms_norm_eps=module.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": module.rotary_base},
        tie_word_embeddings=module.tied,
    )
    peer = transformers.LlamaForCausalLM(config).eval()
    state = names.llama.save(model.params)
    state = {name: torch.tensor(np.asarray(x)) for name, x in state.items()}
    missing, unexpected = peer.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"transformers lacks {unexpected}, wants {missing}")
    peer.tie_weights()
    return torch, peer


def bandwidth(num_bytes, repeats=5):
    """Bytes per second of a sum over an array of that size."""
    x = jnp.ones(num_bytes // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    total(x).block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        total(x).block_until_ready()
        times.append(time.perf_counter() - start)
    return x.nbytes / min(times)


def measure(model, torch, peer, prompts, new, repeats):
    """One batch: tokens per second of both, ratios, equality of the tokens."""
    step = decoding.from_decoder(model.module)
    ids = torch.tensor(prompts)

    def ours():
        out = decoding.generate(step, model.params, prompts, max_new_tokens=new)
        return np.asarray(out.tokens)

    def other():
        with torch.inference_mode():
            out = peer.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
        return out[:, ids.shape[1] :].numpy()

    start = time.perf_counter()
    ours()
    compiled = time.perf_counter() - start
    same = float(np.mean(ours() == other()))
    times = {"mtl_jax": [], "transformers": []}
    for _ in range(repeats):
        for name, call in (("mtl_jax", ours), ("transformers", other)):
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    tokens = new * len(prompts)
    pairs = zip(times["transformers"], times["mtl_jax"], strict=True)
    ratios = sorted(a / b for a, b in pairs)
    return {
        "batch": len(prompts),
        "tokens_per_second": {
            n: tokens / statistics.median(v) for n, v in times.items()
        },
        "speed_over_transformers": {
            "median": statistics.median(ratios),
            "smallest": ratios[0],
            "largest": ratios[-1],
        },
        "same_tokens": same,
        "first_call_seconds": compiled,
    }


def main():
    """Runs, prints and writes the comparison."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    model = zoo.smollm2()
    torch, peer = theirs(model, args.threads)
    rng = np.random.default_rng(0)
    prompts = rng.integers(100, 40000, (max(BATCHES), args.prompt)).tolist()
    with torch.inference_mode():
        want = peer(torch.tensor(prompts)).logits.numpy()
    got = jax.jit(model.module.apply)({"params": model.params}, jnp.asarray(prompts))
    num_bytes = 4 * tree.size(model.params)
    speed = bandwidth(num_bytes)
    result = {
        "machine": f"{jax.devices()[0].device_kind} {platform.machine()}",
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "jax": jax.__version__,
        "torch": torch.__version__,
        "sizes": vars(args),
        "parameters": tree.size(model.params),
        "largest_logit": float(np.abs(want).max()),
        "largest_logit_difference": float(np.abs(want - got).max()),
        "bandwidth_bytes_per_second": speed,
        "floor_tokens_per_second_one_row": speed / num_bytes,
        "rows": [],
    }
    out = pathlib.Path(__file__).parent / "results" / "decode_tokens.json"
    out.parent.mkdir(exist_ok=True)
    for batch in BATCHES:
        row = measure(model, torch, peer, prompts[:batch], args.new, args.repeats)
        print(json.dumps(row, indent=2), flush=True)
        result["rows"].append(row)
        out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
