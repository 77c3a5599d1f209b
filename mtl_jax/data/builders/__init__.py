"""TFDS builders of the package-backed tasks, found by task name.

They write array_record files and are read with `as_data_source`; TensorFlow is not
needed. `default` configurations are bounded in size, `full` ones keep every row.
"""

import importlib
from typing import Any

_MODULES = {
    "sentiment_movie": "sentiment:MtlSentimentMovie",
    "sentiment_product": "sentiment:MtlSentimentProduct",
    "sentiment_news": "sentiment:MtlSentimentNews",
    "sentiment_tweets": "sentiment:MtlSentimentTweets",
    "icd10_chapter": "icd10:MtlIcd10Chapter",
    "hpo_branch": "hpo:MtlHpoBranch",
    "esco_kind": "esco:MtlEscoKind",
    "place_country": "places:MtlPlaceCountry",
    "digits": "digits:MtlDigits",
    "mnist5k": "mnist5k:MtlMnist5k",
    "easy_vqa_shape": "easy_vqa:MtlEasyVqaShape",
    "easy_vqa_color": "easy_vqa:MtlEasyVqaColor",
    "multi_digits": "overlays:MtlMultiDigits",
    "multi_digits_noisy": "overlays:MtlMultiDigitsNoisy",
    "multi_mnist": "overlays:MtlMultiMnist",
    "adult": "adult:MtlAdult",
    "schools": "schools:MtlSchools",
    "chem97": "schools:MtlChem97",
}


def builder_class(task_name: str) -> Any:
    """The builder of a package-backed task or multi-task problem.

    Raises:
      ValueError: no builder here makes that task.
    """
    if task_name not in _MODULES:
        raise ValueError(
            f"no builder for task {task_name!r}; known: {', '.join(_MODULES)}"
        )
    module, _, name = _MODULES[task_name].partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


__all__ = ["builder_class"]
