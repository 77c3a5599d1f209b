import pathlib

import pytest

from mtl_jax.checkpoints import recipe
from mtl_jax.checkpoints._schema import (
    Conditional,
    Model,
    TokenizerRequest,
    TokenSource,
)

pytestmark = pytest.mark.fast


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with some model folders."""
    for name in ("base", "a", "b", "lora"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def model(name):
    return Model(name, name)


HEAD = "merge_method: ties\nbase_model: base\n"
MODELS = "models: [{model: a}, {model: b}]\n"


def test_models(here):
    text = HEAD + (
        "models:\n"
        "  - model: a\n    parameters: {weight: 0.5, density: [0, 1.0]}\n"
        "  - model: base\n"
        "parameters: {normalize: true, lambda: 1e-1}\n"
        "dtype: bfloat16\nout_dtype: torch.float32\n"
    )
    found = recipe.parse_recipe(text, name="r.yaml")
    assert (found.method, found.base) == ("ties", model("base"))
    (module,) = found.modules
    assert [entry.model for entry in module.models] == [model("a"), model("base")]
    assert module.models[0].parameters == {"weight": 0.5, "density": (0, 1.0)}
    assert found.parameters == {"normalize": True, "lambda": 0.1}
    assert (found.dtype, found.out_dtype) == ("bfloat16", "float32")
    assert found.models() == (model("base"), model("a")) and found.text == text


def test_slices(here):
    text = (
        "merge_method: slerp\nslices:\n- sources:\n"
        "  - {model: a, layer_range: [0, 4], parameters: {scale: 2}}\n"
        "  - {model: b, layer_range: [4, 8]}\n"
        "  base_model: a\n  residual_weight: 0.5\n"
        "  parameters: {t: [{filter: mlp, value: [0, 0.5]}, {value: 1}]}\n"
    )
    found = recipe.parse_recipe(text)
    (part,) = found.modules[0].slices
    assert [source.layers for source in part.sources] == [(0, 4), (4, 8)]
    assert part.sources[0].parameters == {"scale": 2} and part.base == model("a")
    wanted = (Conditional("mlp", (0, 0.5)), Conditional(None, 1))
    assert part.parameters == {"t": wanted}
    assert found.models() == (model("a"), model("b"))
    assert "residual_weight has no effect" in found.notes[0]


def test_modules(here):
    text = HEAD + (
        "modules:\n  decoder:\n    models: [{model: a}]\n"
        "    parameters: {weight: 1}\n"
        "  encoder:\n    slices:\n    - sources: [{model: b, layer_range: [0, 1]}]\n"
    )
    decoder, encoder = recipe.parse_recipe(text).modules
    assert (decoder.name, decoder.parameters) == ("decoder", {"weight": 1})
    assert encoder.slices[0].sources[0].model == model("b")


def test_a_single_conditional_is_one_of_a_list(here):
    text = HEAD + MODELS + "parameters: {weight: {filter: mlp, value: 2}}"
    found = recipe.parse_recipe(text)
    assert found.parameters == {"weight": (Conditional("mlp", 2),)}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("tokenizer_source: union", TokenizerRequest("union")),
        ("tokenizer_source: base", TokenizerRequest("base")),
        ("tokenizer_source: a", TokenizerRequest(model("a"))),
        ("tokenizer: {pad_to_multiple_of: 8}", TokenizerRequest("union", {}, 8)),
        (
            "tokenizer: {source: base, tokens: {x: {source: a, force: true}, "
            "y: {source: {kind: zero}}, z: {force: true}, "
            "u: {source: {kind: model_token, model: b, token: v}}, "
            "w: {source: {kind: model_token, model: b, token_id: 3}}}}",
            TokenizerRequest(
                "base",
                {
                    "x": TokenSource("model", True, model("a")),
                    "y": TokenSource("zero"),
                    "z": TokenSource("default", True),
                    "u": TokenSource("model_token", False, model("b"), "v"),
                    "w": TokenSource("model_token", False, model("b"), None, 3),
                },
            ),
        ),
    ],
)
def test_tokenizers(here, text, wanted):
    assert recipe.parse_recipe(HEAD + MODELS + text).tokenizer == wanted


def test_chat_template(here):
    found = recipe.parse_recipe(HEAD + MODELS + "chat_template: auto")
    assert found.chat_template == "auto"


def test_short_form(here):
    text = "method: ties\nbase: base\nmodels: [a, b]\noptions: {weight: [1, 2], x: 3}"
    found = recipe.parse_recipe(text)
    assert found.base == model("base") and found.parameters == {"x": 3}
    assert [e.parameters for e in found.modules[0].models] == [
        {"weight": 1},
        {"weight": 2},
    ]
    with pytest.raises(ValueError, match="one value per model, 2; found 3"):
        recipe.parse_recipe(text.replace("[1, 2]", "[1, 2, 3]"))


def test_paths(here, monkeypatch):
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    (here / "elsewhere" / "a").mkdir()
    text = "merge_method: linear\nmodels: [{model: a}, {model: b}, {model: b+lora}]"
    (here / "r.yaml").write_text(text)
    found = recipe.load_recipe(here / "r.yaml")
    # The working directory first, then the folder of the recipe.
    paths = [entry.model.path for entry in found.modules[0].models]
    assert paths == ["a", str(here / "b"), f"{here / 'b'}+{here / 'lora'}"]
    assert str(found.modules[0].models[2].model) == "b+lora"


def test_structured_models_are_the_same(here):
    text = (
        "merge_method: linear\nmodels:\n- model: {model: {path: a}, lora: lora}\n"
        "- model: a+lora"
    )
    with pytest.raises(ValueError, match=r"line 4: models\[1\]: a\+lora.*twice"):
        recipe.parse_recipe(text)


def test_a_plus_in_a_name(here):
    (here / "a+b").mkdir()
    found = recipe.parse_recipe("merge_method: linear\nmodels: ['a+b', 'a+lora']")
    assert [e.model.path for e in found.modules[0].models] == ["a+b", "a+lora"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + MODELS + "dtyp: x", r"line 4: dtyp: unknown key.*'dtype'\?"),
        (HEAD, "exactly one of models, slices and modules; found none"),
        (HEAD + MODELS + "slices: []", "found models, slices"),
        (HEAD + "models: []", "a list that is not empty"),
        (HEAD + "models: [{modle: a}]", r"models\[0\]\.modle: unknown key"),
        (HEAD + "models: [{parameters: {}}]", r"models\[0\]: wants model"),
        (HEAD + "models: [{model: org/name}]", "only local folders.*hf download org/n"),
        (HEAD + "models: [{model: ./c}]", r"no such folder or file: \./c"),
        (HEAD + "models: [{model: a+c}]", "no such folder or file: c"),
        (HEAD + "models: [{model: a+lora+lora}]", r"wants MODEL or MODEL\+ADAPTER"),
        (MODELS, "wants merge_method"),
        (HEAD + MODELS + "method: ties", "merge_method and method say the same"),
        (HEAD + MODELS + "dtype: int64", "unknown type 'int64'"),
        (HEAD + MODELS + "dtype: float8", r"did you mean 'float(16|32)'"),
        (
            HEAD + MODELS + "tokenizer_source: base\ntokenizer: {}",
            "tokenizer_source is given as well",
        ),
        (
            HEAD + MODELS + "tokenizer: {tokens: {x: {source: {kind: model_token}}}}",
            "wants {kind: zero} or",
        ),
        (HEAD + MODELS + "parameters: {w: []}", "a list that is not empty"),
        (HEAD + MODELS + "parameters: {w: [1, {value: 2}]}", "wants a number"),
        (HEAD + MODELS + "parameters: {w: [{filter: x}]}", "wants value"),
        (HEAD + MODELS + "parameters: {w: 1}\noptions: {w: 2}", "parameters give w"),
        (
            "merge_method: slerp\nslices:\n"
            "- sources: [{model: a, layer_range: [2, 2]}]",
            "first < end",
        ),
        (
            "merge_method: slerp\nslices: [{sources: [{model: a, layer_range: [0, 2]},"
            "{model: b, layer_range: [0, 3]}]}]",
            "equally many layers; found 2 and 3",
        ),
        (
            "merge_method: slerp\nslices: [{sources: [{model: a, layer_range: [0, 2]},"
            "{model: a, layer_range: [0, 2]}]}]",
            "a is a source of this slice already",
        ),
        (
            HEAD + "modules: {x: {models: [a], slices: []}}",
            "modules.x: wants exactly one",
        ),
    ],
)
def test_what_cannot_be_meant(here, text, message):
    with pytest.raises(ValueError, match=message) as error:
        recipe.parse_recipe(text, name="r.yaml")
    assert str(error.value).startswith("r.yaml, line ")


def test_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such recipe"):
        recipe.load_recipe(tmp_path / "r.yaml")
    pathlib.Path(tmp_path / "r.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="not a text file"):
        recipe.load_recipe(tmp_path / "r.yaml")
