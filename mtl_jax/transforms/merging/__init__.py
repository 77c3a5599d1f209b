"""Merging of fine-tuned models: task vectors and every rule that combines them.

Every merge takes a task tree (leaves [T, ...]) and returns a delta shaped like the
parameters, to be applied with `tree.add_scaled(base, delta, scale)`. The interpolations
on spheres, whose argument is named `experts`, take and return parameters.
"""

from mtl_jax.transforms.merging._ada_svd import ada_svd
from mtl_jax.transforms.merging._arcee_fusion import arcee_fusion
from mtl_jax.transforms.merging._arithmetic import (
    analogy,
    average,
    negate,
    task_arithmetic,
)
from mtl_jax.transforms.merging._bitdelta import BitDelta, bitdelta, bitdelta_restore
from mtl_jax.transforms.merging._breadcrumbs import (
    band_masks,
    breadcrumbs,
    chain,
    drop_outliers,
    keep_top,
    scale,
)
from mtl_jax.transforms.merging._coefficients import (
    coefficient_grads,
    compose,
    init_coefficients,
    partition,
    select_blocks,
    take_blocks,
)
from mtl_jax.transforms.merging._concrete import (
    Adversary,
    Concrete,
    concrete,
    concrete_mask,
    concrete_merge,
)
from mtl_jax.transforms.merging._dare import dare
from mtl_jax.transforms.merging._della import della
from mtl_jax.transforms.merging._doge import doge
from mtl_jax.transforms.merging._dop import dop
from mtl_jax.transforms.merging._emr import Emr, emr, emr_restore
from mtl_jax.transforms.merging._evolution import CmaEs, CmaEsState, cma_es
from mtl_jax.transforms.merging._expo import expo
from mtl_jax.transforms.merging._fisher import (
    fisher,
    fisher_diagonal,
    squared_gradients,
)
from mtl_jax.transforms.merging._frank_wolfe import FrankWolfe, frank_wolfe
from mtl_jax.transforms.merging._gossip import gossip, neighbours
from mtl_jax.transforms.merging._grams import InputGram
from mtl_jax.transforms.merging._iso import iso_c, iso_cts
from mtl_jax.transforms.merging._karcher import karcher
from mtl_jax.transforms.merging._knots import knots
from mtl_jax.transforms.merging._learning import Learned, learner
from mtl_jax.transforms.merging._lines import layer_index, lines
from mtl_jax.transforms.merging._lora_factors import lora_align, lora_from_taus
from mtl_jax.transforms.merging._lora_merge import lora_cat, lora_svd
from mtl_jax.transforms.merging._lora_span import lora_span
from mtl_jax.transforms.merging._magmax import magmax
from mtl_jax.transforms.merging._mix_weights import mix_weights
from mtl_jax.transforms.merging._model_stock import model_stock
from mtl_jax.transforms.merging._multislerp import multislerp
from mtl_jax.transforms.merging._nearswap import nearswap
from mtl_jax.transforms.merging._opcm import opcm
from mtl_jax.transforms.merging._pcb import pcb
from mtl_jax.transforms.merging._positioning import Position, positioner
from mtl_jax.transforms.merging._pruning import sparse_gpt, wanda_masks
from mtl_jax.transforms.merging._ram import ram, ram_plus
from mtl_jax.transforms.merging._randes import randes, randes_restore
from mtl_jax.transforms.merging._recombine import recombine
from mtl_jax.transforms.merging._regmean import mean_grams, regmean, regmean_plus_plus
from mtl_jax.transforms.merging._rmm import (
    RmmBank,
    rmm_basis,
    rmm_choose,
    rmm_cost,
    rmm_errors,
    rmm_restore,
)
from mtl_jax.transforms.merging._rows import unit_axis
from mtl_jax.transforms.merging._sce import sce
from mtl_jax.transforms.merging._search import (
    ScaleSearch,
    Trial,
    normalised_accuracy,
    scale_search,
)
from mtl_jax.transforms.merging._slerp import slerp
from mtl_jax.transforms.merging._slerp_chain import slerp_chain, slerp_chain_weights
from mtl_jax.transforms.merging._sparse_low_rank import SparseLowRank, sparse_low_rank
from mtl_jax.transforms.merging._surgery import Surgery, surgery, surgery_apply
from mtl_jax.transforms.merging._svc import svc
from mtl_jax.transforms.merging._tall_masks import (
    CompressionBits,
    MaskStatistics,
    compression_bits,
    consensus,
    consensus_mask,
    magnitude_masks,
    mask_counts,
    mask_statistics,
    restore_delta,
    tall_masks,
)
from mtl_jax.transforms.merging._task_vectors import task_vectors
from mtl_jax.transforms.merging._ties import ties, ties_select
from mtl_jax.transforms.merging._trust_region import trust_region
from mtl_jax.transforms.merging._tsv import tsv_merge
from mtl_jax.transforms.merging._wudi import wudi
from mtl_jax.tree import combine

__all__ = [
    "Adversary",
    "BitDelta",
    "CmaEs",
    "CmaEsState",
    "CompressionBits",
    "Concrete",
    "Emr",
    "FrankWolfe",
    "InputGram",
    "Learned",
    "MaskStatistics",
    "Position",
    "RmmBank",
    "ScaleSearch",
    "SparseLowRank",
    "Surgery",
    "Trial",
    "ada_svd",
    "analogy",
    "arcee_fusion",
    "average",
    "band_masks",
    "bitdelta",
    "bitdelta_restore",
    "breadcrumbs",
    "chain",
    "cma_es",
    "coefficient_grads",
    "combine",
    "compose",
    "compression_bits",
    "concrete",
    "concrete_mask",
    "concrete_merge",
    "consensus",
    "consensus_mask",
    "dare",
    "della",
    "doge",
    "dop",
    "drop_outliers",
    "emr",
    "emr_restore",
    "expo",
    "fisher",
    "fisher_diagonal",
    "frank_wolfe",
    "gossip",
    "init_coefficients",
    "iso_c",
    "iso_cts",
    "karcher",
    "keep_top",
    "knots",
    "layer_index",
    "learner",
    "lines",
    "lora_align",
    "lora_cat",
    "lora_from_taus",
    "lora_span",
    "lora_svd",
    "magmax",
    "magnitude_masks",
    "mask_counts",
    "mask_statistics",
    "mean_grams",
    "mix_weights",
    "model_stock",
    "multislerp",
    "nearswap",
    "negate",
    "neighbours",
    "normalised_accuracy",
    "opcm",
    "partition",
    "pcb",
    "positioner",
    "ram",
    "ram_plus",
    "randes",
    "randes_restore",
    "recombine",
    "regmean",
    "regmean_plus_plus",
    "restore_delta",
    "rmm_basis",
    "rmm_choose",
    "rmm_cost",
    "rmm_errors",
    "rmm_restore",
    "scale",
    "scale_search",
    "sce",
    "select_blocks",
    "slerp",
    "slerp_chain",
    "slerp_chain_weights",
    "sparse_gpt",
    "sparse_low_rank",
    "squared_gradients",
    "surgery",
    "surgery_apply",
    "svc",
    "take_blocks",
    "tall_masks",
    "task_arithmetic",
    "task_vectors",
    "ties",
    "ties_select",
    "trust_region",
    "tsv_merge",
    "unit_axis",
    "wanda_masks",
    "wudi",
]
