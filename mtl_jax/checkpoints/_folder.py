"""What a merged folder holds beside its tensors: config, tokenizer, chat template."""

import collections
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from mtl_jax.checkpoints import _yaml
from mtl_jax.checkpoints._plan import Plan

__all__ = ["folder_files"]

_CONFIG = "config.json"
_GENERATION = "generation_config.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"
# What templates of usual chat formats say, each in our words.
_TURN = "{% for message in messages %}"
_ASK = "{% if add_generation_prompt %}"
_TEMPLATES = {
    "chatml": _TURN
    + "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
    + "{{ '<|im_end|>\\n' }}{% endfor %}"
    + _ASK
    + "{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "llama3": "{{ bos_token }}"
    + _TURN
    + "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    + "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    + _ASK
    + "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    "alpaca": _TURN
    + "{% if message['role'] == 'user' %}{{ '### Instruction:\\n' }}"
    + "{% elif message['role'] == 'assistant' %}{{ '### Response:\\n' }}{% endif %}"
    + "{{ message['content'] + '\\n\\n' }}{% endfor %}"
    + _ASK
    + "{{ '### Response:\\n' }}{% endif %}",
}


def folder_files(plan: Plan) -> dict[str, bytes | pathlib.Path]:
    """Files that belong beside the tensors: name -> content, or the file to copy.

    Raises:
      ValueError: for a chat template that is not known, or no tokenizer to hold it.
    """
    donor, vocabulary = plan.inputs.donor, plan.inputs.vocabulary
    files: dict[str, Any] = dict(donor.source.side_files)
    if vocabulary is not None:
        for name in [n for n in files if _is_tokenizer(n)]:
            del files[name]
        files |= vocabulary.files
    if plan.config is not None:
        files[_CONFIG] = _dump(_config(plan))
    if vocabulary is not None and _GENERATION in files:
        inner = json.loads(files[_GENERATION].read_text(encoding="utf-8"))
        files[_GENERATION] = _dump(_move_ids(inner, plan))
    if plan.recipe.chat_template:
        template = _template(plan)
        if template is not None:
            files |= _with_template(files, template)
    return files


def _is_tokenizer(name: str) -> bool:
    known = ("tokenizer", "vocab.", "merges.", "added_tokens", "special_tokens_map")
    return name.startswith((*known, "spiece", "sentencepiece", "chat_template"))


def _dump(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def _config(plan: Plan) -> dict[str, Any]:
    config = dict(plan.config or {})
    weights = collections.Counter()
    for spec in plan.specs.values():
        weights[spec.dtype.name] += spec.nbytes
    floats = [name for name, _ in weights.most_common() if "float" in name]
    if floats:
        config["dtype" if "dtype" in config else "torch_dtype"] = floats[0]
    if plan.inputs.untied:
        config["tie_word_embeddings"] = False
    vocabulary = plan.inputs.vocabulary
    if vocabulary is not None:
        config = _move_ids(config, plan)
        for node in (config, config.get("text_config")):
            if isinstance(node, dict) and "vocab_size" in node:
                node["vocab_size"] = vocabulary.rows
    return config


def _move_ids(config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Ids of special tokens, as the output's tokenizer has them."""
    vocabulary = plan.inputs.vocabulary
    new = vocabulary.ids if vocabulary else {}
    tokens = {i: token for token, i in plan.inputs.donor_ids.items()}

    def move(value: Any) -> Any:
        if isinstance(value, list):
            return [move(item) for item in value]
        if isinstance(value, int) and not isinstance(value, bool):
            return new.get(tokens.get(value, ""), value)
        return value

    out = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            value = _move_ids(value, plan)
        elif key.endswith("_token_id"):
            value = move(value)
        out[key] = value
    return out


def _template(plan: Plan) -> str | None:
    """The chat template that a recipe asks for; None if `auto` finds none."""
    wanted = plan.recipe.chat_template or ""
    if wanted == "auto":
        found = collections.Counter()
        for checkpoint in plan.inputs.checkpoints.values():
            template = _own_template(checkpoint.source.side_files)
            if template:
                found[template.strip()] += 1
        return found.most_common(1)[0][0] if found else None
    if wanted in _TEMPLATES:
        return _TEMPLATES[wanted]
    if "{" not in wanted:
        raise ValueError(
            f"{plan.recipe.name}: unknown chat_template {wanted!r}; it may be a Jinja "
            f"template, or {_yaml.nearest(wanted, (*_TEMPLATES, 'auto'))}"
        )
    return wanted


def _own_template(side_files: Mapping[str, pathlib.Path]) -> str | None:
    from mtl_jax.io import chat

    if _TOKENIZER_CONFIG not in side_files:
        return None
    try:
        return chat.read_chat_format(side_files[_TOKENIZER_CONFIG].parent).template
    except ValueError:
        return None  # A tokenizer without a template.


def _with_template(files: Mapping[str, Any], template: str) -> dict[str, bytes]:
    if _TOKENIZER_CONFIG not in files:
        raise ValueError("chat_template: there is no tokenizer to hold it")
    held = files[_TOKENIZER_CONFIG]
    text = held if isinstance(held, bytes) else held.read_bytes()
    config = json.loads(text)
    config["chat_template"] = template
    return {_TOKENIZER_CONFIG: _dump(config), _TEMPLATE: template.encode()}
