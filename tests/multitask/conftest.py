import numpy as np
import pytest

from mtl_jax import models, multitask
from mtl_jax.data.multitask import Target


def rows(seed, count):
    """Two labels that share what they look at, and a number."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 6)).astype(np.float32)
    noise = rng.normal(size=count)
    return {
        "x": x,
        "sign": (x[:, 0] + x[:, 1] > 0).astype(np.int32),
        "third": np.digitize(x[:, 0] - x[:, 2], [-0.5, 0.5]).astype(np.int32),
        "sum": (x[:, 0] + 0.1 * noise).astype(np.float32),
    }


TARGETS = (
    Target("sign", "binary", 1, True, "auc"),
    Target("third", "classification", 3, True, "accuracy"),
    Target("sum", "regression", 1, False, "rmse"),
)


def make_model(targets):
    return models.multitask.HardSharing(
        backbone=lambda: models.Mlp((16,), activate_final=True),
        outputs={t.name: t.size for t in targets},
    )


@pytest.fixture(scope="session")
def problem():
    """Three tasks of three kinds on the same rows."""
    return multitask.Problem(
        name="toy",
        targets=TARGETS,
        inputs=("x",),
        splits={
            "train": rows(0, 256),
            "validation": rows(1, 100),
            "test": rows(2, 300),
        },
        model=make_model(TARGETS),
        about={"hidden": 16},
    )


@pytest.fixture(scope="session")
def own_rows_problem():
    """Two tasks, each row of one of them; the second has few rows."""
    targets = (
        Target("a", "binary", 1, True, "accuracy"),
        Target("b", "classification", 3, True, "accuracy"),
    )

    def split(seed, count):
        whole = rows(seed, count)
        task = (np.arange(count) % 5 == 0).astype(np.int32)
        label = np.where(task == 1, whole["third"], whole["sign"])
        return {"x": whole["x"], "task": task, "label": label.astype(np.int32)}

    return multitask.Problem(
        name="own",
        targets=targets,
        inputs=("x",),
        splits={
            "train": split(0, 256),
            "validation": split(1, 64),
            "test": split(2, 300),
        },
        model=make_model(targets),
        about={"hidden": 16},
    )
