import json

import pytest

from mtl_jax.checkpoints import _folder, _inputs, _plan, recipe

LINEAR = "merge_method: linear\nmodels: [a, b]\nparameters: {weight: 1}\n"
CHAT = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": "v"},
]


@pytest.fixture
def files(tmp_path):
    """`files(text)`: what goes beside the tensors, as text or JSON."""

    def make(text=LINEAR):
        read = recipe.parse_recipe(text, name="r", folder=tmp_path)
        plan = _plan.make_plan(read, _inputs.open_inputs(read))
        out = {}
        for name, held in _folder.folder_files(plan).items():
            raw = held if isinstance(held, bytes) else held.read_bytes()
            out[name] = json.loads(raw) if name.endswith(".json") else raw.decode()
        return out

    return make


def test_those_of_the_first_model_are_carried(tmp_path, save_llama, files):
    save_llama(tmp_path / "a", 1)
    save_llama(tmp_path / "b", 2, attention_bias=True)
    (tmp_path / "a" / "generation_config.json").write_text('{"top_k": 3}')
    (tmp_path / "a" / "notes.txt").write_text("not carried")
    found = files(LINEAR + "dtype: float32")
    assert set(found) == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert found["config.json"] == config | {"torch_dtype": "float32"}


def test_the_newer_key_of_the_dtype(tmp_path, save_llama, files):
    for name in "ab":
        save_llama(tmp_path / name, 1, dtype_="x")
        path = tmp_path / name / "config.json"
        config = json.loads(path.read_text())
        config["dtype"] = config.pop("torch_dtype")
        path.write_text(json.dumps(config))
    found = files(LINEAR + "out_dtype: float16")["config.json"]
    assert found["dtype"] == "float16" and "torch_dtype" not in found


def test_special_tokens_keep_their_meaning(tmp_path, save_llama, files, save_tokenizer):
    tokens = {"a": 0, "<s>": 1, "</s>": 2}
    for name in "ab":
        save_llama(tmp_path / name, 1, rows=3, tokens=tokens, eos_token_id=[2, 1])
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": 2}')
    save_tokenizer(tmp_path / "t", {"</s>": 0, "<s>": 1, "a": 2, "b": 3})
    found = files(LINEAR + "tokenizer_source: t")
    assert found["config.json"]["eos_token_id"] == [0, 1]
    assert found["config.json"]["vocab_size"] == 4
    assert found["generation_config.json"] == {"eos_token_id": 0}
    assert "b" in found["tokenizer.json"]["model"]["vocab"]


def test_an_untied_head_is_told(tmp_path, save_llama, files):
    save_llama(tmp_path / "a", 1, drop=("lm_head.weight",), tie_word_embeddings=True)
    save_llama(tmp_path / "b", 2)
    assert files()["config.json"]["tie_word_embeddings"] is False


@pytest.fixture
def two(tmp_path, save_llama, save_tokenizer):
    for name, template in (("a", None), ("b", "{{ 1 }}")):
        save_llama(tmp_path / name, 1)
        tokens = json.loads((tmp_path / name / "tokenizer.json").read_text())
        ids = tokens["model"]["vocab"] | {
            t["content"]: t["id"] for t in tokens["added_tokens"]
        }
        more = {"chat_template": template} if template else {}
        save_tokenizer(tmp_path / name, ids, **more)


@pytest.mark.parametrize(
    ("template", "wanted"),
    [("auto", "{{ 1 }}"), ("'{{ messages }}'", "{{ messages }}")],
)
def test_chat_templates(two, files, template, wanted):
    found = files(LINEAR + f"chat_template: {template}")
    assert found["chat_template.jinja"] == wanted
    assert found["tokenizer_config.json"]["chat_template"] == wanted


WANTED = {
    "chatml": "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n"
    "<|im_start|>assistant\nv<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\ns<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nu<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nv<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "alpaca": "s\n\n### Instruction:\nu\n\n### Response:\nv\n\n### Response:\n",
}


@pytest.mark.parametrize("name", WANTED)
def test_named_templates(two, files, name):
    jinja = pytest.importorskip("jinja2")
    template = files(LINEAR + f"chat_template: {name}")["chat_template.jinja"]
    shown = jinja.Environment(autoescape=False).from_string(template)
    found = shown.render(messages=CHAT, add_generation_prompt=True, bos_token="<s>")
    assert found == WANTED[name]


def test_unknown_templates(two, files, tmp_path):
    with pytest.raises(ValueError, match=r"unknown chat_template 'chatm'.*'chatml'"):
        files(LINEAR + "chat_template: chatm")
    (tmp_path / "a" / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="no tokenizer to hold it"):
        files(LINEAR + "chat_template: chatml")
