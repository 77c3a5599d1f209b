import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax import aggregation, tree, weighting

PARAMS = {"a": {"k": jnp.zeros((2, 3)), "b": jnp.zeros(3)}, "c": jnp.zeros(4)}


def grads_of(seed=0, count=3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=(count, *p.shape)), jnp.float32), PARAMS
    )


def apply(tx, grads, **extra):
    first = jax.tree.map(lambda x: x[0], grads)
    return tx.update(grads, tx.init(first), **extra)[0]


def assert_close(one, two):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4), one, two)


def test_per_leaf_is_the_method_on_each_leaf():
    grads = grads_of()
    want = jax.tree.map(lambda g: apply(aggregation.imtl_g(), g), grads)
    assert_close(apply(aggregation.per_leaf(aggregation.imtl_g()), grads), want)


def test_per_group_is_the_method_on_each_group():
    grads = grads_of()
    tx = aggregation.per_group(aggregation.config(), ["^a/k", "b$"])
    out = apply(tx, grads)
    for part in (("a", "k"), ("a", "b"), ("c",)):
        one, got = grads, out
        for key in part:
            one, got = one[key], got[key]
        assert_close(got, apply(aggregation.config(), one))
    whole = apply(aggregation.per_group(aggregation.config(), ["."]), grads)
    assert_close(whole, apply(aggregation.config(), grads))


def test_groups_have_states_and_keys_of_their_own():
    grads = {"a": jnp.eye(3), "b": jnp.eye(3)}
    out = apply(aggregation.per_leaf(aggregation.random()), grads)
    assert out["a"].tolist() != out["b"].tolist()
    tx = aggregation.per_leaf(aggregation.nash_mtl(3))
    state = tx.init(PARAMS)
    assert state.method.weights.shape == (3, 3)
    _, state = jax.jit(tx.update)(grads_of(), state)
    assert state.method.step.tolist() == [1, 1, 1]


def test_leaves_that_are_no_numbers_are_in_no_group():
    grads = {"n": jnp.ones((2, 1), jnp.int32), "w": jnp.eye(2)}
    out = apply(aggregation.per_leaf(aggregation.imtl_g()), grads)
    assert out["w"].tolist() == [0.5, 0.5]
    assert out["n"].tolist() == [1]


def test_grouping_refusals():
    with pytest.raises(ValueError, match="per_leaf: wanted a method with weights"):
        aggregation.per_leaf(aggregation.trimmed_mean())
    tx = aggregation.per_group(aggregation.mean(), ["^a", "k$"])
    with pytest.raises(ValueError, match="per_group: 'k\\$' is left without a leaf"):
        tx.init(PARAMS)


# With a rule the Gramian is scaled, without one the gradients.
@pytest.mark.parametrize(
    "method", [aggregation.aligned_mtl, aggregation.trimmed_mean, aggregation.sum]
)
@pytest.mark.parametrize("by", ["l2", "loss", "loss_l2"])
def test_normalize_divides_the_gradients(method, by):
    grads, losses = grads_of(), jnp.array([0.5, 2.0, 4.0])
    norms = jnp.sqrt(jnp.diag(tree.gram(grads)))
    size = {"l2": norms, "loss": losses, "loss_l2": norms * losses}[by]
    divided = jax.tree.map(lambda g: g / size.reshape(-1, *[1] * (g.ndim - 1)), grads)
    out = apply(aggregation.normalize(method(), by), grads, losses=losses)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        out,
        apply(method(), divided),
    )


def test_normalize_refusals():
    with pytest.raises(ValueError, match="normalize: by is 'l1', wanted one of"):
        aggregation.normalize(aggregation.sum(), "l1")
    tx = aggregation.normalize(aggregation.sum(), "loss")
    with pytest.raises(ValueError, match="normalize: needs losses"):
        apply(tx, grads_of())
    losses = jnp.array([1.0, 0.0, 1.0])
    with pytest.raises(ValueError, match=r"normalize: losses are .*, wanted above 0"):
        apply(tx, grads_of(), losses=losses)
    out = jax.jit(lambda g: apply(tx, g, losses=losses))(grads_of())
    assert np.isnan(out["c"]).all()


def test_normalize_keeps_zero_gradients():
    grads = {"w": jnp.array([[3.0, 4.0], [0.0, 0.0]])}
    for method in (aggregation.sum(), aggregation.trimmed_mean(trim=0)):
        assert np.isfinite(apply(aggregation.normalize(method), grads)["w"]).all()


@pytest.mark.parametrize("method", [aggregation.aligned_mtl, aggregation.trimmed_mean])
def test_preference_is_a_factor_of_the_losses(method):
    grads, wanted = grads_of(), np.array([1.0, 2.0, 5.0], np.float32)
    scaled = jax.tree.map(lambda g: g * wanted.reshape(-1, *[1] * (g.ndim - 1)), grads)
    out = apply(aggregation.with_preference(method(), wanted), grads)
    assert_close(out, apply(method(), scaled))
    with pytest.raises(ValueError, match=r"preference is \(2,\), wanted \(3,\)"):
        apply(aggregation.with_preference(method(), [1.0, 2.0]), grads)


