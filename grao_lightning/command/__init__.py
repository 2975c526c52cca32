"""The ``grao`` commands that make or read one run: ``fit``, ``validate``, ``export``.

May never be imported by what they run: modules, callbacks, data and everything below.
"""
