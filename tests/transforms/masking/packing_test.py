import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import kernels
from mtl_jax.transforms import masking

P = jax.sharding.PartitionSpec


def masks_like(tree, num_tasks, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.random((num_tasks, *x.shape)) < 0.4), tree
    )


@pytest.mark.parametrize(
    ("size", "num_tasks"), [(0, 2), (1, 1), (7, 3), (8, 2), (31, 1), (32, 3), (65, 2)]
)
def test_pack_then_unpack_is_the_identity(size, num_tasks):
    like = {"a": jnp.zeros(size), "b": [jnp.zeros((3, 5)), jnp.zeros(())]}
    masks = masks_like(like, num_tasks, size)
    packed = masking.pack(masks, per_task=True)
    for p, x in zip(jax.tree.leaves(packed), jax.tree.leaves(like), strict=True):
        assert p.dtype == jnp.uint8 and p.shape == (num_tasks, -(-x.size // 8))
    back = masking.unpack(packed, like)
    jax.tree.map(np.testing.assert_array_equal, back, masks)
    one = jax.tree.map(lambda m: m[0], masks)
    back = masking.unpack(masking.pack(one), like)
    jax.tree.map(np.testing.assert_array_equal, back, one)


def bank(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    base = {
        "w": jnp.asarray(rng.normal(size=(7, 9)), dtype),
        "b": jnp.asarray(rng.normal(size=5), dtype),
        "ids": jnp.arange(3),
    }
    delta = {
        "w": jnp.asarray(rng.normal(size=(7, 9)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=5), jnp.float32),
        "ids": jnp.zeros(3, int),
    }
    return base, delta, masks_like(base, 4, 1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_bank_restores_every_task(dtype):
    base, delta, masks = bank(dtype)
    made = masking.MaskBank.create(base, delta, masks)
    restore = jax.jit(lambda bank, task: bank.restore(task))
    for task in range(4):
        for got in (made.restore(task), restore(made, task)):
            for name in ("w", "b"):
                want = np.asarray(base[name], np.float32) + np.where(
                    masks[name][task], delta[name], 0
                ).astype(np.float32)
                assert got[name].dtype == dtype
                np.testing.assert_array_equal(got[name], want.astype(base[name].dtype))
            np.testing.assert_array_equal(got["ids"], base["ids"])
    many = jax.vmap(made.restore)(jnp.arange(4))
    np.testing.assert_array_equal(many["w"][2], made.restore(2)["w"])


def test_bank_counts_its_bytes_and_takes_packed_masks():
    base, delta, masks = bank()
    made = masking.MaskBank.create(base, delta, masks, scale=0.5)
    assert made.num_tasks == 4
    assert made.nbytes == 2 * 4 * (63 + 5 + 3) + 4 * (8 + 1 + 1)
    again = masking.MaskBank.create(
        base, delta, masking.pack(masks, per_task=True), scale=0.5
    )
    np.testing.assert_array_equal(again.restore(3)["w"], made.restore(3)["w"])


def test_bank_of_tall_masks_matches_the_kernel_that_packs_them():
    taus = jnp.asarray(np.random.default_rng(0).normal(size=(4, 7, 9)), jnp.float32)
    packed = kernels.tall_pack(taus, jnp.array([0.4]))
    made = masking.MaskBank.create(
        {"w": jnp.zeros((7, 9))}, {"w": packed.merged}, {"w": packed.packed[0]}
    )
    keep = jnp.abs(taus) > 0.4 * jnp.abs(packed.merged[None] - taus)
    want = jnp.where(keep, packed.merged[None], 0.0)
    got = jax.vmap(made.restore)(jnp.arange(4))["w"]
    np.testing.assert_array_equal(got, want)


def test_bank_restores_sharded_parameters():
    base = {"w": jnp.arange(64 * 16.0).reshape(64, 16)}
    delta = {"w": jnp.ones((64, 16))}
    masks = masks_like(base, 3, 0)
    made = masking.MaskBank.create(base, delta, masks)
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, P("model"))
    whole = jax.sharding.NamedSharding(mesh, P())
    placed = masking.MaskBank(
        base=jax.device_put(base, split),
        delta=jax.device_put(delta, split),
        masks=jax.device_put(made.masks, whole),
        scale=jax.device_put(made.scale, whole),
    )
    got = jax.jit(lambda b, t: b.restore(t))(placed, 1)
    np.testing.assert_array_equal(got["w"], made.restore(1)["w"])


@pytest.mark.fast
def test_bad_arguments_are_named():
    base, delta, masks = bank()
    with pytest.raises(
        ValueError, match="pack: 'w' is float32, wanted an array of bool"
    ):
        masking.pack({"w": jnp.zeros(3)})
    with pytest.raises(
        ValueError, match=r"unpack: 'w' is uint8\[1\], wanted uint8 of 2"
    ):
        masking.unpack({"w": jnp.zeros(1, jnp.uint8)}, {"w": jnp.zeros(9)})
    with pytest.raises(ValueError, match="MaskBank: 'b' is in base but not in delta"):
        masking.MaskBank.create(base, {"w": delta["w"], "ids": delta["ids"]}, masks)
    with pytest.raises(ValueError, match=r"MaskBank: 'b' is \(4, 6\) in masks"):
        masking.MaskBank.create(base, delta, {**masks, "b": jnp.ones((4, 6), bool)})
    made = masking.MaskBank.create(base, delta, masks)
    with pytest.raises(ValueError, match="restore: task is 4, wanted 0 to 3"):
        made.restore(4)
