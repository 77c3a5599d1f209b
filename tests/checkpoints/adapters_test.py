import json
import math

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest

from mtl_jax.checkpoints.source import TensorSpec, open_source
from mtl_jax.io import safetensors

PREFIX = "base_model.model."
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none"}
RNG = np.random.default_rng(0)
BASE = {
    "model.layers.0.q.weight": RNG.normal(size=(5, 4)).astype(np.float32),
    "model.layers.1.q.weight": RNG.normal(size=(5, 4)).astype(np.float32),
    "model.norm.weight": RNG.normal(size=4).astype(np.float32),
    "model.embed.weight": RNG.normal(size=(9, 4)).astype(np.float32),
    "conv.weight": RNG.normal(size=(3, 2, 2, 2)).astype(np.float32),
    "half.weight": RNG.normal(size=(5, 4)).astype(ml_dtypes.bfloat16),
    "count.weight": np.ones((5, 4), np.int32),
}


def factors(module, rank=2, outer=5, inner=(4,), seed=0):
    rng = np.random.default_rng(seed)
    ones = (1,) * (len(inner) - 1)
    return {
        f"{PREFIX}{module}.lora_A.weight": rng.normal(size=(rank, *inner)),
        f"{PREFIX}{module}.lora_B.weight": rng.normal(size=(outer, rank, *ones)),
    }


def product(tensors, module):
    """In float64, [out, ...in]."""
    a = tensors[f"{PREFIX}{module}.lora_A.weight"].astype(np.float32)
    b = tensors[f"{PREFIX}{module}.lora_B.weight"].astype(np.float32)
    return np.einsum("or,r...->o...", b.reshape(b.shape[:2]).astype(float), a)


@pytest.fixture
def opened(tmp_path):
    """Writes base and adapter, and opens their sum."""

    def build(tensors, config=None, base=None, name="adapter_model.safetensors"):
        for folder in ("base", "adapter"):
            (tmp_path / folder).mkdir(exist_ok=True)
        path = tmp_path / "base/model.safetensors"
        safetensors.save(path, BASE if base is None else base)
        saved = {
            n: t.astype(np.float32) if t.dtype == np.float64 else t
            for n, t in tensors.items()
        }
        safetensors.save(tmp_path / "adapter" / name, saved)
        text = json.dumps({**CONFIG, **(config or {})})
        (tmp_path / "adapter/adapter_config.json").write_text(text)
        return open_source(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")

    return build


Q = "model.layers.1.q"


def near(got, wanted):
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_only_what_the_adapter_names_changes(opened):
    tensors = factors(Q)
    source = opened(tensors)
    assert list(source) == list(source.stored) and set(source) == set(BASE)
    for name, value in BASE.items():
        if name != f"{Q}.weight":
            np.testing.assert_array_equal(source[name].whole(), value)
    near(source[f"{Q}.weight"].whole(), BASE[f"{Q}.weight"] + 3 * product(tensors, Q))


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 6 / 2),
        ({"use_rslora": True}, 6 / math.sqrt(2)),
        ({"alpha_pattern": {"1.q": 5}}, 5 / 2),
        ({"alpha_pattern": {"0.q": 5, "layers.*q": 7}}, 7 / 2),
        ({"alpha_pattern": {"q": 5}, "use_rslora": True}, 5 / math.sqrt(2)),
        ({"alpha_pattern": {"layers.1": 5}}, 6 / 2),  # Not the end of the name.
        ({"r": 8, "rank_pattern": {"layers.1.q": 2}}, 6 / 2),
    ],
)
def test_scales(opened, config, scale):
    tensors = factors(Q)
    got = opened(tensors, config)[f"{Q}.weight"].whole()
    near(got, BASE[f"{Q}.weight"] + scale * product(tensors, Q))


def test_weights_that_are_stored_transposed(opened):
    tensors = factors(Q, outer=4, inner=(5,))
    got = opened(tensors, {"fan_in_fan_out": True})[f"{Q}.weight"].whole()
    near(got, BASE[f"{Q}.weight"] + 3 * product(tensors, Q).T)
    with pytest.raises(ValueError, match=r"is \(4, 5\), but .* is \(5, 4\) \(fan_in"):
        opened(tensors)


