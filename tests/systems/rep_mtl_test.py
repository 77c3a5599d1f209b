"""What rows of Rep-MTL refuse."""

import jax
import optax
import pytest

from mtl_jax import configs, multitask
from mtl_jax.systems import rep_mtl

pytestmark = pytest.mark.fast
CONFIG = "experiments/configs/rep_mtl.py:tiny"
EXPERT = {"model": "mlp", "features": (4,), "activate_final": True}


@pytest.fixture
def method():
    rows = rep_mtl.build(configs.load_config(CONFIG)).rows
    (found,) = (row.candidates[0] for row in rows if row.name == "Rep-MTL")
    return found


def test_saliencies_want_rows_with_all_labels(method):
    model = {"architecture": "hard_sharing", "backbone": EXPERT}
    problem = multitask.outline("schools", model)
    trainable = method.make(problem, optax.sgd(1.0))
    with pytest.raises(ValueError, match="rep-mtl: .* each row of 'schools'"):
        trainable.loss_fn({}, problem.splits["train"], jax.random.key(0))


def test_saliencies_want_a_shared_representation(method):
    model = {"architecture": "cgc", "expert": EXPERT, "shared_experts": 0}
    problem = multitask.outline("adult", model)
    trainable = method.make(problem, optax.sgd(1.0))

    def loss(key):
        return trainable.loss_fn(problem.init(key), problem.splits["train"], key)

    with pytest.raises(ValueError, match="rep-mtl: CGC has no shared repr"):
        jax.eval_shape(loss, jax.random.key(0))
