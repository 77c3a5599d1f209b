"""CLIP image towers on the papers' vision sets, for runs on accelerators."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

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
    remat: bool = True,
) -> Encoder:
    """The image tower of CLIP; class embeddings of its text tower are the heads.

    Args:
      model: "clip-vit-b/32", "clip-vit-b/16" or "clip-vit-l/14".
      weights: checkpoint folder in the Hugging Face layout; "" gives abstract
        parameters, which is enough for a preflight.
      class_embeddings: safetensors file with one [C, D] array per task, named by
        task: its classes' prompts through the text tower, averaged per class.
      dtype: compute dtype; weights stay float32.
      scan: one compiled block for all layers.
      remat: recompute activations in the backward pass.

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
                "[C, D] array per task"
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
