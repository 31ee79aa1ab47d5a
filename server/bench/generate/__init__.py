"""Generation on a CPU in fp32: throughput of a batch, a single stream against the memory's speed, and streaming.

The contenders take turns in every round. Prompts have equal lengths, so that nobody pads, and every contender computes
every prompt in every round: no cache of prefixes is used.
"""
