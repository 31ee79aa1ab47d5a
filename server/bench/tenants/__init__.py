"""What tenants notice of each other, of overload and of cancelled calls.

`run.py` is the order of things; `noisy.py`, `shares.py`, `overload.py` and `cancels.py` are the parts.
"""
