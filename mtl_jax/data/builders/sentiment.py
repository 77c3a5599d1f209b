"""Rated snippets from four domains, of the VADER study."""

import html
from collections.abc import Iterator

from mtl_jax.data import packages, splits, wheels
from mtl_jax.data.builders.base import TaskBuilder

_ARCHIVE = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
_NEUTRAL = 0.5
_CITATION = """@inproceedings{hutto2014vader,
  title={{VADER}: A Parsimonious Rule-Based Model for Sentiment Analysis of Social Media Text},
  author={Hutto, Clayton J. and Gilbert, Eric},
  booktitle={Proceedings of the International AAAI Conference on Web and Social Media},
  year={2014}
}"""  # noqa: E501


def parse(table: str, *, documents: bool) -> Iterator[splits.Row]:
    """Rows of a ground-truth file: identifier, mean rating and text by tabs.

    Args:
      table: the file's text.
      documents: whether identifiers are `document_sentence`; the sentences of one
        document then stay in one split.
    """
    for line in table.splitlines():
        if not line.strip():
            continue
        identifier, rating, text = line.split("\t", 2)
        if abs(float(rating)) <= _NEUTRAL:
            continue
        group = identifier.partition("_")[0] if documents else ""
        yield splits.text_row(html.unescape(text), int(float(rating) > 0), group)


class _Sentiment(TaskBuilder, skip_registration=True):
    citation = _CITATION
    member: str
    documents = False

    def rows(self) -> Iterator[splits.Row]:
        name = f"hutto_ICWSM_2014/{self.member}_GroundTruth.txt"
        text = wheels.read(packages.VADER, _ARCHIVE, name).decode("utf-8", "replace")
        return parse(text, documents=self.documents)


class MtlSentimentMovie(_Sentiment):
    """Sentences of movie reviews."""

    task_name = "sentiment_movie"
    member = "movieReviewSnippets"


class MtlSentimentProduct(_Sentiment):
    """Sentences of product reviews, split by review."""

    task_name = "sentiment_product"
    member = "amazonReviewSnippets"
    documents = True


class MtlSentimentNews(_Sentiment):
    """Sentences of newspaper editorials, split by editorial."""

    task_name = "sentiment_news"
    member = "nytEditorialSnippets"
    documents = True


class MtlSentimentTweets(_Sentiment):
    """Tweets."""

    task_name = "sentiment_tweets"
    member = "tweets"
