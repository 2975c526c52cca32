"""How a run is spread over devices, where Lightning's own strategies do not do.

May import Lightning and what knows models; never a module, a callback or data.
"""
