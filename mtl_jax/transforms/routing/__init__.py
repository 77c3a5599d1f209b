"""Models that choose their weights by what they see: routers over task vectors.

A router maps features, or a preference, to one gate per task; gates mix task vectors
into the weights of one example or one batch. `models.apply_routed` and
`models.apply_smile` read inputs of layers inside Linen modules; everything here takes
any `apply_fn(params, *inputs)`.
"""

from mtl_jax.transforms.routing._dawe import dawe
from mtl_jax.transforms.routing._lora_gates import (
    arrow_experts,
    low_rank_mix,
    poly_weights,
    x_lora_gates,
)
from mtl_jax.transforms.routing._pareto import (
    dirichlet_rays,
    epo_weights,
    pwe,
    simplex_grid,
)
from mtl_jax.transforms.routing._rank_one import rank_one
from mtl_jax.transforms.routing._routers import (
    init_router,
    init_routers,
    mean_gates,
    router,
    soft_top,
)
from mtl_jax.transforms.routing._smile import smile_dense, smile_experts, smile_gates
from mtl_jax.transforms.routing._twin import Twin, twin, twin_apply, twin_delta
from mtl_jax.transforms.routing._upscale import (
    RankOne,
    Upscaled,
    gated,
    mixed,
    per_example,
    upscale,
)
from mtl_jax.transforms.routing._we_moe import we_moe

__all__ = [
    "RankOne",
    "Twin",
    "Upscaled",
    "arrow_experts",
    "dawe",
    "dirichlet_rays",
    "epo_weights",
    "gated",
    "init_router",
    "init_routers",
    "low_rank_mix",
    "mean_gates",
    "mixed",
    "per_example",
    "poly_weights",
    "pwe",
    "rank_one",
    "router",
    "simplex_grid",
    "smile_dense",
    "smile_experts",
    "smile_gates",
    "soft_top",
    "twin",
    "twin_apply",
    "twin_delta",
    "upscale",
    "we_moe",
    "x_lora_gates",
]
