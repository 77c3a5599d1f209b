import functools
import importlib.util
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from mtl_jax import aggregation, models, train, tree
from mtl_jax.train import preflight as preflight_lib

T = 3
ENGINES = ("map", "vmap", "gramian", "auto")


def init(key):
    first, second, third = jax.random.split(key, 3)
    return {
        "trunk": {
            "kernel": jax.random.normal(first, (4, 8)),
            "bias": jnp.zeros(8),
            "fixed": jnp.ones(4),
        },
        "heads": {
            "kernel": jax.random.normal(second, (T, 8)),
            "bias": jax.random.normal(third, (T,)),
        },
    }


def encode(params, batch, key):
    del key
    trunk = params["trunk"]
    x = batch["x"] * trunk["fixed"][None]
    return jnp.tanh(x @ trunk["kernel"] + trunk["bias"][None])


def heads(params, copies, batch, key):
    del key
    found = jnp.einsum("tbd,td->bt", copies, params["heads"]["kernel"])
    error = found + params["heads"]["bias"][None] - batch["y"]
    return jnp.mean(error**2, 0), {"mae": jnp.mean(jnp.abs(error))}


LOSS = aggregation.SplitLoss(encode=encode, heads=heads, num_tasks=T)


def noisy(params, batch, key):
    x = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
    return LOSS(params, batch | {"x": x}, key)


def summed(params, batch, key):
    losses, metrics = LOSS(params, batch, key)
    return losses.sum(), metrics


def batch(step, size=16):
    rng = np.random.default_rng(step)
    return {
        "x": rng.normal(size=(size, 4)).astype(np.float32),
        "y": rng.normal(size=(size, T)).astype(np.float32),
    }


def trainable(**changes):
    options = {
        "init": init,
        "loss_fn": LOSS,
        "tx": optax.adamw(1e-2),
        "frozen": ("fixed",),
        "aggregator": aggregation.pcgrad(seed=2),
        "shared": ("^trunk",),
        "task_names": ("a", "b", "c"),
    }
    return train.Trainable(**(options | changes))


def without_rule():
    """The mean of the task gradients, as a method that needs them."""
    return aggregation.from_gradients(
        "mean",
        lambda params: jax.tree.map(lambda p: jnp.zeros((T, *p.shape)), params),
        lambda grads, state, **extra: (
            tree.combine(grads, extra["losses"] * 0 + 1 / T),
            jax.tree.map(lambda s, g: s + g, state, grads),
        ),
    )


@pytest.fixture
def fit(one_device):
    def run(steps=5, data=batch, trainer=None, **changes):
        options = {k: changes.pop(k) for k in ("accumulate",) if k in changes}
        trainer = trainer or train.Trainer(
            trainable(**changes), mesh=one_device, **options
        )
        return trainer.fit(data, steps=steps, log_every=1)

    return run


def close(a, b, **tolerance):
    tolerance = {"rtol": 1e-4, "atol": 1e-5} | tolerance
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@functools.cache
def ordinary(accumulate):
    plain = train.Trainable(
        init=init, loss_fn=summed, tx=optax.adamw(1e-2), frozen=("fixed",)
    )
    mesh = train.make_mesh(devices=jax.devices()[:1])
    trainer = train.Trainer(plain, accumulate=accumulate, mesh=mesh)
    return trainer.fit(batch, steps=3, log_every=1)


@pytest.mark.parametrize(
    ("engine", "accumulate"),
    [("map", 1), ("vmap", 2), ("gramian", 1), ("gramian", 2), ("features", 1)],
)
def test_the_sum_is_ordinary_training(fit, engine, accumulate):
    want = ordinary(accumulate)
    changes = {"shared": (".*",)} if engine == "features" else {}
    changes |= {"aggregator": aggregation.sum(), "accumulate": accumulate}
    found = fit(3, grads=engine, **changes)
    close(found.params, want.params)
    for record, wanted in zip(found.history, want.history, strict=True):
        for name in ("loss", "grad_norm", "mae"):
            assert record[name] == pytest.approx(wanted[name], rel=1e-4)
        assert record["loss"] == pytest.approx(
            sum(record[f"loss_{name}"] for name in "abc"), rel=1e-5
        )


