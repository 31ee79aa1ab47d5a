"""Benchmarks that check their outputs before they print a speed."""
