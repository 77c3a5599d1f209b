"""Runs an experiment config, or compiles it for a TPU that is not here."""

from mtl_jax.run.dispatch import preflight, run

__all__ = ["preflight", "run"]