def test_embeddings_and_convolutions(opened):
    a, b = RNG.normal(size=(2, 9)), RNG.normal(size=(4, 2))
    embed = f"{PREFIX}model.embed.lora_embedding_"
    tensors = {f"{embed}A": a, f"{embed}B": b}
    tensors |= factors("conv", outer=3, inner=(2, 2, 2))
    source = opened(tensors)
    wanted = BASE["model.embed.weight"] + 3 * (b @ a).T
    near(source["model.embed.weight"].whole(), wanted)
    wanted = BASE["conv.weight"] + 3 * product(tensors, "conv")
    near(source["conv.weight"].whole(), wanted)


def test_the_sum_is_float32_over_a_narrower_base(opened):
    tensors = factors("half")
    source = opened(tensors)
    assert source.specs["half.weight"] == TensorSpec((5, 4), np.dtype(np.float32))
    assert source.stored["half.weight"].dtype == ml_dtypes.bfloat16
    wanted = BASE["half.weight"].astype(float) + 3 * product(tensors, "half")
    near(source["half.weight"].whole(), wanted)
    with pytest.raises(ValueError, match=r"'count\.weight' is int32 in the base"):
        opened(factors("count"))


@hypothesis.given(st.integers(1, 40), st.integers(1, 30), st.booleans(), st.data())
@hypothesis.settings(max_examples=25)
def test_slices_are_those_of_the_whole(rows, columns, flip, data):
    from mtl_jax.checkpoints import adapters
    from mtl_jax.checkpoints.source import ArrayView

    rng = np.random.default_rng(rows * 31 + columns)
    outer, inner = (columns, rows) if flip else (rows, columns)
    parts = [(rows, columns), (3, inner), (outer, 3)]
    base, a, b = (ArrayView(rng.normal(size=s).astype(np.float32)) for s in parts)
    view = adapters.AddedView(base, a, b, 0.5, flip)
    start = data.draw(st.integers(0, view.spec.size))
    stop = data.draw(st.integers(start, view.spec.size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapters, "_BLOCK", 50)
        whole = view.whole()
        got = view.flat(start, stop)
    np.testing.assert_array_equal(got, whole.reshape(-1)[start:stop])


def test_tensors_that_were_saved_whole(opened):
    norm, head = RNG.normal(size=4), RNG.normal(size=(2, 4))
    tensors = {
        **factors(Q),
        f"{PREFIX}model.norm.weight": norm,
        f"{PREFIX}score.weight": head,
    }
    source = opened(tensors, {"modules_to_save": ["score", "norm"]})
    near(source["model.norm.weight"].whole(), norm)
    near(source["score.weight"].whole(), head)
    with pytest.raises(
        ValueError, match=r"'score\.weight' is of no kind that is known"
    ):
        opened(tensors, {"modules_to_save": ["norm"]})
    tensors[f"{PREFIX}model.norm.weight"] = np.zeros(3)
    with pytest.raises(ValueError, match=r"norm\.weight' is \(3,\), \(4,\) in"):
        opened(tensors, {"modules_to_save": ["score", "norm"]})


@pytest.mark.parametrize("renamed", ["layers.1.q", "a.b.model.layers.1.q"])
def test_names_may_differ_by_one_prefix(opened, renamed):
    tensors = factors(renamed)
    got = opened(tensors)[f"{Q}.weight"].whole()
    near(got, BASE[f"{Q}.weight"] + 3 * product(tensors, renamed))


def test_an_adapter_of_another_base_is_refused(opened):
    with pytest.raises(ValueError, match=r"changes 'model\.layers\.7\.q\.weight', not"):
        opened({**factors(Q), **factors("model.layers.7.q")})
    with pytest.raises(ValueError, match=r"is \(6, 4\), but .*is \(5, 4\)"):
        opened(factors(Q, outer=6))
    base = {"x.k.weight": BASE[f"{Q}.weight"], "y.k.weight": BASE[f"{Q}.weight"]}
    with pytest.raises(ValueError, match="which could be in any of"):
        opened(factors("k"), base=base)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "DoRA is not supported"),
        ({"bias": "lora_only"}, "biases are not supported, found bias 'lora_only'"),
        ({"lora_bias": True}, "lora_bias = True is not supported"),
        ({"peft_type": "LOHA"}, "peft_type LORA .* found 'LOHA'"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"new_thing": 1}, "new_thing = 1 is not supported"),
        ({"r": 3}, "has rank 2, adapter_config.json says 3"),
        ({"lora_alpha": None}, "no lora_alpha"),
    ],
)
def test_other_kinds_are_refused_by_name(opened, config, message):
    with pytest.raises(ValueError, match=message):
        opened(factors(Q), config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{PREFIX}{Q}.lora_magnitude_vector": np.ones(5)}, "magnitude.*no kind"),
        ({f"{PREFIX}{Q}.lora_B.bias": np.ones(5)}, "lora_B.bias.*no kind"),
        ({"strange.weight": np.ones(5)}, "'strange.weight' is of no kind"),
        ({f"{PREFIX}model.norm.lora_A.weight": np.ones((2, 4))}, "only the factor A"),
        (
            {f"{PREFIX}{Q}.lora_B.weight": np.ones((5, 3))},
            r"factors \(2, 4\) and \(5, 3",
        ),
    ],
)
def test_other_tensors_are_refused_by_name(opened, change, message):
    with pytest.raises(ValueError, match=message):
        opened({**factors(Q), **change})


