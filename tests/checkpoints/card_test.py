import pytest
import yaml

from mtl_jax.checkpoints import _inputs, _plan, card, recipe

TEXT = """\
merge_method: ties  # Mine.
base_model: base
models:
- {model: a, parameters: {weight: [0, 1]}}
- b
parameters: {weight: 0.5, density: 0.25}
"""


@pytest.fixture
def shown(tmp_path, save_llama):
    for i, name in enumerate(("base", "a", "b")):
        save_llama(tmp_path / name, i)
    read = recipe.parse_recipe(TEXT, folder=tmp_path)
    plan = _plan.make_plan(read, _inputs.open_inputs(read))
    return card.model_card(plan, name="merged", seed=7, version="1.2"), plan


def test_front_matter_is_yaml(shown):
    _, front, _ = shown[0].split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": ["base", "a", "b"],
        "tags": ["merge", "mtl_jax"],
    }


def test_provenance(shown):
    text, plan = shown
    assert TEXT in text and "`ties` of mtl_jax 1.2" in text and "seed 7" in text
    for model, checkpoint in plan.inputs.checkpoints.items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {model} |")]
        assert checkpoint.source.fingerprint in row
        assert ("| base |" in row[3:]) == (str(model) == "base")
    assert "| density | 0.25, 0.25 |" in text
    assert "| weight | 0.0, 0.5 … 1.0, 0.5 (2 values) |" in text
