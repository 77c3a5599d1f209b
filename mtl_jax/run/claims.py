"""The table of a paper's directional claims, the ones that fail included."""

from collections.abc import Sequence

from mtl_jax import report

Claim = tuple[str, str, bool]


def add_claims(document: report.Report, claims: Sequence[Claim], caption: str) -> None:
    """Adds the table, if there are claims.

    Args:
      document: collects tables.
      claims: (claim, what was measured, whether it holds).
      caption: what the measurement rests on.
    """
    if claims:
        document.add_table(
            report.Table(
                title="What the papers claim, and what was measured here",
                columns=("claim", "measured", "holds"),
                rows=tuple(claims),
                caption=caption,
            )
        )
