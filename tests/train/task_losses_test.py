"""Weights from losses, losses after a step, two halves, tasks with uneven rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax import aggregation, train, weighting

T, ROWS, WIDTH = 8, 32, 16
FEW = 3  # Tasks where rows belong to them.


def init(key):
    first, second = jax.random.split(key)
    return {
        "trunk": 0.3 * jax.random.normal(first, (WIDTH, WIDTH)),
        "heads": 0.3 * jax.random.normal(second, (WIDTH, T)),
    }


def errors(params, batch):
    """[B, T]"""
    found = jnp.tanh(batch["x"] @ params["trunk"]) @ params["heads"]
    return (found - batch["y"]) ** 2


def loss_fn(params, batch, key):
    noise = 0.1 * jax.random.normal(key, batch["x"].shape)
    losses = jnp.mean(errors(params, batch | {"x": batch["x"] + noise}), 0)
    return losses, {"largest": jnp.max(losses)}


def data(step, size=ROWS):
    rng = np.random.default_rng(step)
    return {
        "x": rng.normal(size=(size, WIDTH)).astype(np.float32),
        "y": rng.normal(size=(size, T)).astype(np.float32),
    }


def own_loss_fn(params, batch, key):
    """Every row belongs to one task; a task without rows has loss 0."""
    del key
    mine = batch["task"][:, None] == jnp.arange(FEW)[None]
    count = jnp.maximum(jnp.sum(mine.astype(jnp.float32), 0), 1)
    found = jnp.where(mine, errors(params, batch)[:, :FEW], 0)
    return jnp.sum(found, 0) / count, {}


def task_counts(batch):
    return jnp.sum((batch["task"][:, None] == jnp.arange(FEW)[None]), 0)


def own_data(step):
    """Task 2 has one row at first, then none, then all that task 0 lacks."""
    task = np.array([0, 1, 1, 0, 1, 0, 1, 1, 1, 0, 2, 0, 0, 0, 0, 1], np.int32)
    task = {0: task, 1: np.where(task == 2, 0, task), 2: np.where(task == 0, 2, task)}
    return data(step, 16) | {"task": task[step % 3]}


def trainable(aggregator, **changes):
    options = {"init": init, "loss_fn": loss_fn, "tx": optax.adam(1e-2)}
    return train.Trainable(**(options | {"aggregator": aggregator} | changes))


def owned(aggregator, **changes):
    options = {"loss_fn": own_loss_fn, "task_counts": task_counts}
    return trainable(aggregator, **(options | changes))


@pytest.fixture
def fit(one_device):
    def run(what, steps=4, data=data, **options):
        trainer = train.Trainer(what, mesh=one_device, **options)
        return trainer.fit(data, steps=steps, log_every=1)

    return run


def close(a, b, **tolerance):
    tolerance = {"rtol": 1e-4, "atol": 1e-6} | tolerance
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def learned(found):
    """What the method holds, keys aside."""
    leaves = jax.tree.leaves(found.state.opt_state.aggregator.method)
    return [x for x in leaves if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]


METHODS = {
    "sum": aggregation.sum,
    "smoothed": lambda: aggregation.cr_mogm(aggregation.random(seed=1), T),
    "uncertainty": weighting.uncertainty,
    "imtl_l": weighting.imtl_l,
    "dwa": lambda: weighting.dwa(1),
    "geometric_mean": weighting.geometric_mean,
    "stch": lambda: weighting.stch(warmup=2),
    "famo": weighting.famo,
}


def method(name):
    made = METHODS[name]()
    if isinstance(made, weighting.Weighting):
        made = weighting.as_aggregator(made, T, tx=optax.sgd(0.1))
    return made


@pytest.mark.parametrize("name", METHODS)
def test_one_pass_is_the_combination_of_task_gradients(fit, name):
    want = fit(trainable(method(name), grads="map"))
    found = fit(trainable(method(name)))
    close(found.params, want.params)
    close(learned(found), learned(want))
    for record, wanted in zip(found.history, want.history, strict=True):
        missing = {"min_cosine", "conflict_rate"}
        assert set(wanted) - set(record) == missing
        for key, value in record.items():
            assert value == pytest.approx(wanted[key], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", ["sum", "uncertainty"])
def test_one_pass_where_heads_get_the_sum(fit, name):
    changes = {"shared": ("trunk",)}
    want = fit(trainable(method(name), grads="map", **changes), steps=2)
    found = fit(trainable(method(name), **changes), steps=2)
    close(found.params, want.params)


def flops(what, one_device, accumulate=1, batch=None):
    batch = data(0) if batch is None else batch
    trainer = train.Trainer(what, mesh=one_device, accumulate=accumulate)
    lowered = trainer.compiled_step.lower(trainer.abstract_state, batch)
    compiled = lowered.compile().cost_analysis()["flops"]
    counted = train.count_flops(trainer.compiled_step, trainer.abstract_state, batch)
    return np.array([counted.total, compiled])


def wide(params, batch, key):
    """Products dominate."""
    x = jnp.concatenate([batch["x"]] * 16, 0)
    y = jnp.concatenate([batch["y"]] * 16, 0)
    del key
    return jnp.mean(errors(params, {"x": x, "y": y}), 0), {}


def test_weights_from_losses_cost_one_backward_pass(one_device):
    plain = train.Trainable(
        init=init,
        loss_fn=lambda p, b, k: (jnp.sum(wide(p, b, k)[0]), {}),
        tx=optax.sgd(0.1),
    )
    one = flops(plain, one_device)
    sgd = {"loss_fn": wide, "tx": optax.sgd(0.1)}
    for name in ("sum", "uncertainty"):
        ratio = flops(trainable(method(name), **sgd), one_device) / one
        assert (ratio < 1.1).all(), (name, ratio)
    rows = trainable(method(name), grads="map", **sgd)
    assert flops(rows, one_device)[0] > 4 * one[0]
    # One more forward pass, a third of forward and backward.
    ratio = flops(trainable(method("famo"), **sgd), one_device) / one
    assert 1.2 < ratio[0] < 1.45


def test_constant_weights_run_every_microbatch_once(one_device):
    plain = train.Trainable(
        init=init,
        loss_fn=lambda p, b, k: (jnp.sum(wide(p, b, k)[0]), {}),
        tx=optax.sgd(0.1),
    )
    sgd = {"loss_fn": wide, "tx": optax.sgd(0.1)}
    one = flops(plain, one_device, 4)
    assert flops(trainable(method("smoothed"), **sgd), one_device, 4)[0] == one[0]
    again = flops(trainable(method("uncertainty"), **sgd), one_device, 4)[0] / one[0]
    assert 1.2 < again < 1.45


def test_famo_is_the_published_algorithm(fit):
    """Alg. 1 with the losses of the same batch, and the same noise, after the step."""
    rate, decay, steps = 0.05, 0.1, 5
    famo = weighting.famo(learning_rate=rate, weight_decay=decay)
    found = fit(
        trainable(weighting.as_aggregator(famo, T), tx=optax.sgd(0.1)), steps=steps
    )

    start, run = jax.random.split(jax.random.key(0))
    params = init(start)
    logits, m, v = np.zeros(T), np.zeros(T), np.zeros(T)
    jacobian = jax.jit(jax.jacrev(lambda p, b, k: loss_fn(p, b, k)[0]))
    for step in range(steps):
        args = (data(step), jax.random.fold_in(run, step))
        before = np.asarray(loss_fn(params, *args)[0], np.float64) + 1e-8
        z = np.exp(logits - logits.max())
        z /= z.sum()
        weights = z / before / (z / before).sum()
        for t in range(T):
            assert found.history[step][f"weight_{t}"] == pytest.approx(
                weights[t], rel=1e-4
            )
        rows = jacobian(params, *args)
        params = jax.tree.map(
            lambda p, g, w=weights: (
                p - 0.1 * jnp.tensordot(jnp.asarray(w, jnp.float32), g, 1)
            ),
            params,
            rows,
        )
        after = np.asarray(loss_fn(params, *args)[0], np.float64) + 1e-8
        gain = np.log(before) - np.log(after)
        g = z * gain - z * (z @ gain) + decay * logits
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        correct = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
        logits = logits - rate * correct[0] / (np.sqrt(correct[1]) + 1e-8)
    close(found.params, params, rtol=1e-3, atol=1e-5)
    state = found.state.opt_state.aggregator.method
    np.testing.assert_allclose(state.weighting.method.logits, logits, atol=1e-3)
    assert not bool(state.before.open)


def test_a_loss_that_is_not_finite_after_the_step_stops_the_run(one_device):
    what = trainable(
        weighting.as_aggregator(weighting.famo(), 2),
        init=lambda key: {"w": jnp.ones(())},
        loss_fn=lambda p, b, k: (jnp.stack([p["w"] ** 2, p["w"] ** 2 + 1]), {}),
        tx=optax.sgd(1e30),
    )
    with pytest.raises(train.NonFiniteError, match="a loss after it is not"):
        train.Trainer(what, mesh=one_device).fit(data, steps=2)


@pytest.mark.parametrize(
    ("grads", "make"),
    [
        ("map", lambda: aggregation.pcgrad(seed=1)),
        ("gramian", lambda: aggregation.pcgrad(seed=1)),
        ("auto", lambda: weighting.as_aggregator(weighting.uncertainty(), FEW)),
        ("auto", lambda: weighting.as_aggregator(weighting.famo(), FEW)),
        ("auto", lambda: aggregation.constant([1.0, 2.0, 3.0])),
    ],
    ids=["map", "gramian", "learned", "famo", "constant"],
)
def test_uneven_tasks_in_microbatches_are_the_whole_batch(fit, grads, make):
    def run(accumulate):
        what = owned(make(), grads=grads, tx=optax.sgd(0.1))
        return fit(what, 3, own_data, accumulate=accumulate)

    want, found = run(1), run(4)
    close(found.params, want.params, rtol=0, atol=1e-6)
    close(learned(found), learned(want), rtol=0, atol=1e-6)
    for record, wanted in zip(found.history, want.history, strict=True):
        assert record == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("grads", ["auto", "map", "gramian"])
def test_a_task_without_rows_keeps_its_part_of_a_penalty(fit, grads):
    def penalised(params, batch, key):
        losses, metrics = own_loss_fn(params, batch, key)
        return losses + jnp.mean(params["trunk"] ** 2), metrics

    def run(accumulate):
        rule = aggregation.constant([1.0, 2.0, 3.0])
        what = owned(rule, loss_fn=penalised, grads=grads, tx=optax.sgd(0.1))
        return fit(what, 2, own_data, accumulate=accumulate)

    want, found = run(1), run(4)
    close(found.params, want.params, rtol=0, atol=1e-6)
    assert want.history[1]["loss_2"] > 1e-3  # Absent, so this is the penalty.
    assert found.history[1]["loss_2"] == pytest.approx(want.history[1]["loss_2"])


def test_without_counts_microbatches_would_count_alike(fit):
    def run(accumulate, **changes):
        what = owned(aggregation.constant([1.0, 2.0, 3.0]), **changes)
        return fit(what, 2, own_data, accumulate=accumulate).params["trunk"]

    assert abs(run(4, task_counts=None) - run(1)).max() > 1e-3


def halves(params, batch):
    """Task gradients [T, P] of both halves and of the whole batch."""

    def rows(part):
        jacobian = jax.jacrev(lambda p: own_loss_fn(p, part, None)[0])(params)
        return jacobian["trunk"].reshape(FEW, -1)

    parts = [{k: x[i::2] for k, x in batch.items()} for i in (0, 1)]
    return *(rows(part) for part in parts), rows(batch)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("make", [aggregation.modo, aggregation.sdm_grad])
def test_two_halves_of_a_batch_give_an_unbiased_gramian(fit, make, accumulate):
    aggregator = make(FEW)
    what = owned(aggregator, tx=optax.sgd(0.1), shared=("trunk",))
    found = fit(what, 3, own_data, accumulate=accumulate)
    params = init(jax.random.split(jax.random.key(0))[0])
    state = aggregator.rule.init()
    for step in range(3):
        batch = own_data(step)
        first, second, whole = halves(params, batch)
        weights, state = aggregator.rule.weigh(
            jnp.zeros((FEW, FEW)),
            state,
            cross_gram=first @ second.T,
            present=task_counts(batch) > 0,
        )
        record = found.history[step]
        for t in range(FEW):
            assert record[f"weight_{t}"] == pytest.approx(
                float(weights[t]), rel=1e-3, abs=1e-5
            )
        slope = (weights @ whole).reshape(WIDTH, WIDTH)
        heads = jax.grad(lambda p, b=batch: own_loss_fn(p, b, None)[0].sum())(params)
        params = {
            "trunk": params["trunk"] - 0.1 * slope,
            "heads": params["heads"] - 0.1 * heads["heads"],
        }
    close(found.params, params, atol=1e-5)
    assert "conflict_rate" in found.history[0]
    # The only row of task 2, and in the next step no row at all.
    alone = [record["tasks_in_one_half"] for record in found.history]
    assert alone[:2] == [1, 0]


def test_a_loss_of_zero_is_no_absence_where_every_row_belongs_to_every_task(fit):
    def learned_task(params, batch, key):
        losses, metrics = loss_fn(params, batch, key)
        return losses.at[0].multiply(0), metrics

    rule = weighting.as_aggregator(weighting.mean(), T)
    found = fit(trainable(rule, loss_fn=learned_task), 1)
    assert found.history[0]["weight_1"] == pytest.approx(1 / T)


def test_halves_want_two_rows(fit):
    what = trainable(aggregation.modo(T))
    with pytest.raises(ValueError, match="found 1 rows, wanted a multiple of 2"):
        fit(what, 1, lambda step: data(step, 1))
    with pytest.raises(ValueError, match="found 3 rows, wanted a multiple of 6"):
        fit(what, 1, lambda step: data(step, 3), accumulate=3)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (lambda batch: jnp.zeros(2), r"task_counts gives \(2,\), loss_fn \(3,\)"),
        (lambda batch: jnp.zeros(()), r"task_counts gives \(\), wanted \[T\]"),
    ],
)
def test_counts_that_do_not_fit_are_refused(fit, counts, message):
    what = owned(aggregation.mean(), task_counts=counts)
    with pytest.raises(ValueError, match=message):
        fit(what, 1, own_data)


def test_halves_over_devices_are_the_same(one_device):
    """Each device gives rows to both halves."""
    mesh = train.make_mesh(devices=jax.devices()[:2])
    what = trainable(aggregation.modo(T), loss_fn=wide, tx=optax.sgd(0.1))
    runs = [train.Trainer(what, mesh=m).fit(data, steps=1) for m in (one_device, mesh)]
    close(runs[0].params, runs[1].params)


def blocks_of_rows(step):
    """Three tasks, four rows each, in blocks."""
    return data(step, 12) | {"task": np.repeat(np.arange(FEW, dtype=np.int32), 4)}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("shared", [(".*",), ("trunk",)])
@pytest.mark.parametrize("make", [aggregation.upgrad, lambda: aggregation.modo(FEW)])
def test_blocks_give_the_gradients_of_whole_batches(fit, make, shared, accumulate):
    changes = {"shared": shared, "grads": "map"}
    options = {"data": blocks_of_rows, "accumulate": accumulate}
    want = fit(owned(make(), **changes), **options)
    found = fit(owned(make(), **changes, task_blocks=True), **options)
    close(found.params, want.params)
    for record, wanted in zip(found.history, want.history, strict=True):
        assert record.keys() == wanted.keys()
        for name, value in record.items():
            assert value == pytest.approx(wanted[name], rel=1e-3, abs=1e-5), name


def test_blocks_cost_one_backward_pass(one_device):
    """Forward and back once; without blocks, back once for each task."""

    def loss_fn(params, batch, key):
        many = {k: jnp.repeat(x, 64, axis=0) for k, x in batch.items()}
        return own_loss_fn(params, many, key)

    def cost(task_blocks):
        what = owned(
            aggregation.upgrad(),
            loss_fn=loss_fn,
            shared=("trunk",),
            grads="map",
            task_blocks=task_blocks,
        )
        return flops(what, one_device, batch=blocks_of_rows(0))

    # The first layer has no gradient of its input: (1 + 1) / (1 + 3).
    ratio = cost(True) / cost(False)
    assert (ratio < 0.65).all(), ratio


def test_blocks_over_devices_are_the_same(fit):
    def rows(step):
        return data(step, 24) | {"task": np.repeat(np.arange(FEW, dtype=np.int32), 8)}

    what = owned(aggregation.upgrad(), shared=("trunk",), task_blocks=True)
    want = fit(what, data=rows)
    mesh = train.make_mesh(devices=jax.devices()[:4])
    close(train.Trainer(what, mesh=mesh).fit(rows, steps=4).params, want.params)


def test_rows_outside_of_their_block_stop_the_run(fit):
    """Their gradients would be lost."""

    def mixed(step):
        rows = blocks_of_rows(step)
        return rows | {"task": np.roll(rows["task"], 1)}

    what = owned(aggregation.upgrad(), task_blocks=True)
    with pytest.raises(train.NonFiniteError):
        fit(what, data=mixed)


def test_blocks_want_as_many_rows_of_each_task(fit):
    what = owned(aggregation.upgrad(), task_blocks=True)
    with pytest.raises(ValueError, match="equal blocks of 3 tasks; found 16 rows"):
        fit(what, data=own_data)
    with pytest.raises(ValueError, match="task_blocks=True wants an aggregator"):
        train.Trainable(init=init, loss_fn=loss_fn, tx=optax.sgd(1.0), task_blocks=True)


def quiet(params, batch, key):
    del key
    return jnp.mean(errors(params, batch), 0), {}


def start():
    return init(jax.random.split(jax.random.key(0))[0])


def test_heads_of_log_losses_follow_their_logarithms(fit):
    def want(loss_fn, rows):
        def logs(head):
            losses = loss_fn(start() | {"heads": head}, rows, None)[0]
            return jnp.sum(jnp.log(losses + 1e-8))

        head = start()["heads"]
        return head - 0.1 * jax.grad(logs)(head)

    options = {"tx": optax.sgd(0.1), "shared": ("trunk",)}
    what = trainable(aggregation.db_mtl(T), loss_fn=quiet, **options)
    for changes in ({}, {"grads": "vmap"}, {"accumulate": 2}):
        accumulate = changes.pop("accumulate", 1)
        found = fit(dataclasses.replace(what, **changes), 1, accumulate=accumulate)
        close(found.params["heads"], want(quiet, data(0)))

    def blocks(step):
        return data(step, 12) | {"task": np.repeat(np.arange(FEW, dtype=np.int32), 4)}

    what = owned(aggregation.db_mtl(FEW), task_blocks=True, **options)
    for accumulate in (1, 2):
        found = fit(what, 1, blocks, accumulate=accumulate)
        close(found.params["heads"], want(own_loss_fn, blocks(0)))


SPLIT = aggregation.SplitLoss(
    encode=lambda params, batch, key: jnp.tanh(batch["x"] @ params["trunk"]),
    heads=lambda params, copies, batch, key: (
        jnp.mean(
            (jnp.einsum("tbw,wt->bt", copies, params["heads"]) - batch["y"]) ** 2, 0
        ),
        {},
    ),
    num_tasks=T,
)


@pytest.mark.parametrize("engine", ["map", "vmap", "gramian", "features"])
def test_a_weighting_weighs_heads_and_measures_what_is_shared(fit, engine):
    aggregator = weighting.as_aggregator(weighting.grad_norm(), T, tx=optax.sgd(0.5))
    features = engine == "features"
    shared = {} if features else {"shared": ("trunk",)}
    loss = SPLIT if features else quiet
    what = trainable(
        aggregator, loss_fn=loss, tx=optax.sgd(0.1), grads=engine, **shared
    )
    found = fit(what, 3)
    params, state = start(), aggregator.rule.init()
    for step in range(3):
        rows = data(step)
        losses = quiet(params, rows, None)[0]
        if features:
            z = jnp.tanh(rows["x"] @ params["trunk"])
            copies = jnp.broadcast_to(z[None], (T, *z.shape))

            def from_copies(c, p=params, r=rows):
                return SPLIT.heads(p, c, r, None)[0]

            slopes = jax.jacrev(from_copies)(copies)
            jacobian = jnp.einsum("ttbw->tbw", slopes).reshape(T, -1)
        else:
            slopes = jax.jacrev(lambda p, r=rows: quiet(p, r, None)[0])(params)
            jacobian = slopes["trunk"].reshape(T, -1)
        gram = jacobian @ jacobian.T
        weights, state = aggregator.rule.weigh(gram, state, losses=losses)

        def total(p, w=weights, r=rows):
            return jnp.sum(w * quiet(p, r, None)[0])

        grads = jax.grad(total)(params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    assert np.ptp(weights) > 1e-3
    close(found.params, params, rtol=1e-3)


def counted(loss_fn, count):
    """The same losses; every backward pass through x is counted."""

    @jax.custom_vjp
    def watch(x):
        return x

    def backward(_, g):
        jax.debug.callback(lambda: count.append(1))
        return (g,)

    watch.defvjp(lambda x: (x, ()), backward)

    def found(params, batch, key):
        trunk = watch(params["trunk"])
        return loss_fn(params | {"trunk": trunk}, batch, key)

    return found


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("make", [aggregation.mgda, lambda: aggregation.modo(T)])
def test_weights_that_are_reused_cost_one_pass(fit, make, accumulate):
    passes = {}

    def run(k, grads="map"):
        count = []
        what = trainable(
            aggregation.every_k(make(), T, k),
            loss_fn=counted(quiet, count),
            tx=optax.sgd(0.1),
            shared=("trunk",),
            grads=grads,
        )
        found = fit(what, 4, accumulate=accumulate)
        jax.effects_barrier()
        passes[k] = len(count)
        return found

    found = run(3)
    run(1)
    # Steps 0 and 3 as ever; in between one pass each for the shared and for the rest.
    assert passes[3] <= passes[1] / 2 + 2 * 2 * accumulate
    assert "conflict_rate" not in found.history[0]
    params, tx = start(), aggregation.every_k(make(), T, 3)
    state = tx.init(params["trunk"])
    for step in range(4):
        rows = data(step)
        part = {i: jax.tree.map(lambda x, i=i: x[i::2], rows) for i in (0, 1)}

        def jacobian(r, p=params):
            return jax.jacrev(lambda q: quiet(q, r, None)[0])(p)

        first, second = (jacobian(r)["trunk"].reshape(T, -1) for r in part.values())
        slopes = jacobian(rows)
        cross = {"cross_gram": first @ second.T}
        update, state = tx.update(slopes["trunk"], state, **cross)
        head = jnp.sum(slopes["heads"], 0)
        params = {
            "trunk": params["trunk"] - 0.1 * update,
            "heads": params["heads"] - 0.1 * head,
        }
        for t, record in enumerate(np.asarray(state.method.weights)):
            name = f"weight_{t}"
            assert found.history[step][name] == pytest.approx(record, 1e-3, 1e-5)
    close(found.params, params, rtol=1e-3)
