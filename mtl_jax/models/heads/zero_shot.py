"""Classification heads made of texts."""

from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp

from mtl_jax.models.heads.prototype import l2_normalize


def fill_templates(
    class_names: Sequence[str], templates: Sequence[str]
) -> list[list[str]]:
    """Every class name in every template.

    Args:
      class_names: C names.
      templates: T texts, each with one `{}` where the name goes.

    Returns:
      C lists of T texts.

    Raises:
      ValueError: without names or templates, or for a template without its place.

    >>> fill_templates(["cat", "dog"], ["a {}.", "no {}."])
    [['a cat.', 'no cat.'], ['a dog.', 'no dog.']]
    """
    if not class_names or not templates:
        raise ValueError(
            f"fill_templates: wanted names and templates, found {len(class_names)} "
            f"and {len(templates)}"
        )
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"fill_templates: wanted one {{}}, found {template!r}")
    return [[t.replace("{}", name) for t in templates] for name in class_names]


def zero_shot_head(
    apply_text: Callable[[chex.Array], chex.Array], tokens: chex.Array
) -> chex.Array:
    """One unit prototype per class: the mean direction of its texts.

      p_c = u(mean_t u(f(x_ct))),  u(y) = y / ||y||

    Classes are encoded one after the other, in one program.

    Args:
      apply_text: token numbers [T, L] to features [T, D] of any length.
      tokens: [C, T, L] integer: C classes, T templates.

    Returns:
      [C, D] float32 with unit rows, as `prototype_logits` takes them.

    Raises:
      ValueError: if the shapes are others.

    >>> head = zero_shot_head(lambda x: x.astype(float), jnp.array([[[2, 0], [0, 5]]]))
    >>> [round(float(x), 3) for x in head[0]]
    [0.707, 0.707]

    **Follows**: Radford et al. 2021, "Learning Transferable Visual Models From Natural
    Language Supervision", section 3.1.4.
    """
    if tokens.ndim != 3 or 0 in tokens.shape:
        raise ValueError(
            "zero_shot_head: wanted tokens [classes, templates, length], found "
            f"{tokens.shape}"
        )

    def one(texts):
        features = apply_text(texts)
        if features.ndim != 2 or features.shape[0] != texts.shape[0]:
            raise ValueError(
                f"zero_shot_head: apply_text makes {features.shape} of texts "
                f"{texts.shape}, wanted one vector each"
            )
        unit = l2_normalize(features.astype(jnp.float32))
        return l2_normalize(jnp.mean(unit, axis=0))

    return jax.lax.map(one, tokens)
