"""Shared test setup: eight fake CPU devices, strict numerics, a compile cache."""

import atexit
import gc
import os
import pathlib
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")


import hypothesis
import jax
import pytest


def _private_cache() -> str:
    """A package cache of this session's own, but for what was fetched and prepared.

    Nothing that the code under test computed earlier, or under another JAX, is found.
    """
    real = pathlib.Path(
        os.environ.get("MTL_JAX_CACHE", pathlib.Path.home() / ".cache" / "mtl_jax")
    )
    private = pathlib.Path(tempfile.mkdtemp(prefix="mtl-jax-tests-"))
    for name in ("packages", "files", "tfds"):
        (real / name).mkdir(parents=True, exist_ok=True)
        (private / name).symlink_to(real / name, target_is_directory=True)
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    return str(private)


os.environ["MTL_JAX_CACHE"] = _private_cache()

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update(
    "jax_compilation_cache_dir",
    os.environ.get(
        "MTL_JAX_TEST_CACHE", str(pathlib.Path.home() / ".cache/mtl_jax/xla-tests")
    ),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

# Nearly all of the suite's time is compilation of small programs that run once: most
# of what the CPU compiler does to make them fast is left out. The flags are read when
# its devices are made; libtpu, which does not know them, must not see them later.
_flags = os.environ.get("XLA_FLAGS")
# An unknown flag ends the process: later versions have no other emitters.
_older = "--xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""
os.environ["XLA_FLAGS"] = " ".join(
    (
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
        _older,
        _flags or "",
    )
)
jax.devices("cpu")
os.environ.pop("XLA_FLAGS")
if _flags is not None:
    os.environ["XLA_FLAGS"] = _flags

hypothesis.settings.register_profile(
    "mtl_jax",
    deadline=None,
    max_examples=20,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("mtl_jax")


_MOST_RESIDENT = 3 * 2**30


@pytest.fixture(scope="module", autouse=True)
def _few_programs_kept():
    """Thousands of tests compile thousands of programs: drops them at some size."""
    yield
    statm = pathlib.Path("/proc/self/statm")
    if not statm.exists():
        return
    resident = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if resident > _MOST_RESIDENT:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def quiet():
    """Progress that nobody sees."""
    import io

    from mtl_jax import report

    return report.Progress(stream=io.StringIO(), terminal=False)


@pytest.fixture(scope="session")
def tiny_suite(quiet):
    """Encoder and three tasks of a very small synthetic world."""
    from mtl_jax import zoo

    sizes = {"tasks": 3, "hidden": 32, "pretrain_steps": 100, "sizes": (64, 32, 32)}
    return zoo.world(**sizes, seed=0, progress=quiet)


@pytest.fixture(scope="session")
def tiny_zoo(tiny_suite, quiet, tmp_path_factory):
    """Standard and linear experts of that world."""
    from mtl_jax import zoo

    settings = zoo.Settings(
        steps=10,
        batch_size=16,
        optimizer={"name": "adam", "peak": 2e-3, "decay": False},
        logit_scale=16.0,
        seed=0,
    )
    return zoo.open_zoo(
        *tiny_suite,
        settings,
        modes=("standard", "linear"),
        folder=tmp_path_factory.mktemp("zoo"),
        progress=quiet,
    )
