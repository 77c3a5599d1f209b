"""What can be done to one tensor: the rules of streamed merges and their options.

Names and options are mergekit's where both have the method. A rule sees one tensor of
all models at a time. Its *scope* says how much it needs at once: "entry", one pass over
chunks; "tensor", statistics of the tensor first, still chunk by chunk; "model", of all
tensors. A rule that is *whole* reads its tensor as a whole and goes through the pure
function of `mtl_jax.merging`, which needs room for (N + 2) such tensors in float32.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import numpy as np

__all__ = ["REQUIRED", "RULES", "Job", "Option", "Rule", "check", "resolve"]

Scope = Literal["entry", "tensor", "model"]


class _Required:
    """The default of an option that has none."""

    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Any = _Required()


class Spec(Protocol):
    """Shape and dtype of a tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Of its entries."""
        ...


class View(Protocol):
    """A tensor that is not read yet."""

    @property
    def spec(self) -> Spec:
        """Shape and dtype."""
        ...

    def flat(self, start: int, stop: int) -> np.ndarray:
        """Entries of the flattened tensor."""
        ...

    def whole(self) -> np.ndarray:
        """All of it, in its shape."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One output tensor.

    Attributes:
      name: of the tensor.
      spec: shape and dtype to write.
      rule: key of `RULES`.
      base: where task vectors start from; None where the rule needs none.
      experts: the models, each of the shape of `spec`.
      options: resolved for this tensor; those that are per model are tuples in the
        order of `experts`, or one value for all.
      models: what messages call the experts; "expert 0", ... by default.
    """

    name: str
    spec: Spec
    rule: str
    base: View | None
    experts: tuple[View, ...]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    models: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.spec.shape)

    @property
    def views(self) -> tuple[View, ...]:
        """The base, where there is one, and the experts."""
        return self.experts if self.base is None else (self.base, *self.experts)

    def model(self, index: int) -> str:
        """What to call an entry of `views`."""
        if self.base is not None:
            if index == 0:
                return "the base"
            index -= 1
        return self.models[index] if self.models else f"expert {index}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """One option of a rule.

    Attributes:
      kind: float, int, bool or str.
      default: `REQUIRED` where there is none.
      per_model: one value for each expert.
      least: smallest value allowed.
      most: largest value allowed.
      choices: all values allowed; for `rescale` beside the booleans.
    """

    kind: type
    default: Any = REQUIRED
    per_model: bool = False
    least: float = -math.inf
    most: float = math.inf
    choices: tuple[Any, ...] = ()

    def problem(self, value: Any) -> str:
        """What is wrong with a single value, as "wanted ..."; empty if nothing is."""
        if self.choices:
            fits = any(value is c or (value == c and c != 1) for c in self.choices)
            return "" if fits else f"wanted one of {self.choices}"
        if self.kind is bool:
            return "" if isinstance(value, bool | np.bool_) else "wanted true or false"
        if isinstance(value, bool | str) or not isinstance(
            value, int | float | np.integer | np.floating
        ):
            return "wanted a number"
        if self.kind is int and value != int(value):
            return "wanted an integer"
        if not math.isfinite(value):
            return "wanted a finite number"
        if not self.least <= value <= self.most:
            return f"wanted {self.least:g} to {self.most:g}"
        return ""


Test = Callable[[Mapping[str, Any]], str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """One way of merging.

    Attributes:
      name: as recipes say it.
      summary: one line.
      needs_base: whether the base must be given.
      takes_base: whether it may be.
      min_experts: fewest models beside the base.
      max_experts: most of them; None for any number.
      options: by name.
      scope: "entry", "tensor" or "model"; of a rule with an option of that name, its
        widest.
      whole: whether the tensor is read as a whole.
      test: of the resolved options together; says what is wrong, or nothing.
    """

    name: str
    summary: str
    needs_base: bool = True
    takes_base: bool = True
    min_experts: int = 1
    max_experts: int | None = None
    options: Mapping[str, Option] = dataclasses.field(default_factory=dict)
    scope: Scope = "entry"
    whole: bool = False
    test: Test = lambda options: ""


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


def _rules() -> list[Rule]:
    """Rules that run chunk by chunk."""
    pair = {"min_experts": 1, "max_experts": 1}
    return [
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
            **pair,
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
            **pair,
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
        *_arithmetics(),
    ]


def _arithmetics() -> list[Rule]:
    """Trim each task vector, elect signs or not, add."""
    return [
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


def _whole_rules() -> list[Rule]:
    scale = {"lambda": Option(kind=float, default=1.0)}
    common = {**UNIT, **scale}
    share = {"density": _share(0.1)}
    return [
        _whole(
            "arcee_fusion",
            "keeps the changes that stand out",
            {"tukey_fence": _number(1.5)},
            single=True,
        ),
        _whole(
            "pcb",
            "entries compete within and between models for a share",
            {**common, **share, "clip": _number(1e-4, most=0.5)},
        ),
        _whole(
            "consensus",
            "keeps of the sum what several models want",
            {
                **common,
                "mask_scale": _number(0.4),
                "min_tasks": Option(kind=int, default=2, least=1),
            },
        ),
        _whole(
            "trust_region",
            "adds task vectors where they do not disturb each other",
            {**common, "density": _share(0.99)},
        ),
        _whole("tsv_merge", "top singular vectors of every task, decorrelated", common),
        _whole("iso_c", "the sum with all singular values equal", common),
        _whole(
            "iso_cts",
            "common and own directions with equal singular values",
            {**common, "common": _share(0.8)},
        ),
        _whole(
            "knots",
            "TIES in a basis that the task vectors share",
            {**common, **LAYOUT, "density": _share(0.2)},
        ),
        _whole(
            "svc",
            "the sum with calibrated singular values",
            {**common, **LAYOUT, "alpha": _number(1.0)},
        ),
        _whole(
            "opcm",
            "one model after the other, projected off what is there",
            {**common, "alpha": _share(0.5)},
        ),
        _whole(
            "wudi",
            "least interference between the task vectors of a matrix",
            {
                **common,
                **LAYOUT,
                "steps": Option(kind=int, default=300, least=0),
                "learning_rate": _number(1e-5),
                "solver": _choice("adam", "exact"),
            },
        ),
    ]


RULES: Mapping[str, Rule] = {rule.name: rule for rule in (*_rules(), *_whole_rules())}
"""Every rule by its name."""


def _fail(job: Job, message: str) -> ValueError:
    return ValueError(f"{job.rule}: {job.name!r}: {message}")


def _known(name: str, known: Mapping[str, Any], what: str) -> str:
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"no {what} {name!r}{hint} (known: {', '.join(sorted(known))})"


def resolve(job: Job) -> dict[str, Any]:
    """The options of a job with defaults filled in, per-model ones as tuples.

    Raises:
      ValueError: an option that does not exist, is missing, or does not fit; it names
        rule, tensor, option, what was wanted and what was found.
    """
    rule, count = RULES[job.rule], len(job.experts)
    for name in job.options:
        if name not in rule.options:
            raise _fail(job, _known(name, rule.options, "option"))
    found = {}
    for name, option in rule.options.items():
        value = job.options.get(name, option.default)
        if value is REQUIRED:
            raise _fail(job, f"option {name!r} is missing")
        if option.per_model:
            value = (
                tuple(value) if isinstance(value, list | tuple) else (value,) * count
            )
            if len(value) != count:
                raise _fail(
                    job,
                    f"option {name!r} has {len(value)} values, wanted {count}, one "
                    "per model",
                )
        values = value if option.per_model else (value,)
        for one in values:
            problem = "" if one is None is option.default else option.problem(one)
            if problem:
                raise _fail(job, f"option {name!r} is {one!r}, {problem}")
        found[name] = value
    problem = rule.test(found)
    if problem:
        raise _fail(job, problem)
    return found


def _is_float(dtype: np.dtype) -> bool:
    # The kind of bfloat16 and its like is that of raw bytes.
    return dtype.kind == "f" or (dtype.kind == "V" and "float" in dtype.name)


def is_copied(job: Job) -> bool:
    """Whether the tensor holds no numbers to merge: integers and booleans."""
    return not _is_float(np.dtype(job.views[0].spec.dtype))


def check(job: Job) -> None:
    """Refuses a job that cannot be run, before anything is read.

    Raises:
      ValueError: naming rule, tensor, option, what was wanted and what was found.
    """
    if job.rule not in RULES:
        raise ValueError(f"{job.name!r}: {_known(job.rule, RULES, 'rule')}")
    rule, count = RULES[job.rule], len(job.experts)
    if rule.needs_base and job.base is None:
        raise _fail(job, "there is no base, which this rule needs")
    if job.base is not None and not rule.takes_base:
        raise _fail(job, "there is a base, which this rule has no use for")
    if count < rule.min_experts or count > (rule.max_experts or count):
        most = "" if rule.max_experts is None else f" to {rule.max_experts}"
        raise _fail(
            job,
            f"there are {count} models beside the base, wanted "
            f"{rule.min_experts}{most or ' or more'}",
        )
    if job.models and len(job.models) != count:
        raise _fail(job, f"{len(job.models)} names for {count} models")
    resolve(job)
    _check_views(job)


def _check_views(job: Job) -> None:
    copied = is_copied(job)
    for index, view in enumerate(job.views):
        where, dtype = job.model(index), np.dtype(view.spec.dtype)
        if tuple(view.spec.shape) != tuple(job.spec.shape):
            raise _fail(
                job,
                f"{where} has shape {tuple(view.spec.shape)}, wanted "
                f"{tuple(job.spec.shape)}",
            )
        if dtype.kind == "c":
            raise _fail(job, f"{where} is {dtype}, wanted a real dtype")
        if copied and dtype != job.views[0].spec.dtype:
            raise _fail(
                job, f"{where} is {dtype}, {job.model(0)} {job.views[0].spec.dtype}"
            )
        if not copied and not _is_float(dtype):
            raise _fail(job, f"{where} is {dtype}, wanted floating point")
    if copied and np.dtype(job.spec.dtype) != job.views[0].spec.dtype:
        raise _fail(
            job,
            f"to be written as {job.spec.dtype}, but {job.model(0)} is "
            f"{job.views[0].spec.dtype}, which is copied",
        )
    if not copied and not _is_float(np.dtype(job.spec.dtype)):
        raise _fail(job, f"to be written as {job.spec.dtype}, wanted floating point")
