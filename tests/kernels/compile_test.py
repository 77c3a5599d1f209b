import os

import jax
import pytest

from mtl_jax import kernels

pytestmark = [pytest.mark.tpu, pytest.mark.slow]


@pytest.fixture(scope="module")
def topology():
    pytest.importorskip("libtpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies
    from jax.experimental.compilation_cache import compilation_cache

    # The cache cannot read back a program for a chip that is not there.
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield lambda name: topologies.get_topology_desc(name, "tpu")
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


@pytest.mark.parametrize("chip", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize("name", sorted(kernels.list_kernels()))
def test_kernels_compile_ahead_of_time(name, chip, topology):
    compiled = kernels.list_kernels()[name](topology(chip))
    assert compiled
    for program in compiled.values():
        assert "custom-call" in program.as_text()
