"""The shape of the code base: what may import what, how long, how named."""

import ast
import functools
import importlib
import inspect
import pathlib
import re
import sys

import pytest

pytestmark = pytest.mark.fast

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "mtl_jax").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.py"))

# Each layer may import those before it, and itself.
ORDER = (
    {
        "_checks",
        "_apart",
        "_contractions",
        "_cutoff",
        "_lapack",
        "_selection",
        "_strides",
        "_wide",
        "tree",
        "order",
        "placement",
        "catalog",
        "_system_source",
    },
    {"kernels"},
    {"transforms"},
    {"models", "losses", "metrics", "data"},
    {"decoding"},
    {"train", "io", "report"},
    {"checkpoints"},
    {"zoo", "multitask"},
    {"systems"},
    {"run"},
    {"host", "configs", "cli_checkpoints", "cli_arguments", "cli", "__main__"},
)
PURE = {
    "_checks",
    "_apart",
    "_contractions",
    "_cutoff",
    "_lapack",
    "_selection",
    "_strides",
    "_wide",
    "tree",
    "order",
    "placement",
    "kernels",
    "transforms",
}
PURE_IMPORTS = {
    "jax",
    "jaxlib",
    "numpy",
    "optax",
    "chex",
    "mtl_jax",
} | sys.stdlib_module_names
ALIASES = {  # Names that `mtl_jax` itself resolves lazily.
    name: "transforms"
    for name in (
        "adapters",
        "aggregation",
        "bilevel",
        "hypernet",
        "linearize",
        "masking",
        "merging",
        "routing",
        "weighting",
    )
}
FORBIDDEN_FILES = {"utils", "common", "helpers", "misc"}
FORBIDDEN_IMPORTS = ("jax._src", "tensorflow", "torch", "keras")
FORBIDDEN_CALLS = {"pmap", "jax.pmap", "pickle.load", "pickle.loads", "torch.load"}
# Test folders that cut across the package instead of mirroring it.
CROSSCUTTING = {"conformance", "sharding", "integration", "reference"}
# Files that do: about the package as a whole, or about every kernel at once.
CROSSCUTTING_FILES = {
    "layout_test.py",
    "import_test.py",
    "readme_test.py",
    "kernels/compile_test.py",
}


@functools.cache
def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path):
    return str(path.relative_to(ROOT))


def layer_of(path):
    return path.relative_to(ROOT / "mtl_jax").parts[0].removesuffix(".py")


def rank(layer):
    for number, group in enumerate(ORDER):
        if layer in group:
            return number
    return None


