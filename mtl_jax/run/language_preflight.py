"""Language models on a TPU that is not here: one training step, or decoding."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from mtl_jax import decoding, models
from mtl_jax.models.backbones.decoder import CACHE_RULES
from mtl_jax.models.layers.sharding import without_axis
from mtl_jax.run import language
from mtl_jax.train import causal_lm, optim, sharding
from mtl_jax.train import preflight as preflight_lib
from mtl_jax.transforms.quantization import nf4

_NAMES = {"random": ("decoder", language.BYTES), "smollm2": ("smollm2-135m", {})}


def outline(config: ConfigDict) -> tuple[models.Decoder, Any]:
    """The model of a language experiment without its weights.

    Args:
      config: of the experiment; its model is one that the experiment knows, or any
        decoder that `models.build` knows.

    Returns:
      (module, shapes of its parameters, those that are kept in 4 bits as such).

    Raises:
      ValueError: if there is no such decoder.
    """
    options = config.model.options.to_dict()
    name, more = _NAMES.get(config.model.name, (config.model.name, {}))
    module, params = decoder(name, **{**more, **options})
    if rules := tuple(config.model.nf4):
        params = jax.eval_shape(lambda p: nf4.quantize(p, *rules), params)
    return module, params


def decoder(name: str, **options: Any) -> tuple[models.Decoder, Any]:
    """A decoder that `models.build` knows, and shapes of its parameters.

    Raises:
      ValueError: if there is no such decoder.
    """
    module: Any = models.build(name, **options)
    if not isinstance(module, models.Decoder):
        raise ValueError(f"preflight: model {name!r} is no decoder")
    start = jnp.zeros((1, 1), jnp.int32)
    return module, jax.eval_shape(module.init, jax.random.key(0), start)["params"]


def preflight(
    config: ConfigDict, *, topology: str, mesh: dict[str, int]
) -> preflight_lib.PreflightReport:
    """Compiles what a language experiment runs, for a TPU topology.

    Args:
      config: an experiment; with `decode` it is about decoding, else about the step
        that trains, an adapter if there is `lora`.
      topology: such as "v5e:4x4".
      mesh: sizes of the axes.

    Returns:
      The report.

    Raises:
      ValueError: as `train.preflight.preflight`.
    """
    module, params = outline(config)
    if "decode" in config:
        if tuple(config.model.nf4):
            raise ValueError("preflight: a model in 4 bits is not decoded as it is")
        return decoding_report(
            [(module, params)], config.decode, topology=topology, mesh=mesh
        )
    training = config.training
    lora = None
    if config.lora is not None:
        lora = causal_lm.LoraSettings(**config.lora.to_dict())
    trainable = causal_lm.causal_lm(
        module,
        params,
        tx=optim.over_steps(training.steps, training.optimizer.to_dict()),
        lora=lora,
    )
    shape = (training.batch_size, config.packing.row_length)
    batch = {
        name: jax.ShapeDtypeStruct(shape, "int32")
        for name in ("input_ids", "segment_ids", "positions")
    }
    return preflight_lib.preflight(trainable, batch, topology=topology, mesh=mesh)


def decoding_report(
    members: Sequence[tuple[models.Decoder, Any]],
    options: Any,
    *,
    topology: str,
    mesh: Mapping[str, int],
    fuse: Any = None,
) -> preflight_lib.PreflightReport:
    """Compiles the reading of prompts and the loop over tokens, one program.

    Each device holds its part of every weight for good: no token waits for weights.

    Args:
      members: decoders and shapes of their parameters; one, or with `fuse` several.
      options: `batch_size`, `prompt_tokens`, `max_new_tokens` and `stop`.
      topology: see `preflight`.
      mesh: see `preflight`.
      fuse: see `decoding.fused`.

    Returns:
      The report.

    Raises:
      ValueError: as `train.preflight.preflight`, or for several models without `fuse`.
    """
    if fuse is None and len(members) != 1:
        raise ValueError(f"decoding_report: {len(members)} models want a fuse")
    placed = preflight_lib.target_mesh(topology, mesh)

    def on_mesh(tree, rules):
        specs = sharding.specs_from_rules(tree, rules)
        return jax.tree.map(
            lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spec),
            tree,
            sharding.shardings(placed, tree, specs),
        )

    def weights(module, params):
        rules = without_axis(models.sharding_rules(module), sharding.DATA)
        return on_mesh(params, rules)

    rows, width, new = options.batch_size, options.prompt_tokens, options.max_new_tokens
    params = tuple(weights(module, params) for module, params in members)
    caches = tuple(
        jax.eval_shape(lambda m=module: models.init_cache(m, rows, width + new))
        for module, _ in members
    )
    sharding.check_batch(caches[0]["length"], placed, accumulate=1)
    split = NamedSharding(placed, PartitionSpec(sharding.DATA))
    ids, lengths = (
        jax.ShapeDtypeStruct(shape, "int32", sharding=split)
        for shape in ((rows, width), (rows,))
    )
    model: Any = tuple(decoding.from_decoder(module) for module, _ in members)
    model = model[0] if fuse is None else decoding.fused(model, fuse)
    run = decoding.generation_fn(model, max_new_tokens=new, stop=options.stop)
    return preflight_lib.inspect(
        jax.jit(run),
        (params if fuse is not None else params[0], ids, lengths),
        topology=topology,
        mesh=placed,
        batch_size=rows,
        parts={
            "parameters": params,
            "cache": tuple(on_mesh(cache, CACHE_RULES) for cache in caches),
            "prompts": (ids, lengths),
        },
    )