@functools.cache
def by_hand(steps, rate):
    """Shared leaves by PCGrad, heads by the sum; written without a trainer."""
    method = aggregation.pcgrad(seed=2)
    params = init(jax.random.split(jax.random.key(0))[0])
    state = method.init(params["trunk"])

    @jax.jit
    def step(params, state, rows):
        def losses(trunk, head):
            return LOSS({"trunk": trunk, "heads": head}, rows, None)[0]

        grads = jax.jacrev(losses)(params["trunk"], params["heads"])
        grads["fixed"] = jnp.zeros_like(grads["fixed"])
        trunk, state = method.update(grads, state)
        head = jax.grad(lambda h: losses(params["trunk"], h).sum())(params["heads"])
        update = {"trunk": trunk, "heads": head}
        return jax.tree.map(lambda p, u: p - rate * u, params, update), state

    for number in range(steps):
        params, state = step(params, state, batch(number))
    return params


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_give_the_steps_written_by_hand(fit, engine):
    found = fit(4, grads=engine, tx=optax.sgd(0.05))
    close(found.params, by_hand(4, 0.05))


def test_methods_that_need_the_gradients(fit):
    want = fit(3, aggregator=aggregation.mean(), grads="map")
    for engine in ("auto", "vmap"):
        found = fit(3, aggregator=without_rule(), grads=engine)
        close(found.params, want.params)
        assert not any(name.startswith("weight") for name in found.history[0])
        assert found.history[0]["min_cosine"] == pytest.approx(
            want.history[0]["min_cosine"], abs=1e-4
        )
        kept = found.state.opt_state.aggregator.method
        assert kept["trunk"]["kernel"].shape == (T, 4, 8)
        assert kept["heads"] == {"kernel": None, "bias": None}


@pytest.mark.parametrize("engine", ["map", "gramian"])
def test_accumulation_is_the_whole_batch(fit, engine):
    want = fit(3, grads=engine)
    found = fit(3, grads=engine, accumulate=4)
    close(found.params, want.params)
    close(found.history[-1]["weight_b"], want.history[-1]["weight_b"])


def test_engines_draw_the_same_noise_on_microbatches(fit):
    runs = [fit(2, loss_fn=noisy, grads=e, accumulate=2) for e in ("map", "gramian")]
    close(runs[0].params, runs[1].params)
    assert fit(2, loss_fn=noisy).history != runs[0].history


def test_metrics_are_those_of_the_gramian(fit):
    found = fit(1, grads="gramian")
    params = init(jax.random.split(jax.random.key(0))[0])
    rows = jax.jacrev(
        lambda k: LOSS(
            params | {"trunk": params["trunk"] | {"kernel": k["k"], "bias": k["b"]}},
            batch(0),
            None,
        )[0]
    )({"k": params["trunk"]["kernel"], "b": params["trunk"]["bias"]})
    flat = np.concatenate([np.reshape(x, (T, -1)) for x in jax.tree.leaves(rows)], 1)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    pairs = (unit @ unit.T)[np.triu_indices(T, 1)]
    record = found.history[0]
    assert record["min_cosine"] == pytest.approx(pairs.min(), abs=1e-5)
    assert record["conflict_rate"] == pytest.approx(np.mean(pairs < 0))
    wanted = {"step", "loss", "grad_norm", "mae", "min_cosine", "conflict_rate"}
    named = {f"{kind}_{name}" for kind in ("loss", "weight") for name in "abc"}
    assert set(record) == wanted | named
    assert min(record[f"weight_{name}"] for name in "abc") >= 1
    numbered = fit(1, task_names=None).history[0]
    assert numbered["loss_2"] == pytest.approx(record["loss_c"], rel=1e-5)


