"""The table of rules."""

import math
from collections.abc import Mapping
from typing import Any

from mtl_jax.checkpoints._rule_types import REQUIRED, Option, Rule


def _any_weight(default: Any = REQUIRED) -> Option:
    return Option(kind=float, default=default, per_model=True)


def _number(default: Any, least: float = 0.0, most: float = math.inf) -> Option:
    return Option(kind=float, default=default, least=least, most=most)


def _share(default: Any, **more: Any) -> Option:
    return Option(kind=float, default=default, least=0, most=1, **more)


def _flag(default: bool) -> Option:
    return Option(kind=bool, default=default)


def _choice(default: str, *others: str) -> Option:
    return Option(kind=str, default=default, choices=(default, *others))


def _total(options: Mapping[str, Any]) -> str:
    """Refuses weights that a rule would divide by their sum of zero."""
    weights = options["weight"]
    if not options.get("normalize", options.get("normalize_weights", True)):
        return ""
    if abs(sum(weights)) > 1e-8 * sum(map(abs, weights)):
        return ""
    return f"option 'weight' is {weights}, wanted a sum other than 0"


def _range(options: Mapping[str, Any]) -> str:
    """Refuses probabilities of DELLA that leave (0, 1)."""
    pairs = zip(options["density"], options["epsilon"], strict=True)
    for density, epsilon in pairs:
        inside = density - epsilon > 0 and density + epsilon < 1
        if 0 < density < 1 and epsilon and not inside:
            return (
                f"options 'density' {density} and 'epsilon' {epsilon}, wanted "
                "0 < density - epsilon and density + epsilon < 1"
            )
    return ""


RESCALE = (True, False, "l1", "probability", "none")
WEIGHTS = {"weight": _any_weight()}
DENSITY = {"density": _share(1.0, per_model=True)}
GAMMA = {"gamma": _share(0.01, per_model=True)}
EPSILON = {"epsilon": _share(0.15, per_model=True)}
UNIT = {"weight": _any_weight(1.0)}
LAYOUT = {"layout": _choice("out_in", "in_out")}


def _arithmetic(normalize: bool, rescale: bool, **more: Any) -> dict[str, Option]:
    """The options that mergekit's task arithmetic and all its kin share."""
    return {
        **WEIGHTS,
        **more,
        "normalize": _flag(normalize),
        "rescale": Option(kind=str, default=rescale, choices=RESCALE),
        "lambda": Option(kind=float, default=1.0),
    }


PAIR: dict[str, Any] = {"min_experts": 1, "max_experts": 1}

_BY_CHUNKS = [
    Rule(
        name="linear",
        summary="weighted sum or mean of parameters",
        needs_base=False,
        takes_base=False,
        options={**WEIGHTS, "normalize": _flag(True)},
        test=_total,
    ),
    Rule(
        name="passthrough",
        summary="one model as it is, or times a number",
        needs_base=False,
        takes_base=False,
        max_experts=1,
        options={"scale": _any_weight(None)},
    ),
    Rule(
        name="slerp",
        summary="from the base to another model along the great circle",
        options={"t": Option(kind=float)},
        scope="tensor",
        **PAIR,
    ),
    Rule(
        name="nuslerp",
        summary="between two models, or their task vectors, along the great circle",
        needs_base=False,
        min_experts=2,
        max_experts=2,
        options={
            **WEIGHTS,
            "nuslerp_flatten": _flag(True),
            "nuslerp_row_wise": _flag(False),
        },
        scope="tensor",
    ),
    Rule(
        name="multislerp",
        summary="several models on a sphere, by the direction of their mean",
        needs_base=False,
        options={
            **WEIGHTS,
            "normalize_weights": _flag(True),
            "eps": _number(1e-8),
        },
        scope="tensor",
        test=_total,
    ),
    Rule(
        name="karcher",
        summary="Riemannian centre of several models on a sphere",
        needs_base=False,
        takes_base=False,
        options={
            "max_iter": Option(kind=int, default=10, least=0),
            "tol": _number(1e-5),
        },
        scope="tensor",
    ),
    Rule(
        name="model_stock",
        summary="towards the average as far as the task vectors agree",
        min_experts=2,
        options={"filter_wise": _flag(False), "clip": _flag(False)},
        scope="tensor",
    ),
    Rule(
        name="nearswap",
        summary="takes over small changes, and of others no more than a bound",
        options={"t": _number(REQUIRED)},
        **PAIR,
    ),
    Rule(
        name="ram",
        summary="averages each entry over the models that changed it",
        options={"epsilon": _number(1e-5)},
    ),
    Rule(
        name="ramplus_tl",
        summary="RAM that amplifies what one model alone changed",
        options={
            "r": _number(0.1),
            "alpha": _number(0.2),
            "epsilon": _number(1e-5),
        },
        scope="tensor",
    ),
    Rule(
        name="sce",
        summary="where models differ, weighs them by what they changed",
        options={"select_topk": _share(1.0), **UNIT},
        scope="tensor",
    ),
    Rule(
        name="magmax",
        summary="of every entry the largest change",
        options={**UNIT, "lambda": Option(kind=float, default=1.0)},
    ),
]


