import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax.data import synthetic

SMALL = {"tasks": 3, "pretrain_tasks": 5, "sizes": (60, 30, 100)}


@pytest.fixture(scope="module")
def bench():
    return synthetic.zero_shot_world(jax.random.key(0), **SMALL)


def test_shapes_and_dtypes(bench):
    assert bench.world.mix.shape == (16, 64)
    assert bench.world.render.shape == (64, 48)
    assert bench.world.text.shape == (16, 32)
    assert bench.targets.head.shape == (3, 32, 10)
    assert bench.pretrain.centres.shape == (5, 10, 16)
    assert bench.train["inputs"].shape == (3, 60, 48)
    assert bench.test["label"].shape == (3, 100)
    assert {x.dtype for x in jax.tree.leaves(bench)} == {
        jnp.dtype("float32"),
        jnp.dtype("int32"),
    }


def test_head_columns_are_16_unit_embeddings_of_the_centres(bench):
    centres = np.asarray(bench.targets.centres, np.float64)
    text = np.asarray(bench.world.text, np.float64)
    for t in range(3):
        for k in range(10):
            wanted = centres[t, k] @ text
            wanted *= 16 / np.sqrt(wanted @ wanted)
            np.testing.assert_allclose(
                bench.targets.head[t, :, k], wanted, rtol=2e-5, atol=2e-5
            )


def test_scales_of_the_shared_part_and_of_centres():
    world = synthetic.make_world(jax.random.key(1), latent=64)
    tasks = synthetic.make_tasks(jax.random.key(2), world, rho=np.ones(30))
    drawn = (world.mix, world.render, world.text, tasks.centres, tasks.bias)
    wanted = [1, 1 / 8, 1 / 8, 1.2, 0.5]
    np.testing.assert_allclose([x.std() for x in drawn], wanted, rtol=0.06)


@pytest.mark.parametrize("rho", [0.2, 1.3])
def test_shift_is_orthogonal_and_its_strength_follows_rho(rho):
    world = synthetic.make_world(jax.random.key(0))
    tasks = synthetic.make_tasks(jax.random.key(1), world, rho=np.full(2, rho))
    eye = np.eye(48)
    for q in np.asarray(tasks.shift):
        np.testing.assert_allclose(q @ q.T, eye, atol=2e-5)
        assert np.abs(q - eye).max() > rho / 4


def test_shift_solves_the_qr_of_the_card():
    """shift^T (I + rho (K - K^T) / sqrt D) is upper triangular for a skew part."""
    world = synthetic.make_world(jax.random.key(0))
    key = jax.random.key(5)
    task = synthetic.make_tasks(key, world, rho=np.array([0.7]))
    own = jax.random.normal(jax.random.split(key, 1)[0], (160 + 48 * 48 + 48,))
    gauss = np.asarray(own[160:-48], np.float64).reshape(48, 48)
    target = np.eye(48) + 0.7 * (gauss - gauss.T) / np.sqrt(48)
    r = np.asarray(task.shift[0], np.float64).T @ target
    np.testing.assert_allclose(np.tril(r, -1), 0, atol=1e-5)
    assert np.all(np.diag(r) > 0)


def test_no_shift_is_the_identity():
    world = synthetic.make_world(jax.random.key(0))
    tasks = synthetic.make_tasks(jax.random.key(1), world, rho=np.zeros(2))
    np.testing.assert_array_equal(tasks.shift, np.broadcast_to(np.eye(48), (2, 48, 48)))
    np.testing.assert_array_equal(tasks.bias, 0)


def test_inputs_follow_the_equation(bench):
    """Class means and spreads agree with a NumPy sampler of the card's equation."""
    world, tasks = bench.world, bench.targets
    found = synthetic.sample(jax.random.key(3), world, tasks, rows=20_000)
    w = [np.asarray(x, np.float64) for x in world]
    rng = np.random.default_rng(0)
    for t in range(3):
        centres, shift = np.asarray(tasks.centres[t]), np.asarray(tasks.shift[t])
        label = rng.integers(0, 10, 20_000)
        u = centres[label] + rng.normal(size=(20_000, 16))
        x = 2 * np.tanh(u @ w[0] / 4) @ w[1] @ shift + np.asarray(tasks.bias[t])
        got = np.asarray(found["inputs"][t])
        for k in range(10):
            mean = got[found["label"][t] == k].mean(0)
            np.testing.assert_allclose(mean, x[label == k].mean(0), atol=0.2)
        np.testing.assert_allclose(got.std(0), x.std(0), rtol=0.05)


