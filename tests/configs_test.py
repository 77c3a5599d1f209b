import pytest
from ml_collections import ConfigDict

from mtl_jax import configs

pytestmark = pytest.mark.fast

TEXT = """
from ml_collections import ConfigDict

VARIANTS = ("tiny", "demo")


def get_config(variant="demo"):
    return ConfigDict(
        {
            "seed": 0,
            "name": variant,
            "tasks": ("trec", "sst2"),
            "scale": None,
            "flag": False,
            "optimizer": {"learning_rate": 1e-3, "warmup": 10, "clip": {"norm": 1.0}},
        }
    )
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "tall_masks.py"
    file.write_text(TEXT)
    (tmp_path / "model_breadcrumbs.py").write_text(TEXT)
    return file


def test_variants_and_default(path):
    assert configs.variants(path) == ("tiny", "demo")
    assert configs.load_config(str(path)).name == "demo"
    assert configs.load_config(f"{path}:tiny").name == "tiny"


def test_locked(path):
    config = configs.load_config(str(path))
    assert isinstance(config, ConfigDict) and config.is_locked
    with pytest.raises(AttributeError):
        config.sede = 1


@pytest.mark.parametrize(
    ("key", "text", "wanted"),
    [
        ("seed", "7", 7),
        ("seed", "1e3", 1000),
        ("name", "7", "7"),
        ("flag", "true", True),
        ("flag", "0", False),
        ("tasks", "trec", ("trec",)),
        ("tasks", "trec,sst2,subj", ("trec", "sst2", "subj")),
        ("tasks", "('a', 'b')", ("a", "b")),
        ("scale", "0.3", 0.3),
        ("scale", "word", "word"),
        ("optimizer.learning_rate", "1e-4", 1e-4),
        ("optimizer.learning_rate", "2", 2.0),
        ("optimizer.clip.norm", "0.5", 0.5),
        ("seed", 3, 3),
    ],
)
def test_override(path, key, text, wanted):
    found = configs.load_config(str(path), {key: text})
    for part in key.split("."):
        found = found[part]
    assert found == wanted and type(found) is type(wanted)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("sed", "1", "config.sed: no such key; near it: seed"),
        ("learning_rate", "1", "near it: optimizer.learning_rate"),
        ("warmpu", "1", "near it: optimizer.warmup$"),
        ("seed.x", "1", "no such key"),
        ("seed", "1.5", "wants int, as 0; found '1.5'"),
        ("seed", "x", "wants int"),
        ("flag", "maybe", "wants bool"),
        ("optimizer.clip.norm", "big", "wants float"),
        ("seed", "1e999", "wants int"),
        (
            "optimizer",
            "1",
            "a group; set one of optimizer.clip.norm, optimizer.learning_rate",
        ),
        ("seed", 1.5, "wants int"),
    ],
)
def test_wrong_override(path, key, text, message):
    with pytest.raises(ValueError, match=message):
        configs.load_config(str(path), {key: text})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tall_mask.py:demo", "near it: tall_masks.py"),
        ("tall-masks.py", "near it: tall_masks.py"),
        ("nowhere/x.py", "is not a directory"),
        ("tall_masks.py:papr", "no variant 'papr'; it has tiny, demo"),
        ("zzz.py", "model_breadcrumbs.py"),
    ],
)
def test_wrong_path_or_variant(path, spec, message):
    with pytest.raises(ValueError, match=message):
        configs.load_config(f"{path.parent}/{spec}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "wants VARIANTS and get_config"),
        ("def f(:", "config .*bad.py"),
        ("VARIANTS = ('a',)\ndef get_config(v): return {}", "must return a ConfigDict"),
    ],
)
def test_bad_file(tmp_path, text, message):
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        configs.load_config(str(path))


@pytest.mark.parametrize("spec", ["", ":", ":demo"])
def test_no_path_at_all(spec):
    with pytest.raises(ValueError, match="wants PATH.py"):
        configs.load_config(spec)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
        ("import no_such_module_at_all", "no_such_module_at_all"),
        (
            "VARIANTS = ('demo',)\ndef get_config(v): return 1 / 0",
            r"get_config\('demo'",
        ),
        ("\0", "null bytes"),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, message):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"config .*broken.py: .*{message}"):
        configs.load_config(str(path))
