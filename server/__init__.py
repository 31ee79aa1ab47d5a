"""The gRPC server: transport, admission and metrics around `lora_runtime`."""
