import jax.numpy as jnp
import numpy as np

from mtl_jax import models


def test_the_mean_of_the_encoders_tokens(fill):
    def bert():
        return models.Bert(vocab_size=9, width=4, depth=1, num_heads=2, mlp_dim=5)

    module = models.SentenceEncoder(bert)
    tokens = jnp.array([[1, 2, 3], [4, 5, 0]], jnp.int32)
    mask = jnp.array([[1, 1, 1], [1, 1, 0]], jnp.int32)
    params = fill(module, tokens, mask)
    hidden = np.asarray(bert().apply({"params": params["encoder"]}, tokens, mask))
    want = [hidden[0].mean(0), hidden[1, :2].mean(0)]
    found = module.apply({"params": params}, tokens, mask)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
