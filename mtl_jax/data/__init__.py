"""Tasks, sources and pipelines.

A task is a name (`TEXT_TASKS`, `VISION_TASKS`); `load_source` gives its rows,
`transform` what models take from a row, `pipeline` and its siblings batches.
"""

from mtl_jax.data import multitask, packages, synthetic
from mtl_jax.data.instruct import encode_chat, encode_text
from mtl_jax.data.multitask import MultiTask, stack_by_task, task_batches
from mtl_jax.data.packing import Packed, pack
from mtl_jax.data.pipelines import (
    ArraySource,
    evaluation,
    iterate,
    lockstep,
    mixture,
    mixture_weights,
    pipeline,
    to_arrays,
)
from mtl_jax.data.sources import default_data_dir, load_source, prepare
from mtl_jax.data.task import SPLITS, Task, get, tasks
from mtl_jax.data.text_tasks import TEXT_TASKS
from mtl_jax.data.transforms import (
    Normalize,
    Tokenize,
    bucket,
    fit_length,
    load_tokenizer,
    minilm_tokenizer,
    prompt_arrays,
    transform,
)
from mtl_jax.data.vision_tasks import PAPER_VISION_TASKS, VISION_TASKS
from mtl_jax.data.wheels import FetchError, Package, cache_dir, extract, fetch, read

__all__ = [
    "PAPER_VISION_TASKS",
    "SPLITS",
    "TEXT_TASKS",
    "VISION_TASKS",
    "ArraySource",
    "FetchError",
    "MultiTask",
    "Normalize",
    "Package",
    "Packed",
    "Task",
    "Tokenize",
    "bucket",
    "cache_dir",
    "default_data_dir",
    "encode_chat",
    "encode_text",
    "evaluation",
    "extract",
    "fetch",
    "fit_length",
    "get",
    "iterate",
    "load_source",
    "load_tokenizer",
    "lockstep",
    "minilm_tokenizer",
    "mixture",
    "mixture_weights",
    "multitask",
    "pack",
    "packages",
    "pipeline",
    "prepare",
    "prompt_arrays",
    "read",
    "stack_by_task",
    "synthetic",
    "task_batches",
    "tasks",
    "to_arrays",
    "transform",
]
