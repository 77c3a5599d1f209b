"""Suites and training settings that the configs of several systems share.

Plain data: each function returns the `suite` and `experts` parts of a config.
"""

from typing import Any

TEXT = (
    "sentiment_movie",
    "sentiment_product",
    "sentiment_news",
    "sentiment_tweets",
    "icd10_chapter",
    "hpo_branch",
    "esco_kind",
    "place_country",
)
VISION = ("digits", "mnist5k", "easy_vqa_shape", "easy_vqa_color")
PAPER_8 = ("cars", "dtd", "eurosat", "gtsrb", "mnist", "resisc45", "svhn", "sun397")

# Strengths to choose from: of plain sums, and of sums or means of few entries.
SCALES = (0.2, 0.3, 0.4, 0.5, 0.7)
FINE_SCALES = tuple(round(0.1 * i, 1) for i in range(1, 11))
SPARSE_SCALES = (0.3, 0.5, 0.7, 1.0, 1.4)

Part = dict[str, Any]


def text(names: tuple[str, ...] = TEXT, *, steps: int = 60) -> tuple[Part, Part]:
    """MiniLM on real text tasks, sized for two CPU cores."""
    suite = {
        "name": "minilm",
        "options": {
            "names": names,
            "max_length": 16,
            "train": 1000,
            "validation": 64,
            "test": 160,
        },
    }
    adamw = {
        "name": "adamw",
        "peak": 1e-4,
        "warmup": 0.1,
        "clip_norm": 1.0,
        "weight_decay": 0.1,
    }
    return suite, _experts(steps, 16, adamw, 20.0)


def vision(names: tuple[str, ...] = VISION, *, steps: int = 150) -> tuple[Part, Part]:
    """A small ViT, pretrained on rotations, on real images of 32 x 32."""
    options = {
        "names": names,
        "train": 2000,
        "validation": 128,
        "test": 256,
        "base": {},
    }
    adamw = {"name": "adamw", "peak": 5e-4, "warmup": 0.1, "weight_decay": 0.05}
    return {"name": "small_vit", "options": options}, _experts(steps, 64, adamw, 20.0)


def world(*, hidden: int = 192, tiny: bool = False) -> tuple[Part, Part]:
    """The synthetic zero-shot world: eight tasks, one MLP, seconds."""
    size = {"hidden": hidden, "seed": 0, "unit_outputs": True}
    if tiny:
        size |= {"tasks": 3, "hidden": 32, "pretrain_steps": 100, "sizes": (64, 32, 32)}
    adam = {"name": "adam", "peak": 5e-4, "decay": False}
    steps, batch = (10, 16) if tiny else (300, 64)
    return {"name": "world", "options": size}, _experts(steps, batch, adam, 16.0)


def clip(names: tuple[str, ...] = PAPER_8, *, steps: int = 2000) -> tuple[Part, Part]:
    """CLIP towers on the papers' eight image tasks; weights are the user's."""
    base = {
        "model": "clip-vit-l/14",
        "weights": "",
        "class_embeddings": "",
        "dtype": "bfloat16",
        "scan": True,
        "remat": True,
    }
    options = {
        "names": names,
        "train": 100_000,
        "validation": 5_000,
        "test": 100_000,
        "base": base,
    }
    adamw = {
        "name": "adamw",
        "peak": 1e-5,
        "warmup": 500 / steps,
        "clip_norm": 1.0,
        "weight_decay": 0.1,
    }
    return {"name": "clip", "options": options}, _experts(steps, 128, adamw, 100.0)


def _experts(steps: int, batch_size: int, optimizer: Part, logit_scale: float) -> Part:
    return {
        "steps": steps,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "logit_scale": logit_scale,
        "seed": 0,
    }
