"""Sum, packed TALL masks and their counts from one reading of the task vectors."""
