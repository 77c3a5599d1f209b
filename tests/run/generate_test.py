import io as std_io
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import cli, decoding, io, models
from mtl_jax.run import generate

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

CONFIG = {
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 12,
    "max_position_embeddings": 24,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": 257,
}
CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def byte_tokenizer():
    """Tokens 0 ... 255 are bytes, 256 and 257 special."""
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    out = tokenizers.Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
    )
    out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    out.decoder = decoders.ByteLevel()
    out.add_special_tokens(["<s>", "</s>"])
    return out


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    table = io.names.llama
    module = models.build(table.model, **table.options(CONFIG))
    like = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), like["params"]
    )
    # Only letters and the end are ever likely.
    names = byte_tokenizer().get_vocab()
    letters = [names[c] for c in "abcdefgh"]
    unlikely = np.setdiff1d(np.arange(260), letters)
    params["head"]["kernel"] = params["head"]["kernel"].at[:, unlikely].set(0)
    params["norm"]["scale"] = 30 * params["norm"]["scale"]
    io.save_pretrained(folder, params, table, config=CONFIG)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT}))
    return folder


def run(capsys, *arguments):
    code = cli.main(["generate", *map(str, arguments)])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out, captured.err


def test_text_is_that_of_generate(checkpoint, capsys, monkeypatch):
    command = (checkpoint, "--prompt", "abc", "--max-new-tokens", 10)
    out, err = run(capsys, *command)
    found = generate.open_checkpoint(str(checkpoint))
    assert found.ends == (257,) and found.chat is None
    model = decoding.from_decoder(found.module)
    ids = found.tokenizer.encode("abc").ids
    rows = decoding.generate(
        model, found.params, [ids], max_new_tokens=10, stop=257
    ).rows()
    assert out == found.tokenizer.decode(rows[0]) + "\n" and len(out) == 11
    assert re.fullmatch(
        r"3 \+ 10 tokens, the first after [\d.]+ s, then [\d.]+ tokens/s\n", err
    )

    monkeypatch.setattr("sys.stdin", std_io.StringIO("abc"))
    assert run(capsys, checkpoint, "--prompt", "-", *command[3:])[0] == out
    # It ends before a stop string, wherever tokens begin and end.
    stop = out[4:7]
    cut, _ = run(capsys, *command, "--stop", stop, "--stop", "zzz")
    assert cut == out[: out.index(stop)] + "\n"

    hot = (*command, "--temperature", 30, "--top-k", 200)
    first, second = (run(capsys, *hot, "--seed", s)[0] for s in (1, 2))
    assert first != second and run(capsys, *hot, "--seed", 1)[0] == first

    found_beams = decoding.beam_search(
        model, found.params, [ids], max_new_tokens=10, beams=3, stop=257
    )
    out, err = run(capsys, *command, "--beam", 3)
    assert out == found.tokenizer.decode(found_beams.rows()[0][0]) + "\n"
    assert "3 + 10 tokens in" in err


def test_a_message_is_put_into_the_chat_format(checkpoint, capsys, monkeypatch):
    seen = []

    monkeypatch.setattr(generate, "_stream", lambda model, ids, *rest: seen.append(ids))
    run(capsys, checkpoint, "--prompt", "ab", "--chat")
    run(capsys, checkpoint, "--prompt", "ab", "--chat", "--system", "c")
    decode = byte_tokenizer().decode
    assert [decode(ids) for ids in seen] == ["[user]ab", "[system]c[user]ab"]


def test_the_room_in_the_context_is_said(checkpoint, capsys, monkeypatch):
    rooms = []
    monkeypatch.setattr(
        generate, "_stream", lambda model, ids, new, *rest: rooms.append(new)
    )
    _, err = run(capsys, checkpoint, "--prompt", "a" * 20)
    assert rooms == [4] and err == "the context of 24 tokens has room for 4 more\n"


