"""Problems, models and training settings that the configs of several systems share.

Plain data: each function returns the `problem`, `model` and `training` of a config.
"""

from typing import Any

Part = dict[str, Any]


def digits(*, steps: int = 600, noisy: bool = False) -> tuple[Part, Part, Part]:
    """Two overlaid digits, a small convolutional network."""
    problem = {
        "name": "multi_digits_noisy" if noisy else "multi_digits",
        "train": 8000,
        "validation": 1000,
        "test": 1000,
    }
    backbone = {"model": "small-conv", "channels": (16, 32), "width": 64}
    return problem, _hard(backbone), _training(steps, 64, 2e-3)


def census(*, steps: int = 600) -> tuple[Part, Part, Part]:
    """Adult: income, ever married, college; two layers."""
    problem = {"name": "adult", "train": 20000, "validation": 3000, "test": 10000}
    backbone = {"model": "mlp", "features": (64, 32), "activate_final": True}
    return problem, _hard(backbone), _training(steps, 128, 2e-3)


def schools(*, steps: int = 300) -> tuple[Part, Part, Part]:
    """Exam scores, one regression per school."""
    backbone = {"model": "mlp", "features": (32,), "activate_final": True}
    return {"name": "schools"}, _hard(backbone), _training(steps, 256, 5e-3)


def texts(*, steps: int = 100) -> tuple[Part, Part, Part]:
    """Six text tasks, each on texts of its own; the upper two layers of MiniLM."""
    problem = {
        "name": "text_six",
        "train": 600,
        "validation": 64,
        "test": 384,
        "pretrained": "minilm",
        "lower": 4,
    }
    backbone = {"model": "sentence-minilm-l6-top2"}
    training = _training(steps, 24, 1e-4)
    training["optimizer"] |= {"name": "adamw", "clip_norm": 1.0}
    return problem, _hard(backbone), training


def tiny() -> tuple[Part, Part, Part]:
    """Two overlaid digits, too few of them to mean anything."""
    problem = {"name": "multi_digits", "train": 64, "validation": 32, "test": 32}
    backbone = {"model": "small-conv", "channels": (4,), "width": 8}
    return problem, _hard(backbone), _training(6, 16, 1e-2)


def faces() -> tuple[Part, Part, Part]:
    """CelebA, 40 attributes, a ViT: the papers' many-task vision setting."""
    backbone = {
        "model": "vit-b/16",
        "image_size": 64,
        "scan": True,
        "remat": True,
        "dtype": "bfloat16",
    }
    training = _training(30_000, 256, 3e-4)
    return {"name": "celeba"}, _hard(backbone), training


def _hard(backbone: Part) -> Part:
    return {"architecture": "hard_sharing", "backbone": backbone}


def _training(steps: int, batch_size: int, peak: float) -> Part:
    return {
        "steps": steps,
        "batch_size": batch_size,
        "optimizer": {"name": "adam", "peak": peak, "warmup": 0.05},
    }
