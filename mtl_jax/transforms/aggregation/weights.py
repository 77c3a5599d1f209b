"""Pure cores of the Gramian methods: `weights.<method>(gram [T, T], ...) -> [T]`."""

from mtl_jax.transforms.aggregation._linear import mean_weights as mean
from mtl_jax.transforms.aggregation._linear import sum_weights as sum
from mtl_jax.transforms.aggregation._pcgrad import weights as pcgrad

__all__ = ["mean", "pcgrad", "sum"]
