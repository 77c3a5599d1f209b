"""Losses of language models: one value per token, never all logits at once."""

import functools

import chex
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec as P

from mtl_jax import placement, tree


def token_cross_entropy(
    hidden: chex.Array,
    kernel: chex.Array,
    labels: chex.Array,
    weights: chex.Array | None = None,
    *,
    chunk: int = 128,
    softcap: float | None = None,
) -> chex.Array:
    """`-w log softmax(hidden kernel)[label]` of every token.

    The logits of `chunk` positions exist at a time, [B, chunk, V] float32. Where only
    `hidden` is differentiated, as under a frozen head, its gradient is made beside the
    losses: [B, L, D] is kept, and the backward pass multiplies nothing by the kernel.
    Where the kernel is differentiated too, the backward pass makes the logits again.

    Args:
      hidden: [B, L, D], what the head takes (`head=False` of `models.Decoder`).
      kernel: [D, V]; of a tied head the transposed word embedding.
      labels: [B, L] integer; not read where the weight is 0.
      weights: [B, L] real, or None for ones.
      chunk: positions at a time.
      softcap: c, logits become `c tanh(logits / c)`; None = as they are.

    Returns:
      [B, L] float32. A label outside [0, V) costs +inf: it is an error in the data
      and must not pass unseen.

    Raises:
      ValueError: if shapes or dtypes do not fit.

    >>> token_cross_entropy(jnp.zeros((1, 2, 3)), jnp.zeros((3, 4)),
    ...                     jnp.array([[1, 2]]), jnp.array([[1.0, 0.0]])).round(4)
    Array([[1.3863, 0.    ]], dtype=float32)
    """
    _check(hidden, kernel, labels, weights)
    if chunk < 1:
        raise ValueError(f"token_cross_entropy: chunk must be 1 or more, is {chunk}")
    batch, length = labels.shape
    chunk = min(chunk, length) or 1
    chunks = -(-length // chunk)
    parts = placement.parts(batch)
    split = parts, batch // parts

    def cut(x):
        """[B, L, ...] -> [chunks, N, B / N, chunk, ...], zeros at the end."""
        pad = [(0, 0)] * x.ndim
        pad[1] = (0, chunks * chunk - length)
        x = jnp.pad(x, pad).reshape(*split, chunks, chunk, *x.shape[2:])
        return placement.keep_split(jnp.moveaxis(x, 2, 0), None, "data")

    labels = labels.astype(jnp.int32)  # 8 or 16 bits hold no vocabulary.
    copies = _copies(kernel.astype(hidden.dtype), parts)

    def one(part):
        hidden, labels = part
        return _cross_entropy(softcap, hidden, labels, copies)

    losses = jax.lax.map(one, (cut(hidden), cut(labels)))
    losses = jnp.moveaxis(losses, 0, 2).reshape(batch, chunks * chunk)[:, :length]
    if weights is None:
        return losses
    weights = weights.astype(jnp.float32)
    return jnp.where(weights == 0, 0, losses) * weights


def next_tokens(
    input_ids: chex.Array, segment_ids: chex.Array | None = None
) -> tuple[chex.Array, chex.Array]:
    """What each token has to predict: the next one of its segment.

    Args:
      input_ids: [B, L] integer.
      segment_ids: [B, L] integer, 0 = padding; None = one segment per row.

    Returns:
      (labels [B, L], weights [B, L] float32: 0 for padding and for the last token of
      a segment, 1 otherwise).

    Raises:
      ValueError: if the shapes differ.

    >>> labels, weights = next_tokens(jnp.array([[5, 6, 7, 8]]),
    ...                               jnp.array([[1, 1, 2, 2]]))
    >>> labels, weights
    (Array([[6, 7, 8, 0]], dtype=int32), Array([[1., 0., 1., 0.]], dtype=float32))
    """
    if segment_ids is None:
        segment_ids = jnp.ones(input_ids.shape, jnp.int32)
    if segment_ids.shape != input_ids.shape:
        raise ValueError(
            f"next_tokens: segment_ids are {segment_ids.shape}, input_ids "
            f"{input_ids.shape}"
        )
    ahead = ((0, 0), (0, 1))
    labels = jnp.pad(input_ids[:, 1:], ahead)
    same = segment_ids[:, 1:] == segment_ids[:, :-1]
    same = jnp.pad(same & (segment_ids[:, 1:] != 0), ahead)
    return labels, same.astype(jnp.float32)


def weighted_mean(losses: chex.Array, weights: chex.Array) -> chex.Array:
    """`sum(losses) / sum(weights)` for losses that carry their weights; 0 without any.

    Args:
      losses: [...] as `token_cross_entropy` weights them.
      weights: [...] real.

    Returns:
      float32 scalar.
    """
    total = jnp.sum(weights.astype(jnp.float32))
    return jnp.sum(losses) / jnp.where(total == 0, 1, total)


def segment_means(
    losses: chex.Array,
    weights: chex.Array,
    segment_ids: chex.Array,
    num_segments: int,
) -> chex.Array:
    """`weighted_mean` of every segment of every row.

    Args:
      losses: [B, L] as `token_cross_entropy` weights them.
      weights: [B, L] real.
      segment_ids: [B, L] integer, 0 = padding, 1 ... `num_segments`.
      num_segments: N.

    Returns:
      [B, N] float32, column n - 1 for segment n; 0 without any weight.

    Raises:
      ValueError: if the shapes differ.

    >>> segment_means(jnp.array([[1.0, 3.0, 5.0]]), jnp.ones((1, 3)),
    ...               jnp.array([[1, 1, 2]]), 2)
    Array([[2., 5.]], dtype=float32)
    """
    if not losses.shape == weights.shape == segment_ids.shape:
        raise ValueError(
            f"segment_means: losses are {losses.shape}, weights {weights.shape}, "
            f"segment_ids {segment_ids.shape}"
        )
    numbers = jnp.arange(1, num_segments + 1, dtype=segment_ids.dtype)
    member = segment_ids[:, :, None] == numbers[None, None]

    def sums(x):
        x = x.astype(jnp.float32)[:, :, None]
        return jnp.sum(jnp.where(member, x, 0), axis=1)

    total = sums(weights)
    return sums(losses) / jnp.where(total == 0, 1, total)


def _copies(kernel, parts):
    """[D, V] -> [N, D, V] float32, one for each of the N parts of a batch.

    Where the mesh splits the batch, each device then has the whole of its copy before
    the first chunk, and its own sum of gradients until after the last: one exchange of
    each instead of one for every chunk.
    """
    copies = jnp.broadcast_to(kernel[None], (parts, *kernel.shape))
    if parts > 1:
        spec = P("data", None, P.UNCONSTRAINED)
        copies = jax.lax.with_sharding_constraint(copies, spec)
    # Gradients of the chunks are added up in float32; `one` rounds back.
    return copies.astype(tree.wide_dtype(kernel.dtype))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _cross_entropy(softcap, hidden, labels, kernel):
    """[N, b, c, D], [N, b, c], [N, D, V] -> [N, b, c]."""
    return _plain(softcap, hidden, labels, kernel)


def _differentiate(softcap, primals, tangents):
    hidden, labels, kernel = primals
    along_hidden, _, along_kernel = tangents
    if isinstance(along_kernel, SymbolicZero):
        loss, slope = _with_slope(softcap, hidden, labels, kernel)
        return loss, _along(slope, along_hidden)

    @jax.checkpoint
    def plain(hidden, kernel):
        return _plain(softcap, hidden, labels, kernel)

    if isinstance(along_hidden, SymbolicZero):
        of_kernel = functools.partial(plain, hidden)
        return jax.jvp(of_kernel, (kernel,), (along_kernel,))
    return jax.jvp(plain, (hidden, kernel), (along_hidden, along_kernel))


_cross_entropy.defjvp(_differentiate, symbolic_zeros=True)


@jax.checkpoint  # So that the slope is kept in its own dtype.
def _along(slope, along_hidden):
    """[N, b, c, D], [N, b, c, D] -> [N, b, c] float32."""
    slope, along_hidden = (x.astype(jnp.float32) for x in (slope, along_hidden))
    return jnp.sum(slope * along_hidden, axis=-1)


def _plain(softcap, hidden, labels, kernel):
    logits, _ = _logits(softcap, hidden, kernel)
    loss = jax.nn.logsumexp(logits, axis=-1) - _summed(logits, labels)
    return jnp.where(_known(labels, logits), loss, jnp.inf)


@functools.partial(jax.checkpoint, static_argnums=0)
def _with_slope(softcap, hidden, labels, kernel):
    """The losses, and their gradients [N, b, c, D] by `hidden`, in its dtype."""
    logits, bent = _logits(softcap, hidden, kernel)
    hit, known = _hits(labels, logits), _known(labels, logits)
    top = jnp.max(logits, axis=-1, keepdims=True)
    top = jnp.where(jnp.isfinite(top), top, 0)
    # XLA's CPU backend sums exponentials that it has many times faster than those that
    # it makes on the way; others had better not write them down.
    powers = jax.lax.platform_dependent(
        jnp.exp(logits - top),
        cpu=jax.lax.optimization_barrier,
        default=lambda x: x,
    )
    total = jnp.sum(powers, axis=-1, keepdims=True)
    own = jax.lax.platform_dependent(logits, labels, cpu=_gathered, default=_summed)
    loss = (jnp.log(total) + top)[..., 0] - own
    slope = powers / total - hit.astype(logits.dtype)
    if bent is not None:
        slope = slope * (1 - bent**2)
    slope = jnp.einsum(
        "nblv,ndv->nbld",
        slope.astype(hidden.dtype),
        kernel.astype(hidden.dtype),
        preferred_element_type=jnp.float32,
    )
    slope = jnp.where(known[..., None], slope, 0)
    return jnp.where(known, loss, jnp.inf), slope.astype(hidden.dtype)


def _logits(softcap, hidden, kernel):
    """[N, b, c, V] float32, and the tanh in them or None."""
    logits = jnp.einsum(
        "nbld,ndv->nblv",
        hidden,
        kernel.astype(hidden.dtype),
        preferred_element_type=jnp.float32,
    )
    if softcap is None:
        return logits, None
    bent = jnp.tanh(logits / softcap)
    return softcap * bent, bent


def _summed(logits, labels):
    """Logits of the labels, as XLA fuses it and splits it over the vocabulary."""
    nothing = (0 * labels[..., None]).astype(logits.dtype)
    return jnp.sum(jnp.where(_hits(labels, logits), logits, nothing), axis=-1)


def _gathered(logits, labels):
    """The same without another pass; its transpose would be a scatter."""
    places = jnp.clip(labels, 0, logits.shape[-1] - 1)[..., None]
    return jnp.take_along_axis(logits, places, axis=-1)[..., 0]


def _hits(labels, logits):
    # What depends on no chunk, JAX takes out of the loop: here, like the zeros above,
    # an array as large as the logits.
    words = jnp.arange(logits.shape[-1], dtype=labels.dtype)
    words, labels = jax.lax.optimization_barrier((words, labels))
    return words[None, None, None] == labels[..., None]


def _known(labels, logits):
    return (labels >= 0) & (labels < logits.shape[-1])


def _check(hidden, kernel, labels, weights):
    if hidden.ndim != 3 or kernel.ndim != 2 or hidden.shape[-1] != kernel.shape[0]:
        raise ValueError(
            f"token_cross_entropy: wanted hidden [B, L, D] and kernel [D, V], found "
            f"{hidden.shape} and {kernel.shape}"
        )
    arrays = (
        {"labels": labels}
        if weights is None
        else {
            "labels": labels,
            "weights": weights,
        }
    )
    for name, array in arrays.items():
        if array.shape != hidden.shape[:2]:
            raise ValueError(
                f"token_cross_entropy: {name} are {array.shape}, wanted "
                f"{hidden.shape[:2]}"
            )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"token_cross_entropy: labels must be integers, are {labels.dtype}"
        )
