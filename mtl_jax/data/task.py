"""What a task is, and the strict lookup of tasks by name."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A single-label classification task.

    Attributes:
      name: registry name.
      kind: what the input is.
      num_classes: C.
      class_names: C human-readable names in label order; empty only for tasks of
        `PAPER_VISION_TASKS`, whose names TFDS knows once they are prepared.
      prompts: for text tasks, C tuples of sentences that describe the class. A
        text encoder turns them into the prototypes of a zero-shot head (encode
        all, average per class, normalise).
      length: for text tasks, L: tokens per example, fixed, so that one compiled
        step serves the task. Longer texts are cut.
      image_shape: for image tasks, (H, W, C) of the stored uint8 image.
      licence: of the data, as far as its package states it.
      source: what the rows are and where they come from.
      tfds_name: for `PAPER_VISION_TASKS`, the name in TFDS.
      splits: maps `train`, `validation` and `test` to TFDS split expressions where
        they differ.
    """

    name: str
    kind: Literal["text", "image"]
    num_classes: int
    class_names: tuple[str, ...] = ()
    prompts: tuple[tuple[str, ...], ...] = ()
    length: int = 0
    image_shape: tuple[int, ...] = ()
    licence: str
    source: str
    tfds_name: str = ""
    splits: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for field in ("class_names", "prompts"):
            found = len(getattr(self, field))
            if found not in (0, self.num_classes):
                raise ValueError(
                    f"Task {self.name!r}: {field} has {found} entries, wanted "
                    f"{self.num_classes}"
                )

    def flat_prompts(self) -> tuple[list[str], list[int]]:
        """All prompts in one list, and the class that each belongs to."""
        if not self.prompts:
            raise ValueError(f"Task {self.name!r} has no prompts")
        texts = [text for group in self.prompts for text in group]
        labels = [label for label, group in enumerate(self.prompts) for _ in group]
        return texts, labels


def fill(templates: tuple[str, ...], classes: tuple[str, ...]) -> tuple:
    """Prompts per class: every template with `{}` replaced by the class name."""
    return tuple(tuple(t.format(name) for t in templates) for name in classes)


def tasks() -> dict[str, Task]:
    """All registered tasks by name: text, vision, and the papers' vision sets."""
    from mtl_jax.data import text_tasks, vision_tasks

    return {
        **text_tasks.TEXT_TASKS,
        **vision_tasks.VISION_TASKS,
        **vision_tasks.PAPER_VISION_TASKS,
    }


def get(name: str) -> Task:
    """The task called `name`.

    Raises:
      ValueError: no such task; the message lists those that exist.
    """
    known = tasks()
    if name not in known:
        raise ValueError(f"unknown task {name!r}; known: {', '.join(sorted(known))}")
    return known[name]
