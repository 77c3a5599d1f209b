"""Language models on a TPU that is not here: one training step, or decoding."""

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
    module: Any = models.build(name, **{**more, **options})
    if not isinstance(module, models.Decoder):
        raise ValueError(f"preflight: model {name!r} is no decoder")
    start = jnp.zeros((1, 1), jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), start)["params"]
    if rules := tuple(config.model.nf4):
        params = jax.eval_shape(lambda p: nf4.quantize(p, *rules), params)
    return module, params


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
        return _decoding(module, params, config.decode, topology, mesh)
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


def _decoding(module, params, options, topology, mesh):
    """Reading prompts and the loop over tokens, one program.

    Each device holds its part of every weight for good: no token waits for weights.
    """
    placed = preflight_lib.target_mesh(topology, mesh)
    rules = without_axis(models.sharding_rules(module), sharding.DATA)

    def on_mesh(tree, rules):
        specs = sharding.specs_from_rules(tree, rules)
        return jax.tree.map(
            lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spec),
            tree,
            sharding.shardings(placed, tree, specs),
        )

    rows, width, new = options.batch_size, options.prompt_tokens, options.max_new_tokens
    params = on_mesh(params, rules)
    cache = jax.eval_shape(lambda: models.init_cache(module, rows, width + new))
    sharding.check_batch(cache["length"], placed, accumulate=1)
    split = NamedSharding(placed, PartitionSpec(sharding.DATA))
    ids, lengths = (
        jax.ShapeDtypeStruct(shape, "int32", sharding=split)
        for shape in ((rows, width), (rows,))
    )
    run = decoding.generation_fn(
        decoding.from_decoder(module), max_new_tokens=new, stop=options.stop
    )
    return preflight_lib.inspect(
        jax.jit(run),
        (params, ids, lengths),
        topology=topology,
        mesh=placed,
        batch_size=rows,
        parts={
            "parameters": params,
            "cache": on_mesh(cache, CACHE_RULES),
            "prompts": (ids, lengths),
        },
    )
