"""Fisher merging: every entry goes where the models that depend on it want it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax._checks import named_leaves
from mtl_jax.transforms.merging import _compose

LABELS = ("expected", "sampled")


def squared_gradients(
    log_prob_fn: Callable[[Any, Any], Any],
    params: Any,
    examples: Any,
    *,
    chunk: int = 8,
) -> Any:
    r"""Mean over examples of the squared gradient of each, the empirical Fisher.

      F = 1/N sum_n (d log_prob_fn(params, example_n) / d params)^2

    Args:
      log_prob_fn: `log_prob_fn(params, example) -> scalar` of one example, without a
        batch axis: the log likelihood of its label or of its sequence. Any other loss
        gives the mean squared slope of that.
      params: tree of parameters, leaves [...].
      examples: tree with leaves [N, ...].
      chunk: examples differentiated at a time; the memory is that of so many
        gradients. Several sets are averaged by their sizes.

    Returns:
      Tree like `params`, float32 (or wider) and at least 0. Leaves that are not
      floating point become zeros of their own dtype.

    Raises:
      ValueError: no examples, leaves of `examples` that disagree about N, or a chunk
        below 1.

    Follows: Matena, Raffel 2022, "Merging Models with Fisher-Weighted Averaging".
    Differs: squares are of single examples. FusionBench squares the gradient of a
      batch, which for B examples is not their mean square.

    >>> f = lambda w, x: w * x
    >>> float(squared_gradients(f, jnp.ones(()), jnp.array([1.0, 3.0])))
    5.0
    """
    _example_count("squared_gradients", examples, chunk)

    return _mean(_Slope(log_prob_fn), params, examples, chunk)


def fisher_diagonal(
    apply_fn: Callable[..., Any],
    params: Any,
    inputs: Any,
    *,
    labels: Any = "expected",
    key: Any = None,
    chunk: int = 8,
) -> Any:
    r"""Diagonal of the Fisher information of a classifier, per entry of the parameters.

      F = 1/N sum_n E_{y ~ p(y | x_n)} (d log p(y | x_n) / d params)^2

    Args:
      apply_fn: `apply_fn(params, *inputs) -> logits [B, C]`, treating examples one by
        one. Calls with the same function compile once.
      params: tree of parameters, leaves [...].
      inputs: leaves [N, ...]; a tuple holds several positional inputs.
      labels: "expected", the exact expectation, C backward passes per example;
        "sampled", one label per example, drawn from the model; or [N] integers, the
        true labels (the empirical Fisher).
      key: typed PRNG key, for "sampled".
      chunk: examples differentiated at a time, as in `squared_gradients`.

    Returns:
      Tree like `params`, float32 (or wider) and at least 0. Leaves that are not
      floating point become zeros of their own dtype.

    Raises:
      ValueError: labels that are neither, a key that is missing, logits that are not
        [B, C], or what `squared_gradients` raises.

    Follows: Matena, Raffel 2022, "Merging Models with Fisher-Weighted Averaging",
      the diagonal with the expectation over the model's own labels.
    Differs: see `squared_gradients`; FusionBench also squares the sum over labels of
      sqrt(p) log p, which has cross terms between labels.

    >>> apply_fn = lambda w, x: x * w
    >>> w, x = jnp.zeros((1, 2)), jnp.ones((3, 1))
    >>> fisher_diagonal(apply_fn, w, x).tolist()
    [[0.25, 0.25]]
    """
    name = "fisher_diagonal"
    count = _example_count(name, inputs, chunk)
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)

    if isinstance(labels, str):
        _compose.choice(name, "labels", labels, LABELS)
        if labels == "expected":
            return _mean(_Expected(apply_fn), params, inputs, chunk)
        if key is None:
            raise ValueError(f"{name}: key is missing, labels='sampled' draws")
        drawn = jax.random.split(key, count)
        return _mean(_Slope(_Drawn(apply_fn)), params, (inputs, drawn), chunk)
    labels = jnp.asarray(labels)
    if labels.shape != (count,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"{name}: labels are {labels.dtype}{list(labels.shape)}, wanted integers "
            f"[{count}], 'expected' or 'sampled'"
        )
    return _mean(_Slope(_Given(apply_fn)), params, (inputs, labels), chunk)


def fisher(
    taus: Any,
    fishers: Any,
    *,
    weights: Any = None,
    key: Any = None,
    floor: float = 1e-6,
    normalize: bool = True,
    check_finite: bool = True,
) -> Any:
    r"""Mean of the tasks, each entry weighted by how much each task depends on it.

      P_t = w_t max(F_t / |F_t|, floor),   result = sum_t P_t tau_t / sum_t P_t

    Args:
      taus: task tree, leaves [T, ...]: task vectors or, as a mean is all that happens,
        the stacked parameters themselves.
      fishers: tree like `taus` of diagonals, at least 0; see `fisher_diagonal`.
      weights: [T], ones by default, at least 0: how much each task counts.
      key: unused; every merge takes one.
      floor: least P_t / w_t, in units of the mean of F_t / |F_t| over all entries and
        tasks; entries that no task depends on become the weighted mean.
      normalize: divide every diagonal by its norm over the whole model, so that tasks
        of confident models count as much as the others.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree with leaves [...] in the dtypes of `taus`; the first task's where they are
      not floating point.

    Raises:
      ValueError: diagonals unlike the taus or negative, weights that do not fit, a
        negative floor, or NaN or infinity.

    Follows: Matena, Raffel 2022, "Merging Models with Fisher-Weighted Averaging", and
      their code, which has the floor and the norm.
    Differs: the floor is relative, so that the scale of the diagonals does not matter,
      and it holds for all tasks, where their code spares the donors by default.
      FusionBench adds 1e-6 instead.

    >>> taus = {"w": jnp.array([[1.0, 1.0], [3.0, 3.0]])}
    >>> diagonals = {"w": jnp.array([[1.0, 3.0], [1.0, 1.0]])}
    >>> fisher(taus, diagonals, normalize=False)["w"].tolist()
    [2.0, 1.5]
    """
    del key
    name = "fisher"
    _, weights = _compose.check_taus(name, taus, weights, check_finite)
    _compose.check_nonnegative(name, "weights are", weights)
    _compose.check_total(name, weights)
    floor = _compose.nonnegative(name, "floor", floor)
    _compose.check_real(name, taus)
    tree.check_match(
        name, taus, fishers, reference_name="taus", other_name="the fishers"
    )
    named = {
        k: jnp.asarray(x)
        for k, x in named_leaves(fishers).items()
        if tree.is_inexact(x) and x.size
    }
    if check_finite:
        tree.check_finite(f"{name}: fishers", named)
    for leaf, least in _least(named).items():
        _compose.check_nonnegative(name, f"{leaf!r} of the fishers goes down to", least)
    if not named:  # Floating leaves, but nothing in them.
        return jax.tree.map(lambda x: x[0], taus)
    scales, floor = _scales(list(named.values()), jnp.float32(floor), normalize)
    return jax.tree.map(
        lambda x, f: (
            _leaf(x, f, weights, scales, floor) if tree.is_inexact(x) else x[0]
        ),
        taus,
        fishers,
    )


def _example_count(fn_name, examples, chunk) -> int:
    if chunk < 1:
        raise ValueError(f"{fn_name}: chunk is {chunk}, wanted 1 or more")
    sizes = {k: jnp.shape(x)[:1] for k, x in named_leaves(examples).items()}
    if len(set(sizes.values())) != 1 or () in sizes.values():
        raise ValueError(
            f"{fn_name}: wanted examples along one first axis, found {sizes}"
        )
    (count,) = sizes.popitem()[1]
    if not count:
        raise ValueError(f"{fn_name}: there are no examples")
    return count


def _floats(params):
    """Floating leaves, and the function that puts them back."""
    leaves, treedef = jax.tree.flatten(params)
    at = [i for i, x in enumerate(leaves) if tree.is_inexact(x)]

    def join(floats):
        found = list(leaves)
        for i, x in zip(at, floats, strict=True):
            found[i] = x
        return treedef.unflatten(found)

    return [jnp.asarray(leaves[i]) for i in at], join


def _square(x):
    return jnp.square(jnp.abs(x).astype(tree.wide_dtype(x.real.dtype)))


def _log_probs(apply_fn, params, row):
    """[C] float32 of one example."""
    logits = apply_fn(params, *jax.tree.map(lambda x: x[None], row))
    if jnp.ndim(logits) != 2:
        raise ValueError(
            f"fisher_diagonal: logits are {jnp.shape(logits)}, wanted [B, C]"
        )
    return jax.nn.log_softmax(logits[0].astype(jnp.float32))


# Types instead of closures, so that equal functions of a model compile once.
class _Given(NamedTuple):
    """Log likelihood of the label that comes with an example."""

    apply_fn: Callable[..., Any]

    def __call__(self, params, example):
        row, label = example
        return _log_probs(self.apply_fn, params, row)[label]


class _Drawn(NamedTuple):
    """Log likelihood of a label that the model draws."""

    apply_fn: Callable[..., Any]

    def __call__(self, params, example):
        row, key = example
        values = _log_probs(self.apply_fn, params, row)
        return values[jax.random.categorical(key, jax.lax.stop_gradient(values))]


class _Slope(NamedTuple):
    """Squared slopes of a function of one example."""

    log_prob_fn: Callable[[Any, Any], Any]

    def __call__(self, params, example):
        leaves, join = _floats(params)
        return [
            _square(g)
            for g in jax.grad(lambda x: self.log_prob_fn(join(x), example))(leaves)
        ]


class _Expected(NamedTuple):
    """Squared slopes of all labels by their probabilities, one label at a time."""

    apply_fn: Callable[..., Any]

    def __call__(self, params, row):
        leaves, join = _floats(params)
        values, pull = jax.vjp(
            lambda x: _log_probs(self.apply_fn, join(x), row), leaves
        )

        def label(total, item):
            grads = zip(total, pull(item[0])[0], strict=True)
            return [t + item[1] * _square(g) for t, g in grads], None

        total = [jnp.zeros(x.shape, _square(x).dtype) for x in leaves]
        turns = jnp.eye(values.size, dtype=values.dtype), jnp.exp(values)
        return jax.lax.scan(label, total, turns)[0]


@functools.partial(jax.jit, static_argnums=(0, 3))
def _mean(squares, params, examples, chunk):
    """Mean of `squares(params, example)` over the examples, a chunk at a time."""
    count = jnp.shape(jax.tree.leaves(examples)[0])[0]
    size = min(chunk, count)
    blocks = -(-count // size)
    places = jnp.arange(blocks * size).reshape(blocks, size)
    leaves, join = _floats(params)

    def turn(total, places):
        # What is left over repeats the last example, without weight.
        rows = jax.tree.map(lambda x: x[jnp.minimum(places, count - 1)], examples)
        found = jax.vmap(squares, in_axes=(None, 0))(params, rows)
        real = (places < count).astype(jnp.float32)
        return [
            t + jnp.tensordot(real.astype(f.dtype), f, 1)
            for t, f in zip(total, found, strict=True)
        ], None

    total = [jnp.zeros(x.shape, _square(x).dtype) for x in leaves]
    total = jax.lax.scan(turn, total, places)[0]
    found = join([t / count for t in total])
    return jax.tree.map(
        lambda p, f: f if tree.is_inexact(p) else jnp.zeros_like(p), params, found
    )


@jax.jit
def _least(named):
    return jax.tree.map(jnp.min, named)


@functools.partial(jax.jit, static_argnums=2)
def _scales(fishers, floor, normalize):
    """[T], 1 / |F_t| or one number for all; and the least value after it."""

    def by_task(reduce, scales):
        return [
            jnp.stack(
                [
                    reduce(row.astype(jnp.float32) * s)
                    for row, s in zip(f, scales, strict=True)
                ]
            )
            for f in fishers
        ]

    count = fishers[0].shape[0]
    tops = jnp.stack(by_task(jnp.max, jnp.ones(count))).max(0)
    tops = tops if normalize else jnp.full_like(tops, tops.max())
    scales = jnp.where(tops > 0, 1 / jnp.where(tops > 0, tops, 1), 0)
    if normalize:  # Of the scaled ones, whose squares neither vanish nor overflow.
        norms = sum(by_task(lambda f: jnp.sum(f * f), scales))
        scales = scales * _inverse_root(norms)
    total = jnp.sum(sum(by_task(jnp.sum, scales)))
    return scales, floor * total / sum(f.size for f in fishers)


def _inverse_root(x):
    return jnp.where(x > 0, jax.lax.rsqrt(jnp.where(x > 0, x, 1)), 0)


@jax.jit
def _leaf(x, f, weights, scales, floor):
    wide = tree.wide_dtype(x.dtype)
    powers = [
        w.astype(wide)
        * jnp.maximum(row.astype(wide) * s.astype(wide), floor.astype(wide))
        for w, row, s in zip(weights, f, scales, strict=True)
    ]
    share = weights.astype(wide) / weights.astype(wide).sum()
    mean = sum(w * row.astype(wide) for w, row in zip(share, x, strict=True))
    total = sum(powers)
    moved = sum(p * (row.astype(wide) - mean) for p, row in zip(powers, x, strict=True))
    moved = jnp.where(total > 0, moved / jnp.where(total > 0, total, 1), 0)
    return (mean + moved).astype(x.dtype)
