"""Customised gate control and progressive layered extraction."""

from collections.abc import Sequence
from typing import Any

import chex
import flax.linen as nn
import jax.numpy as jnp

from mtl_jax.models.multitask.base import Factory, MultiTaskModule, mix
from mtl_jax.models.multitask.gates import SoftGate, run_stem


class ExpertLevel(nn.Module):
    """One level: shared and own experts, and the gates that read them.

    Attributes:
      tasks: T names.
      expert: makes an expert.
      shared: S, number of shared experts.
      own: N, number of each task's own experts.
      gate_shared: also make the gate that mixes all experts for the next level's
        shared ones.
    """

    tasks: Sequence[str]
    expert: Factory
    shared: int = 1
    own: int = 1
    gate_shared: bool = False

    def setup(self):
        """Makes experts and gates."""
        if self.shared < 0 or self.own < 0 or self.shared + self.own < 1:
            raise ValueError(
                f"ExpertLevel: shared={self.shared} and own={self.own} give a task no "
                "expert"
            )
        self.shared_experts = [self.expert() for _ in range(self.shared)]
        self.own_experts = {
            name: [self.expert() for _ in range(self.own)] for name in self.tasks
        }
        self.gates = {name: SoftGate(self.shared + self.own) for name in self.tasks}
        if self.gate_shared:
            self.gate_all = SoftGate(self.shared + self.own * len(self.tasks))

    def __call__(
        self, common: chex.Array, task_inputs: Sequence[chex.Array]
    ) -> tuple[dict[str, chex.Array], chex.Array | None]:
        """Runs the experts.

        Args:
          common: what the shared experts read, [B, ...].
          task_inputs: T inputs of own experts and gates, each [B, ...].

        Returns:
          ({"shared": [B, S, ...], "own": [B, T, N, ...], "gates": [B, T, S + N]},
          next level's common input or None). "shared" or "own" is left out where
          there are none.
        """
        found = {}
        if self.shared:
            outputs = [expert(common) for expert in self.shared_experts]
            found["shared"] = jnp.stack(outputs, 1)
        if self.own:
            rows = [
                jnp.stack([expert(h) for expert in self.own_experts[name]], 1)
                for name, h in zip(self.tasks, task_inputs, strict=True)
            ]
            found["own"] = jnp.stack(rows, 1)
        gates = [
            self.gates[name](h) for name, h in zip(self.tasks, task_inputs, strict=True)
        ]
        found["gates"] = jnp.stack(gates, 1)
        if not self.gate_shared:
            return found, None
        parts = [found["shared"]] if self.shared else []
        if self.own:
            own = found["own"]
            parts.append(own.reshape(own.shape[0], -1, *own.shape[3:]))
        return found, mix(self.gate_all(common), jnp.concatenate(parts, 1))


def task_mixture(z, task: int) -> chex.Array:
    """The task's mixture of the shared and its own experts, [B, ...]."""
    parts = [z["shared"]] if "shared" in z else []
    if "own" in z:
        parts.append(z["own"][:, task])
    return mix(z["gates"][:, task], jnp.concatenate(parts, 1))


class PLE(MultiTaskModule, kw_only=True):
    """Levels of shared and task-specific experts with gates of their own.

    Per level, with g_t = softmax(h_t W_t) over the shared and task t's experts,

      h_t <- g_t . [shared experts(h_0), experts_t(h_t)]
      h_0 <- g_0 . [shared experts(h_0), experts_1(h_1), ..., experts_T(h_T)]

    from h_t = h_0 = stem(x); outputs_t = head_t(h_t). `z["shared"]` are the outputs of
    the last level's shared experts, [B, S, ...]; with `shared_experts=0` there is no
    such entry, and nothing is shared but the stem (and, from two levels on, what h_0
    carries is not read).

    Attributes:
      outputs: task name -> width of its output.
      head: width -> head module.
      levels: makers of the experts, one per level.
      shared_experts: S, per level.
      task_experts: N, per level and task.
      stem: makes what comes before the first level; None = the single input itself.

    **Follows**: Tang et al. 2020, "Progressive Layered Extraction (PLE)", eqs. 1-6.
    """

    levels: Sequence[Factory]
    shared_experts: int = 1
    task_experts: int = 1
    stem: Factory | None = None

    @property
    def shared_paths(self) -> tuple[str, ...]:
        """Stem, shared experts, and what their gates read at levels before the last."""
        found = [] if self.stem is None else ["^trunk/"]
        if not self.shared_experts:
            return tuple(found)
        count = self._num_levels()
        found.append(r"^stack_\d+/shared_experts_")
        if count > 1:
            found.append(r"^stack_\d+/gate_all/")
        if self.task_experts:
            # What own experts and their inputs give, the next shared ones read.
            found += [rf"^stack_{n}/own_experts_" for n in range(count - 1)]
            found += [rf"^stack_{n}/gates_" for n in range(count - 2)]
        return tuple(found)

    def _num_levels(self) -> int:
        return len(self.levels)

    def setup(self):
        """Makes stem, levels and heads."""
        self._make(self.levels)

    def _make(self, levels: Sequence[Factory]) -> None:
        if not levels:
            raise ValueError(f"{type(self).__name__}: levels must hold a maker")
        if self.stem is not None:
            self.trunk = self.stem()
        last = len(levels) - 1
        self.stack = [
            ExpertLevel(
                self.task_names,
                make,
                self.shared_experts,
                self.task_experts,
                gate_shared=level < last and self.shared_experts > 0,
            )
            for level, make in enumerate(levels)
        ]
        self.heads = self._make_heads()

    def encode(self, *inputs: chex.Array, **options: Any) -> dict[str, Any]:
        """Args: what stem or experts take. Returns: {"shared", "own", "gates"}."""
        common = run_stem(self, inputs, options)
        task_inputs = [common] * len(self.outputs)
        z: dict[str, chex.Array] = {}
        for level in self.stack:
            if z:
                count = len(self.outputs)
                task_inputs = [task_mixture(z, t) for t in range(count)]
            z, onward = level(common, task_inputs)
            common = common if onward is None else onward
        return z

    def feature(self, z, task: int) -> chex.Array:
        """The task's mixture at the last level."""
        return task_mixture(z, task)


class CGC(PLE, kw_only=True):
    """Shared and task-specific experts, one level: `PLE` with one maker.

    Attributes:
      outputs: task name -> width of its output.
      head: width -> head module.
      expert: makes an expert.
      shared_experts: S.
      task_experts: N, per task.
      stem: makes what comes before; None = the single input itself.

    **Follows**: Tang et al. 2020, "Progressive Layered Extraction (PLE)", section 4.1.
    """

    expert: Factory
    levels: Sequence[Factory] = ()

    def _num_levels(self) -> int:
        return 1

    def setup(self):
        """Makes stem, experts and heads."""
        if self.levels:
            raise ValueError("CGC: give `expert`; `levels` are PLE's")
        self._make((self.expert,))
