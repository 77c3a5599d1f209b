"""Name tables: which foreign tensor is which leaf, and how its axes lie.

A table is data plus two directions. Rules name one tensor per layer by a template,
`encoder.layer.{i}.output.dense.weight <-> layers_{i}/mlp/out/kernel`. Parameters of
scanned backbones (`layers/...` with a leading layer axis) are stacked and split on
the way, so one table serves both.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from mtl_jax import tree as tree_lib
from mtl_jax.io.names._leaves import (
    HostLeaf,
    described,
    empty,
    placed,
    read_into,
)

# A stack may lie inside of a larger tree, such as `text/layers/...`.
_SCANNED = re.compile(r"((?:.*/)?)layers/(.*)")


class Hook(NamedTuple):
    """Axis conventions of one kind of tensor, both ways.

    Attributes:
      load: foreign array -> our array; a view or a copy.
      save: the inverse.
      ndim: number of axes of the foreign array, or None for any.
    """

    load: Callable[[np.ndarray], np.ndarray]
    save: Callable[[np.ndarray], np.ndarray]
    ndim: int | None = None


AS_IS = Hook(lambda x: x, lambda x: x)
# Linear weights: [out, in] there, [in, out] here.
TRANSPOSE = Hook(np.transpose, np.transpose, 2)
# Leading unit axes there, none here.
LEADING_1 = Hook(lambda x: x[0], lambda x: x[None], 3)
LEADING_1_1 = Hook(lambda x: x[0, 0], lambda x: x[None, None], 3)


def patch_kernel(channels: int = 3) -> Hook:
    """Convolution [D, C, p, p] there, Dense kernel [p * p * C, D] here."""

    def load(x):
        return x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])

    def save(x):
        side = round((x.shape[0] / channels) ** 0.5)
        return x.reshape(side, side, channels, -1).transpose(3, 2, 0, 1)

    return Hook(load, save, 4)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row: a foreign name and a path, either both with `{i}` or neither.

    Attributes:
      name: name in the file.
      path: path of the leaf in the unrolled parameters.
      hook: axis conventions.
      optional: the tensor may be absent from the file.
    """

    name: str
    path: str
    hook: Hook = AS_IS
    optional: bool = False

    @functools.cached_property
    def _name_regex(self):
        return re.compile(re.escape(self.name).replace(r"\{i\}", r"(\d+)"))

    @functools.cached_property
    def _path_regex(self):
        return re.compile(re.escape(self.path).replace(r"\{i\}", r"(\d+)"))


def linear(name: str, path: str) -> tuple[Rule, Rule]:
    """Weight and bias of a linear layer."""
    return (
        Rule(f"{name}.weight", f"{path}/kernel", TRANSPOSE),
        Rule(f"{name}.bias", f"{path}/bias"),
    )


