"""Task arithmetic: sums, means, negation and analogy of task vectors."""

from typing import Any

import jax

from mtl_jax import tree
from mtl_jax.transforms.merging import _compose


def task_arithmetic(
    taus: Any, *, weights: Any = None, key: Any = None, check_finite: bool = True
) -> Any:
    """Adds task vectors, `sum_t weights[t] * tau_t`.

    Args:
      taus: task tree, leaves [T, ...].
      weights: [T], ones by default.
      key: unused; every merge takes one.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree with leaves [...] in the dtypes of `taus`.

    Raises:
      ValueError: the weights do not fit, or something is NaN or infinite.

    Follows: Ilharco et al. 2023, "Editing Models with Task Arithmetic", section 4.
    Differs: nothing is scaled here; `tree.add_scaled(base, delta, scale)` does.

    >>> import jax.numpy as jnp
    >>> task_arithmetic({"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])})["w"].tolist()
    [4.0, 6.0]
    """
    del key
    _, weights = _compose.check_taus("task_arithmetic", taus, weights, check_finite)
    return tree.combine(taus, weights)


def average(
    taus: Any, *, weights: Any = None, key: Any = None, check_finite: bool = True
) -> Any:
    """Averages task vectors, `sum_t w_t tau_t / sum_t w_t`.

    Args:
      taus: task tree, leaves [T, ...].
      weights: [T] with a sum other than zero, ones by default.
      key: unused; every merge takes one.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree with leaves [...] in the dtypes of `taus`.

    Raises:
      ValueError: the weights do not fit, or something is NaN or infinite.

    Follows: Wortsman et al. 2022, "Model soups", the uniform soup, on deltas.
    Differs: nothing; on one base, averaging deltas is averaging parameters.

    >>> import jax.numpy as jnp
    >>> average({"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])})["w"].tolist()
    [2.0, 3.0]
    """
    del key
    _, weights = _compose.check_taus("average", taus, weights, check_finite)
    _compose.check_total("average", weights)
    return tree.combine(taus, weights / weights.sum())


def negate(
    taus: Any, *, weights: Any = None, key: Any = None, check_finite: bool = True
) -> Any:
    """Subtracts task vectors, `-sum_t weights[t] * tau_t`, to forget the tasks.

    Args:
      taus: task tree, leaves [T, ...].
      weights: [T], ones by default.
      key: unused; every merge takes one.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree with leaves [...] in the dtypes of `taus`.

    Raises:
      ValueError: the weights do not fit, or something is NaN or infinite.

    Follows: Ilharco et al. 2023, "Editing Models with Task Arithmetic", section 3.

    >>> import jax.numpy as jnp
    >>> negate({"w": jnp.array([[1.0, 2.0]])})["w"].tolist()
    [-1.0, -2.0]
    """
    del key
    _, weights = _compose.check_taus("negate", taus, weights, check_finite)
    return tree.combine(taus, -weights)


def analogy(
    taus: Any, *, weights: Any = None, key: Any = None, check_finite: bool = True
) -> Any:
    """Task by analogy: a is to b as c is to the result, `tau_c + (tau_b - tau_a)`.

    Args:
      taus: task tree of exactly three tasks in the order a, b, c, leaves [3, ...].
      weights: [3], multiply the three terms; ones by default.
      key: unused; every merge takes one.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree with leaves [...] in the dtypes of `taus`.

    Raises:
      ValueError: there are not three tasks, the weights do not fit, or
        something is NaN or infinite.

    Follows: Ilharco et al. 2023, "Editing Models with Task Arithmetic", section 5.

    >>> import jax.numpy as jnp
    >>> analogy({"w": jnp.array([[1.0], [3.0], [10.0]])})["w"].tolist()
    [12.0]
    """
    del key
    count, weights = _compose.check_taus("analogy", taus, weights, check_finite)
    if count != 3:
        raise ValueError(f"analogy: there are {count} tasks, wanted 3: a, b and c")
    signs = jax.numpy.array([-1.0, 1.0, 1.0], weights.dtype)
    return tree.combine(taus, weights * signs)
