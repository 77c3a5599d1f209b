"""From a recipe and its opened models to one job per tensor."""

import collections
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from mtl_jax.checkpoints import _layers, mergekit
from mtl_jax.checkpoints._inputs import Checkpoint, Inputs
from mtl_jax.checkpoints._schema import Input, Model, Module, Recipe, Slice
from mtl_jax.checkpoints.rules import Job, Rule, check, is_copied
from mtl_jax.checkpoints.source import TensorSpec

__all__ = ["Plan", "make_plan"]

_TYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
# mergekit's names for parts of a model -> words in names of tensors.
_MODULE_WORDS = {
    "text_decoder": ("language_model", "text_model"),
    "vision_tower": ("vision_tower", "visual", "vision_model"),
}
# Parts that what belongs to no other part goes with.
_MAIN = ("text_decoder", "decoder", "shared")
_SHOWN = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a merge will do.

    Attributes:
      recipe: what was asked for.
      inputs: the models.
      jobs: one per tensor of the output, in its order.
      config: config.json of the output; None if the donor has none.
      notes: what the user should know.
    """

    recipe: Recipe
    inputs: Inputs
    jobs: tuple[Job, ...]
    config: dict[str, Any] | None
    notes: tuple[str, ...]

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Tensors of the output."""
        return {job.name: TensorSpec(*_pair(job.spec)) for job in self.jobs}

    @property
    def read_bytes(self) -> int:
        """Bytes of all inputs, each read once."""
        return sum(
            TensorSpec(*_pair(view.spec)).nbytes
            for job in self.jobs
            for view in job.views
        )

    @property
    def write_bytes(self) -> int:
        """Bytes of the output's tensors."""
        return sum(spec.nbytes for spec in self.specs.values())


def _pair(spec: Any) -> tuple[tuple[int, ...], np.dtype]:
    return tuple(spec.shape), np.dtype(spec.dtype)


def make_plan(recipe: Recipe, inputs: Inputs, dtype: str | None = None) -> Plan:
    """One job per tensor, every one checked; nothing is read.

    Args:
      recipe: what to do.
      inputs: its models, opened.
      dtype: of the output; None: as the recipe says, else that of the donor's tensors.

    Raises:
      ValueError: for models whose tensors differ, listing tensors, shapes and models;
        for layers that are not there; for options that are missing or do not fit.
    """
    return _Planner(recipe, inputs, dtype).plan()