def test_an_adapter_alone_gives_its_factors(opened, tmp_path):
    tensors = factors(Q)
    opened(tensors)
    source = open_source(tmp_path / "adapter")
    assert set(source) == set(tensors) and source.config == CONFIG
    for name, value in tensors.items():
        near(source[name].whole(), value)
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
        open_source(tmp_path / "adapter")
    (tmp_path / "adapter/adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"adapter_model\.bin: pickled"):
        open_source(tmp_path / "adapter")


def test_fingerprint_is_of_base_and_adapter(opened, tmp_path):
    first = opened(factors(Q))
    base = open_source(tmp_path / "base")
    config = tmp_path / "adapter/adapter_config.json"
    config.write_text(json.dumps({**CONFIG, "lora_alpha": 7}))
    second = open_source(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
    assert len({first.fingerprint, second.fingerprint, base.fingerprint}) == 3


def test_a_layer_that_was_saved_with_its_factors(opened):
    tensors = factors(Q)
    base = np.float32(RNG.normal(size=(5, 4)))
    got = opened({**tensors, f"{PREFIX}{Q}.base_layer.weight": base})
    near(got[f"{Q}.weight"].whole(), base + 3 * product(tensors, Q))


def test_two_adapters_add_up(opened, tmp_path):
    tensors = factors(Q)
    opened(tensors)
    adapter = tmp_path / "adapter"
    source = open_source(f"{tmp_path / 'base'}+{adapter}+{adapter}")
    near(source[f"{Q}.weight"].whole(), BASE[f"{Q}.weight"] + 6 * product(tensors, Q))


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sum_is_that_of_the_peft_library(tmp_path, kind):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "llama":
        size = {"hidden_size": 8, "intermediate_size": 12, "vocab_size": 11}
        heads = {"num_hidden_layers": 2, "num_attention_heads": 2}
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(num_key_value_heads=1, **size, **heads)
        )
        config = peft.LoraConfig(
            r=2,
            lora_alpha=3,
            use_rslora=True,
            target_modules=["q_proj", "v_proj", "down_proj", "embed_tokens"],
            modules_to_save=["lm_head"],
            rank_pattern={"layers.1.self_attn.q_proj": 3},
            alpha_pattern={"v_proj": 5},
        )
        trained = {"q_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"}
    else:
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11)
        )
        config = peft.LoraConfig(
            r=2, lora_alpha=3, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True
        )
        trained = {"c_attn", "c_proj"}
    model.save_pretrained(tmp_path / "base")
    tuned = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, value in tuned.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                value.copy_(torch.randn_like(value))
    tuned.save_pretrained(tmp_path / "adapter")
    wanted = tuned.merge_and_unload().state_dict()
    source = open_source(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
    base, changed = open_source(tmp_path / "base"), set()
    for name, view in source.items():
        value = wanted[name].numpy()
        np.testing.assert_allclose(view.whole(), value, rtol=1e-5, atol=1e-5)
        if not np.array_equal(value, base[name].whole()):
            changed.add(name.split(".")[-2])
    assert changed == trained
