"""Losses on task saliencies, the gradients of task losses by a shared representation.

Saliencies are [T, B, ..., C]: tasks, examples, any positions, channels last.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from mtl_jax import tree

HeadsFn = Callable[[Any, chex.Array], chex.Array]

_DETACH = ("none", "heads", "all")
_LOG = 1e-8


def task_saliency(
    heads_fn: HeadsFn, head_params: Any, features: chex.Array
) -> tuple[chex.Array, chex.Array]:
    r"""Gradient of every task's loss by the shared features, `S_t = B dL_t / dZ`.

    The losses being means over the batch, the factor B makes a row what the example
    itself contributes. Differentiable: second derivatives flow through it.

    Args:
      heads_fn: `heads_fn(head_params, features) -> losses [T]`, means over examples.
      head_params: tree.
      features: Z, [B, ..., C] floating point.

    Returns:
      losses [T] float32 and S [T, B, ..., C] in the features' dtype, by T backward
      passes through the heads.

    Raises:
      ValueError: losses that are not [T], or features without a batch.

    **Follows**: Wang et al. 2025, "Rep-MTL: Unleashing the Power of Representation-
      level Task Saliency for Multi-Task Learning".

    >>> heads = lambda w, z: jnp.mean(z @ w, 0)
    >>> losses, saliency = task_saliency(heads, jnp.eye(2), jnp.ones((3, 2)))
    >>> losses.tolist(), saliency[:, 0].tolist()
    ([1.0, 1.0], [[1.0, 0.0], [0.0, 1.0]])
    """
    if features.ndim < 2:
        raise ValueError(
            f"task_saliency: features are {features.shape}, wanted [B, ..., C]"
        )
    losses, pullback = jax.vjp(lambda z: heads_fn(head_params, z), features)
    if losses.ndim != 1:
        raise ValueError(
            f"task_saliency: losses are {losses.shape}, wanted [T], one per task"
        )
    rows = jax.vmap(lambda e: pullback(e)[0])(jnp.eye(losses.size, dtype=losses.dtype))
    return _wide(losses), rows * features.shape[0]


def tsr_loss(saliency: chex.Array, *, epsilon: float = 1e-8) -> chex.Array:
    r"""Entropy of the tasks at every position: low where few tasks own it.

      s_t = |mean_c S_t|,   P_t = s_t / sum_k s_k,
      loss = mean over examples and positions of -sum_t P_t log P_t

    Args:
      saliency: [T, B, ..., C], floating point.
      epsilon: positions whose sum is at most this share of the largest count 0.

    Returns:
      float32 in [0, log T].

    Raises:
      ValueError: fewer than three axes.

    **Follows**: Wang et al. 2025, "Rep-MTL", task-specific saliency regulation.
    **Differs**: the published form adds a number to the sum, which lets the entropy
      pass log T and depend on the scale of the losses; here dead positions are left
      out.

    >>> round(float(tsr_loss(jnp.ones((2, 1, 3)))), 4)
    0.6931
    """
    _check("tsr_loss", saliency)
    sizes = jnp.abs(jnp.mean(_scaled(saliency), -1))
    total = jnp.sum(sizes, 0, keepdims=True)
    alive = total > epsilon * jax.lax.stop_gradient(jnp.max(total))
    shares = jnp.where(alive, sizes / jnp.where(alive, total, 1), 0)
    logs = jnp.log(jnp.where(shares > 0, shares, 1))
    return jnp.mean(-jnp.sum(shares * logs, 0))


def csa_loss(saliency: chex.Array, *, temperature: float = 0.1) -> chex.Array:
    r"""Contrast that aligns all tasks' channel structure within an example.

    With S_tb the [C, N] saliency of a task in one example, A_b [C, T] its means over
    positions, and the cosine of matrices `cos(X, Y) = <X, Y> / |X| |Y|`,

      p_tb = cos(A_b A_b^T, S_tb S_tb^T),   n_bk = cos(A_b A_b^T, A_k A_k^T)
      loss = mean_b mean_t -log( exp(p_tb / tau) / sum_{k != b} exp(n_bk / tau) )

    Cosines are those of Gramians, `<X X^T, Y Y^T> = |X^T Y|^2`: no [C, C] matrix is
    formed but where C is smaller than N.

    Args:
      saliency: [T, B, ..., C], floating point; B of 2 or more. [T, B, C] is one
        position.
      temperature: tau, positive.

    Returns:
      float32, at least `log(B - 1) - 1 / tau`; it may be negative, the positive pair
      being no part of the denominator.

    Raises:
      ValueError: fewer than three axes, one example (nothing to contrast with), or a
        temperature that is not positive.

    **Follows**: Wang et al. 2025, "Rep-MTL", cross-task saliency alignment.
    **Differs**: averages over tasks, which the printed sum leaves open; an example or
      task without saliency has cosine 0 with everything.

    >>> float(csa_loss(jnp.ones((2, 2, 3)), temperature=1.0))
    0.0
    """
    _check("csa_loss", saliency)
    if saliency.shape[1] < 2:
        raise ValueError(
            "csa_loss: one example in the batch, wanted 2 or more to contrast"
        )
    if not temperature > 0:
        raise ValueError(f"csa_loss: temperature is {temperature}, wanted it positive")
    tasks, batch, channels = *saliency.shape[:2], saliency.shape[-1]
    s = saliency.reshape(tasks, batch, -1, channels)
    # Cosines do not see a factor of one task in one example; float32 does.
    anchors = _scaled(jnp.mean(_wide(s), 2), (0, 2))
    s = _scaled(s, (2, 3))
    if s.shape[2] < channels:
        own = _product("tbnc,tbmc->tbnm", s, s)
    else:
        own = _product("tbnc,tbnd->tbcd", s, s)
    own_norms = _length(own, (2, 3))
    anchor_norms = _length(_product("tbc,ubc->btu", anchors, anchors), (1, 2))
    between = _product("ubc,tbnc->tbun", anchors, s)
    positives = _ratio(jnp.sum(between**2, (2, 3)), own_norms * anchor_norms[None])
    across = jnp.sum(_product("tbc,ukc->bktu", anchors, anchors) ** 2, (2, 3))
    negatives = _ratio(across, anchor_norms[:, None] * anchor_norms[None])
    others = jnp.where(jnp.eye(batch, dtype=bool), -jnp.inf, negatives / temperature)
    return jnp.mean(jax.nn.logsumexp(others, 1)) - jnp.mean(positives) / temperature


def rep_mtl_loss(
    heads_fn: HeadsFn,
    head_params: Any,
    features: chex.Array,
    *,
    tsr: float = 0.9,
    csa: float = 0.9,
    temperature: float = 0.1,
    log: bool = True,
    detach: str = "none",
    remat: bool = False,
) -> tuple[chex.Array, dict[str, chex.Array]]:
    r"""Sum of task losses with both regularisers of their saliencies.

      loss = sum_t l_t + tsr * tsr_loss(S) + csa * csa_loss(S),   l = log(L + 1e-8)

    where S are the saliencies of l. To be differentiated in the head parameters and,
    through the features, in the encoder's: that takes second derivatives of the heads.

    Args:
      heads_fn: `heads_fn(head_params, features) -> losses [T]`, means over examples.
      head_params: tree.
      features: [B, ..., C], the encoder's output.
      tsr: weight of `tsr_loss`; 0 leaves it out altogether.
      csa: weight of `csa_loss`; 0 leaves it out altogether.
      temperature: of `csa_loss`.
      log: whether losses pass the logarithm; they must then be positive.
      detach: "none" is the method; "heads" keeps the regularisers from moving the
        heads, "all" makes them constants, for comparison.
      remat: whether to compute the heads again in the backward pass.

    Returns:
      loss float32, and `{"losses": [T], "tsr": scalar, "csa": scalar}` float32, the
      losses as `heads_fn` returned them; terms that are left out are absent.

    Raises:
      ValueError: an unknown `detach`, and as the parts do.

    **Follows**: Wang et al. 2025, "Rep-MTL: Unleashing the Power of Representation-
      level Task Saliency for Multi-Task Learning"; weights 0.9 are the centre of the
      published range 0.7 to 1.5.
    **Differs**: temperature 0.1 is ours, the text read gives none, and so is the number
      in the logarithm.

    >>> heads = lambda w, z: jnp.mean(jnp.square(z @ w), 0)
    >>> loss, parts = rep_mtl_loss(heads, jnp.eye(2), jnp.ones((3, 2)), csa=0.0)
    >>> sorted(parts), parts["losses"].tolist()
    (['losses', 'tsr'], [1.0, 1.0])
    """
    if detach not in _DETACH:
        raise ValueError(
            f"rep_mtl_loss: detach is {detach!r}, wanted one of {', '.join(_DETACH)}"
        )
    if remat:
        heads_fn = jax.checkpoint(heads_fn)

    def transformed(params, z):
        losses = _wide(heads_fn(params, z))
        return jnp.log(losses + _LOG) if log else losses

    losses = _wide(heads_fn(head_params, features))
    total = jnp.sum(jnp.log(losses + _LOG) if log else losses)
    parts = {"losses": losses}
    if not tsr and not csa:
        return total, parts
    held = head_params if detach == "none" else jax.lax.stop_gradient(head_params)
    _, saliency = task_saliency(transformed, held, features)
    if detach == "all":
        saliency = jax.lax.stop_gradient(saliency)
    if tsr:
        parts["tsr"] = tsr_loss(saliency)
        total = total + tsr * parts["tsr"]
    if csa:
        parts["csa"] = csa_loss(saliency, temperature=temperature)
        total = total + csa * parts["csa"]
    return total, parts


def _check(name: str, saliency: chex.Array) -> None:
    if saliency.ndim < 3 or not jnp.issubdtype(saliency.dtype, jnp.floating):
        raise ValueError(
            f"{name}: saliency is {saliency.dtype}{list(saliency.shape)}, "
            "wanted floating point [T, B, ..., C]"
        )


def _wide(x: chex.Array) -> chex.Array:
    return x.astype(tree.wide_dtype(x.dtype))


def _scaled(x: chex.Array, axes: tuple[int, ...] | None = None) -> chex.Array:
    """Divided by its largest size, a constant: for what does not see that factor."""
    x = _wide(x)
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axes, keepdims=True))
    return x / jnp.where(largest > 0, largest, 1)


def _product(subscripts: str, x: chex.Array, y: chex.Array) -> chex.Array:
    return jnp.einsum(subscripts, x, y, precision="highest")


def _length(x: chex.Array, axes: tuple[int, ...]) -> chex.Array:
    """Euclidean norm whose slope at 0 is 0."""
    square = jnp.sum(x * x, axes)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _ratio(x: chex.Array, y: chex.Array) -> chex.Array:
    return jnp.where(y > 0, x / jnp.where(y > 0, y, 1), 0)
