"""Learning to branch: a tree over stages whose edges are learned."""

from collections.abc import Sequence
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax.models.multitask.base import Factory, MultiTaskModule, mix


def choose(
    logits: chex.Array,
    key: chex.PRNGKey | None,
    temperature: float | chex.Array = 1.0,
    *,
    straight_through: bool = False,
) -> chex.Array:
    """One parent per child.

      d = softmax((logits + gumbel) / temperature)

    Args:
      logits: [children, parents].
      key: typed PRNG key; None gives the one-hot of the largest logit, without
        gradient.
      temperature: positive; small values approach one-hot samples.
      straight_through: one-hot forward, with the gradient of the soft sample.

    Returns:
      [children, parents] float32, rows sum to one.

    **Follows**: Jang et al. 2017, "Categorical Reparameterization with
    Gumbel-Softmax", eq. 2 and section 2.2.

    >>> choose(jnp.array([[0.0, 2.0], [1.0, 0.0]]), None).tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    logits = logits.astype(jnp.float32)
    if key is None:
        return jax.nn.one_hot(jnp.argmax(logits, -1), logits.shape[-1])
    noisy = logits + jax.random.gumbel(key, logits.shape)
    soft = jax.nn.softmax(noisy / temperature, axis=-1)
    if not straight_through:
        return soft
    hard = jax.nn.one_hot(jnp.argmax(noisy, -1), logits.shape[-1])
    return hard + soft - jax.lax.stop_gradient(soft)


class LTB(MultiTaskModule, kw_only=True):
    """Stages of T nodes each; every node, and every task, learns which node it reads.

    Node i of stage l reads sum_j d[i, j] y_j over the nodes of the stage before, with
    d from `choose`; all nodes of the first stage read the input. After training,
    `encode` without an rng is the discrete tree. `z["shared"]` are the last stage's
    nodes, [B, T, ...]; `z["parents"]`, [B, T, T], what each task reads.

    Attributes:
      outputs: task name -> width of its output.
      head: width -> head module.
      stages: makers of the stages; each is called once per node.
      temperature: of the samples, unless the call gives another.
      straight_through: sample one-hot choices.

    **Follows**: Guo et al. 2020, "Learning to Branch for Multi-Task Learning",
    section 3.

    **Differs**: as many nodes per stage as tasks, and a choice of parents for the
    heads too.
    """

    stages: Sequence[Factory]
    temperature: float = 1.0
    straight_through: bool = False

    @property
    def shared_paths(self) -> tuple[str, ...]:
        """All nodes, and the choices of all stages but the heads'."""
        return ("^nodes_", "^branch_logits$")

    def setup(self):
        """Makes T nodes per stage, the choices and the heads."""
        if not self.stages:
            raise ValueError("LTB: stages must hold at least one maker")
        count = len(self.outputs)
        self.nodes = [[make() for _ in range(count)] for make in self.stages]
        zeros, shape = nn.initializers.zeros, (count, count)
        if len(self.stages) > 1:
            self.branch_logits = self.param(
                "branch_logits", zeros, (len(self.stages) - 1, *shape)
            )
        self.task_logits = [
            self.param(f"branch_logits_{name}", zeros, (count,))
            for name in self.outputs
        ]
        self.heads = self._make_heads()

    def encode(
        self,
        *inputs: chex.Array,
        sample: bool | None = None,
        temperature: float | chex.Array | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Runs all stages.

        Args:
          *inputs: what the first stage takes.
          sample: draw the choices, with the rng named "branch"; False: each child
            reads its likeliest parent, and the choices get no gradient. None: draw
            where there is such an rng.
          temperature: instead of the module's.
          **options: go to the first stage.

        Returns:
          {"shared": [B, T, ...], "parents": [B, T, T]}.
        """
        if sample is None:
            sample = self.has_rng("branch")
        nodes = [node(*inputs, **options) for node in self.nodes[0]]
        for level in range(1, len(self.stages)):
            chosen = self._choose(self.branch_logits[level - 1], sample, temperature)
            stacked = jnp.stack(nodes, 1)
            chosen = spread(chosen, stacked)
            nodes = [
                node(mix(chosen[:, i], stacked))
                for i, node in enumerate(self.nodes[level])
            ]
        stacked = jnp.stack(nodes, 1)
        task_logits = jnp.stack(self.task_logits)
        chosen = self._choose(task_logits, sample, temperature)
        return {"shared": stacked, "parents": spread(chosen, stacked)}

    def feature(self, z, task: int) -> chex.Array:
        """What the task reads of the last stage."""
        return mix(z["parents"][:, task], z["shared"])

    def tree(self) -> list[chex.Array]:
        """The discrete tree: per stage from the second on, and for the tasks, parents.

        Returns:
          len(stages) arrays of int [T].
        """
        inner = [] if len(self.stages) == 1 else list(self.branch_logits)
        task_logits = jnp.stack(self.task_logits)
        return [jnp.argmax(logits, -1) for logits in (*inner, task_logits)]

    def _choose(self, logits, sample, temperature):
        key = self.make_rng("branch") if sample else None
        temperature = self.temperature if temperature is None else temperature
        return choose(logits, key, temperature, straight_through=self.straight_through)


def spread(weights: chex.Array, like: chex.Array) -> chex.Array:
    """[N, M] -> [B, N, M], B that of `like`."""
    return jnp.broadcast_to(weights[None], (like.shape[0], *weights.shape))