def test_no_task_gradients_of_the_heads(one_device):
    def text_of(**changes):
        trainer = train.Trainer(trainable(**changes), mesh=one_device)
        lowered = trainer.compiled_step.lower(trainer.abstract_state, batch(0))
        return lowered.compile().as_text()

    for engine in ("map", "vmap"):
        text = text_of(grads=engine, aggregator=aggregation.mean())
        assert f"f32[{T},4,8]" in text
        assert f"f32[{T},{T},8]" not in text
    assert f"f32[{T},4,8]" not in text_of(grads="gramian")


@pytest.mark.parametrize("make", [lambda: aggregation.pcgrad(seed=5), without_rule])
def test_resume_is_exact(one_device, tmp_path, equal, make):
    trainer = train.Trainer(trainable(aggregator=make()), mesh=one_device)
    straight = trainer.fit(batch, steps=6)
    trainer.fit(batch, steps=3, workdir=tmp_path)
    resumed = trainer.fit(batch, steps=6, workdir=tmp_path)
    equal(straight.state, resumed.state)
    assert jax.tree.leaves(resumed.state.opt_state.aggregator.method)


def test_another_aggregator_is_another_run(one_device, tmp_path):
    train.Trainer(trainable(), mesh=one_device).fit(batch, steps=1, workdir=tmp_path)
    plain = train.Trainer(
        train.Trainable(init=init, loss_fn=summed, tx=optax.adamw(1e-2)),
        mesh=one_device,
    )
    with pytest.raises(ValueError, match="holds another run"):
        plain.fit(batch, steps=2, workdir=tmp_path)


def two_tasks(slope_of_second):
    def loss(params, batch, key):
        w = params["w"]
        return jnp.stack([jnp.mean(batch["x"] * w), slope_of_second(w)]), {}

    return types.SimpleNamespace(
        init=lambda key: {"w": jnp.zeros(())},
        loss_fn=loss,
        frozen=(),
        shared=(".*",),
        task_names=("good", "bad"),
    ).__dict__


@pytest.mark.parametrize("engine", ["map", "gramian"])
@pytest.mark.parametrize(
    "second", [lambda w: jnp.log(w - 1), lambda w: jnp.sqrt(w)], ids=["loss", "slope"]
)
def test_the_task_that_is_not_finite_is_named(
    fit, tmp_path, one_device, engine, second
):
    trainer = train.Trainer(
        trainable(**two_tasks(second), grads=engine), mesh=one_device
    )
    before = trainer.init_state()
    with pytest.raises(train.NonFiniteError, match="not finite for task: 'bad'") as e:
        trainer.fit(batch, steps=3, workdir=tmp_path)
    assert e.value.report["tasks"] == ["bad"]
    assert json.loads((tmp_path / "nonfinite.json").read_text())["tasks"] == ["bad"]
    state, metrics = trainer.step(trainer.init_state(), batch(0))
    assert not bool(metrics["finite"]) and int(state.step) == 0
    np.testing.assert_array_equal(state.params["w"], before.params["w"])


def test_a_method_that_hides_what_is_not_finite_does_not_hide_it(fit):
    """Task gradients count, whatever the aggregator makes of them."""
    zero = aggregation.from_gradients(
        "zero",
        lambda params: (),
        lambda grads, state, **extra: (jax.tree.map(lambda g: g[0] * 0, grads), state),
    )
    bad = two_tasks(lambda w: jnp.sqrt(w))
    bad["loss_fn"] = lambda p, b, k: (jnp.stack([p["w"], jnp.sqrt(p["w"])]), {})
    with pytest.raises(train.NonFiniteError, match="'bad'"):
        fit(1, aggregator=zero, **bad)


