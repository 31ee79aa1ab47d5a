"""PEFT folder → validated → one packed image."""
