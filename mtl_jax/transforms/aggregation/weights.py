"""Pure cores of the Gramian methods: `weights.<method>(gram [T, T], ...) -> [T]`."""

from mtl_jax.transforms.aggregation._aligned_mtl import weights as aligned_mtl
from mtl_jax.transforms.aggregation._cagrad import weights as cagrad
from mtl_jax.transforms.aggregation._config import weights as config
from mtl_jax.transforms.aggregation._constant import weights as constant
from mtl_jax.transforms.aggregation._dual_proj import weights as dual_proj
from mtl_jax.transforms.aggregation._fair_grad import weights as fair_grad
from mtl_jax.transforms.aggregation._grad_vac import weights as grad_vac
from mtl_jax.transforms.aggregation._imtl_g import weights as imtl_g
from mtl_jax.transforms.aggregation._krum import weights as krum
from mtl_jax.transforms.aggregation._linear import mean_weights as mean
from mtl_jax.transforms.aggregation._linear import sum_weights as sum
from mtl_jax.transforms.aggregation._mgda import weights as mgda
from mtl_jax.transforms.aggregation._modo import weights as modo
from mtl_jax.transforms.aggregation._nash_mtl import weights as nash_mtl
from mtl_jax.transforms.aggregation._pcgrad import weights as pcgrad
from mtl_jax.transforms.aggregation._random import weights as random
from mtl_jax.transforms.aggregation._sdm_grad import weights as sdm_grad
from mtl_jax.transforms.aggregation._upgrad import weights as upgrad

__all__ = [
    "aligned_mtl",
    "cagrad",
    "config",
    "constant",
    "dual_proj",
    "fair_grad",
    "grad_vac",
    "imtl_g",
    "krum",
    "mean",
    "mgda",
    "modo",
    "nash_mtl",
    "pcgrad",
    "random",
    "sdm_grad",
    "sum",
    "upgrad",
]
