"""Parameters of a recipe for one tensor, found as mergekit finds them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mtl_jax.checkpoints import _yaml
from mtl_jax.checkpoints._schema import (
    Conditional,
    Input,
    Module,
    Recipe,
    Scalar,
    Setting,
    Slice,
)
from mtl_jax.checkpoints.rules import REQUIRED, RULES, Rule

__all__ = [
    "Scope",
    "check_parameters",
    "evaluate",
    "find_rule",
    "has_gradient",
    "options_for",
]

# mergekit's switch for the type of its masks.
_MASKS = frozenset(
    ("breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della")
    + ("della_linear", "sce", "task_arithmetic", "ties")
)


def find_rule(method: str, where: str) -> Rule:
    """The rule that a recipe names.

    Raises:
      ValueError: naming the nearest one.
    """
    if method not in RULES:
        raise ValueError(
            f"{where}: unknown merge_method {method!r}; {_yaml.nearest(method, RULES)}"
        )
    return RULES[method]


def _has_no_effect(method: str, name: str) -> bool:
    """What mergekit reads for a method, and which changes no value of its output."""
    if name == "int8_mask":
        return method in _MASKS
    return (method, name) == ("task_arithmetic", "density")


def evaluate(setting: Setting, tensor: str, t: float) -> Scalar | None:
    """The value of a setting for a tensor.

    A list of numbers is a gradient: linear between its points, which lie evenly from
    the first layer (t = 0) to the last (t = 1). A list with words or flags changes in
    steps. Of
    values with filters, the first whose filter is part of the tensor's name is taken.

    Args:
      setting: a value, a gradient, or values with filters.
      tensor: name.
      t: where its layer stands, in [0, 1]; 0 outside of layers.

    Returns:
      The value; None if no filter fits.

    >>> evaluate((0.0, 0.5, 1.0), "h.1.w", 0.25)
    0.25
    """
    if not isinstance(setting, tuple):
        return setting
    if isinstance(setting[0], Conditional):
        for entry in setting:
            if isinstance(entry, Conditional) and _fits(entry.filter, tensor):
                return evaluate(entry.value, tensor, t)
        return None
    points = [point for point in setting if not isinstance(point, Conditional)]
    place = t * (len(points) - 1)
    low = int(place)
    if any(isinstance(point, str | bool) for point in points):
        return points[low]
    high = min(low + 1, len(points) - 1)
    rest = place - low
    return (1 - rest) * float(points[low]) + rest * float(points[high])


def has_gradient(recipe: Recipe) -> bool:
    """Whether any value of a recipe changes over layers."""

    def changes(setting: Setting) -> bool:
        if not isinstance(setting, tuple):
            return False
        return any(
            not isinstance(entry, Conditional) or changes(entry.value)
            for entry in setting
        )

    levels = [recipe.parameters]
    for module in recipe.modules:
        levels += [module.parameters, *(e.parameters for e in module.models)]
        for part in module.slices:
            levels += [part.parameters, *(e.parameters for e in part.sources)]
    return any(changes(setting) for level in levels for setting in level.values())


def _fits(wanted: str | None, tensor: str) -> bool:
    return wanted is None or wanted == "*" or wanted in tensor


class Scope(NamedTuple):
    """Where a parameter is looked up: slice, then module, then the recipe."""

    recipe: Recipe
    module: Module
    part: Slice

    def find(
        self, name: str, tensor: str, t: float, source: Input | None = None
    ) -> Scalar | None:
        """The innermost value for a tensor, of one source or of all."""
        levels = [source.parameters] if source else []
        levels += [self.part.parameters, self.module.parameters, self.recipe.parameters]
        for level in levels:
            if name in level:
                value = evaluate(level[name], tensor, t)
                if value is not None:
                    return value
        return None


def check_parameters(recipe: Recipe, rule: Rule) -> None:
    """Refuses parameters that the rule does not have, at every level.

    Raises:
      ValueError: naming the parameter, its place and the nearest known one.
    """
    shared = [("parameters", recipe.parameters)]
    own = []
    for module in recipe.modules:
        shared.append((f"modules.{module.name}.parameters", module.parameters))
        own += module.models
        for part in module.slices:
            shared.append((f"{part.where}.parameters", part.parameters))
            own += part.sources
    for where, parameters in shared:
        for name in parameters:
            _known(recipe, rule, name, where)
    for source in own:
        where = f"{source.where}.parameters"
        for name in source.parameters:
            known = _known(recipe, rule, name, where)
            if known and not rule.options[name].per_model:
                raise ValueError(
                    f"{recipe.name}: {where}.{name}: {rule.name} has one {name} for "
                    "all models; it goes under the recipe's parameters"
                )


def _known(recipe: Recipe, rule: Rule, name: str, where: str) -> bool:
    if name in rule.options:
        return True
    if _has_no_effect(rule.name, name):
        return False
    raise ValueError(
        f"{recipe.name}: {where}: {rule.name} has no parameter {name!r}; "
        f"{_yaml.nearest(name, rule.options)}"
    )


def options_for(
    scope: Scope,
    rule: Rule,
    tensor: str,
    experts: Sequence[tuple[Input, str]],
    t: float,
) -> Mapping[str, Any]:
    """Options of one output tensor.

    Args:
      scope: where to look.
      rule: what merges it.
      tensor: name of the output.
      experts: per expert, the input and the name of its tensor.
      t: where the output's layer stands.

    Returns:
      Option -> value, or one value per expert.

    Raises:
      ValueError: for a value that is missing or of the wrong kind, by name.
    """
    out = {}
    for name, option in rule.options.items():
        if not option.per_model:
            found = scope.find(name, tensor, t)
            out[name] = _value(scope, rule, name, found, tensor)
            continue
        out[name] = tuple(
            _value(scope, rule, name, scope.find(name, inner, t, source), inner, source)
            for source, inner in experts
        )
    return out


def _value(
    scope: Scope,
    rule: Rule,
    name: str,
    value: Scalar | None,
    tensor: str,
    source: Input | None = None,
) -> Any:
    option = rule.options[name]
    if value is None:
        if option.default is REQUIRED:
            of = f" of {source.model}" if source else ""
            raise ValueError(
                f"{scope.recipe.name}: {rule.name}: {name}{of} is not given for "
                f"{tensor!r}"
            )
        return option.default
    if option.kind is bool and value in (0, 1):
        return bool(value)
    if isinstance(value, float) and option.kind is int and value.is_integer():
        return int(value)
    return value
