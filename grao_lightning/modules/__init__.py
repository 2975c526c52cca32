"""LightningModules: one file a method, on a shared base.

May never import a command, nor a callback: the checks of a run look at both.
"""
