"""Concrete subspace: one mask, learned, for the entries in which all tasks agree."""

import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from mtl_jax import tree
from mtl_jax._checks import number
from mtl_jax._contractions import weighted_sum
from mtl_jax.transforms.merging import _coefficients, _compose, _learning

Kind = Literal["relaxed", "sampled", "mean"]
_ADAM = optax.adam(1e-3)


class Adversary(NamedTuple):
    """Who moves inputs against the merged model while it learns.

    Attributes:
      loss_fn: `loss_fn(params, noise, batch, task, args) -> scalar`, of one task, which
        the noise makes small: minus the cross-entropy of predictions on moved inputs
        against those on the inputs themselves. A function of a module.
      noise: where it starts, leaves [tasks, ...], such as one input of zeros per task.
      tx: its optimizer.
    """

    loss_fn: Any
    noise: Any
    tx: optax.GradientTransformation


class Concrete(NamedTuple):
    """A learned mask and the coefficients that go with it.

    Attributes:
      logits: tree like the base, float32: sigmoid(logit) is the chance of an entry.
      coeffs: tree like the base, leaves [T], for which it was learned.
      losses: [S, tasks] float32, of every step before its update.
      noise: of an `Adversary`, where it ended; None without.
    """

    logits: Any
    coeffs: Any
    losses: jax.Array
    noise: Any = None


def concrete(
    base: Any,
    taus: Any,
    loss_fn: Any,
    batches: Any,
    *,
    key: Any,
    coeffs: Any = 0.3,
    logits: Any = 0.0,
    tx: optax.GradientTransformation = _ADAM,
    coeffs_tx: optax.GradientTransformation | None = None,
    adversary: Adversary | None = None,
    temperature: float = 0.5,
    tasks: Any = None,
    args: Any = None,
    check_finite: bool = True,
) -> Concrete:
    r"""Learns one mask for all task vectors from losses of the merged model.

      m     = sigmoid((logits + log u - log(1 - u)) / temperature),  u uniform
      theta = base + m / mean(m) * sum_t coeffs_t tau_t

    with a mean per leaf and a fresh u for every step, which descends on
    sum_k loss_k(theta).

    Args:
      base: tree of parameters, leaves [...].
      taus: task tree like `base`, leaves [T, ...].
      loss_fn: `loss_fn(params, batch, task, args) -> scalar`, of one task: the mean
        entropy of predictions for the published method. A function of a module, so
        that equal calls compile once.
      batches: leaves [S, tasks, ...], one step of every task after the other.
      key: typed PRNG key, of the masks.
      coeffs: a number, [T], or a tree like `taus` with leaves [T].
      logits: to start from, a number or a tree like `base`.
      tx: optimizer of the logits.
      coeffs_tx: optimizer of the coefficients: every mask is judged after one step of
        theirs from `coeffs`, at the same draw. None: it is judged at `coeffs` (task
        arithmetic).
      adversary: moves its noise by one step for every mask, before the mask learns.
        Then `loss_fn` gets `(task, noise)` for its task, and is the loss on inputs plus
        that on moved ones in the published method. None: there is no noise.
      temperature: of the mask; lower is nearer to 0 and 1.
      tasks: leaves [tasks, ...], what differs between tasks and stays; see `learner`.
      args: any arrays that the loss takes.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      `Concrete` with the coefficients as given, for `concrete_merge`; all steps run in
      one `lax.scan`. To learn coefficients for a mask, multiply task vectors by
      `concrete_mask` and use `learner`.

    Raises:
      ValueError: trees that do not fit, a temperature that is not positive, or NaN or
        infinity.

    Follows: Tang et al. 2023, "Concrete Subspace Learning based Interference
      Elimination for Multi-task Model Fusion", as in FusionBench: Adam at 1e-3, logits
      from 0; with `coeffs_tx` the first half of its AdaMerging variants, where this is
      Adam at 1.
      With an adversary Yang et al. 2024, "Mitigating the Backdoor Effect for Multi-Task
      Model Merging via Safety-Aware Subspace", with one noise per task.
    Differs: one row of coefficients per leaf throughout, so that the step is by leaf;
      both steps see one batch, and that of the coefficients its slope at `coeffs`,
      where FusionBench takes the one at the end of the step before.

    >>> base, taus = {"w": jnp.zeros(2)}, {"w": jnp.ones((1, 2))}
    >>> def loss_fn(params, batch, task, args):
    ...     return (params["w"] * batch).sum()
    >>> batches = jnp.broadcast_to(jnp.array([1.0, -1.0]), (20, 1, 2))
    >>> found = concrete(
    ...     base, taus, loss_fn, batches, key=jax.random.key(0), tx=optax.sgd(1.0)
    ... )
    >>> (found.logits["w"] > 0).tolist()
    [False, True]
    """
    name = "concrete"
    temperature = _positive(name, temperature)
    _compose.check_key(name, key)
    _compose.check_taus(name, taus, None, check_finite)
    coeffs = _coefficients.spread(name, taus, coeffs)
    if jax.tree.structure(logits) == jax.tree.structure(0):
        start = number(name, "logits", logits)
        logits = jax.tree.map(
            lambda x: jnp.full(jnp.shape(x), start, jnp.float32), base
        )
    tree.check_match(name, taus, _like(taus, logits), other_name="the logits")
    against, noise = None, None
    if adversary is not None:
        if check_finite:
            tree.check_finite(f"{name}: noise", adversary.noise)
        noise = jax.tree.map(jnp.asarray, adversary.noise)
        against = (adversary.loss_fn, adversary.tx)
    return _learn(
        loss_fn, tx, coeffs_tx, against, base, taus, logits, coeffs, noise, key,
        temperature, batches, tasks, args,
    )  # fmt: skip


