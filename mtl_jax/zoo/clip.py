"""CLIP image towers on the papers' vision sets, for runs on accelerators."""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mtl_jax import data, io, models
from mtl_jax.models import heads
from mtl_jax.models.backbones import vit
from mtl_jax.zoo.encoders import Encoder

# Of the pixels CLIP was trained on, in [0, 1]; published with its weights.
_STATS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def clip(
    *,
    model: str = "clip-vit-b/32",
    weights: str = "",
    class_embeddings: str = "",
    dtype: str = "bfloat16",
    scan: bool = True,
    remat: bool | str = True,
) -> Encoder:
    """The image tower of CLIP; class embeddings of its text tower are the heads.

    Args:
      model: "clip-vit-b/32", "clip-vit-b/16" or "clip-vit-l/14".
      weights: checkpoint folder in the Hugging Face layout; "" gives abstract
        parameters, which is enough for a preflight.
      class_embeddings: safetensors file with one [C, D] array per task, named by
        task, such as `text_heads` makes.
      dtype: compute dtype; weights stay float32.
      scan: one compiled block for all layers.
      remat: of the blocks; see `layers.rematerialised`.

    Raises:
      ValueError: for an unknown model, or weights that do not fit it.
    """
    module = models.build(model, dtype=dtype, scan=scan, remat=remat)

    def init(key):
        shape = (1, module.image_size, module.image_size, 3)
        return module.init(key, jnp.zeros(shape))["params"]

    def features(params, batch):
        out = jnp.asarray(module.apply({"params": params}, batch["image"]))
        return out.astype(jnp.float32)

    found = io.load_tree(class_embeddings)[0] if class_embeddings else {}

    def prototypes(task, rows):
        del rows
        if not class_embeddings:
            raise ValueError(
                f"clip: the head of {task.name!r} needs class embeddings; set "
                "suite.options.base.class_embeddings to a safetensors file with one "
                "[C, D] array per task, such as zoo.text_heads makes"
            )
        if task.name not in found:
            raise ValueError(
                f"clip: {class_embeddings} has no array {task.name!r}, only "
                f"{', '.join(sorted(found))}"
            )
        return heads.l2_normalize(found[task.name].astype(jnp.float32))

    params = jax.eval_shape(init, jax.random.key(0))
    if weights:
        params = io.load_pretrained(weights, io.names.clip_vision, like=params)
    return Encoder(
        name=f"{model}-{dtype}",
        params=params,
        features=features,
        prototypes=prototypes,
        frozen=(),
        rules=vit.SHARDING_RULES,
        image_size=module.image_size,
        image_stats=_STATS,
        head_source=io.digest(found) if found else "",
    )


def text_heads(
    weights: epath.PathLike, texts: Mapping[str, Sequence[Sequence[str]]]
) -> dict[str, jax.Array]:
    """Class embeddings from the text tower of CLIP, for `clip(class_embeddings=...)`.

    `io.save_tree(path, text_heads(folder, texts))` writes the file.

    Args:
      weights: checkpoint folder of the whole model, with `tokenizer.json`.
      texts: by task, C lists of T texts about a class each, such as
        `models.heads.fill_templates` makes.

    Returns:
      By task, [C, D] float32 with unit rows; see `models.zero_shot_head`.

    Raises:
      FileNotFoundError: if something is not there.
      ValueError: for a checkpoint of another kind, classes with different numbers of
        texts, or a text that does not fit.
    """
    table = io.names.clip_text
    module = models.build(
        table.model, **table.options(io.read_config(weights)), scan=True
    )
    tokenizer = io.load_tokenizer(weights)
    tokens = {
        task: _encode(module, tokenizer, task, classes)
        for task, classes in texts.items()
    }
    like = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    params = io.load_pretrained(weights, table, like["params"])

    @jax.jit
    def head(params, ids):
        encode = functools.partial(module.apply, {"params": params})
        return heads.zero_shot_head(encode, ids)

    return {task: head(params, ids) for task, ids in tokens.items()}


def _encode(module, tokenizer, task, classes):
    """[C, T, L] int32, padded with zeros."""
    if not classes or {len(c) for c in classes} != {len(classes[0])} or not classes[0]:
        raise ValueError(
            f"text_heads: {task!r} has classes of {[len(c) for c in classes]} texts, "
            "wanted one number above 0"
        )
    shape = (len(classes), len(classes[0]), module.max_positions)
    out = np.zeros(shape, np.int32)
    for place in np.ndindex(shape[:2]):
        text = classes[place[0]][place[1]]
        ids = tokenizer.encode(text).ids
        if not 0 < len(ids) <= module.max_positions:
            raise ValueError(
                f"text_heads: {text!r} has {len(ids)} tokens, wanted 1 to "
                f"{module.max_positions}"
            )
        if module.end_token not in (None, *ids):
            raise ValueError(
                f"text_heads: the tokenizer gives {text!r} no end token "
                f"{module.end_token}"
            )
        out[place][: len(ids)] = ids
    return out


def require_weights(encoder: Encoder, names: Sequence[str]) -> None:
    """Refuses to run on abstract parameters, saying what to set.

    Raises:
      ValueError: the encoder has shapes instead of weights.
    """
    if isinstance(jax.tree.leaves(encoder.params)[0], jax.ShapeDtypeStruct):
        missing = [data.get(name).tfds_name for name in names]
        raise ValueError(
            "clip: this run needs pretrained weights; set suite.options.base.weights "
            "to a CLIP checkpoint folder, and prepare the TFDS sets "
            f"{', '.join(missing)}"
        )
