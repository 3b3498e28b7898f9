"""Measuring attention beside its peers; ``python -m flash_attn_ext bench`` and benchmarks/ use it.

``measure`` times calls alternately, ``problems`` says what is computed, ``providers`` who computes
it, ``check`` whether it is right, ``runs`` puts them together, ``pictures`` and ``report`` show it.
"""