class _Planner:
    """Collects jobs, and everything in which the models differ."""

    def __init__(self, recipe: Recipe, inputs: Inputs, dtype: str | None):
        self._recipe = recipe
        self._inputs = inputs
        self._rule: Rule = mergekit.find_rule(recipe.method, recipe.name)
        mergekit.check_parameters(recipe, self._rule)
        dtype = dtype or recipe.out_dtype or recipe.dtype
        self._dtype = _TYPES[dtype] if dtype else None
        self._jobs: dict[str, Job] = {}
        self._missing: dict[str, list[str]] = collections.defaultdict(list)
        self._shapes: list[str] = []
        self._rows_differ = False
        self._notes: list[str] = []
        self._config = dict(inputs.donor.config) or None

    def plan(self) -> Plan:
        for module, names in self._modules():
            if module.models:
                self._whole(module, names)
            else:
                self._sliced(module, names)
        self._refuse()
        order = {name: i for i, name in enumerate(self._inputs.donor.tensors)}
        jobs = sorted(
            self._jobs.values(), key=lambda job: order.get(job.name, len(order))
        )
        return Plan(
            recipe=self._recipe,
            inputs=self._inputs,
            jobs=tuple(jobs),
            config=self._config,
            notes=(*self._inputs.notes, *self._notes),
        )

    def _at(self, model: Model) -> Checkpoint:
        return self._inputs.checkpoints[model]

    def _modules(self) -> Iterator[tuple[Module, set[str]]]:
        """Modules and the tensors that each covers."""
        every = {n for c in self._inputs.checkpoints.values() for n in c.tensors}
        modules = self._recipe.modules
        if len(modules) == 1 and modules[0].name in (None, "default"):
            yield modules[0], every
            return
        covered = {}
        for module in modules:
            words = _MODULE_WORDS.get(str(module.name), (str(module.name),))
            covered[module.name] = {
                n for n in every if any(f".{word}." in f".{n}." for word in words)
            }
        rest = every.difference(*covered.values())
        main = next((name for name in _MAIN if name in covered), None)
        if rest and main is None:
            raise ValueError(
                f"{self._recipe.name}: modules: {_some(sorted(rest))} belong to none "
                f"of {', '.join(map(str, covered))}; a module is named by a part of "
                "the names of its tensors"
            )
        if main is not None:
            covered[main] |= rest
        for module in modules:
            yield module, covered[module.name]

    def _whole(self, module: Module, names: set[str]) -> None:
        """Whole models: every tensor from the tensor of the same name."""
        sources = list(module.models)
        base = self._recipe.base
        if base and base not in [source.model for source in sources]:
            sources.append(Input(base, {}, None, "base_model"))
            if not self._rule.takes_base:
                self._notes.append(
                    f"{self._rule.name} takes no base: {base} is one more model"
                )
        part = Slice(tuple(sources), None, {}, "models")
        scope = mergekit.Scope(self._recipe, module, part)
        stacks = self._at(sources[0].model).stacks
        if not stacks and mergekit.has_gradient(self._recipe):
            raise ValueError(
                f"{self._recipe.name}: lists of values change over layers; "
                f"{self._no_layers(sources[0].model)}"
            )
        every = dict.fromkeys(n for s in sources for n in self._at(s.model).tensors)
        for name in every:
            if name in names:
                at = _layers.place(name, stacks)
                t = _position(at.layer, at.stack.count) if at else 0.0
                self._add(scope, name, [(source, name) for source in sources], t)

    def _sliced(self, module: Module, names: set[str]) -> None:
        """Slices of layers, behind each other; the rest from the outer slices."""
        donor = self._inputs.donor
        stack = self._stack(donor, names)
        layers: list[tuple[Mapping[str, Any], int]] = []
        for part in module.slices:
            first, last = part.sources[0].layers or (0, 0)
            scope = mergekit.Scope(self._recipe, module, part)
            for i in range(last - first):
                at = [(s, (s.layers or (0, 0))[0] + i) for s in part.sources]
                self._layer(scope, stack, len(layers), at, _position(i, last - first))
                layers.append((self._at(part.sources[0].model).config, first + i))
        self._outside(module, stack, names)
        if self._config is not None:
            self._config = _layers.restack_config(
                self._config, stack, donor.stacks, layers
            )

    def _stack(self, checkpoint: Checkpoint, names: set[str]) -> _layers.Stack:
        found = [
            s for s in checkpoint.stacks if any(n.startswith(s.prefix) for n in names)
        ]
        if len(found) != 1:
            shown = ", ".join(f"{s.prefix}0 to {s.count - 1}" for s in found)
            found = f"{checkpoint.model} has {shown}: give each a module"
            raise ValueError(
                f"{self._recipe.name}: slices want one stack of layers; "
                f"{found if shown else self._no_layers(checkpoint.model)}"
            )
        return found[0]

    def _no_layers(self, model: Model) -> str:
        checkpoint = self._at(model)
        found = _layers.find_stacks(checkpoint.tensors, None)
        shown = ", ".join(f"{s.prefix}0 to {s.count - 1}" for s in found) or "none"
        counts = ", ".join(
            f"{'.'.join(path)} {n}"
            for path, n in _layers.layer_counts(checkpoint.config).items()
        )
        says = f", but its config.json says {counts}" if counts else ""
        return f"the tensors of {model} show {shown}{says}"

    @functools.cached_property
    def _layer_names(self) -> dict[tuple[Model, str, int], list[str]]:
        """Suffixes of the tensors of every layer of every stack."""
        out = collections.defaultdict(list)
        for model, checkpoint in self._inputs.checkpoints.items():
            stacks = checkpoint.stacks
            for name in checkpoint.tensors:
                at = _layers.place(name, stacks)
                if at:
                    out[model, at.stack.prefix, at.layer].append(at.suffix)
        return dict(out)

    def _layer(
        self,
        scope: mergekit.Scope,
        stack: _layers.Stack,
        new: int,
        at: Sequence[tuple[Input, int]],
        t: float,
    ) -> None:
        """One layer of the output, from a layer of each source."""
        suffixes: dict[str, None] = {}
        for source, layer in at:
            found = self._layer_names.get((source.model, stack.prefix, layer))
            if found is None:
                raise ValueError(
                    f"{self._recipe.name}: {source.where}: {source.model} has no "
                    f"layer {stack.prefix}{layer}"
                )
            suffixes |= dict.fromkeys(found)
        for suffix in suffixes:
            inner = [(s, f"{stack.prefix}{layer}.{suffix}") for s, layer in at]
            self._add(scope, f"{stack.prefix}{new}.{suffix}", inner, t)

    def _outside(self, module: Module, stack: _layers.Stack, names: set[str]) -> None:
        """Tensors outside of the layers: before them, of the first slice's models."""
        ends = {"before": module.slices[0], "behind": module.slices[-1]}
        every = dict.fromkeys(
            name
            for part in ends.values()
            for source in part.sources
            for name in self._at(source.model).tensors
            if name in names and not name.startswith(stack.prefix)
        )
        alike = [{s.model for s in part.sources} for part in ends.values()]
        for name in every:
            side = _layers.side(name)
            if side is None and alike[0] != alike[1]:
                raise ValueError(
                    f"{self._recipe.name}: whether {name!r} stands before the layers "
                    "or behind them cannot be told, and the first and the last slice "
                    "have different sources"
                )
            part = ends[side or "before"]
            scope = mergekit.Scope(self._recipe, module, part)
            self._add(scope, name, [(s, name) for s in part.sources], 0.0)

    def _add(
        self,
        scope: mergekit.Scope,
        name: str,
        sources: Sequence[tuple[Input, str]],
        t: float,
    ) -> None:
        """The job of one tensor; notes what its models do not have in common."""
        found = {}
        for source, inner in sources:
            tensors = self._at(source.model).tensors
            if inner in tensors:
                found[source.model] = tensors[inner]
            else:
                self._missing[str(source.model)].append(inner)
        if len(found) < len(sources):
            return
        base = scope.part.base or self._recipe.base
        as_base = base in found and self._rule.takes_base
        experts = [s for s in sources if not (as_base and s[0].model == base)]
        donor, inner = next((s for s in sources if s[0].model == base), sources[0])
        stored = self._at(donor.model).source.stored.get(inner)
        shape, dtype = _pair(found[donor.model].spec)
        if any(tuple(view.spec.shape) != shape for view in found.values()):
            shapes = (f"{list(v.spec.shape)} in {m}" for m, v in found.items())
            self._shapes.append(f"{name!r} is {', '.join(shapes)}")
            self._rows_differ |= len(shape) > 1 and all(
                tuple(view.spec.shape[1:]) == shape[1:] for view in found.values()
            )
            return
        job = Job(
            name=name,
            spec=TensorSpec(shape, stored.dtype if stored else dtype),
            rule=self._rule.name,
            base=found[base] if as_base and base else None,
            experts=tuple(found[s.model] for s, _ in experts),
            options=mergekit.options_for(scope, self._rule, name, experts, t),
            models=tuple(str(s.model) for s, _ in experts),
        )
        if self._dtype is not None and not is_copied(job):
            job = dataclasses.replace(job, spec=TensorSpec(shape, self._dtype))
        check(job)
        self._jobs[name] = job

    def _refuse(self) -> None:
        """Raises for everything in which the models differ."""
        problems = [
            f"{model} lacks {_some(names)}" for model, names in self._missing.items()
        ]
        problems += self._shapes[:_SHOWN]
        if len(self._shapes) > _SHOWN:
            problems.append(f"{len(self._shapes) - _SHOWN} more shapes differ")
        if not problems:
            return
        rows = self._rows_differ and self._recipe.tokenizer is None
        hint = "; if rows are tokens, tokenizer_source says how they match"
        raise ValueError(
            f"{self._recipe.name}: the models differ: {'; '.join(problems)}"
            + (hint if rows else "")
        )


def _position(index: int, count: int) -> float:
    """Where a layer stands among `count`, in [0, 1]; a single one at the end."""
    return index / (count - 1) if count > 1 else 1.0


def _some(names: Iterable[str]) -> str:
    names = list(dict.fromkeys(names))
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    more = len(names) - _SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
