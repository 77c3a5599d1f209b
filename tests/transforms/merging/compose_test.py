"""What every merge refuses: one line that names the function and the fault."""

import jax
import jax.numpy as jnp
import pytest

from mtl_jax.transforms import merging

pytestmark = pytest.mark.fast
TAUS = {"a": {"b": jnp.ones((2, 3)), "k": jnp.ones((2, 2, 3))}}
KEY = jax.random.key(0)
MERGES = {
    "task_arithmetic": {},
    "average": {},
    "negate": {},
    "ties": {"density": 0.5},
    "ties_select": {"density": 0.5},
    "analogy": {},
    "breadcrumbs": {"density": 0.5, "drop_top": 0.1},
    "band_masks": {"density": 0.5, "drop_top": 0.1},
    "dare": {"density": 0.5, "key": KEY},
    "tall_masks": {"scale": 0.5},
    "consensus": {"scale": 0.5},
    "magnitude_masks": {"density": 0.5},
    "model_stock": {},
    "slerp": {},
    "multislerp": {},
    "karcher": {},
    "nearswap": {"threshold": 0.5},
    "magmax": {},
    "emr": {},
    "sce": {"density": 0.5},
    "ram": {},
    "ram_plus": {},
    "della": {"density": 0.5, "key": KEY},
    "pcb": {"density": 0.5},
    "trust_region": {"density": 0.5},
    "expo": {"strength": 0.5},
    "randes": {"key": KEY},
}
WEIGHTED = [n for n in MERGES if not n.endswith("_masks")]


def refusal(name, taus, **options):
    """The message, which is one line and starts with the function's name."""
    with pytest.raises(ValueError) as caught:
        getattr(merging, name)(taus, **{**MERGES.get(name, {}), **options})
    text = str(caught.value)
    assert text.startswith(f"{name}: ") and "\n" not in text
    return text


@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_one_bad_entry_is_named(name, value):
    b = TAUS["a"]["b"].at[1, 2].set(value)
    text = refusal(name, {"a": {"b": b, "k": TAUS["a"]["k"]}})
    assert "'a/b' holds NaN or infinity" in text


@pytest.mark.parametrize("name", MERGES)
def test_integers_are_no_task_vectors(name):
    taus = jax.tree.map(lambda x: x.astype(jnp.int32), TAUS)
    assert "no leaf of taus is floating point" in refusal(name, taus)


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, float("nan")], "'weights' holds NaN or infinity"),
        ([1.0], "wanted (2,)"),
        ([[1.0], [1.0]], "wanted (2,)"),
        ("x", "wanted numbers"),
    ],
)
def test_weights(name, weights, message):
    assert message in refusal(name, TAUS, weights=weights)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("average", {}),
        ("dare", {"reduce": "mean"}),
        ("model_stock", {}),
        ("slerp", {}),
        ("multislerp", {}),
        ("expo", {"strength": 0.5}),
        ("della", {"elect": "none", "reduce": "mean"}),
    ],
)
@pytest.mark.parametrize("weights", [(1.0, -1.0), (0.0, 0.0), (0.3, -0.1 - 0.2)])
def test_means_want_a_weight(name, options, weights):
    text = refusal(name, TAUS, weights=list(weights), **options)
    assert "wanted a sum other than 0" in text


@pytest.mark.parametrize(
    "name", ["ties", "ties_select", "karcher", "emr", "sce", "della"]
)
@pytest.mark.parametrize("weights", [[1.0, 0.0], [2.0, -1.0]])
def test_elections_want_positive_weights(name, weights):
    text = refusal(name, TAUS, weights=weights)
    assert f"weights are {weights}, wanted all of them positive" in text


@pytest.mark.parametrize("name", ["tall_masks", "consensus"])
@pytest.mark.parametrize("scale", [-0.1, [0.1, -0.2]])
def test_scales_are_not_negative(name, scale):
    assert "wanted 0 or more" in refusal(name, TAUS, scale=scale)


@pytest.mark.parametrize("name", ["tall_masks", "consensus"])
def test_the_merged_vector_is_read_too(name):
    merged = jax.tree.map(lambda x: x[0], TAUS)
    merged["a"]["k"] = merged["a"]["k"].at[0, 0].set(jnp.inf)
    text = refusal(name, TAUS, merged=merged)
    assert "merged: 'a/k' holds NaN or infinity" in text
    getattr(merging, name)(TAUS, merged=merged, scale=0.5, check_finite=False)


@pytest.mark.parametrize("min_tasks", [-1, 1.5, None])
def test_min_tasks(min_tasks):
    assert "min_tasks is" in refusal("consensus", TAUS, min_tasks=min_tasks)
    counts = {"w": jnp.array([0, 1])}
    assert "min_tasks is" in refusal("consensus_mask", counts, min_tasks=min_tasks)
    mask = jax.jit(merging.consensus_mask)(counts, jnp.asarray(1))
    assert mask["w"].tolist() == [False, True]


@pytest.mark.parametrize("name", [n for n in MERGES if n != "analogy"])
def test_the_reading_can_be_switched_off(name):
    taus = {"w": TAUS["a"]["b"].at[1, 2].set(jnp.inf)}
    getattr(merging, name)(taus, check_finite=False, **MERGES[name])


@pytest.mark.parametrize("make", [merging.drop_outliers, merging.keep_top])
def test_transforms_of_breadcrumbs_read_too(make):
    taus = {"w": TAUS["a"]["b"].at[1, 2].set(jnp.nan)}
    with pytest.raises(ValueError, match=f"{make.__name__}: 'w' holds NaN"):
        make(0.5)(taus)
    make(0.5, check_finite=False)(taus)


@pytest.mark.parametrize(
    "name", ["ties", "ties_select", "dare", "magnitude_masks", "breadcrumbs"]
)
@pytest.mark.parametrize(
    "density", [-0.1, 1.5, float("nan"), "0.2", None, [0.1], (0.1, 0.2)]
)
def test_density(name, density):
    assert "density is" in refusal(name, TAUS, density=density)


def test_a_traced_density_is_refused():
    with pytest.raises(ValueError, match="ties: density is .* wanted a number"):
        jax.jit(lambda d: merging.ties(TAUS, density=d))(0.5)


@pytest.mark.parametrize("option", ["elect", "reduce"])
def test_dare_options(option):
    assert "wanted one of" in refusal("dare", TAUS, **{option: "typo"})


@pytest.mark.parametrize("key", [None, 0, "x"])
def test_dare_wants_a_key(key):
    assert "jax.random.key" in refusal("dare", TAUS, key=key)


@pytest.mark.parametrize("scale", [float("nan"), "x", [0.1, 0.2, 0.3]])
def test_tall_masks_scale(scale):
    assert "scale" in refusal("tall_masks", TAUS, scale=scale)


@pytest.mark.parametrize("name", ["mask_counts", "mask_statistics"])
def test_masks_are_bool(name):
    assert "'a/b' is float32, wanted bool" in refusal(name, TAUS)


def test_checks_let_traced_values_pass():
    taus = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    found = jax.jit(merging.average)(taus, weights=jnp.array([1.0, 3.0]))
    assert found["w"].tolist() == [2.5, 3.5]
    constant = jax.jit(lambda: merging.average(taus, weights=[1.0, 3.0]))()
    assert constant["w"].tolist() == [2.5, 3.5]
