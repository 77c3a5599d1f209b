"""Pure functions over arrays and pytrees, and optax gradient transformations."""