def concrete_mask(
    logits: Any, *, key: Any = None, kind: Kind = "relaxed", temperature: float = 0.5
) -> Any:
    """Draws a mask, divided by its mean over every leaf.

    Args:
      logits: tree, see `Concrete`.
      key: typed PRNG key; not needed for "mean".
      kind: "relaxed", as in learning; "sampled", entries of 0 and 1; "mean",
        sigmoid(logits), without chance.
      temperature: of "relaxed".

    Returns:
      Tree like `logits`, float32; a leaf of nothing but zeros stays zero.

    Raises:
      ValueError: a kind that does not exist, a key that is missing, or a temperature
        that is not positive.

    >>> concrete_mask({"w": jnp.array([100.0, -100.0])}, kind="mean")["w"].tolist()
    [2.0, 0.0]
    """
    _compose.choice("concrete_mask", "kind", kind, get_args(Kind))
    temperature = _positive("concrete_mask", temperature)
    if kind != "mean":
        _compose.check_key("concrete_mask", key)
    return _masks(logits, key, kind, temperature)


def concrete_merge(
    taus: Any,
    learned: Concrete,
    *,
    key: Any = None,
    kind: Kind = "relaxed",
    temperature: float = 0.5,
) -> Any:
    """The merge with a learned mask, `m / mean(m) * sum_t coeffs_t tau_t`.

    Args:
      taus: task tree, leaves [T, ...].
      learned: what `concrete` returned.
      key: as in `concrete_mask`.
      kind: as in `concrete_mask`; the authors evaluate a "relaxed" draw.
      temperature: as in `concrete_mask`.

    Returns:
      Tree with leaves [...] in the dtypes of `taus`; the first task's where they are
      not floating point.

    Raises:
      ValueError: as `concrete_mask`.

    >>> learned = Concrete({"w": jnp.zeros(2)}, {"w": jnp.array([0.5])}, None)
    >>> taus = {"w": jnp.array([[2.0, 4.0]])}
    >>> concrete_merge(taus, learned, kind="mean")["w"].tolist()
    [1.0, 2.0]
    """
    masks = concrete_mask(learned.logits, key=key, kind=kind, temperature=temperature)
    return _masked(taus, learned.coeffs, masks)