# Trim each task vector, elect signs or not, add.
_ARITHMETIC = [
    Rule(
        name="task_arithmetic",
        summary="adds task vectors",
        options=_arithmetic(False, False),
    ),
    Rule(
        name="ties",
        summary="trims small changes, elects a sign, merges what agrees",
        options={
            **_arithmetic(True, False, **DENSITY),
            "scope": _choice("tensor", "model"),
        },
        scope="model",
    ),
    Rule(
        name="breadcrumbs",
        summary="drops the largest and the smallest changes, adds the rest",
        options=_arithmetic(False, False, **DENSITY, **GAMMA),
        scope="tensor",
    ),
    Rule(
        name="breadcrumbs_ties",
        summary="breadcrumbs with an elected sign",
        options=_arithmetic(False, False, **DENSITY, **GAMMA),
        scope="tensor",
    ),
    Rule(
        name="dare_linear",
        summary="drops changes at random, rescales and adds the rest",
        options=_arithmetic(False, True, **DENSITY),
        scope="tensor",
    ),
    Rule(
        name="dare_ties",
        summary="dare with an elected sign",
        options=_arithmetic(False, True, **DENSITY),
        scope="tensor",
    ),
    Rule(
        name="della_linear",
        summary="drops small changes of a row more often, rescales and adds",
        options=_arithmetic(False, True, **DENSITY, **EPSILON),
        scope="tensor",
        test=_range,
    ),
    Rule(
        name="della",
        summary="della_linear with an elected sign",
        options=_arithmetic(True, True, **DENSITY, **EPSILON),
        scope="tensor",
        test=_range,
    ),
]


def _whole(
    name: str, summary: str, options: Mapping[str, Option], *, single: bool = False
) -> Rule:
    """A rule of `mtl_jax.merging` over whole tensors."""
    return Rule(
        name=name,
        summary=summary,
        max_experts=1 if single else None,
        options=options,
        scope="tensor",
        whole=True,
    )


COMMON = {**UNIT, "lambda": Option(kind=float, default=1.0)}

_WHOLE = [
    _whole(
        "arcee_fusion",
        "keeps the changes that stand out",
        {"tukey_fence": _number(1.5)},
        single=True,
    ),
    _whole(
        "pcb",
        "entries compete within and between models for a share",
        {**COMMON, "density": _share(0.1), "clip": _number(1e-4, most=0.5)},
    ),
    _whole(
        "consensus",
        "keeps of the sum what several models want",
        {
            **COMMON,
            "mask_scale": _number(0.4),
            "min_tasks": Option(kind=int, default=2, least=1),
        },
    ),
    _whole(
        "trust_region",
        "adds task vectors where they do not disturb each other",
        {**COMMON, "density": _share(0.99)},
    ),
    _whole("tsv_merge", "top singular vectors of every task, decorrelated", COMMON),
    _whole("iso_c", "the sum with all singular values equal", COMMON),
    _whole(
        "iso_cts",
        "common and own directions with equal singular values",
        {**COMMON, "common": _share(0.8)},
    ),
    _whole(
        "knots",
        "TIES in a basis that the task vectors share",
        {**COMMON, **LAYOUT, "density": _share(0.2)},
    ),
    _whole(
        "svc",
        "the sum with calibrated singular values",
        {**COMMON, **LAYOUT, "alpha": _number(1.0)},
    ),
    _whole(
        "opcm",
        "one model after the other, projected off what is there",
        {**COMMON, "alpha": _share(0.5)},
    ),
    _whole(
        "wudi",
        "least interference between the task vectors of a matrix",
        {
            **COMMON,
            **LAYOUT,
            "steps": Option(kind=int, default=300, least=0),
            "learning_rate": _number(1e-5),
            "solver": _choice("adam", "exact"),
        },
    ),
]


RULES: Mapping[str, Rule] = {
    rule.name: rule for rule in (*_BY_CHUNKS, *_ARITHMETIC, *_WHOLE)
}
"""Every rule by its name."""
