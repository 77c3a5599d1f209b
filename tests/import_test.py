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
start = time.perf_counter()
import mtl_jax
seconds = time.perf_counter() - start
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


@pytest.mark.parametrize(
    ("namespace", "not_loaded"),
    [
        ("catalog", HEAVY),
        ("tree", HEAVY),
        ("merging", HEAVY),
        ("linearize", HEAVY),
        ("masking", HEAVY),
        ("kernels", HEAVY),
        ("cli", HEAVY),
        ("report", {"matplotlib", "jinja2", "flax", "orbax", "tensorflow"}),
        ("data", {"tensorflow", "torch", "matplotlib"}),
        ("models", {"tensorflow", "torch", "matplotlib", "tensorflow_datasets"}),
        ("train", {"tensorflow", "torch", "matplotlib", "tensorflow_datasets"}),
        ("io", {"tensorflow", "torch", "matplotlib", "tensorflow_datasets"}),
    ],
)
def test_namespace_loads_no_more_than_it_needs(namespace, not_loaded):
    code = (
        "import json, sys, mtl_jax, importlib\n"
        f"name = mtl_jax._NAMESPACES.get({namespace!r}, 'mtl_jax.' + {namespace!r})\n"
        "importlib.import_module(name)\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    loaded = {name.split(".")[0] for name in probe(code)}
    assert not loaded & not_loaded


def test_namespaces_resolve_lazily():
    import mtl_jax

    assert set(mtl_jax._NAMESPACES) <= set(dir(mtl_jax))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        mtl_jax.nonsense  # noqa: B018
