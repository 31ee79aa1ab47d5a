"""RPCs: proto messages to runtime types and back, and nothing else."""
