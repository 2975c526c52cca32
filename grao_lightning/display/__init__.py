"""What people look at, from plain values: tables, progress lines, pictures, the console's notes.

May never import any other part of this package: it is handed numbers and text.
"""
