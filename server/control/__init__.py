"""The control plane: what clients registered, aliased and pinned, kept across restarts, and who watches it."""
