"""Gossip: experts that learn to merge with a few neighbours, round after round."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax.transforms.merging import _compose

Topology = Literal["ring", "rotate"]
TOPOLOGY = get_args(Topology)


def neighbours(tasks: int, *, topology: Topology = "ring", reach: int = 1) -> jax.Array:
    """Whose models each model meets in a round of `gossip`.

    Args:
      tasks: T.
      topology: "ring", itself and `reach` models on either side; "rotate", itself and
        the next `reach` models.
      reach: how far, so that no model is met twice.

    Returns:
      [T, N] int32, each row itself first; N = 2 reach + 1 or reach + 1.

    Raises:
      ValueError: a topology that does not exist, or a reach below 1 or around the ring.

    Follows: the topologies of Gossip in FusionBench.

    >>> neighbours(4).tolist()
    [[0, 1, 3], [1, 2, 0], [2, 3, 1], [3, 0, 2]]
    """
    _compose.choice("neighbours", "topology", topology, TOPOLOGY)
    steps = list(range(reach + 1))
    if topology == "ring":
        steps += [-step for step in range(1, reach + 1)]
    if reach < 1 or len(steps) > tasks:
        raise ValueError(
            f"neighbours: reach is {reach}, wanted 1 or more, and no more models to "
            f"meet than the {tasks} that there are, found {len(steps)}"
        )
    return (jnp.arange(tasks)[:, None] + jnp.asarray(steps)[None]) % tasks


def gossip(
    taus: Any,
    merge: Callable[[Any, Any], Any],
    *,
    rounds: int,
    topology: Topology = "ring",
    reach: int = 1,
    check_finite: bool = True,
) -> Any:
    r"""Lets every expert merge with its neighbours, all at once, for some rounds.

      tau_t <- merge([tau_s of neighbours s, t first], t)

    No model ever sees more than its neighbours, as where each lives on a machine of its
    own; what one knows travels `reach` models a round.

    Args:
      taus: task tree, leaves [T, ...].
      merge: `merge(taus, t) -> delta`: a task tree with leaves [N, ...] and the index
        of the model whose turn it is (traced), to a tree with leaves [...]; such as one
        that learns AdaMerging's coefficients on inputs of these tasks and composes.
        `neighbours` says who they are.
      rounds: how often.
      topology: see `neighbours`.
      reach: see `neighbours`.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Task tree like `taus`. `average` makes one model of it.

    Raises:
      ValueError: rounds below 0, a topology that does not fit, a merge that returns
        another tree, or NaN or infinity.

    Follows: Gossip of FusionBench (Tang et al. 2024, arXiv 2406.03280): AdaMerging,
      layer-wise, among three neighbours of a ring or the next ones.
    Differs: any merge; models take turns in a loop, so that one merge is in memory.

    >>> from mtl_jax.transforms import merging
    >>> taus = {"w": jnp.array([0.0, 0.0, 0.0, 3.0, 0.0])}
    >>> gossip(taus, lambda taus, t: merging.average(taus), rounds=1)["w"].tolist()
    [0.0, 0.0, 1.0, 1.0, 1.0]
    """
    _compose.check_index("gossip", "rounds", rounds)
    count, _ = _compose.check_taus("gossip", taus, None, check_finite)
    met = neighbours(count, topology=topology, reach=reach)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), taus)

    def turn(taus, item):
        task, own = item
        delta = merge(jax.tree.map(lambda x: x[own], taus), task)
        tree.check_match(
            "gossip",
            one,
            delta,
            reference_name="a task of taus",
            other_name="what merge returns",
        )
        return jax.tree.map(lambda x, like: x.astype(like.dtype), delta, one)

    def step(taus, _):
        items = (jnp.arange(count), met)
        return jax.lax.map(lambda item: turn(taus, item), items), None

    taus = jax.tree.map(jnp.asarray, taus)
    return jax.lax.scan(step, taus, length=rounds)[0]
