"""The resident base: loading, wrapping, the packed forward."""
