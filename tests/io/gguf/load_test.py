"""From a file to the decoder's parameters, within a bound on host memory."""

import json
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import models
from mtl_jax.io import gguf
from mtl_jax.io.names._gguf_llama import gguf_llama


def metadata(width=32, mlp=64, vocab=48, depth=2):
    return {
        "general.architecture": "llama",
        "llama.context_length": 16,
        "llama.embedding_length": width,
        "llama.block_count": depth,
        "llama.feed_forward_length": mlp,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": vocab,
    }


def abstract(config, **options):
    table = gguf_llama(config, tied=True)
    module = models.build(table.model, **table.options(config), **options)
    example = jnp.zeros((1, 4), jnp.int32)
    return jax.eval_shape(module.init, jax.random.key(0), example)["params"]


def write(path, kind="Q8_0", **sizes):
    """A random model; matrices are quantised. Returns its parameters."""
    config = metadata(**sizes)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32), abstract(config)
    )
    tensors = gguf_llama(config, tied=True).save(params)
    types = {name: kind for name, x in tensors.items() if len(x.shape) == 2}
    gguf.save(path, tensors, config, types=types)
    return params


def assert_close(a, b, atol):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


@pytest.mark.parametrize(("kind", "atol"), [("F32", 0), ("Q8_0", 0.03), ("Q4_1", 0.3)])
def test_parameters_come_back_as_the_type_keeps_them(tmp_path, kind, atol):
    path = tmp_path / "x.gguf"
    params = write(path, kind)
    assert_close(gguf.load(path, abstract(metadata())), params, atol)
    stacked = gguf.load(path, abstract(metadata(), scan=True))
    assert_close(models.unstack_layers(stacked), params, atol)
    free = gguf.load(gguf.GgufFile(path))
    assert {x.dtype for x in jax.tree.leaves(free)} == {jnp.dtype("float32")}
    assert_close(free, params, atol)


def test_bfloat16_is_rounded_once(tmp_path):
    path = tmp_path / "x.gguf"
    write(path)
    wide = gguf.load(path)
    got = gguf.load(path, abstract(metadata(), param_dtype="bfloat16"))
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, y.astype(jnp.bfloat16)), got, wide
    )


def test_an_untied_head_is_a_leaf(tmp_path):
    path = tmp_path / "x.gguf"
    config = metadata()
    params = write(path)
    params["head"] = {"kernel": np.ones((32, 48), np.float32)}
    gguf.save(path, gguf_llama(config, tied=False).save(params), config)
    file = gguf.GgufFile(path)
    assert gguf.name_table(file).options(file.metadata)["tied"] is False
    assert_close(gguf.load(path), params, 0)
    with pytest.raises(ValueError, match=r"gguf.load: .*unexpected: 'output\.weight'"):
        gguf.load(path, abstract(config))


def test_faults_name_the_file(tmp_path):
    path = tmp_path / "x.gguf"
    write(path)
    tensors, config = dict(gguf.GgufFile(path)), gguf.GgufFile(path).metadata
    gguf.save(path, tensors, {**config, "tokenizer.ggml.tokens": ["a", "b"]})
    with pytest.raises(
        ValueError, match=r"x\.gguf: the vocabulary has 2 tokens, 'token_embd.* 48 rows"
    ):
        gguf.load(path)
    gguf.save(path, tensors, {"general.architecture": "mamba"})
    with pytest.raises(ValueError, match=r"x\.gguf: names\.gguf_llama: .*'mamba'"):
        gguf.load(path)
    for depth in (1, 3, 2**31):
        gguf.save(path, tensors, {**config, "llama.block_count": depth})
        with pytest.raises(ValueError, match=rf"has {depth} blocks, the .* of 2"):
            gguf.load(path)
    del tensors["blk.1.ffn_up.weight"]
    gguf.save(path, tensors, config)
    with pytest.raises(ValueError, match=r"gguf\.load: .*missing: 'blk\.1\.ffn_up"):
        gguf.load(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        gguf.load(tmp_path / "y.gguf")


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_host_memory_beside_the_tree_is_at_most_one_leaf(tmp_path, scan, dtype):
    """1.3 of the largest leaf, and nothing that stays."""
    path = tmp_path / "x.gguf"
    sizes = {"width": 256, "mlp": 1024, "vocab": 16384, "depth": 4}
    write(path, "Q4_1", **sizes)
    like = abstract(metadata(**sizes), scan=scan, param_dtype=dtype)
    largest = max(x.size * x.dtype.itemsize for x in jax.tree.leaves(like))
    tracemalloc.start()
    try:
        params = gguf.load(path, like)
        left, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    kept = sum(x.nbytes for x in jax.tree.leaves(params))
    # A device may go on using the buffer that it was given.
    assert peak <= 1.3 * largest + min(left, kept)


def test_the_dtype_that_is_asked_for_is_rounded_to_once(tmp_path):
    path = tmp_path / "x.gguf"
    write(path, "Q4_1")
    whole = gguf.load(path)
    half = gguf.load(path, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}
    want = jax.tree.map(lambda x: x.astype(jnp.bfloat16), whole)
    assert_close(half, want, 0)
    like = abstract(metadata(), scan=True)  # float32
    scanned = gguf.load(path, like, dtype=jnp.bfloat16)
    assert_close(scanned, models.stack_layers(want), 0)


@pytest.mark.fast
def test_the_only_file_of_a_folder(tmp_path):
    assert gguf.find(tmp_path) is None
    assert gguf.find(tmp_path / "weights.bin") is None
    assert gguf.find(tmp_path / "none.gguf") == tmp_path / "none.gguf"
    (tmp_path / "readme.md").touch()
    (tmp_path / "b.gguf").touch()
    assert gguf.find(tmp_path) == tmp_path / "b.gguf"
    (tmp_path / "a.gguf").touch()
    with pytest.raises(ValueError, match=r"which of a\.gguf, b\.gguf\?"):
        gguf.find(tmp_path)


RSS = '''
import json, pathlib, sys
import jax
import jax.numpy as jnp
from mtl_jax import models
from mtl_jax.io import gguf


def status(field):
    """Bytes resident: VmRSS now, VmHWM at most so far, without its parent's."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(s.split()[1]) for s in lines if s.startswith(field))


path, scan = sys.argv[1], sys.argv[2] == "scan"
file = gguf.GgufFile(path)
table = gguf.name_table(file)
options = table.options(file.metadata)
module = models.build(table.model, scan=scan, **options)
like = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
jnp.zeros(1).block_until_ready()
before = status("VmRSS")
params = gguf.load(file, like["params"])
grown = status("VmHWM") - before
sizes = [x.nbytes for x in jax.tree.leaves(params)]
print(json.dumps([grown, sum(sizes), max(sizes)]))
'''


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("scan", ["scan", "unrolled"])
def test_resident_memory_of_an_import(tmp_path, scan):
    """At most the mapped file, the tree and 1.3 of its largest leaf."""
    path = tmp_path / "x.gguf"
    write(path, "Q8_0", width=512, mlp=2048, vocab=16384, depth=6)
    done = subprocess.run(
        [sys.executable, "-c", RSS, str(path), scan],
        capture_output=True,
        text=True,
        check=True,
    )
    grown, tree, largest = json.loads(done.stdout.splitlines()[-1])
    bound = path.stat().st_size + tree + 1.3 * largest
    # The tree was seen. Small leaves may lie in pages that were resident before, and
    # the kernel counts pages of several threads a few MiB inexactly.
    assert grown >= 0.95 * tree and tree > 100 << 20
    assert grown <= bound, (grown >> 20, tree >> 20, largest >> 20)
