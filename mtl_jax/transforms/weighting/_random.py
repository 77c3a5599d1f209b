"""RLW, new random weights at every step."""

import jax

from mtl_jax.transforms.weighting._base import Weighting, from_loss, masked_sum


def random(*, seed: int = 0) -> Weighting:
    r"""Weighs the losses at random: `w = softmax(z)`, z standard normal, every step.

    Args:
      seed: of the weights.

    Returns:
      A `Weighting` whose state is the typed key of the next step; `update` moves it on.

    **Follows**: Lin et al. 2022, "Reasonable Effectiveness of Random Weighting: A
      Litmus Test for Multi-Task Learning", alg. 2.

    >>> method = random(seed=1)
    >>> params, state = method.init(3)
    >>> weights = method.weights([1.0, 2.0, 3.0], params, state)
    >>> round(float(weights.sum()), 4)
    1.0
    """

    def init(num_tasks):
        del num_tasks
        return {}, jax.random.key(seed)

    def loss(losses, params, key, present):
        del params
        scores = jax.random.normal(jax.random.split(key)[1], losses.shape, losses.dtype)
        return masked_sum(jax.nn.softmax(scores) * losses, present)

    def update(key, losses, present, **extra):
        del losses, present, extra
        return jax.random.split(key)[0]

    return from_loss("random", loss, init=init, update=update)