@pytest.mark.parametrize("engine", ["map", "gramian"])
def test_one_task(fit, engine):
    def alone(params, batch, key):
        losses, metrics = LOSS(params, batch, key)
        return losses[:1], metrics

    found = fit(1, loss_fn=alone, task_names=None, grads=engine)
    assert found.history[0]["weight_0"] == 1
    assert found.history[0]["min_cosine"] == 1
    assert found.history[0]["conflict_rate"] == 0


def test_auto_falls_back_where_the_backward_pass_has_no_transpose(fit):
    @jax.custom_vjp
    def op(x):
        return x

    def backward(_, g):
        shape = jax.ShapeDtypeStruct(g.shape, g.dtype)
        return (jax.pure_callback(np.asarray, shape, g),)

    op.defvjp(lambda x: (x, None), backward)

    def loss(params, batch, key):
        return LOSS(params, batch | {"y": batch["y"]}, key)

    def through_host(params, batch, key):
        trunk = params["trunk"] | {"kernel": op(params["trunk"]["kernel"])}
        return loss(params | {"trunk": trunk}, batch, key)

    close(fit(2, loss_fn=through_host).params, fit(2).params)
    with pytest.raises(ValueError, match="grads='gramian' wants a backward pass"):
        fit(1, loss_fn=through_host, grads="gramian")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_fn": summed}, r"want to be \[T\], one per task, found shape \(\)"),
        ({"loss_fn": lambda p, b, k: LOSS(p, b, k)[0]}, r"\(losses \[T\], dict of"),
        ({"task_names": ("a", "b")}, "returned 3 losses, there are 2 task_names: a, b"),
        ({"shared": ("^trunk", "nowhere")}, "'nowhere' matches none of the 4 trained"),
        ({"shared": ("fixed",)}, "'fixed' matches none of the 4 trained leaves"),
        (
            {"loss_fn": lambda p, b, k: (LOSS(p, b, k)[0], {"loss_a": 1.0})},
            r"\['loss_a'\] of loss_fn are taken",
        ),
    ],
)
def test_bad_loss_functions_and_patterns(fit, changes, message):
    with pytest.raises(ValueError, match=message):
        fit(1, **changes)


def test_a_number_of_tasks_that_changes_is_refused(fit):
    def loss(params, batch, key):
        losses, metrics = LOSS(params, batch | {"y": batch["y"][:, :T]}, key)
        return losses[: batch["y"].shape[1] - 1], metrics

    def data(step):
        rows = batch(step)
        y = np.concatenate([rows["y"], rows["y"]], 1)[:, : T + 1 - step]
        return rows | {"y": y}

    with pytest.raises(ValueError, match="returned 2 losses, before 3: T must not"):
        fit(2, data=data, loss_fn=loss, task_names=None)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"aggregator": None}, r"shared=\('\^trunk',\) wants an aggregator"),
        ({"aggregator": aggregation.pcgrad}, "aggregator wants a gradient transf"),
        ({"grads": "jacobian"}, "grads is 'jacobian', wanted one of auto, map"),
        ({"shared": ()}, "shared is empty"),
        ({"shared": "trunk"}, "shared wants a tuple of regexes, found the string"),
        ({"task_names": ("a", "a")}, "task_names wants unique names"),
        (
            {"aggregator": aggregation.modo(T), "grads": "gramian"},
            "grads='gramian' forms no cross_gram",
        ),
        ({"task_names": "abc"}, "task_names wants a tuple of names"),
        ({"grads": "features"}, "takes no shared"),
        ({"grads": "features", "loss_fn": summed}, "wants loss_fn to be an aggreg"),
        (
            {"grads": "gramian", "aggregator": without_rule()},
            "wants an aggregator with a rule",
        ),
        ({"chunk": 2}, "chunk is 2 with engine 'auto', wanted 1 or more with 'vmap'"),
        ({"sharpness": "device"}, "sharpness is 'device', wanted one of batch, micro"),
        (
            {"aggregator": aggregation.grad_drop(at="features")},
            "wants features, so grads='features'; found 'auto'",
        ),
        ({"grads": "flat", "radii": (1, 1)}, "flat_mtl, found 'flat' with one .* no"),
        (
            {"aggregator": aggregation.flat_mtl(aggregation.mgda())},
            "flat_mtl, found 'auto' with one that takes sam_grads",
        ),
        *(
            (
                {"grads": "features", "shared": (".*",), "aggregator": keeper},
                "keeps something for every parameter",
            )
            for keeper in (
                aggregation.moco(T),
                aggregation.db_mtl(T),
                aggregation.normalize(aggregation.excess_mtl(T)),
                aggregation.per_leaf(aggregation.pcgrad()),
            )
        ),
    ],
)
def test_trainables_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match="Trainable: .*" + message):
        trainable(**changes)


