"""Checks of arguments that losses and metrics of classification share."""

import chex
import jax.numpy as jnp


def check_labels(name: str, logits: chex.Array, labels: chex.Array) -> None:
    """Refuses labels that are not integers shaped like the logits without classes."""
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"{name}: wanted logits [..., C] and labels [...], found {logits.shape} "
            f"and {labels.shape}"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"{name}: labels must be integers, are {labels.dtype}")


def class_mask_like(
    name: str, logits: chex.Array, class_mask: chex.Array
) -> chex.Array:
    """The mask with as many axes as the logits, checked."""
    if class_mask.dtype != jnp.bool_ or class_mask.shape not in (
        logits.shape[-1:],
        logits.shape,
    ):
        raise ValueError(
            f"{name}: class_mask must be bool [C] or like the logits "
            f"{list(logits.shape)}, is {class_mask.dtype}{list(class_mask.shape)}"
        )
    leading = (1,) * (logits.ndim - class_mask.ndim)
    return class_mask.reshape(leading + class_mask.shape)
