"""Generated from protos/ by protos/generate.py; import from server.pb.<package>."""
