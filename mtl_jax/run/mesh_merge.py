"""Merging models that live on a mesh: timed where it runs, compiled where it would."""

import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from mtl_jax import models, report, tree
from mtl_jax.train import preflight as preflight_lib
from mtl_jax.train import sharding
from mtl_jax.transforms import merging


def _merge(config: ConfigDict) -> Any:
    """From taus to a delta, by the rule that the config names."""
    name, options = config.merge.rule, config.merge.options.to_dict()
    if name not in merging.__all__:
        raise ValueError(
            f"merge rule {name!r} does not exist; known: {', '.join(merging.__all__)}"
        )
    rule = getattr(merging, name)

    def merge(taus: Any) -> Any:
        return rule(taus, **options)

    return merge


def _outline(config: ConfigDict, mesh: Mesh) -> tuple[Any, Any]:
    """Shapes of the parameters, and of the stacked task vectors, with shardings."""
    module: Any = models.build(config.model.name, **config.model.options.to_dict())
    start = jnp.zeros((1, 1), jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), start)["params"]
    specs = sharding.specs_from_rules(params, models.sharding_rules(module))
    places = sharding.shardings(mesh, params, specs)

    def one(x, place):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    def stacked(x, place):
        spec = PartitionSpec(None, *place.spec)
        shape = (config.merge.models, *x.shape)
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return (
        jax.tree.map(one, params, places),
        jax.tree.map(stacked, params, places),
    )


def preflight(
    config: ConfigDict, *, topology: str, mesh: dict[str, int]
) -> preflight_lib.PreflightReport:
    """Compiles a merge of sharded task vectors, as one program, for a TPU topology.

    Args:
      config: `model`, any language model that `models.build` knows, and `merge`: how
        many models, the rule of `mtl_jax.merging`, and its options.
      topology: such as "v5p:4x4x4".
      mesh: sizes of the axes.

    Returns:
      The report; its batch is the number of models.

    Raises:
      ValueError: as `train.preflight.preflight`, or for a rule that does not exist.
    """
    placed = preflight_lib.target_mesh(topology, mesh)
    params, taus = _outline(config, placed)
    places = jax.tree.map(lambda x: x.sharding, params)
    return preflight_lib.inspect(
        jax.jit(_merge(config), out_shardings=places),
        (taus,),
        topology=topology,
        mesh=placed,
        batch_size=config.merge.models,
        parts={"parameters": params, "task vectors": taus},
    )


def run(
    config: ConfigDict, document: report.Report, workdir: Any, progress: Any, mesh: Mesh
) -> None:
    """Merges random task vectors on the mesh and reports how long that takes.

    The merge is one program, the one that `preflight` compiles.

    Args:
      config: see `preflight`; `repeats` says how often it is timed.
      document: gets the table.
      workdir: gets `report/`.
      progress: a `report.Progress`.
      mesh: where the models live.
    """
    params, shapes = _outline(config, mesh)
    places = jax.tree.map(lambda x: x.sharding, params)
    merge = jax.jit(_merge(config), out_shardings=places)
    leaves, treedef = jax.tree.flatten(shapes)
    with progress.task("task vectors", total=len(leaves)) as bar:
        taus = []
        for i, x in enumerate(leaves):
            draw = jax.jit(
                lambda key, x=x: 1e-3 * jax.random.normal(key, x.shape, x.dtype),
                out_shardings=x.sharding,
            )
            taus.append(draw(jax.random.fold_in(jax.random.key(0), i)))
            bar.advance()
    taus = treedef.unflatten(taus)
    seconds = []
    with progress.task("merges", total=config.repeats + 1) as bar:
        for _ in range(config.repeats + 1):
            begin = time.perf_counter()
            jax.block_until_ready(merge(taus))
            seconds.append(time.perf_counter() - begin)
            bar.advance(seconds=seconds[-1])
    first, *rest = seconds
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(taus))
    document.add_table(
        report.Table(
            title="Merging on the mesh",
            columns=(
                *("rule", "models", "parameters", "devices", "task vectors"),
                *("first, s", "median, s", "bytes / s"),
            ),
            rows=(
                (
                    config.merge.rule,
                    config.merge.models,
                    tree.size(taus) // config.merge.models,
                    mesh.size,
                    size,
                    first,
                    sorted(rest)[len(rest) // 2],
                    size / sorted(rest)[len(rest) // 2],
                ),
            ),
            formats={
                "parameters": ",",
                "task vectors": "bytes",
                "first, s": ".2f",
                "median, s": ".3f",
                "bytes / s": "bytes",
            },
            caption="Random task vectors; the first call compiles. Bytes of the task "
            "vectors over the median time.",
        )
    )
    document.write(workdir / "report")
    document.print()
