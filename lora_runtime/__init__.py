"""Many LoRA adapters on one resident base, in one batch, never merged. A library: it knows no server.

from lora_runtime.runtime import Runtime

with Runtime("path/to/encoder") as runtime:
    runtime.load("adapters/news")
    print(runtime.classify("news", ["Markets rallied after the announcement."]))
"""
