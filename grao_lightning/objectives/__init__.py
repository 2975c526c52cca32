"""Pure maths of every method, and of a group's advantages: one file a method, named terms.

May never import anything but torch: no framework, no model, no input or output.
"""
