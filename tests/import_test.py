"""`import mtl_jax` is light, in time and in what it loads."""

import json
import statistics
import subprocess
import sys

import pytest

PROBE = """
import json, sys, time
import jax, optax, chex
before = set(sys.modules)
start = time.process_time()
import mtl_jax
seconds = time.process_time() - start
print(json.dumps([seconds, sorted(set(sys.modules) - before)]))
"""
HEAVY = {
    "array_record",
    "flax",
    "grain",
    "jinja2",
    "matplotlib",
    "orbax",
    "rich",
    "safetensors",
    "sklearn",
    "tensorboardX",
    "tensorflow",
    "tensorflow_datasets",
    "tokenizers",
    "torch",
}


def probe(code):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_import_is_light():
    found = [probe(PROBE) for _ in range(3)]
    assert statistics.median(seconds for seconds, _ in found) < 0.2
    loaded = {name.split(".")[0] for name in found[0][1]}
    assert not loaded & HEAVY


# Namespaces imported one after the other in one process, and what none of them needs.
@pytest.mark.parametrize(
    ("namespaces", "not_loaded"),
    [
        (
            (
                *("tree", "kernels", "merging", "linearize", "masking"),
                *("adapters", "quantization", "catalog", "cli"),
            ),
            HEAVY,
        ),
        (
            (
                *("report", "losses", "metrics", "models"),
                *("decoding", "data", "train", "io"),
            ),
            {"tensorflow", "torch", "matplotlib", "tensorflow_datasets", "jinja2"},
        ),
    ],
    ids=["light", "all"],
)
def test_namespaces_load_no_more_than_they_need(namespaces, not_loaded):
    code = (
        "import importlib, json, sys, mtl_jax\n"
        f"for name in {namespaces!r}:\n"
        "    path = mtl_jax._NAMESPACES.get(name, 'mtl_jax.' + name)\n"
        "    importlib.import_module(path)\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    loaded = {name.split(".")[0] for name in probe(code)}
    assert not loaded & not_loaded


def test_namespaces_resolve_lazily():
    import mtl_jax

    assert set(mtl_jax._NAMESPACES) <= set(dir(mtl_jax))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        mtl_jax.nonsense  # noqa: B018
