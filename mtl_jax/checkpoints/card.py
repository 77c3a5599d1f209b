"""The model card of a merge: what was made of what, and how to make it again."""

from mtl_jax.checkpoints._plan import Plan

__all__ = ["RECIPE_FILE", "model_card"]

RECIPE_FILE = "mtl_jax_recipe.yaml"


def model_card(plan: Plan, *, name: str, seed: int, version: str) -> str:
    """README.md of a merged folder, with the front matter that model hubs read.

    Args:
      plan: the merge.
      name: of the output.
      seed: of rules that draw.
      version: of this library.
    """
    rule, models = plan.recipe.method, plan.inputs.checkpoints
    base = plan.recipe.base
    rows = [
        f"| {_cell(str(model))} | {'base' if model == base else 'model'} | "
        f"`{checkpoint.source.fingerprint}` |"
        for model, checkpoint in models.items()
    ]
    options = _options(plan)
    lines = [
        "---",
        "base_model:",
        *(f"- {_quoted(str(model))}" for model in models),
        "tags:",
        "- merge",
        "- mtl_jax",
        "---",
        "",
        f"# {name}",
        "",
        f"A merge of {len(models)} checkpoints by the rule `{rule}` of mtl_jax "
        f"{version}.",
        "",
        "| checkpoint | part | fingerprint |",
        "|:---|:---|:---|",
        *rows,
        "",
        f"{len(plan.jobs)} tensors, seed {seed}. A fingerprint is a digest of names, "
        "types, shapes, sizes and times of change of a checkpoint's files.",
        "",
        *options,
        f"## Recipe (`{RECIPE_FILE}`)",
        "",
        "```yaml",
        plan.recipe.text.rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def _options(plan: Plan) -> list[str]:
    """Options of the rule, and the range of those that vary over tensors."""
    values: dict[str, dict[str, None]] = {}
    for job in plan.jobs:
        for name, value in job.options.items():
            shown = ", ".join(map(str, value)) if isinstance(value, tuple) else value
            values.setdefault(name, {})[str(shown)] = None
    if not values:
        return []
    out = ["| option | value |", "|:---|:---|"]
    for name, found in values.items():
        first, *rest = found
        more = f" … {list(found)[-1]} ({len(found)} values)" if rest else ""
        out.append(f"| {name} | {_cell(first + more)} |")
    return [*out, ""]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _quoted(text: str) -> str:
    plain = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{plain}"'
