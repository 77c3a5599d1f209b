"""Coins that are tossed once, or again in every pass."""

import numpy as np
import pytest

from mtl_jax.checkpoints import _draw_programs as programs
from mtl_jax.checkpoints import _draws, rules
from mtl_jax.checkpoints._stream import Buffers
from mtl_jax.checkpoints._work import Work
from mtl_jax.checkpoints.source import ArrayView, TensorSpec

SIZE, CHUNK = 1000, 512


@pytest.mark.parametrize("kept", [_draws.KEPT, 0])
def test_masks_hold_what_coins_say(monkeypatch, kept):
    monkeypatch.setattr(_draws, "KEPT", kept)
    density = (0.5, 0.2, 1.0, 0.0, 0.9, 0.5, 0.1, 0.7, 0.3)
    view = ArrayView(np.zeros(SIZE, np.float32))
    job = rules.Job(
        name="w",
        spec=TensorSpec((SIZE,), np.dtype(np.float32)),
        rule="dare_linear",
        base=view,
        experts=(view,) * len(density),
        options={"weight": 1.0, "density": density},
    )
    work = Work(job, None, Buffers(), chunk=CHUNK, seed=3, check_finite=True)
    coin, coins = _draws.Coin(work), _draws.Coins(work)
    for chunk in work.stream.chunks():
        args = coin.args(chunk)
        mask = coins.args(chunk)["mask"]
        assert mask.shape == (2, CHUNK)
        for t, share in enumerate(density):
            u = np.asarray(programs.random_bits(args["keys"][t], args["start"], CHUNK))
            wanted = u < share * 2.0**32
            assert (((mask[t // 8] >> (t % 8)) & 1) == wanted).all()
        assert (coins.args(chunk)["mask"] is mask) == (kept > 0)
