import pytest

from mtl_jax.checkpoints import _arithmetic

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("density", "size", "wanted"),
    [(0.5, 7, 3), (0.04, 16, 1), (1e-9, 16, 1), (0.0, 16, 0), (0.5, 0, 0), (1.0, 5, 5)],
)
def test_trimming_leaves_an_entry(density, size, wanted):
    """Small tensors do not vanish at low densities."""
    found = _arithmetic.top_counts({"density": (density,)}, [size])
    assert found == [[wanted]]


@pytest.mark.parametrize(
    ("density", "gamma", "size", "wanted"),
    [
        (0.5, 0.1, 20, [12, 2]),
        (0.9, 0.4, 20, [20, 2]),
        (0.04, 0.1, 16, [1, 1]),
        (1.0, 0.4, 20, [20, 0]),
        (0.5, 0.01, 20, [10, 0]),
    ],
)
def test_outliers_leave_the_density(density, gamma, size, wanted):
    options = {"density": (density,), "gamma": (gamma,)}
    assert _arithmetic.top_counts(options, [size]) == [wanted]
