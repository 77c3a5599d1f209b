"""Shapes that tests, benchmarks and ahead-of-time compilation share."""

# Task vectors [T, ...] and the number of scales.
STACKS = (
    ((1, 1), 1),
    ((2, 7), 2),
    ((3, 33, 65), 1),
    ((8, 384), 5),
    ((3, 300, 128), 2),
)

COMPILED = (((8, 384), 5), ((3, 33, 65), 1), ((20, 768, 768), 5))
