import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import models

IDS = jnp.array([[1, 2, 3, 4], [5, 6, 0, 0]], jnp.int32)
X = jnp.arange(8.0)
MASK = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0]], jnp.int32)


def tiny(**options):
    return models.Bert(
        vocab_size=11,
        width=8,
        depth=2,
        num_heads=2,
        mlp_dim=16,
        max_positions=6,
        **options,
    )


@pytest.fixture(scope="module")
def params(fill):
    return fill(tiny(), IDS)


def loss(module, params):
    return jnp.mean(jnp.square(module.apply({"params": params}, IDS, MASK)))


@pytest.fixture(scope="module")
def reference(params):
    return jax.jit(jax.value_and_grad(lambda p: loss(tiny(), p)))(params)


def test_stack_and_unstack_are_inverse(params):
    stacked = models.stack_layers(params)
    like = jax.eval_shape(tiny(scan=True).init, jax.random.key(0), IDS)["params"]
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, like)
    back = models.unstack_layers(stacked)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("remat", [False, True])
def test_scan_and_remat_change_no_number(params, reference, scan, remat):
    want, want_grad = reference
    module = tiny(scan=scan, remat=remat)
    own = models.stack_layers(params) if scan else params
    got, grad = jax.jit(jax.value_and_grad(lambda p: loss(module, p)))(own)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    grad = models.unstack_layers(grad) if scan else grad
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), grad, want_grad
    )


@pytest.mark.parametrize("scan", [False, True])
def test_hidden_states_end_with_the_output(params, scan):
    own = models.stack_layers(params) if scan else params
    module = tiny(scan=scan)
    hidden = jax.jit(
        lambda p: module.apply({"params": p}, IDS, MASK, return_hidden=True)
    )(own)
    assert len(hidden) == 3
    want = jax.jit(lambda p: tiny().apply({"params": p}, IDS, MASK))(params)
    np.testing.assert_allclose(hidden[-1], want, atol=1e-6)
    assert not np.allclose(hidden[1], hidden[2])


def test_remat_recomputes_and_scan_does_not_grow(params):
    """Kills a `remat` or `scan` that is accepted and dropped."""

    def text(module, own):
        return str(jax.make_jaxpr(jax.grad(lambda p: loss(module, p)))(own))

    stacked = models.stack_layers(params)
    assert "remat" in text(tiny(remat=True), params)
    assert "remat" not in text(tiny(), params)
    assert "scan[" in text(tiny(scan=True), stacked)
    assert "scan[" not in text(tiny(), params)


def test_jvp_agrees_with_finite_differences_through_scan_and_remat(params):
    module = tiny(scan=True, remat=True)
    own = models.stack_layers(params)
    tangent = jax.tree.map(lambda x: 0.1 * jnp.cos(7 * x), own)
    f = jax.jit(lambda p: loss(module, p))
    _, slope = jax.jit(lambda p, t: jax.jvp(f, (p,), (t,)))(own, tangent)
    eps = 1e-2
    sides = [
        f(jax.tree.map(lambda x, t, s=s: x + s * eps * t, own, tangent))
        for s in (1, -1)
    ]
    np.testing.assert_allclose(slope, (sides[0] - sides[1]) / (2 * eps), rtol=5e-3)


def test_vmap_over_models(params):
    bank = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    f = jax.jit(lambda p: loss(tiny(), p))
    got = jax.jit(jax.vmap(f))(bank)
    twice = jax.tree.map(lambda x: 2 * x, params)
    want = [f(params), f(twice)]
    np.testing.assert_allclose(got, jnp.stack(want), rtol=1e-5)


