"""Numerical ops, a folder each."""
