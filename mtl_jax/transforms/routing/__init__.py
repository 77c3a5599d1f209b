"""Models that choose their weights by what they see: routers over task vectors.

A router maps features, or a preference, to one gate per task; gates mix task vectors
into the weights of one example or one batch. `models.apply_routed` and
`models.apply_smile` read inputs of layers inside Linen modules; everything here takes
any `apply_fn(params, *inputs)`.
"""

from mtl_jax.transforms.routing._pareto import (
    dirichlet_rays,
    epo_weights,
    pwe,
    simplex_grid,
)
from mtl_jax.transforms.routing._routers import (
    init_router,
    init_routers,
    mean_gates,
    router,
)
from mtl_jax.transforms.routing._smile import smile_dense, smile_experts, smile_gates
from mtl_jax.transforms.routing._twin import Twin, twin, twin_apply, twin_delta
from mtl_jax.transforms.routing._upscale import Upscaled, gated, per_example, upscale
from mtl_jax.transforms.routing._we_moe import we_moe

__all__ = [
    "Twin",
    "Upscaled",
    "dirichlet_rays",
    "epo_weights",
    "gated",
    "init_router",
    "init_routers",
    "mean_gates",
    "per_example",
    "pwe",
    "router",
    "simplex_grid",
    "smile_dense",
    "smile_experts",
    "smile_gates",
    "twin",
    "twin_apply",
    "twin_delta",
    "upscale",
    "we_moe",
]
