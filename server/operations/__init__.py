"""What operators and their machines ask over HTTP: metrics, probes, and the state inside."""
