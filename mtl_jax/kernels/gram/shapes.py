"""Shapes that tests, benchmarks and ahead-of-time compilation share."""

# Leaves [T, ...]: few and many tasks, with and without whole rows of lanes.
STACKS = (
    (1, 1),
    (2, 7),
    (3,),
    (3, 33, 65),
    (8, 384),
    (8, 20, 200),
    (4, 17, 128),
    (40, 300),
    (40, 3, 5, 130),
    (128, 64),
    (128, 9, 129),
)

# Leaves that span several blocks, read where they lie and flat.
COMPILED = (
    (3, 33, 65),
    (8, 384),
    (8, 300, 1100),
    (16, 768, 3072),
    (40, 5, 100, 200),
    (8, 100003),
    (128, 5000),
    (128, 257, 768),
)