def test_labels_are_uniform(bench):
    found = synthetic.sample(jax.random.key(1), bench.world, bench.targets, rows=20_000)
    for t in range(3):
        np.testing.assert_allclose(
            np.bincount(found["label"][t]) / 20_000, 0.1, atol=0.01
        )


def test_keys_decide_everything_and_splits_differ(bench):
    again = synthetic.zero_shot_world(jax.random.key(0), **SMALL)
    jax.tree.map(np.testing.assert_array_equal, bench, again)
    train, test = np.asarray(bench.train["inputs"]), np.asarray(bench.test["inputs"])
    assert not np.any(np.all(train[0, :30] == test[0, :30], axis=-1))
    assert np.abs(bench.targets.centres[0] - bench.targets.centres[1]).max() > 0.5


def test_tasks_do_not_depend_on_each_other(bench):
    """A task's rows follow from its own key and parameters."""
    swapped = jax.tree.map(lambda x: x.at[1:].set(x[:1]), bench.targets)
    key = jax.random.key(9)
    one = synthetic.sample(key, bench.world, bench.targets, rows=7)
    two = synthetic.sample(key, bench.world, swapped, rows=7)
    np.testing.assert_array_equal(one["inputs"][0], two["inputs"][0])
    assert np.abs(one["inputs"][1] - two["inputs"][1]).max() > 0.1
    np.testing.assert_array_equal(one["label"], two["label"])


def test_rho_is_one_number_per_task():
    world = synthetic.make_world(jax.random.key(0))
    with pytest.raises(ValueError, match=r"rho has shape \(\), wanted \(tasks,\)"):
        synthetic.make_tasks(jax.random.key(0), world, rho=0.5)


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")
def test_zero_shot_is_above_chance_and_far_below_fine_tuned():
    """The card's bench: zero-shot about .58 and fine-tuned about .96 of accuracy."""
    bench = synthetic.zero_shot_world(jax.random.key(0))
    sizes = (48, 192, 192, 32)
    keys = jax.random.split(jax.random.key(1), 3)
    params = [
        (jax.random.normal(k, (m, n)) * jnp.sqrt(2.0 / m), jnp.zeros(n))
        for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]

    def logits(params, x, head):
        for i, (w, b) in enumerate(params):
            x = jnp.dot(x, w) + b[None, :]
            x = jax.nn.relu(x) if i < 2 else x
        x /= jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-6
        return jnp.dot(x, head)

    def loss(params, x, y, head):
        out = logits(params, x, head)
        return optax.softmax_cross_entropy_with_integer_labels(out, y).mean()

    def train(params, rate, steps, batch):
        tx = optax.adam(rate)

        def step(carry, key):
            params, state = carry
            grads = jax.grad(loss)(params, *batch(key))
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.key(2), steps)
        return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]

    def pretraining(key):
        k1, k2 = jax.random.split(key)
        t = jax.random.randint(k1, (), 0, 40)
        task = jax.tree.map(lambda x: x[t][None], bench.pretrain)
        rows = synthetic.sample(k2, bench.world, task, rows=128)
        return rows["inputs"][0], rows["label"][0], task.head[0]

    def fine_tuning(key):
        rows = jax.random.randint(key, (64,), 0, 600)
        x, y = bench.train["inputs"][0], bench.train["label"][0]
        return x[rows], y[rows], bench.targets.head[0]

    def accuracy(params, t):
        out = logits(params, bench.test["inputs"][t], bench.targets.head[t])
        return float((out.argmax(-1) == bench.test["label"][t]).mean())

    base = jax.jit(lambda p: train(p, 1e-3, 1500, pretraining))(params)
    zero_shot = np.mean([accuracy(base, t) for t in range(8)])
    tuned = accuracy(jax.jit(lambda p: train(p, 5e-4, 300, fine_tuning))(base), 0)
    assert 0.4 < zero_shot < 0.75
    assert tuned > 0.9
