"""Families of experts from one base, cached, and the rows that merge them."""

from mtl_jax.zoo import diagnostics, transfer
from mtl_jax.zoo.adapters import Adapters, adapted, from_nf4, nf4_adapters
from mtl_jax.zoo.clip import clip, require_weights, text_heads
from mtl_jax.zoo.encoders import Encoder, class_means, minilm, small_vit
from mtl_jax.zoo.evaluate import Evaluator
from mtl_jax.zoo.experts import Settings, Zoo, logits_fn, open_zoo, trainable
from mtl_jax.zoo.language import LanguageModel, open_gguf, smollm2
from mtl_jax.zoo.learning import Recipe, Trace, coefficients, learn
from mtl_jax.zoo.material import Material, stacks
from mtl_jax.zoo.rows import (
    Fit,
    LearnedModel,
    PostHoc,
    Row,
    SharedModel,
    TaskModels,
    baselines,
    individual,
    task_delta,
    zero_shot,
)
from mtl_jax.zoo.tasks import TaskData, load_tasks, make_task
from mtl_jax.zoo.views import perturb
from mtl_jax.zoo.world import world

__all__ = [
    "Adapters",
    "Encoder",
    "Evaluator",
    "Fit",
    "LanguageModel",
    "LearnedModel",
    "Material",
    "PostHoc",
    "Recipe",
    "Row",
    "Settings",
    "SharedModel",
    "TaskData",
    "TaskModels",
    "Trace",
    "Zoo",
    "adapted",
    "baselines",
    "class_means",
    "clip",
    "coefficients",
    "diagnostics",
    "from_nf4",
    "individual",
    "learn",
    "load_tasks",
    "logits_fn",
    "make_task",
    "minilm",
    "nf4_adapters",
    "open_gguf",
    "open_zoo",
    "perturb",
    "require_weights",
    "small_vit",
    "smollm2",
    "stacks",
    "task_delta",
    "text_heads",
    "trainable",
    "transfer",
    "world",
    "zero_shot",
]