def test_features_want_whole_batches(one_device):
    with pytest.raises(ValueError, match="whole batch, found accumulate=2"):
        train.Trainer(
            trainable(grads="features", shared=(".*",)), mesh=one_device, accumulate=2
        )


def test_features_act_on_the_encoder_alone(fit):
    found = fit(3, grads="features", shared=(".*",))
    assert {"weight_a", "min_cosine", "loss_c"} <= set(found.history[0])
    exact = fit(3)
    first, second = found.history[0], exact.history[0]
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
    assert first["min_cosine"] != pytest.approx(second["min_cosine"], abs=1e-3)


def test_flat_is_the_loop_over_its_own_gradients(fit, one_device):
    flat = aggregation.flat_mtl(aggregation.sum())
    found = fit(4, grads="flat", radii=(0.1, 0.2), aggregator=flat)
    still = fit(4, grads="flat", radii=(0.0, 0.0), aggregator=flat)
    close(still.params, fit(4, aggregator=aggregation.sum()).params)
    assert {"loss_a", "conflict_rate"} <= set(found.history[0])

    def moved(params, rows):
        """Sum over tasks of the gradients at each task's own perturbed place."""
        total = jax.tree.map(jnp.zeros_like, params)
        for t in range(T):
            grad = jax.grad(lambda p, t=t: LOSS(p, rows, None)[0][t])
            g = grad(params)
            g["trunk"]["fixed"] = jnp.zeros(4)
            place = {}
            for part, rho in (("trunk", 0.1), ("heads", 0.2)):
                norm = optax.tree.norm(g[part])
                place[part] = jax.tree.map(
                    lambda p, x, s=rho / norm: p + s * x, params[part], g[part]
                )
            total = jax.tree.map(jnp.add, total, grad(place))
        total["trunk"]["fixed"] = jnp.zeros(4)
        return total

    tx = optax.sgd(0.1)
    plain = fit(2, grads="flat", radii=(0.1, 0.2), aggregator=flat, tx=tx)
    params = init(jax.random.split(jax.random.key(0))[0])
    for step in range(2):
        grads = moved(params, batch(step))
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    close(plain.params, params)


def test_flat_draws_the_same_noise_twice(fit):
    flat = aggregation.flat_mtl(aggregation.mgda())
    options = {"loss_fn": noisy, "tx": optax.sgd(0.1)}
    found = fit(3, grads="flat", radii=(0.0, 0.0), aggregator=flat, **options)
    close(found.params, fit(3, aggregator=aggregation.mgda(), **options).params)


def test_each_microbatch_may_have_a_worst_place_of_its_own(fit):
    flat = aggregation.flat_mtl(aggregation.sum())
    options = {"grads": "flat", "radii": (0.3, 0.3), "aggregator": flat}
    options |= {"tx": optax.sgd(0.1)}
    apart = fit(1, accumulate=2, sharpness="microbatch", **options)
    halves = [
        fit(1, lambda step, i=i: {k: x[i::2] for k, x in batch(0).items()}, **options)
        for i in (0, 1)
    ]
    want = jax.tree.map(lambda x, y: (x + y) / 2, *(h.params for h in halves))
    close(apart.params, want)
    together = fit(1, **options).params["trunk"]["kernel"]
    assert np.abs(apart.params["trunk"]["kernel"] - together).max() > 1e-4
    whole = fit(1, sharpness="microbatch", **options).params["trunk"]["kernel"]
    np.testing.assert_allclose(whole, together, rtol=1e-5)


