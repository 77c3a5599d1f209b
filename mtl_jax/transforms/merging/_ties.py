"""TIES: trim small changes, elect a sign, merge what agrees."""

from typing import Any, Literal

from mtl_jax.transforms.merging import _compose


def ties(
    taus: Any,
    *,
    density: float = 0.2,
    weights: Any = None,
    key: Any = None,
    scope: _compose.Scope = "global",
    elect: _compose.Elect = "sum",
    reduce: _compose.Reduce = "disjoint_mean",
    zero_sign: Literal["majority", "none"] = "majority",
    check_finite: bool = True,
) -> Any:
    r"""Merges task vectors after trimming and electing a sign per entry.

      v_t    = w_t tau_t where tau_t is among the task's largest magnitudes, else 0
      gamma  = sign(sum_t v_t)
      A      = {t : sign(v_t) = gamma, v_t != 0}
      result = sum_{t in A} v_t / sum_{t in A} w_t

    Args:
      taus: task tree, leaves [T, ...].
      density: fraction kept of each task, exactly floor(density * n) entries; equal
        magnitudes are kept in the order of leaves and indices.
      weights: [T], positive; ones by default. They multiply the values before the
        election and enter the mean.
      key: unused; every merge takes one.
      scope: "global" trims each task vector as a whole, "leaf" each leaf by itself.
      elect: "sum", the sign with the larger total magnitude; "count", the sign that
        more tasks have; "none", all values pass.
      reduce: "disjoint_mean" over the agreeing tasks, "sum" of them, or "mean", their
        sum over the weight of all tasks.
      zero_sign: what an election that ends in zero becomes: "majority", the most
        common elected sign of the model (in both scopes), or "none", nothing passes.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree with leaves [...] in the dtypes of `taus`.

    Raises:
      ValueError: an option that does not exist, weights that do not fit, or NaN or
        infinity.

    Follows: Yadav et al. 2023, "TIES-Merging", algorithm 1.
    Differs: exactly k entries are kept, where the authors' threshold keeps all that
      equal it. The zero-sign rule is the released code's, not in the paper. Consensus
      merging uses `reduce="sum"`; mergekit trims per tensor, `scope="leaf"`.

    >>> import jax.numpy as jnp
    >>> taus = {"w": jnp.array([[3.0, 1.0, 0.1], [1.0, -2.0, 0.1]])}
    >>> ties(taus, density=0.7)["w"].tolist()
    [2.0, -2.0, 0.0]
    """
    del key
    options = _check("ties", elect, reduce, zero_sign)
    _, weights = _compose.check_taus("ties", taus, weights, check_finite)
    _compose.check_positive("ties", weights)
    selectors = _compose.top_share("ties", taus, density, scope)
    return _compose.merge(taus, selectors, weights, reduce=reduce, **options)


def ties_select(
    taus: Any,
    *,
    density: float = 0.2,
    weights: Any = None,
    scope: _compose.Scope = "global",
    elect: _compose.Elect = "sum",
    zero_sign: Literal["majority", "none"] = "majority",
    check_finite: bool = True,
) -> Any:
    """The entries of each task that `ties` would merge; zero elsewhere.

    Args:
      taus: task tree, leaves [T, ...].
      density: as in `ties`.
      weights: [T], positive; they weigh the election, not the result.
      scope: as in `ties`.
      elect: as in `ties`; "none" returns the trimmed task vectors.
      zero_sign: as in `ties`.
      check_finite: as in `ties`.

    Returns:
      Tree like `taus`.

    Raises:
      ValueError: as in `ties`.

    Follows: Yang et al. 2024, "AdaMerging", the "++" variants, which learn
      coefficients for these vectors.

    >>> import jax.numpy as jnp
    >>> taus = {"w": jnp.array([[3.0, 1.0, 0.1], [1.0, -2.0, 0.1]])}
    >>> ties_select(taus, density=0.7)["w"].tolist()
    [[3.0, 0.0, 0.0], [1.0, -2.0, 0.0]]
    """
    options = _check("ties_select", elect, "sum", zero_sign)
    _, weights = _compose.check_taus("ties_select", taus, weights, check_finite)
    _compose.check_positive("ties_select", weights)
    selectors = _compose.top_share("ties_select", taus, density, scope)
    return _compose.survivors(taus, selectors, weights, **options)


def _check(fn_name: str, elect: Any, reduce: Any, zero_sign: Any) -> dict[str, Any]:
    _compose.choice(fn_name, "elect", elect, _compose.ELECT)
    _compose.choice(fn_name, "reduce", reduce, _compose.REDUCE)
    _compose.choice(fn_name, "zero_sign", zero_sign, ("majority", "none"))
    return {"elect": elect, "zero_sign": zero_sign}
