"""Inner products between tasks from one reading of a task tree."""
