"""Merging whole checkpoints against mergekit: seconds, processor time, memory.

python experiments/bench/merge_checkpoints.py [--peer mergekit-yaml] [--methods ties]

A base and four models of 219 M bfloat16 parameters (a Llama of 24 layers, random
weights, small random changes) are written once to a folder and stay in the page cache.
For every method the two programs take turns as processes of their own, from the first
import to the last byte written, with as many threads each; each turn gives one ratio.
The first program runs once more before, so that compiled programs are in its cache, as
they are from the second merge on.
Memory is the largest anonymous resident set, sampled; mapped files do not count.
Refused unless the merged weights agree. Writes results/merge_checkpoints.json beside
this file.

The peer is any command that takes a recipe and an output folder as mergekit-yaml does;
without one only the first program is timed.
"""

import argparse
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import ml_dtypes
import numpy as np
import yaml

from mtl_jax.io import safetensors

EXPERTS = 4
SHAPE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 24,
    "vocab_size": 32000,
}
METHODS = {
    "linear": {"weight": 0.25},
    "task_arithmetic": {"weight": 0.3},
    "ties": {"weight": 0.25, "density": 0.5},
    "dare_linear": {"weight": 0.25, "density": 0.5},
    "della": {"weight": 0.25, "density": 0.5, "epsilon": 0.1},
    "breadcrumbs": {"weight": 0.25, "density": 0.5, "gamma": 0.01},
    "sce": {"select_topk": 0.5},
}
GOAL = {
    "linear": 3,
    "task_arithmetic": 3,
    "ties": 6,
    "dare_linear": 5,
    "della": 12,
    "breadcrumbs": 6,
    "sce": 6,
}
# Shares of entries that may be more than two steps of bfloat16 apart. mergekit rounds
# changes to bfloat16, so that many have the same size as the threshold and any of them
# are kept; two methods draw at random.
FAR = {
    "linear": 0,
    "task_arithmetic": 0.001,
    "ties": 0.05,
    "dare_linear": 1,
    "della": 1,
    "breadcrumbs": 0.05,
    "sce": 0.05,
}


def shapes(config):
    """Names and shapes of a Llama with its own head."""
    d, ffn = config["hidden_size"], config["intermediate_size"]
    found = {"model.embed_tokens.weight": (config["vocab_size"], d)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name in ("q", "k", "v", "o"):
            found[f"{prefix}self_attn.{name}_proj.weight"] = (d, d)
        found[f"{prefix}mlp.gate_proj.weight"] = (ffn, d)
        found[f"{prefix}mlp.up_proj.weight"] = (ffn, d)
        found[f"{prefix}mlp.down_proj.weight"] = (d, ffn)
        found[f"{prefix}input_layernorm.weight"] = (d,)
        found[f"{prefix}post_attention_layernorm.weight"] = (d,)
    found["model.norm.weight"] = (d,)
    found["lm_head.weight"] = (config["vocab_size"], d)
    return found


def write_models(folder):
    """The base and its experts, unless they are there; returns their folders."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **SHAPE,
    }
    paths = [folder / ("base" if i < 0 else f"expert-{i}") for i in range(-1, EXPERTS)]
    for seed, path in enumerate(paths):
        if (path / "model.safetensors").is_file():
            continue
        path.mkdir(parents=True, exist_ok=True)
        start, change = np.random.default_rng(0), np.random.default_rng(seed)
        tensors = {}
        for name, shape in shapes(config).items():
            value = 0.02 * start.standard_normal(shape, np.float32)
            if seed:
                value += 0.002 * change.standard_normal(shape, np.float32)
            tensors[name] = value.astype(ml_dtypes.bfloat16)
        (path / "config.json").write_text(json.dumps(config))
        safetensors.save(path / "model.safetensors", tensors, {"format": "pt"})
    return paths


def write_recipe(path, method, folders):
    """The same recipe for both."""
    base, *experts = map(str, folders)
    recipe = {
        "merge_method": method,
        "models": [{"model": e, "parameters": dict(METHODS[method])} for e in experts],
        "dtype": "bfloat16",
    }
    if method == "sce":
        recipe["models"] = [{"model": e} for e in experts]
        recipe["parameters"] = dict(METHODS[method])
    if method != "linear":
        recipe["base_model"] = base
    path.write_text(yaml.safe_dump(recipe))


def anonymous(pid):
    """Anonymous resident bytes of a process and of its children."""
    total = 0
    try:
        text = pathlib.Path(f"/proc/{pid}/status").read_text()
        children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except (OSError, ProcessLookupError):
        return 0
    for line in text.splitlines():
        if line.startswith("RssAnon"):
            total += int(line.split()[1]) * 1024
    return total + sum(anonymous(int(child)) for child in children.split())


def timed(command, threads):
    """Wall seconds, user and system seconds, peak anonymous bytes of a process."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, str(threads))}
    with tempfile.TemporaryFile() as errors:
        begin = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=errors, env=environment
        )
        peak = 0
        while True:
            found, status, usage = os.wait4(process.pid, os.WNOHANG)
            if found:
                break
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.02)
        wall = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            text = errors.read().decode()[-2000:]
            raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{text}")
    return {
        "wall": wall,
        "user": usage.ru_utime,
        "system": usage.ru_stime,
        "peak_anonymous_bytes": peak,
    }