def test_collections_beside_params_reach_every_scanned_layer(fill):
    """Kills a scan that carries `params` only: adapters would vanish in silence."""

    def adapt(call, args, kwargs, context):
        out = call(*args, **kwargs)
        module = context.module
        if context.method_name == "__call__" and module.has_variable("shift", "s"):
            out = out + module.get_variable("shift", "s")
        return out

    module = tiny(scan=True).clone(depth=2)
    params = fill(module, IDS)

    @jax.jit
    def run(shift):
        shifts = {"layers": {"mlp": {"out": {"s": shift}}}}
        with nn.intercept_methods(adapt):
            return module.apply(
                {"params": params, "shift": shifts}, IDS, return_hidden=True
            )

    rows = jnp.zeros((2, 1, 1, 8))
    base, first, second = (run(rows.at[i].set(d)) for i, d in ((0, 0), (0, X), (1, X)))
    assert not np.allclose(base[1], first[1])
    np.testing.assert_array_equal(base[1], second[1])
    assert not np.allclose(base[2], second[2])


class Recorder(nn.Module):
    """Multiplies, and writes what came in to its place in the cache."""

    @nn.compact
    def __call__(self, x, shared, own, cache, layer):
        gain = self.param("gain", nn.initializers.ones, (), jnp.float32)
        if cache is not None and layer is None:
            cache = {"seen": x + cache["seen"]}
        elif cache is not None:
            seen = x + cache["seen"][layer]
            cache = {"seen": cache["seen"].at[layer].set(seen)}
        return x * gain * shared + own["shift"], cache


class Recorders(nn.Module):
    scan: bool
    remat: bool = False

    @nn.compact
    def __call__(self, x, shared, own, cache=None):
        return models.layers.run_layers(
            lambda name: Recorder(name=name),
            3,
            x,
            shared,
            own=own,
            cache=cache,
            scan=self.scan,
            remat=self.remat,
            collect=True,
        )


@pytest.mark.fast
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("remat", [False, True])
def test_layers_get_their_own_inputs_and_write_their_own_cache(scan, remat):
    x, shared = jnp.array([[1.0]]), jnp.float32(2)
    own = {"shift": jnp.array([0.5, 0.25, 0.125])}
    gains = [3.0, 5.0, 7.0]
    params = {f"layers_{i}": {"gain": jnp.float32(g)} for i, g in enumerate(gains)}
    cache = {f"layers_{i}": {"seen": jnp.full((1, 1), 100.0)} for i in range(3)}
    if scan:
        params = models.stack_layers(params)
        cache = models.stack_layers(cache)
    module = Recorders(scan, remat)
    y, written, outputs = module.apply({"params": params}, x, shared, own, cache)
    want, seen = [1.0], []
    for gain, shift in zip(gains, (0.5, 0.25, 0.125), strict=True):
        seen.append(100 + want[-1])
        want.append(want[-1] * gain * 2 + shift)
    np.testing.assert_allclose(y, [[want[-1]]])
    np.testing.assert_allclose(np.ravel(jnp.stack(outputs)), want[1:])
    assert jax.tree.structure(written) == jax.tree.structure(cache)
    written = models.unstack_layers(written) if scan else written
    found = [written[f"layers_{i}"]["seen"].item() for i in range(3)]
    np.testing.assert_allclose(found, seen)
    same, nothing, _ = module.apply({"params": params}, x, shared, own)
    np.testing.assert_array_equal(same, y)
    assert nothing is None


@pytest.mark.fast
def test_stack_layers_refuses_gaps_and_absence():
    leaf = {"w": jnp.zeros(2)}
    with pytest.raises(ValueError, match="stack_layers.*without a gap"):
        models.stack_layers({"layers_0": leaf, "layers_2": leaf})
    with pytest.raises(ValueError, match="stack_layers"):
        models.stack_layers({"head": leaf})
    with pytest.raises(ValueError, match="unstack_layers: wanted 'layers'"):
        models.unstack_layers({"layers_0": leaf})
    with pytest.raises(ValueError, match="leading axis"):
        models.unstack_layers({"layers": {"a": jnp.zeros(2), "b": jnp.zeros(3)}})
