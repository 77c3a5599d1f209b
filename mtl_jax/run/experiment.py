"""What every kind of run has: config, results, claims and a report."""

from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mtl_jax import report


class Experiment:
    """A run that collects results by row, and what analyses say of them.

    Attributes:
      config: the whole experiment; what is compared is `config.study`.
      results: row name -> result.
      report: collects tables and figures.
      claims: (claim, what was measured, whether it holds).
      progress: a `report.Progress`.
      claims_title: of the table of claims.
    """

    claims_title = "What the papers claim, and what was measured here"

    def __init__(
        self, config: ConfigDict, document: report.Report, progress: report.Progress
    ):
        self.config = config
        self.report = document
        self.progress = progress
        self.results: dict[str, Any] = {}
        self.claims: list[tuple[str, str, bool]] = []

    def claim(self, text: str, measured: str, holds: bool) -> None:
        """Records a directional claim of the paper and what came of it here."""
        self.claims.append((text, measured, bool(holds)))

    def write(
        self,
        workdir: epath.Path,
        *,
        table: Callable[[], None],
        rests_on: str,
        details: Callable[[], None],
    ) -> None:
        """Writes the report and prints its tables.

        Args:
          workdir: gets `report/`.
          table: adds the main table, which comes first.
          rests_on: what the claims, the ones that fail included, were measured on.
          details: adds what follows the claims; analyses come last.
        """
        document = self.report
        analyses, document.sections = document.sections, []
        table()
        if self.claims:
            document.add_table(
                report.Table(
                    title=self.claims_title,
                    columns=("claim", "measured", "holds"),
                    rows=tuple(self.claims),
                    caption=rests_on,
                )
            )
        details()
        document.sections += analyses
        page = document.write(workdir / "report")
        document.print()
        self.progress.log(f"report: {page}")


def mean_and_spread(values: np.ndarray, digits: int) -> str:
    """Mean over seeds [S], with the standard deviation where there are several.

    >>> mean_and_spread(np.array([1.0, 2.0]), 1)
    '1.5 ± 0.7'
    """
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"
