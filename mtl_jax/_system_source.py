"""Reads what a system module says and uses from its source, without importing it."""

import ast
import pathlib
from collections.abc import Iterator
from typing import Any

# Namespaces whose use a SPEC must declare.
PRIMITIVES = (
    "adapters",
    "aggregation",
    "hypernet",
    "kernels",
    "linearize",
    "losses",
    "masking",
    "merging",
    "routing",
    "weighting",
)


def read_spec(path: pathlib.Path) -> dict[str, Any]:
    """The keyword arguments of `SPEC = SystemSpec(...)` in a module.

    Each is a literal, or the name of a module constant that is one.

    Raises:
      ValueError: no SPEC, or an argument that is not a literal.
    """
    body = ast.parse(path.read_text(encoding="utf-8")).body
    constants: dict[str, ast.expr] = {}
    for statement in body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                constants[name] = value
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                constants[name] = value
    call = constants.get("SPEC")
    if not isinstance(call, ast.Call) or call.args:
        raise ValueError(f"{path}: wants SPEC = SystemSpec(name=..., ...)")
    fields = {}
    for keyword in call.keywords:
        value = keyword.value
        if isinstance(value, ast.Name) and value.id in constants:
            value = constants[value.id]
        try:
            fields[str(keyword.arg)] = ast.literal_eval(value)
        except ValueError as error:
            raise ValueError(
                f"{path}: SPEC.{keyword.arg} must be a literal or a module constant"
            ) from error
    return fields


def _bindings(tree: ast.AST) -> dict[str, str]:
    """Local name -> dotted name, for everything imported from mtl_jax."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "mtl_jax":
                    # `import a.b` binds a; `import a.b as c` binds c to a.b.
                    bound = alias.name if alias.asname else "mtl_jax"
                    names[alias.asname or "mtl_jax"] = bound
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module.split(".")[0] == "mtl_jax":
                for alias in node.names:
                    names[alias.asname or alias.name] = f"{module}.{alias.name}"
    return names


def _dotted(node: ast.expr) -> list[str] | None:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return None
    return [node.id, *reversed(parts)]


def _chains(node: ast.AST) -> Iterator[list[str]]:
    """Longest attribute chains `a.b.c` of every expression."""
    if isinstance(node, ast.Attribute | ast.Name):
        chain = _dotted(node)
        if chain:
            yield chain
            return
    for child in ast.iter_child_nodes(node):
        yield from _chains(child)


def names_used(source: str) -> frozenset[str]:
    """Names of mtl_jax that a module reaches, such as "merging.ties".

    The prefixes `mtl_jax.` and `transforms.` are dropped.
    """
    tree = ast.parse(source)
    bound = _bindings(tree)
    used = set()
    for first, *rest in _chains(tree):
        if first in bound:
            name = ".".join([bound[first], *rest])
            used.add(name.removeprefix("mtl_jax.").removeprefix("transforms."))
    return frozenset(used)


def uses_problems(source: str, uses: tuple[str, ...]) -> list[str]:
    """What is wrong between a SPEC's `uses` and the module's own text.

    Every declared primitive must be reached, and every primitive reached in
    `PRIMITIVES` must be declared, by its name or a prefix of it.
    """

    def covers(declared: str, name: str) -> bool:
        return name == declared or name.startswith(declared + ".")

    used = names_used(source)
    problems = [
        f"uses declares {declared!r}, which the module never reaches"
        for declared in uses
        if not any(covers(declared, name) for name in used)
    ]
    problems += [
        f"the module reaches {name!r}, which uses does not declare"
        for name in sorted(used)
        if name.split(".")[0] in PRIMITIVES
        and "." in name
        and not any(covers(declared, name) for declared in uses)
    ]
    return problems
