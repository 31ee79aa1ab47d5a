"""Where adapters come from: a local folder, the Hugging Face hub, or anything that fsspec can reach."""
