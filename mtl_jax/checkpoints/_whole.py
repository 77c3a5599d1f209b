"""Rules that need a tensor as a whole, through the pure functions of merging."""

from typing import Any

import numpy as np

from mtl_jax.checkpoints._work import Work, floats


def whole(work: Work, name: str, weights: tuple[float, ...], **options: Any) -> None:
    """Merges the task vectors, or where there is no base the models.

    Args:
      work: the job.
      name: of the function in `mtl_jax.merging`.
      weights: of the models.
      **options: of the function.
    """
    import jax.numpy as jnp

    from mtl_jax.transforms import merging

    if not work.stream.size:
        return
    base = work.whole(0) if work.job.base is not None else None
    shape = (work.count, *work.job.spec.shape)
    stack = np.empty(shape, np.float32)
    for t in range(work.count):
        stack[t] = work.whole(t + (base is not None))
        if base is not None:
            stack[t] -= base
    taus = {work.job.name: jnp.asarray(stack)}
    if name == "arcee_fusion":
        options["base"] = {work.job.name: jnp.asarray(base)}
    del stack
    merged = getattr(merging, name)(
        taus, weights=floats(np.array(weights)), check_finite=False, **options
    )
    del taus
    result = np.asarray(merged[work.job.name])
    if base is not None:
        result = base + np.float32(work.options.get("lambda", 1.0)) * result
    flat = result.reshape(-1)
    step, _ = work.stream.bounds()
    for start in range(0, flat.size, step):
        work.write(start, flat[start : start + step].astype(work.dtype))


def _weights(work: Work) -> tuple[float, ...]:
    return tuple(float(w) for w in work.options.get("weight", (1.0,) * work.count))


def merging_rule(work: Work) -> None:
    """A rule whose options are those of the pure function of its name."""
    skipped = ("weight", "lambda", "tukey_fence", "mask_scale", "density")
    options = {k: v for k, v in work.options.items() if k not in skipped}
    name, given = work.job.rule, work.options
    if name == "arcee_fusion":
        options["spread"] = given["tukey_fence"]
    elif name == "consensus":
        options["scale"] = given["mask_scale"]
    elif name == "pcb" or name == "trust_region":
        options |= {"density": given["density"], "scope": "leaf"}
    elif name == "knots":
        options["rule"] = _ties(given["density"])
    whole(work, name, _weights(work), **options)


def _ties(density: float) -> Any:
    import functools

    from mtl_jax.transforms import merging

    return functools.partial(merging.ties, density=density, scope="leaf")
