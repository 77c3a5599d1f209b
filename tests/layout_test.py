"""The shape of the code base: what may import what, how long, how named."""

import ast
import functools
import importlib
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
    {"_checks", "tree", "order", "catalog", "_system_source"},
    {"kernels"},
    {"transforms"},
    {"models", "losses", "metrics", "data"},
    {"train", "io", "report"},
    {"zoo"},
    {"systems"},
    {"run"},
    {"configs", "cli", "__main__"},
)
PURE = {"_checks", "tree", "order", "kernels", "transforms"}
PURE_IMPORTS = {"jax", "numpy", "optax", "chex", "mtl_jax"} | sys.stdlib_module_names
ALIASES = {  # Names that `mtl_jax` itself resolves lazily.
    name: "transforms"
    for name in (
        "adapters",
        "aggregation",
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
ROOT_TESTS = {"layout", "import", "readme"}

ids = lambda path: str(path.relative_to(ROOT))  # noqa: E731


@functools.cache
def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


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
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def own_layers(path):
    """Layers of mtl_jax that a file imports."""
    for name in imports(path):
        first, _, rest = name.partition(".")
        if first == "mtl_jax" and rest:
            layer = rest.split(".")[0]
            yield ALIASES.get(layer, layer)


@pytest.mark.parametrize("path", PACKAGE, ids=ids)
def test_imports_go_one_way(path):
    layer = layer_of(path)
    if layer == "__init__":
        return
    mine = rank(layer)
    assert mine is not None, f"{layer}: a new layer needs its place in ORDER"
    for other in own_layers(path):
        if other.startswith("__"):
            continue
        assert rank(other) is not None, other
        assert rank(other) <= mine, f"{layer} must not import {other}"


@pytest.mark.parametrize("path", PACKAGE, ids=ids)
def test_pure_layers_import_little(path):
    if layer_of(path) in PURE:
        foreign = {name.split(".")[0] for name in imports(path)} - PURE_IMPORTS
        assert not foreign


@pytest.mark.parametrize("path", PACKAGE, ids=ids)
def test_systems_stand_alone(path):
    if layer_of(path) == "systems" and path.stem != "__init__":
        assert "systems" not in set(own_layers(path))
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("path", PACKAGE + EXPERIMENTS, ids=ids)
def test_forbidden_names(path):
    for name in imports(path):
        assert not any(
            name == bad or name.startswith(f"{bad}.") for bad in FORBIDDEN_IMPORTS
        ), name
    calls = {dotted(n.func) for n in ast.walk(parse(path)) if isinstance(n, ast.Call)}
    assert not calls & FORBIDDEN_CALLS


@pytest.mark.parametrize("path", PACKAGE + TESTS, ids=ids)
def test_file_is_named_for_what_it_holds(path):
    stem = path.stem.strip("_").removesuffix("_test")
    assert stem not in FORBIDDEN_FILES
    assert re.fullmatch(r"[a-z0-9_]+", path.stem)


def code_lines(function):
    """Lines of a function without its docstring."""
    length = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        length -= first.end_lineno - first.lineno + 1
    return length


@pytest.mark.parametrize("path", PACKAGE + TESTS, ids=ids)
def test_lengths(path):
    limit = 400 if path in PACKAGE else 600
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= limit, f"{lines} lines, at most {limit}"
    if path in PACKAGE:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found = code_lines(node)
                assert found <= 60, f"{node.name}: {found} lines without docstring"


@pytest.mark.parametrize("path", TESTS, ids=ids)
def test_tests_mirror_the_package(path):
    inside = path.relative_to(ROOT / "tests")
    assert path.name != "__init__.py", "tests are not a package"
    if path.name == "conftest.py" or inside.parts[0] in CROSSCUTTING:
        return
    assert path.name.endswith("_test.py")
    stem = path.name.removesuffix("_test.py")
    if len(inside.parts) == 1 and stem in ROOT_TESTS:
        return
    folder = ROOT / "mtl_jax" / inside.parent
    assert folder.is_dir(), f"no package {folder.relative_to(ROOT)}"
    here = {p.stem.removeprefix("_") for p in folder.iterdir()}
    here |= {p.stem.removeprefix("_") for p in folder.glob("*/*.py")}
    # `ties_edge_cases_test.py` may share out what is tested of `_ties.py`.
    assert any(stem == name or stem.startswith(f"{name}_") for name in here - {""}), (
        f"nothing in {folder.relative_to(ROOT)} is called {stem}"
    )


@pytest.mark.parametrize("path", TESTS, ids=ids)
def test_tests_do_not_wait(path):
    calls = {dotted(n.func) for n in ast.walk(parse(path)) if isinstance(n, ast.Call)}
    assert "time.sleep" not in calls


def exported():
    for path in PACKAGE:
        for node in parse(path).body:
            match node:
                case ast.Assign(targets=[ast.Name(id="__all__")], value=value):
                    if path == ROOT / "mtl_jax/__init__.py":
                        continue
                    for name in ast.literal_eval(value):
                        yield path, name


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize(
    ("path", "name"), list(exported()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_public_names_exist_and_are_documented(path, name):
    module = importlib.import_module(module_name(path))
    value = getattr(module, name)
    if callable(value) or isinstance(value, type(ast)):
        doc = value.__doc__ or ""
        assert len(doc.split()) >= 3, f"{module.__name__}.{name}"


@pytest.mark.parametrize("path", PACKAGE, ids=ids)
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(parse(path))


@pytest.mark.parametrize(
    "path", [p for p in PACKAGE if layer_of(p) == "transforms"], ids=ids
)
def test_public_transforms_have_a_doctest(path):
    tree = parse(path)
    public = {name for where, name in exported() if where == path}
    if path.stem == "__init__":
        return
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in public:
            assert ">>>" in (ast.get_docstring(node) or ""), f"{node.name}: no doctest"
