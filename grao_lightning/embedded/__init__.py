"""The embedded default: a task, data and a base model that need no download.

May never import Lightning, nor anything of this package but faults and files.
"""
