import dataclasses
import importlib
import pathlib
import re

import pytest

from mtl_jax import _system_source, catalog

pytestmark = pytest.mark.fast

ROOT = pathlib.Path(__file__).parents[1]
WORKING = [e for e in catalog.entries() if e.status == "working"]
FIELDS = {
    "name": "demo",
    "title": "A demo",
    "year": 2020,
    "family": "merging",
    "kind": "posthoc",
    "reference": "@misc{demo}",
}


def test_knows_every_system_once():
    names = [entry.name for entry in catalog.entries()]
    assert len(names) == len(set(names)) == 82
    assert {entry.spec.family for entry in catalog.entries()} == set(catalog.FAMILIES)


@pytest.mark.parametrize("entry", catalog.entries(), ids=lambda e: e.name)
def test_row_is_complete(entry):
    spec = entry.spec
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", spec.name)
    assert 2015 <= spec.year <= 2030
    assert spec.title and entry.short and spec.summary.endswith(".")
    assert len(spec.summary) < 160 and spec.summary.count(".") == 1
    assert spec.reference.startswith("@")
    assert spec.title in " ".join(spec.reference.split())
    assert spec.reference.count("{") == spec.reference.count("}")


def test_every_system_file_is_in_the_catalogue():
    files = ROOT.glob("mtl_jax/systems/[a-z]*.py")
    known = {entry.module.rpartition(".")[2] for entry in catalog.entries()}
    assert {path.stem for path in files} <= known


@pytest.mark.parametrize("entry", WORKING, ids=lambda e: e.name)
def test_working_system_agrees_with_the_catalogue(entry):
    module = importlib.import_module(entry.module)
    assert entry.spec == module.SPEC
    row = catalog._rows()[entry.name]
    agreed = {key: getattr(entry.spec, key) for key in ("title", "year", "family")}
    assert agreed == {key: row[key] for key in agreed}
    assert entry.spec.name == entry.name and entry.spec.kind == row["kind"]
    assert callable(module.build)
    assert (ROOT / entry.config).exists()


@pytest.mark.parametrize("entry", WORKING, ids=lambda e: e.name)
def test_uses_is_what_the_module_reaches(entry):
    path = ROOT / (entry.module.replace(".", "/") + ".py")
    source = path.read_text(encoding="utf-8")
    assert _system_source.uses_problems(source, entry.spec.uses) == []
    import mtl_jax

    for use in entry.spec.uses:
        target = mtl_jax
        for part in use.split("."):
            target = getattr(target, part)


def test_get_lists_close_names():
    assert catalog.get("tall-masks").config == "experiments/configs/tall_masks.py"
    with pytest.raises(ValueError, match="'tal_mask'.*tall-masks"):
        catalog.get("tal_mask")
    with pytest.raises(ValueError, match="mtl-jax list"):
        catalog.get("zzzzqqq")


def test_select():
    merging = catalog.select(family="merging")
    assert {e.spec.family for e in merging} == {"merging"} and len(merging) > 5
    planned = catalog.select(status="planned")
    assert len(planned) + len(WORKING) == 82
    assert catalog.select(uses="no.such.primitive") == ()
    with pytest.raises(ValueError, match="family must be one of"):
        catalog.select(family="mergin")
    with pytest.raises(ValueError, match="status must be one of"):
        catalog.select(status="done")


@pytest.mark.parametrize(("field", "value"), [("family", "x"), ("kind", "y")])
def test_spec_refuses_unknown_words(field, value):
    with pytest.raises(ValueError, match=f"{field} of 'demo' must be one of"):
        catalog.SystemSpec(**{**FIELDS, field: value})


def test_spec_is_frozen():
    spec = catalog.SystemSpec(**FIELDS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.year = 1


MODULE = '''
from mtl_jax.catalog import SystemSpec
from mtl_jax.transforms import merging as m
from mtl_jax.transforms.masking import keep
import mtl_jax as mtl

TEXT = """@misc{x}"""
SPEC = SystemSpec(name="x", year=2020, reference=TEXT, uses=("merging.ties",))

def build(cfg):
    return m.ties(cfg), keep, mtl.linearize.taylor1(cfg).shape, mtl.tree.add_scaled
'''


def test_spec_is_read_without_import(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(MODULE + "\nraise RuntimeError('imported')\n")
    assert _system_source.read_spec(path) == {
        "name": "x",
        "year": 2020,
        "reference": "@misc{x}",
        "uses": ("merging.ties",),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "wants SPEC"),
        ("SPEC = SystemSpec(name='a' + b)", "SPEC.name must be a literal"),
    ],
)
def test_unreadable_spec(tmp_path, text, message):
    path = tmp_path / "x.py"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        _system_source.read_spec(path)


def test_names_used_follow_imports():
    used = _system_source.names_used(MODULE)
    assert {"merging.ties", "masking.keep", "tree.add_scaled"} <= used
    assert any(name.startswith("linearize.taylor1") for name in used)


def test_uses_problems_both_ways():
    exact = ("merging.ties", "masking.keep", "linearize.taylor1")
    assert _system_source.uses_problems(MODULE, exact) == []
    assert (
        _system_source.uses_problems(MODULE, ("merging", "masking", "linearize")) == []
    )
    missing = _system_source.uses_problems(MODULE, exact[:2])
    assert len(missing) == 1 and "linearize.taylor1" in missing[0]
    extra = _system_source.uses_problems(MODULE, (*exact, "merging.dare"))
    assert extra == ["uses declares 'merging.dare', which the module never reaches"]


def test_readme_table_is_current():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert catalog.readme_with_table(text) == text, (
        "run: python -m mtl_jax.catalog --write-readme"
    )


def test_readme_needs_markers():
    with pytest.raises(ValueError, match="wants the lines"):
        catalog.readme_with_table("no markers")