def _positive(name, temperature):
    temperature = number(name, "temperature", temperature)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"{name}: temperature is {temperature}, wanted more than 0")
    return temperature


def _like(taus, logits):
    """The logits with a task axis and the dtypes of task vectors, as shapes."""
    count = jax.tree.leaves(taus)[0].shape[0]
    if jax.tree.structure(taus) != jax.tree.structure(logits):
        return logits
    return jax.tree.map(
        lambda x, m: jax.ShapeDtypeStruct((count, *jnp.shape(m)), x.dtype), taus, logits
    )


@functools.partial(jax.jit, static_argnums=2)
def _masks(logits, key, kind, temperature):
    def draw(i, x):
        x = x.astype(jnp.float32)
        if kind == "mean":
            mask = jax.nn.sigmoid(x)
        elif kind == "sampled":
            own = jax.random.fold_in(key, i)
            mask = jax.random.bernoulli(own, jax.nn.sigmoid(x)).astype(jnp.float32)
        else:
            noise = jax.random.logistic(jax.random.fold_in(key, i), x.shape)
            mask = jax.nn.sigmoid((x + noise) / temperature)
        mean = mask.mean() if mask.size else jnp.ones(())
        return mask / jnp.where(mean > 0, mean, 1)

    leaves, treedef = jax.tree.flatten(logits)
    return treedef.unflatten([draw(i, x) for i, x in enumerate(leaves)])


@jax.jit
def _masked(taus, coeffs, masks):
    def leaf(x, w, m):
        return _delta(x, w, m).astype(x.dtype) if tree.is_inexact(x) else x[0]

    return jax.tree.map(leaf, taus, coeffs, masks)


def _delta(x, w, m):
    wide = tree.wide_dtype(x.dtype)
    return m.astype(wide) * weighted_sum(x, w.astype(wide))


def _model(base, taus, coeffs, masks):
    def leaf(b, x, w, m):
        if not tree.is_inexact(b):
            return b
        wide = tree.wide_dtype(b.dtype)
        return (b.astype(wide) + _delta(x, w, m).astype(wide)).astype(b.dtype)

    return jax.tree.map(leaf, base, taus, coeffs, masks)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _learn(
    loss_fn, tx, coeffs_tx, against, base, taus, logits, coeffs, noise, key,
    temperature, batches, tasks, args,
):  # fmt: skip
    def step(carry, item):
        logits, state, inner, noise, foe = carry
        key, batch = item

        def run(model, variables):
            seen = tasks if noise is None else (tasks, noise)
            return _learning.slopes(
                lambda found, _: model(found), loss_fn, variables, batch, seen, args
            )

        moved = coeffs
        if coeffs_tx is not None:
            masks = _masks(logits, key, "relaxed", temperature)
            _, slopes = run(lambda found: _model(base, taus, found, masks), coeffs)
            moved, inner = _learning.descend(coeffs_tx, slopes, inner, coeffs)

        def model(found):
            masks = _masks(found, key, "relaxed", temperature)
            return _model(base, taus, moved, masks)

        if against is not None:
            slopes = _against(against[0], model(logits), noise, batch, tasks, args)
            noise, foe = _learning.descend(against[1], slopes, foe, noise)
        losses, slopes = run(model, logits)
        logits, state = _learning.descend(tx, slopes, state, logits)
        return (logits, state, inner, noise, foe), losses

    steps = jax.tree.leaves(batches)[0].shape[0]
    inner = None if coeffs_tx is None else coeffs_tx.init(coeffs)
    foe = None if against is None else against[1].init(noise)
    carry = logits, tx.init(logits), inner, noise, foe
    carry, losses = jax.lax.scan(step, carry, (jax.random.split(key, steps), batches))
    return Concrete(carry[0], coeffs, losses, carry[3])


def _against(loss_fn, params, noise, batch, tasks, args):
    """Slopes of an adversary's loss along the noise of every task, one by one."""

    def one(item):
        noise, batch, task = item
        return jax.grad(lambda n: loss_fn(params, n, batch, task, args))(noise)

    return jax.lax.map(one, (noise, batch, tasks))
