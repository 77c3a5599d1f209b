"""Weighted sums over tasks from one reading of a task tree."""
