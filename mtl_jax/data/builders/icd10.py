"""Chapter of a diagnosis, from its title in the ICD-10-CM tabular list."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator

from mtl_jax.data import packages, splits, wheels
from mtl_jax.data.builders.base import TaskBuilder

_MEMBER = "simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml"
_VARIANT = re.compile(
    r"\b(left|right|bilateral|unilateral|unspecified|initial|subsequent|other|part|"
    r"side|site|with|without|upper|lower|of|the|and|or|in|due|to|encounter)\b|[\W\d]"
)


def family(title: str) -> str:
    """A title without side, site qualifier and stop words.

    `... of left upper eyelid` and `... of right eyelid, unspecified` are one family,
    and a family stays in one split.
    """
    return " ".join(_VARIANT.sub(" ", splits.text_key(title)).split())


def parse(xml: bytes) -> Iterator[splits.Row]:
    """One row per diagnosis title; chapter k has label k - 1."""
    for chapter in ET.fromstring(xml).iter("chapter"):
        label = int(chapter.findtext("name", "")) - 1
        for diagnosis in chapter.iter("diag"):
            title = diagnosis.findtext("desc", "")
            yield splits.text_row(title, label, family(title))


class MtlIcd10Chapter(TaskBuilder):
    """Diagnosis titles labelled with their chapter; near-copies share a split."""

    task_name = "icd10_chapter"

    def rows(self) -> Iterator[splits.Row]:
        """Every diagnosis title."""
        return parse(wheels.read(packages.ICD10, _MEMBER))
