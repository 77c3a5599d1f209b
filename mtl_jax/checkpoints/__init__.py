"""Checkpoint folders edited out of core: tensors go in and out in chunks."""
