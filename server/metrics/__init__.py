"""What Prometheus and routers read of a server. `series.py` declares every series."""

from server.metrics.server_metrics import ServerMetrics

__all__ = ["ServerMetrics"]