def weights(folder):
    """All tensors of a written model."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    found = {}
    for name in names:
        found |= safetensors.SafetensorsFile(folder / name)
    return found


def disagreement(ours, theirs, method):
    """Shares of entries that differ at all, and by more than two bfloat16 steps."""
    ours, theirs = weights(ours), weights(theirs)
    if set(ours) != set(theirs):
        raise ValueError(f"{method}: tensors differ: {set(ours) ^ set(theirs)}")
    total = different = far = 0
    for name in sorted(ours)[::7]:
        a = np.asarray(ours[name], np.float32).reshape(-1)[: 1 << 21]
        b = np.asarray(theirs[name], np.float32).reshape(-1)[: 1 << 21]
        step = np.maximum(np.abs(b), 2e-3) * 2.0**-8
        total += a.size
        different += int((a != b).sum())
        far += int((np.abs(a - b) > 2 * step).sum())
    return {"different": different / total, "far": far / total}


def copy_rate():
    """Bytes a second of a copy in memory, read and written."""
    source = np.ones(1 << 28, np.uint8)
    target = np.empty_like(source)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - begin)
    return 2 * source.nbytes / min(times)


def measure(method, folders, scratch, args):
    """One row of the result."""
    recipe = scratch / f"{method}.yaml"
    write_recipe(recipe, method, folders)
    command = pathlib.Path(sys.executable).with_name("mtl-jax")
    programs = {"mtl_jax": [command, "merge", recipe]}
    if args.peer:
        programs["peer"] = [args.peer, recipe]
    extra = {"mtl_jax": [], "peer": ["--no-copy-tokenizer"]}
    runs = {name: [] for name in programs}
    row = {"method": method, "options": METHODS[method]}
    for turn in range(args.repeats + 1):
        for name, program in programs.items():
            if turn == 0 and name == "peer":
                continue
            out = scratch / f"{method}-{name}"
            shutil.rmtree(out, ignore_errors=True)
            found = timed([*program, out, *extra[name]], args.threads)
            if turn:
                runs[name].append(found)
            else:
                row["first_run"] = found
        if turn == 1 and args.peer:
            outs = [scratch / f"{method}-{name}" for name in programs]
            row["disagreement"] = disagreement(*outs, method)
            if row["disagreement"]["far"] > FAR[method]:
                raise ValueError(f"{method}: results differ: {row['disagreement']}")
    for name, found in runs.items():
        row[name] = {
            key: statistics.median(run[key] for run in found)
            for key in ("wall", "user", "system")
        }
        row[name]["walls"] = [run["wall"] for run in found]
        row[name]["peak_anonymous_bytes"] = max(
            run["peak_anonymous_bytes"] for run in found
        )
    if args.peer:
        pairs = zip(runs["peer"], runs["mtl_jax"], strict=True)
        ratios = sorted(p["wall"] / o["wall"] for p, o in pairs)
        row["times_faster"] = {
            "median": statistics.median(ratios),
            "smallest": ratios[0],
            "largest": ratios[-1],
        }
    models = EXPERTS + (method != "linear")
    moved = (
        (models + 1) * 2 * sum(int(np.prod(shape)) for shape in shapes(SHAPE).values())
    )
    row["bytes_read_and_written"] = moved
    row["moved_over_copy_rate"] = moved / row["mtl_jax"]["wall"] / args.copy_rate
    row["goal_seconds"] = GOAL[method]
    for name in programs:
        shutil.rmtree(scratch / f"{method}-{name}", ignore_errors=True)
    return row


def main():
    """Runs, prints and writes the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", help="such as the path of mergekit-yaml")
    parser.add_argument("--peer-version", default="", help="kept in the result")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--models", type=pathlib.Path, help="folder of the models")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.copy_rate = copy_rate()
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        folders = write_models(args.models or scratch / "models")
        result = {
            "machine": f"{jax.devices()[0].device_kind} {platform.machine()}",
            "cores": os.cpu_count(),
            "load_average": os.getloadavg()[0],
            "jax": jax.__version__,
            "peer": args.peer_version,
            "copy_bytes_per_second": args.copy_rate,
            "threads": args.threads,
            "repeats": args.repeats,
            "rows": [],
        }
        out = pathlib.Path(__file__).parent / "results" / "merge_checkpoints.json"
        for method in args.methods:
            row = measure(method, folders, scratch, args)
            print(json.dumps(row, indent=2), flush=True)
            result["rows"].append(row)
            out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
