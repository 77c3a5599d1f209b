"""Shared test setup: eight fake CPU devices, strict numerics, a compile cache."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update(
    "jax_compilation_cache_dir",
    os.environ.get(
        "MTL_JAX_TEST_CACHE", str(pathlib.Path.home() / ".cache/mtl_jax/xla-tests")
    ),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

hypothesis.settings.register_profile(
    "mtl_jax",
    deadline=None,
    max_examples=20,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("mtl_jax")