@pytest.fixture
def damaged(checkpoint, tmp_path):
    """(what) -> a folder with that fault; light files are copied, weights linked."""

    def make(what):
        folder = tmp_path / what
        folder.mkdir()
        for file in checkpoint.iterdir():
            (folder / file.name).symlink_to(file)
        config = {**CONFIG}
        if what == "tokenizer":
            (folder / "tokenizer.json").unlink()
        elif what == "vocabulary":
            config["vocab_size"] = 100
        elif what == "kind":
            config["model_type"] = "mamba"
        elif what == "template":
            (folder / "tokenizer_config.json").unlink()
            (folder / "tokenizer_config.json").write_text("{}")
        elif what == "ends":
            config["eos_token_id"] = "</s>"
        elif what == "weights":
            weights = (checkpoint / "model.safetensors").read_bytes()
            (folder / "model.safetensors").unlink()
            (folder / "model.safetensors").write_bytes(weights[:-1])
        elif what == "header":
            (folder / "model.safetensors").unlink()
            (folder / "model.safetensors").write_bytes((1 << 62).to_bytes(8, "little"))
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.mark.parametrize(
    ("what", "arguments", "message"),
    [
        (None, ["--prompt", ""], "the prompt is empty"),
        (None, ["--prompt", "a" * 24], "has 24 tokens, the context of the model is 24"),
        (None, ["--prompt", "a", "--temperature", "-1"], "temperature: must be"),
        (None, ["--prompt", "a", "--top-p", "0.5"], "--top-p needs a --temperature"),
        (None, ["--prompt", "a", "--beam", "2", "--temperature", "1"], "choose one"),
        (None, ["--prompt", "a", "--beam", "0"], "--beam must be 1 or more"),
        (None, ["--prompt", "a", "--max-new-tokens", "0"], "1 or more, is 0"),
        (None, ["--prompt", "a", "--system", "b"], "--system belongs to --chat"),
        (None, ["--prompt", "a", "--stop", ""], "non-empty strings"),
        ("tokenizer", ["--prompt", "a"], "has no tokenizer.json"),
        ("vocabulary", ["--prompt", "a"], "tokenizer has 258 tokens, the model 100"),
        ("kind", ["--prompt", "a"], "model_type 'mamba' is not supported"),
        ("template", ["--prompt", "a", "--chat"], "has no chat template"),
        ("ends", ["--prompt", "a"], "eos_token_id is '</s>'"),
        ("weights", ["--prompt", "a"], "model.safetensors: "),
        ("header", ["--prompt", "a"], "above the limit"),
    ],
)
def test_a_mistake_is_one_line(checkpoint, damaged, capsys, what, arguments, message):
    folder = checkpoint if what is None else damaged(what)
    assert cli.main(["generate", str(folder), *arguments]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert message in line and captured.out == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "no such file or folder: nowhere; .* smollm2-135m-instruct"),
        ("file.txt", "neither a folder nor a GGUF file"),
        ("bad.gguf", "bad.gguf"),
    ],
)
def test_a_checkpoint_that_is_none(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    for file in ("file.txt", "bad.gguf"):
        (tmp_path / file).write_text("nothing")
    with pytest.raises((ValueError, OSError), match=message):
        generate.open_checkpoint(name)


def gguf_folder(folder, **changes):
    """Writes one GGUF file, whose token 10 is the usual one that ends a turn."""
    metadata = {
        "general.architecture": "llama",
        "llama.context_length": 24,
        "llama.embedding_length": 8,
        "llama.block_count": 1,
        "llama.feed_forward_length": 12,
        "llama.attention.head_count": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["<s>", "</s>", *"abcdefg", "ab", "<|im_end|>"],
        "tokenizer.ggml.token_type": np.array([3, 3] + 8 * [1] + [3], np.int32),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": "{{ messages[0].content }}",
        **changes,
    }
    table = io.names.gguf_llama(metadata, tied=True)
    module = models.build(table.model, **table.options(metadata))
    ids = jnp.zeros((1, 1), jnp.int32)
    like = jax.eval_shape(module.init, jax.random.key(0), ids)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), like)
    for part in ("attention", "mlp"):  # A token is followed by the nearest to it.
        params["layers_0"][part]["out"]["kernel"][...] = 0
    params["norm"]["scale"][...] = 1
    word = params["embeddings"]["word"]["embedding"]
    word[10] = 5 * word[9]
    io.gguf.save(folder / "x.gguf", table.save(params), metadata)
    return folder


def test_an_answer_ends_with_its_turn(tmp_path, capsys):
    folder = gguf_folder(tmp_path)
    for chat, ends in ((False, (1,)), (True, (1, 10))):
        assert generate.open_checkpoint(str(folder), chat=chat).ends == ends
    command = (folder, "--prompt", "ab", "--max-new-tokens", 4)
    assert "1 + 4 tokens" in run(capsys, *command)[1]
    out, said = run(capsys, *command, "--chat")
    assert out == "\n" and "1 + 1 tokens" in said
    again = gguf_folder(tmp_path, **{"tokenizer.ggml.eot_token_id": 1})
    assert generate.open_checkpoint(str(again), chat=True).ends == (1,)


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_weights_of_half_the_size(checkpoint, tmp_path, capsys, kind):
    folder = checkpoint if kind == "folder" else gguf_folder(tmp_path)
    half = generate.open_checkpoint(str(folder), dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(half.params)} == {jnp.dtype("bfloat16")}
    command = (folder, "--prompt", "ab", "--max-new-tokens", 4)
    out, _ = run(capsys, *command, "--dtype", "bfloat16")
    model = decoding.from_decoder(half.module)
    rows = decoding.generate(
        model,
        half.params,
        [half.tokenizer.encode("ab").ids],
        max_new_tokens=4,
        stop=half.ends,
    ).rows()
    assert out == half.tokenizer.decode(rows[0]) + "\n"


def test_what_ends_a_text_and_a_turn_of_a_folder(checkpoint, damaged):
    """A null says nothing; the chat format's own end counts with --chat."""
    folder = damaged("turns")
    (folder / "tokenizer_config.json").unlink()
    settings = {"chat_template": CHAT, "eos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text('{"eos_token_id": null}')
    for chat, ends in ((False, (257,)), (True, (257, 256))):
        assert generate.open_checkpoint(str(folder), chat=chat).ends == ends
