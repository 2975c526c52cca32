"""The embedded default: a task, data and a base model that need no download."""