def norm(name: str, path: str) -> tuple[Rule, Rule]:
    """Weight and bias of a layer norm."""
    return (
        Rule(f"{name}.weight", f"{path}/scale"),
        Rule(f"{name}.bias", f"{path}/bias"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NameTable:
    """The tensors of one kind of checkpoint.

    Attributes:
      model: name of the backbone for `models.build`.
      rules: the rows; names and paths are unique.
      aliases: (regex, replacement) pairs, applied in order to every foreign name
        before it is looked up.
      ignore: regular expressions of foreign names that are dropped on purpose, such
        as heads; matched in full after the aliases.
      options: parsed `config.json` -> options of `models.build`.
    """

    model: str
    rules: tuple[Rule, ...]
    aliases: tuple[tuple[str, str], ...] = ()
    ignore: tuple[str, ...] = ()
    options: Callable[[Mapping[str, Any]], dict[str, Any]]

    def load(
        self,
        tensors: Mapping[str, Any],
        like: Any = None,
        *,
        dtype: DTypeLike | None = None,
        where: str = "NameTable.load",
    ) -> dict[str, Any]:
        """Foreign tensors to parameters.

        No tensor is read before its leaf is made, and a CPU device takes the buffer of
        a leaf as it is: beside the tree, the host holds one leaf and a few MiB, or for
        a tensor whose axes are moved one more tensor.

        Args:
          tensors: name -> array. A mapping may have the methods `shape(name)`,
            `dtype(name)` and `read_into(name, out)`, as files of encoded tensors do.
          like: parameters or their `jax.eval_shape`, unrolled or scanned. Its
            structure, shapes and dtypes are those of the result, and its shardings
            where it has any. None: the unrolled parameters that the file holds, in
            its dtypes.
          dtype: what floating-point leaves are cast to as they are read, whatever the
            file and `like` have; None = as they say.
          where: what an error begins with.

        Returns:
          A nested dict of JAX arrays.

        Raises:
          ValueError: listing every tensor that is missing, unexpected or of the
            wrong shape.
        """
        found, problems = self._match(tensors)
        wanted = None if like is None else _unrolled(like)
        problems = self._missing(found, wanted) + problems
        leaves = {}
        for path, (name, rule) in found.items():
            if wanted is not None and path not in wanted:
                if not rule.optional:
                    problems.append(f"unexpected: {name!r} for {path!r}")
                continue
            foreign, problem = described(tensors, name, rule.hook)
            if foreign is None:
                problems.append(problem)
                continue
            leaves[path] = foreign
            if wanted is not None:
                problems += _differs(name, foreign, path, wanted[path])
        if problems:
            raise ValueError(f"{where}: " + "; ".join(problems))

        def fill(path, out):
            name, rule = found[path]
            read_into(out, tensors, name, rule.hook)

        def leaf_of(path, leaf):
            """One buffer, filled layer by layer where layers are stacked."""
            out = empty(path, leaf.shape, _dtype_of(leaf, dtype))
            if match := _SCANNED.fullmatch(path):
                for i in range(len(out)):
                    fill(f"{match[1]}layers_{i}/{match[2]}", out[i])
            else:
                fill(path, out)
            return placed(out, getattr(leaf, "sharding", None))

        if like is None:
            return tree_of({path: leaf_of(path, x) for path, x in leaves.items()})
        return tree_lib.map_with_path(leaf_of, like)

    def save(self, params: Any) -> dict[str, HostLeaf]:
        """Parameters to foreign tensors, read lazily one by one.

        Args:
          params: parameters, unrolled or scanned.

        Returns:
          name -> array-like with shape and dtype.

        Raises:
          ValueError: listing every leaf that no rule covers.
        """
        out, uncovered = {}, []
        for path, leaf in _unrolled(params).items():
            hit = self._rule_of_path(path)
            if hit is None:
                uncovered.append(path)
                continue
            name, hook = hit[0], hit[1].hook
            out[name] = HostLeaf(
                hook.save(np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)).shape,
                np.dtype(leaf.dtype),
                lambda leaf=leaf, hook=hook: hook.save(leaf.read()),
            )
        if uncovered:
            raise ValueError(f"NameTable.save: no rule for {', '.join(uncovered)}")
        return out

    def _match(self, tensors):
        """Returns ({path: (foreign name, rule)}, problems)."""
        found, problems = {}, []
        for name in tensors:
            canonical = name
            for regex, replacement in self.aliases:
                canonical = re.sub(regex, replacement, canonical)
            hit = self._rule_of_name(canonical)
            if hit is None:
                if not any(re.fullmatch(regex, canonical) for regex in self.ignore):
                    problems.append(f"unexpected: {name!r}")
            elif hit[0] in found:
                first = found[hit[0]][0]
                problems.append(f"twice the same tensor: {first!r} and {name!r}")
            else:
                found[hit[0]] = (name, hit[1])
        return found, problems

    def _rule_of_name(self, name):
        for rule in self.rules:
            if match := rule._name_regex.fullmatch(name):
                return _fill(rule.path, match), rule
        return None

    def _rule_of_path(self, path):
        for rule in self.rules:
            if match := rule._path_regex.fullmatch(path):
                return _fill(rule.name, match), rule
        return None

    def _missing(self, found, wanted):
        """Without `wanted`, every rule must hold for every layer that occurs."""
        if wanted is None:
            needed = [
                rule.path.replace("{i}", str(i))
                for rule in self.rules
                if not rule.optional
                for i in range(_depth(rule.path, found))
            ]
        else:
            needed = list(wanted)
        problems = []
        for path in needed:
            if path not in found:
                hit = self._rule_of_path(path)
                name = repr(hit[0]) if hit else "no tensor of this table"
                problems.append(f"missing: {name} for {path!r}")
        return problems


def tree_of(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dict from paths; {"a/b": x} -> {"a": {"b": x}}.

    Raises:
      ValueError: if a path runs through a leaf.
    """
    out: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = out
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"tree_of: {path!r} runs through a leaf")
        if last in node:
            raise ValueError(f"tree_of: {path!r} is both a leaf and a node")
        node[last] = leaf
    return out


def _fill(template, match):
    return template.replace("{i}", str(int(match[1]))) if match.groups() else template


def _dtype_of(leaf, dtype):
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return np.dtype(leaf.dtype) if dtype is None or not floating else jnp.dtype(dtype)


def _depth(template, paths):
    """Layers that occur in the stack of a template; 1 where there is none."""
    stack, *inner = template.split("{i}")
    if not inner:
        return 1
    layers = re.compile(re.escape(stack) + r"(\d+)/")
    return 1 + max((int(m[1]) for p in paths if (m := layers.match(p))), default=0)


def _unrolled(params):
    """{unrolled path: HostLeaf}; `layers/...` is split along its first axis."""
    out = {}
    for key_path, leaf in jax.tree.leaves_with_path(params):
        path = tree_lib.path_str(key_path)
        shape, dtype = tuple(leaf.shape), leaf.dtype
        if match := _SCANNED.fullmatch(path):
            for i in range(shape[0]):
                out[f"{match[1]}layers_{i}/{match[2]}"] = HostLeaf(
                    shape[1:], dtype, lambda leaf=leaf, i=i: np.asarray(leaf[i])
                )
        else:
            out[path] = HostLeaf(shape, dtype, lambda leaf=leaf: np.asarray(leaf))
    return out


def _differs(name, array, path, wanted):
    if array.shape != wanted.shape:
        return [
            f"wrong shape: {name!r} gives {array.shape} for {path!r}, which is "
            f"{wanted.shape}"
        ]
    inexact = [jnp.issubdtype(x.dtype, jnp.inexact) for x in (array, wanted)]
    if inexact[0] != inexact[1]:
        return [f"wrong dtype: {name!r} is {array.dtype}, {path!r} is {wanted.dtype}"]
    return []