def test_signs_of_features_reach_the_aggregator(fit):
    options = {"grads": "features", "shared": (".*",), "tx": optax.sgd(0.1)}
    everything = aggregation.grad_drop(at="features", leak=1.0)
    found = fit(2, aggregator=everything, **options)
    close(found.params, fit(2, aggregator=aggregation.sum(), **options).params)
    dropped = fit(2, aggregator=aggregation.grad_drop(at="features"), **options)
    close(dropped.params["heads"], found.params["heads"], atol=0.1)
    moved = dropped.params["trunk"]["kernel"] - found.params["trunk"]["kernel"]
    assert np.abs(moved).max() > 1e-3


def test_flat_wants_whole_batches_and_radii(one_device):
    flat = aggregation.flat_mtl(aggregation.sum())
    with pytest.raises(ValueError, match="grads='flat' goes with radii"):
        trainable(grads="flat", aggregator=flat)
    with pytest.raises(ValueError, match="goes with radii, found 'map'"):
        trainable(grads="map", radii=(0.1, 0.1))
    whole = trainable(grads="flat", radii=(0.1, 0.1), aggregator=flat)
    with pytest.raises(ValueError, match="gradient of one whole batch, found"):
        train.Trainer(whole, mesh=one_device, accumulate=2)


@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
def test_a_vision_transformer_with_surgery_compiles_for_a_tpu(monkeypatch):
    """Rows of parameters that are split over the devices are split like them."""
    width, side = 64, 16
    options = {"image_size": side, "patch_size": 8, "width": width, "depth": 2}
    vit = models.ViT(**options, num_heads=2, scan=True, remat=True, dtype=jnp.bfloat16)

    def make(key):
        image = jnp.zeros((1, side, side, 3))
        return {
            "encoder": vit.init(key, image)["params"],
            "heads": jnp.zeros((width, T)),
        }

    def loss(params, rows, key):
        z = vit.apply({"params": params["encoder"]}, rows["image"])
        error = z.astype(jnp.float32) @ params["heads"] - rows["y"]
        return jnp.mean(error**2, 0), {}

    texts = []
    monkeypatch.setattr(preflight_lib, "collectives", lambda text: texts.append(text))
    report = preflight_lib.preflight(
        trainable(
            init=make,
            loss_fn=loss,
            shared=("^encoder",),
            frozen=(),
            grads="map",
            rules=(("^heads$", P()), *models.sharding_rules(vit)),
        ),
        {
            "image": jax.ShapeDtypeStruct((32, side, side, 3), jnp.float32),
            "y": jax.ShapeDtypeStruct((32, T), jnp.float32),
        },
        topology="v5e:2x2",
    )
    assert report.fits and report.while_loops == 0
    assert f"f32[{T},2,{width // 4},{4 * width}]" in texts[0]
    for whole in (f"2,{width},{4 * width}", f"2,{4 * width},{width}"):
        assert f"f32[{T},{whole}]" not in texts[0]
        assert f"bf16[{T},{whole}]" not in texts[0]


def test_an_aggregator_that_says_not_finite_stops_the_run(fit):
    whole = aggregation.mean()

    def update(updates, state, params=None, **extra):
        out, new = whole.update(updates, state, params, **extra)
        return out, new._replace(finite=new.finite & (extra["losses"][0] < 0))

    doubtful = aggregation.Aggregator(whole.init, update)
    with pytest.raises(train.NonFiniteError):
        fit(2, aggregator=doubtful)
