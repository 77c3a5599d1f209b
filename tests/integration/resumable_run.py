"""A small run for `resume_test.py`: resumable_run.py WORKDIR [PAUSE_AT_STEP].

Prints "at N" and waits for a line on standard input once step PAUSE_AT_STEP is
reported, and in the end "done" with a digest of the whole state.
"""

import hashlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import train

STEPS = 30


class Stream:
    """A random walk through the data, with the walker's state as its position."""

    def __init__(self):
        self.rng = np.random.default_rng(0)

    def __iter__(self):
        return self

    def __next__(self):
        return {"x": self.rng.normal(size=(8, 4)).astype(np.float32)}

    def get_state(self):
        return self.rng.bit_generator.state

    def set_state(self, state):
        self.rng.bit_generator.state = state


def loss(params, batch, key):
    x = batch["x"] + jax.random.normal(key, batch["x"].shape)
    return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] - 1) ** 2), {}


def init(key):
    return {"w": jax.random.normal(key, (4, 4)), "v": jnp.ones((4, 1))}


def main(workdir, pause="0"):
    def progress(step, steps, metrics):
        if step == int(pause):
            sys.stdout.write(f"at {step}\n")
            sys.stdout.flush()
            sys.stdin.readline()

    tx = train.optimizer("adamw", ("linear", {"peak": 0.1, "steps": STEPS}))
    trainable = train.Trainable(init=init, loss_fn=loss, tx=tx)
    result = train.Trainer(trainable, ema=0.9).fit(
        Stream(),
        steps=STEPS,
        workdir=workdir,
        checkpoint_every=5,
        log_every=3,
        progress=progress,
    )
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(result.state._replace(key=None)):
        digest.update(np.asarray(leaf).tobytes())
    digest.update(repr(result.history).encode())
    sys.stdout.write(f"done {digest.hexdigest()}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
