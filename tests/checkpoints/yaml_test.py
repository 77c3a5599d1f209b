import pytest

from mtl_jax.checkpoints import _yaml

pytestmark = pytest.mark.fast


def test_lines_and_paths_are_kept():
    top = _yaml.parse("a:\n  - x: 1\n    y: two\n", "f.yaml")
    (item,) = top.mapping(("a",))["a"].items()
    y = item.mapping()["y"]
    assert (y.path, y.line, y.text()) == ("a[0].y", 3, "two")
    with pytest.raises(ValueError, match=r"^f\.yaml, line 3: a\[0\]\.y: wants a whole"):
        y.whole()


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("0.5", 0.5), ("3", 3), ("true", True), ("l1", "l1")],
)
def test_scalars(text, value):
    found = _yaml.parse(f"a: {text}", "f").mapping()["a"].scalar()
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", r"line 3: 'a' is given twice, first in line 1"),
        ("a: {x: 1, x: 2}", r"line 1: 'x' is given twice"),
        ("a: [1", r"line 1: not YAML"),
        ("a: !!python/object:os.system {}", r"not YAML: could not determine"),
        ("? [1, 2]\n: 3", r"a key must be a word"),
        ("a: 1\n---\nb: 2", r"not YAML: expected a single document"),
    ],
)
def test_what_is_not_a_document(text, message):
    with pytest.raises(ValueError, match=message):
        _yaml.parse(text, "f")


def test_anchors_and_merge_keys_work():
    text = "p: &p {weight: 1, t: 2}\nq:\n  <<: *p\n  weight: 3\n"
    q = _yaml.parse(text, "f").mapping()["q"].mapping()
    assert {k: c.scalar() for k, c in q.items()} == {"weight": 3, "t": 2}


def test_unknown_keys_name_the_nearest():
    with pytest.raises(ValueError, match=r"line 2: modles: unknown key.*'models'\?"):
        _yaml.parse("base: 1\nmodles: 2", "f").mapping(("base", "models"))


@pytest.mark.parametrize("text", [".nan", ".inf", "[1]", "", "2020-01-01"])
def test_scalars_are_finite(text):
    with pytest.raises(ValueError, match="wants a"):
        _yaml.parse(f"a: {text}", "f").mapping()["a"].scalar()