def dotted(node):
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def imports(path):
    """Dotted names of everything imported, wherever in the file."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def own_layers(path):
    """Layers of mtl_jax that a file imports."""
    for name in imports(path):
        first, _, rest = name.partition(".")
        if first == "mtl_jax" and rest:
            layer = rest.split(".")[0]
            yield ALIASES.get(layer, layer)


def test_imports_go_one_way():
    problems = []
    for path in PACKAGE:
        layer = layer_of(path)
        if layer == "__init__":
            continue
        for other in (layer, *own_layers(path)):
            if other.startswith("__"):
                continue
            if rank(other) is None:
                problems.append(f"{name_of(path)}: {other} has no place in ORDER")
            elif rank(other) > rank(layer):
                problems.append(f"{name_of(path)}: {layer} must not import {other}")
    assert not problems


def test_pure_layers_import_little():
    problems = [
        f"{name_of(path)}: {name}"
        for path in PACKAGE
        if layer_of(path) in PURE
        for name in imports(path)
        if name.split(".")[0] not in PURE_IMPORTS
    ]
    assert not problems


def spec_lines(path):
    """Length of the statement `SPEC = ...`, which is data and not counted."""
    for node in parse(path).body:
        match node:
            case ast.Assign(targets=[ast.Name(id="SPEC")]):
                return node.end_lineno - node.lineno + 1
    return 0


def test_systems_stand_alone():
    for path in PACKAGE:
        if layer_of(path) == "systems" and path.stem != "__init__":
            assert "systems" not in set(own_layers(path)), name_of(path)
            length = len(path.read_text(encoding="utf-8").splitlines())
            length -= spec_lines(path)
            assert length <= 200, f"{name_of(path)}: {length} lines beside SPEC"


def test_forbidden_names():
    problems = []
    for path in PACKAGE + EXPERIMENTS:
        # Benches time the peers, in the same run.
        peers = {"torch"} if path.is_relative_to(ROOT / "experiments/bench") else set()
        problems += [
            f"{name_of(path)}: imports {name}"
            for name in imports(path)
            for bad in set(FORBIDDEN_IMPORTS) - peers
            if f"{name}.".startswith(f"{bad}.")
        ]
        found = calls(path) & FORBIDDEN_CALLS
        problems += [f"{name_of(path)}: calls {call}" for call in found]
    assert not problems


def calls(path):
    return {dotted(n.func) for n in ast.walk(parse(path)) if isinstance(n, ast.Call)}


def test_tests_do_not_wait():
    assert not [name_of(path) for path in TESTS if "time.sleep" in calls(path)]


def test_files_are_named_for_what_they_hold():
    for path in PACKAGE + TESTS:
        stem = path.stem.strip("_").removesuffix("_test")
        assert stem not in FORBIDDEN_FILES, name_of(path)
        assert re.fullmatch(r"[a-z0-9_]+", path.stem), name_of(path)


def code_lines(function):
    """Lines of a function without its docstring."""
    length = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        length -= first.end_lineno - first.lineno + 1
    return length


def test_lengths():
    problems = []
    for path in PACKAGE + TESTS:
        limit = 400 if path in PACKAGE else 600
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > limit:
            problems.append(f"{name_of(path)}: {lines} lines, at most {limit}")
        for node in ast.walk(parse(path)) if path in PACKAGE else ():
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = code_lines(node)
                if lines > 60:
                    problems.append(f"{name_of(path)}: {node.name} has {lines} lines")
    assert not problems


def mirrors(path):
    """Whether a test file has a module or package of its name beside it."""
    inside = path.relative_to(ROOT / "tests")
    if str(inside) in CROSSCUTTING_FILES or inside.parts[0] in CROSSCUTTING:
        return True
    folder = ROOT / "mtl_jax" / inside.parent
    if not path.name.endswith("_test.py") or not folder.is_dir():
        return False
    stem = path.name.removesuffix("_test.py")
    files = [*folder.iterdir(), *folder.glob("*/*.py")]
    names = {file.stem.removeprefix("_") for file in files} - {""}
    # `ties_edge_cases_test.py` may share out what is tested of `_ties.py`.
    return any(stem == name or stem.startswith(f"{name}_") for name in names)


def test_tests_mirror_the_package():
    files = [path for path in TESTS if path.name != "conftest.py"]
    assert not [name_of(path) for path in files if path.name == "__init__.py"]
    assert not [name_of(path) for path in files if not mirrors(path)]


@functools.cache
def exported():
    """Pairs of a module's path and a name in its `__all__`."""
    found = []
    for path in PACKAGE:
        for node in parse(path).body:
            match node:
                case ast.Assign(targets=[ast.Name(id="__all__")], value=value):
                    if path != ROOT / "mtl_jax/__init__.py":
                        found += [(path, name) for name in ast.literal_eval(value)]
    return found


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_public_names_exist_and_are_documented():
    problems = []
    for path, name in exported():
        value = getattr(importlib.import_module(module_name(path)), name)
        documented = callable(value) or inspect.ismodule(value)
        if documented and len((value.__doc__ or "").split()) < 3:
            problems.append(f"{module_name(path)}.{name}")
    assert not problems


def test_every_module_says_what_it_is():
    assert not [name_of(p) for p in PACKAGE if not ast.get_docstring(parse(p))]


def test_public_transforms_have_a_doctest():
    problems = []
    for path in PACKAGE:
        if layer_of(path) != "transforms" or path.stem == "__init__":
            continue
        public = {name for where, name in exported() if where == path}
        for package, name in exported():
            if package == path.with_name("__init__.py"):
                public.add(name)
        functions = [n for n in parse(path).body if isinstance(n, ast.FunctionDef)]
        problems += [
            f"{name_of(path)}: {node.name}"
            for node in functions
            if node.name in public and ">>>" not in (ast.get_docstring(node) or "")
        ]
    assert not problems
