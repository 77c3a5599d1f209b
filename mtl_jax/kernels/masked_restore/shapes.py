"""Shapes that tests, benchmarks and ahead-of-time compilation share."""

LEAVES = (
    (1,),
    (7,),
    (384,),
    (33, 65),
    (2, 3, 128),
    (300, 128),
    (384, 1536),
)

# Awkward for a tile of 256 x 128 entries, and one that spans several tiles.
COMPILED = ((384,), (33, 65), (300, 128), (768, 3072))
