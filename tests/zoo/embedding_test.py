"""Families of embedding models, on an encoder of one table."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import losses, train
from mtl_jax.zoo import embedding

pytestmark = pytest.mark.fast
WORDS, WIDTH = 6, 4


def one_device():
    return train.make_mesh(devices=jax.devices()[:1])


def features(params, texts):
    return params["table"][texts["ids"]].mean(1)


def pairs(seed, count):
    rng = np.random.default_rng(seed)
    first, second = ({"ids": rng.integers(0, WORDS, (count, 3))} for _ in range(2))
    label = rng.integers(0, 3, count).astype(np.int32)
    return embedding.Pairs(first=first, second=second, label=label)


def group(name, count, judged):
    test = pairs(9, len(judged))
    return embedding.Group(
        name=name,
        train=pairs(len(name), count),
        probe=pairs(1, 5),
        first=test.first,
        second=test.second,
        judged=judged,
    )


@pytest.fixture(scope="module")
def family(quiet):
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(WORDS, WIDTH)), jnp.float32)
    material = embedding.Material(
        name="table",
        base={"table": table},
        features=features,
        groups=(
            group("large", 40, np.eye(6, dtype=bool)),
            group("small", 8, rng.random(6).astype(np.float32)),
        ),
    )
    settings = embedding.Settings(
        batch_size=4,
        temperature=0.1,
        rate=1e-2,
    )
    return embedding.Family(material, settings, one_device(), quiet)


def test_pairs_of_one_label_are_not_each_others_negatives():
    batch = pairs(0, 8).take(np.arange(8))
    params = {"table": jnp.asarray(np.random.default_rng(2).normal(size=(6, 4)))}
    table = np.asarray(params["table"], np.float64)
    first, second = (table[batch[k]["ids"]].mean(1) for k in ("first", "second"))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (first, second)]
    scores = unit[0] @ unit[1].T / 0.1
    total = 0
    for i, row in enumerate(scores):
        against = np.exp(row[batch["label"] != batch["label"][i]]).sum()
        total += np.log1p(against / np.exp(row[i]))
    found = embedding.pair_loss(features, 0.1)(params, batch)
    np.testing.assert_allclose(found, total / 8, rtol=1e-4)
    assert total / 8 != pytest.approx(
        float(losses.infonce(jnp.asarray(scores), jnp.arange(8)).mean()), rel=1e-3
    )


def test_experts_see_their_own_pairs_once(family):
    assert [family.steps(g) for g in (0, 1)] == [10, 2]
    assert family.norms[0][-1, 0] == 10 and family.norms[1][-1, 0] == 2
    np.testing.assert_allclose(
        [norms[-1, 1] ** 2 for norms in family.norms], np.diag(family.gram), rtol=1e-4
    )


def test_what_was_trained_is_not_trained_again(family, quiet, monkeypatch):
    monkeypatch.setattr(embedding.Family, "_fit", lambda *args: 1 / 0)
    again = embedding.Family(family.material, family.settings, one_device(), quiet)
    for x, y in zip(again.experts, family.experts, strict=True):
        np.testing.assert_array_equal(x["table"], y["table"])
    np.testing.assert_array_equal(again.norms[0], family.norms[0])
    other = dataclasses.replace(family.settings, temperature=0.2)
    with pytest.raises(ZeroDivisionError):
        embedding.Family(family.material, other, one_device(), quiet)


def test_merges_are_measured_like_models(family):
    ends = family.measure(family.merged([1.0, 0.0]))
    np.testing.assert_allclose(ends, family.measure(family.experts[0]), atol=1e-6)
    base = family.measure(family.merged([0.0, 0.0]))
    np.testing.assert_allclose(base, family.measure(family.material.base), atol=1e-6)
    np.testing.assert_allclose(family.cosines(family.experts[1])[1], 1, atol=1e-5)


def test_batches_of_the_probe_have_one_group_each(family):
    batches = family.probe_batches(3)
    assert batches["label"].shape == (3, 2, 4)
    known = family.groups[0].probe.first["ids"].tolist()
    assert all(row in known for row in batches["first"]["ids"][0, 0].tolist())
    one = family.probe_loss(family.material.base, batches)
    want = [
        family.loss_fn(
            family.material.base,
            {
                "first": {"ids": batches["first"]["ids"][s, t]},
                "second": {"ids": batches["second"]["ids"][s, t]},
                "label": batches["label"][s, t],
            },
        )
        for s in range(3)
        for t in range(2)
    ]
    assert one == pytest.approx(float(np.mean(want)), rel=1e-5)
