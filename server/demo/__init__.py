"""The packaged demo: three small real data sets, three adapters, one server."""