def test_every_k_uses_weights_again():
    tx = optax.chain(aggregation.every_k(aggregation.imtl_g(), num_tasks=3, k=2))
    state, outs = tx.init(PARAMS), []
    steps = [grads_of(s) for s in range(4)]
    update = jax.jit(tx.update)
    for grads in steps:
        out, state = update(grads, state)
        outs.append(out)
    weights = [aggregation.weights.imtl_g(tree.gram(g)) for g in steps]
    for i, out in enumerate(outs):
        assert_close(out, tree.combine(steps[i], weights[i - i % 2]))
    assert update._cache_size() == 1


def test_every_k_is_a_rule_too():
    rule = aggregation.every_k(aggregation.random(), num_tasks=3, k=3).rule
    state, found = rule.init(), []
    for _ in range(4):
        w, state = rule.weigh(jnp.eye(3), state)
        found.append(w.tolist())
    assert found[0] == found[1] == found[2] != found[3]


def test_every_k_refusals():
    with pytest.raises(ValueError, match="every_k: k is 0, wanted 1 or more"):
        aggregation.every_k(aggregation.mean(), num_tasks=2, k=0)
    with pytest.raises(ValueError, match="every_k: wanted a method with weights"):
        aggregation.every_k(aggregation.trimmed_mean(), num_tasks=2, k=2)


def test_combinators_combine():
    tx = aggregation.normalize(
        aggregation.cr_mogm(
            aggregation.every_k(aggregation.config(), num_tasks=3, k=2), 3
        )
    )
    out = apply(tx, grads_of())
    assert_close(out, apply(aggregation.normalize(aggregation.config()), grads_of()))


@pytest.mark.fast
def test_what_the_method_reads_is_handed_on():
    constant, modo = aggregation.constant([1.0, 2.0]), aggregation.modo(2)
    reads = [
        aggregation.with_preference(constant, [1.0, 3.0]),
        aggregation.normalize(constant),
        aggregation.normalize(constant, "loss"),
        aggregation.every_k(constant, 2, 3),
        aggregation.with_preference(modo, [1.0, 3.0]),
        aggregation.cr_mogm(modo, 2),
    ]
    assert [tx.rule.reads for tx in reads] == [
        (),
        ("gram",),
        ("losses",),
        (),
        ("cross_gram",),
        ("cross_gram",),
    ]


@pytest.mark.fast
def test_preference_goes_to_the_products_of_two_batches():
    cross, scale = jnp.array([[1.0, 0.5], [-0.5, 3.0]]), np.array([1.0, 3.0])
    tx = aggregation.with_preference(aggregation.modo(2), scale)
    found, _ = tx.rule.weigh(jnp.zeros((2, 2)), tx.rule.init(), cross_gram=cross)
    scaled = jnp.asarray(np.asarray(cross) * np.outer(scale, scale), jnp.float32)
    want = aggregation.weights.modo(scaled) * scale.astype(np.float32)
    np.testing.assert_allclose(found, want, rtol=1e-6)


@pytest.mark.fast
def test_weights_in_use_for_long_leave_no_room_for_looking_back():
    famo = weighting.as_aggregator(weighting.famo(), 2)
    with pytest.raises(ValueError, match="looks at what every step has brought"):
        aggregation.every_k(famo, 2, 3)
    with pytest.raises(ValueError, match="per_leaf: .* what every step has brought"):
        aggregation.per_leaf(famo)
    smooth = aggregation.cr_mogm(famo, 2)
    _, state = smooth.rule.weigh(
        jnp.zeros((2, 2)), smooth.rule.init(), losses=jnp.ones(2)
    )
    logits = smooth.rule.after(state, jnp.array([0.5, 1.0])).method.weighting.method
    assert logits.logits[0] < logits.logits[1]


@pytest.mark.fast
@pytest.mark.parametrize("reads", ["gram", ("grams",)])
def test_rules_that_read_what_is_not_there(reads):
    with pytest.raises(ValueError, match="Rule: reads is .*, wanted a tuple of some"):
        aggregation.Rule(lambda: (), lambda gram, state: (gram, state), reads)


def test_absent_tasks_have_no_loss_to_divide_by():
    tx = aggregation.normalize(aggregation.sum(), "loss")
    grads = {"w": jnp.array([[2.0], [0.0]])}
    extra = {"losses": jnp.array([4.0, 0.0]), "present": jnp.array([True, False])}
    out, state = jax.jit(tx.update)(grads, tx.init({"w": jnp.zeros(1)}), **extra)
    assert out["w"].tolist() == [0.5] and bool(state.finite)
