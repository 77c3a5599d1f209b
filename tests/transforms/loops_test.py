import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.transforms import loops

pytestmark = pytest.mark.fast


def body(carry, x):
    return carry * 0.5 + x["a"], {"sum": carry + x["b"]}


@pytest.mark.parametrize(("count", "loop"), [(1, False), (8, False), (9, True)])
def test_is_scan_written_out_for_few_turns(count, loop):
    rng = np.random.default_rng(0)
    xs = {k: jnp.asarray(rng.normal(size=count), jnp.float32) for k in "ab"}
    run = jax.jit(lambda c, xs: loops.scan(body, c, xs))
    want = jax.lax.scan(body, jnp.float32(1), xs)
    found = run(jnp.float32(1), xs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, want)
    text = run.lower(jnp.float32(1), xs).compile().as_text()
    assert (" while(" in text) is loop


@pytest.mark.parametrize("length", [2, 20])
def test_without_inputs(length):
    found = loops.scan(lambda c, _: (2 * c, None), 1.0, None, length=length)
    assert float(found[0]) == 2.0**length and found[1] is None
