import jax.numpy as jnp
import numpy as np

from mtl_jax.train.diagnose import nonfinite_error


def test_leaves_are_named_and_many_are_summed_up(toy, trainer):
    state = trainer.init_state()
    params = {**state.params, "head": {"kernel": jnp.full((8, 2), jnp.inf)}}
    batch = {"x": np.ones((16, 4), np.float32), "y": np.ones((16, 2), np.float32)}
    metrics = {"loss": float("inf"), "mae": 1.0}
    error = nonfinite_error(
        trainer.trainable, state._replace(params=params), batch, metrics
    )
    assert error.report["params"] == ["head/kernel"]
    assert error.report["batch"] == []
    assert "metric 'loss' is inf; not finite in params: 'head/kernel'" in str(error)
    assert "mae" not in str(error)


def test_integer_batches_are_finite(toy, trainer):
    batch = toy.batch(0) | {"label": np.zeros(16, np.int32)}
    error = nonfinite_error(
        trainer.trainable, trainer.init_state(), batch, {"loss": float("nan")}
    )
    assert error.report["batch"] == error.report["params"] == []
    assert error.report["gradient"] == []
