"""LoRA by singular values, without training: from a fully fine-tuned model, or from an adapter of a higher rank.

    settings.py           what a run is told: ranks, targets, dtype; what it tells an observer
    spectrum.py           one matrix → its singular values and the two factors of a rank
    sites.py              what was found at each site, and what was not carried
    writer.py             tensors → one safetensors file, through the disk, so that none is kept in memory
    layout.py             ranks, targets and whole modules as PEFT's config writes them
    model_folder.py       a model's safetensors, read one tensor at a time
    task_class.py         the names of a checkpoint in the task class that PEFT wraps
    observed.py           which modules an adapter can reach
    plan.py               what of a fine-tuned model becomes LoRA, what is carried whole, and what cannot be
    described.py          the files beside an extracted adapter's weights
    extract.py            `extract_adapter`: a fine-tuned model and its base → an adapter
    compress.py           `compress_adapter`: an adapter → one of a lower rank
    report.py, plot.py    the same findings as JSON, Markdown and a picture

Nothing here needs PEFT; the picture needs matplotlib.
"""
