"""One process of `processes_test.py`: process_run.py ID COUNT PORT FOLDER."""

import pathlib
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from mtl_jax import train


def init(key):
    return {"w": jax.random.normal(key, (4, 8)), "v": jnp.ones((8, 2))}


def loss(params, batch, key):
    x = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
    error = jnp.tanh(x @ params["w"]) @ params["v"] - batch["y"]
    return jnp.mean(error**2), {}


def main(index, count, port, folder):
    index, count, folder = int(index), int(count), pathlib.Path(folder)
    jax.config.update("jax_num_cpu_devices", 4 // count)
    several = train.initialize(f"localhost:{port}", count, index)
    assert several == (count > 1) and train.is_main() == (index == 0)

    def batch(step):
        rng = np.random.default_rng(step)
        whole = {
            "x": rng.normal(size=(16, 4)).astype(np.float32),
            "y": rng.normal(size=(16, 2)).astype(np.float32),
        }
        rows = slice(index * 16 // count, (index + 1) * 16 // count)
        return {name: x[rows] for name, x in whole.items()}

    trainable = train.Trainable(
        init=init,
        loss_fn=loss,
        tx=train.optimizer("adam", 1e-2),
        rules=(("w", P(None, "model")), (".*", P())),
    )
    trainer = train.Trainer(trainable, mesh=train.make_mesh(model=2), accumulate=2)
    fits = {
        "straight": trainer.fit(batch, steps=5),
        "first": trainer.fit(batch, steps=2, workdir=folder / "run"),
        "resumed": trainer.fit(batch, steps=5, workdir=folder / "run"),
        "given": trainer.fit(
            batch,
            steps=1,
            params=jax.tree.map(
                np.ones_like,
                {"w": np.zeros((4, 8), np.float32), "v": np.zeros((8, 2), np.float32)},
            ),
        ),
    }

    def late(step, steps, metrics):
        """A signal to one process, when the last step is done and agreed on."""
        if step == steps and index == count - 1:
            signal.raise_signal(signal.SIGTERM)

    try:
        trainer.fit(batch, steps=3, workdir=folder / "late", progress=late)
    except train.Interrupted as error:
        assert (error.code, error.step) == (143, 3)
    else:
        raise AssertionError("fit went on after a signal to one process")
    gather = jax.jit(
        lambda p: p, out_shardings=jax.sharding.NamedSharding(trainer.mesh, P())
    )
    arrays = {
        f"{name}/{leaf}": np.asarray(x)
        for name, fit in fits.items()
        for leaf, x in gather(fit.params).items()
    }
    arrays["loss"] = np.array(fits["straight"].history[-1]["loss"])
    np.savez(folder / f"{index}.npz", **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
