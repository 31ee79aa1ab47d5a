"""Fine-tuning of LoRA adapters: what this package writes, the runtime loads.

    run.py                `train(settings, observer) -> TrainReport`: the whole run
    settings.py           what a run is told, in groups; processes.py: which process and device
    progress.py           what it reports, and whom it tells meanwhile
    rows/                 files → checked rows of each task → train and validation rows
    tasks/                what each task needs of a run: rows to features, logits to loss and metrics
    metrics/              what a validation pass is measured by
    task_base.py          a base under a task's head (gguf_base.py, quantized.py), its fingerprint
    lora.py               PEFT's adapter around it, and its form on disk
    loss.py optimizers.py by name, or the user's own
    fitting.py watcher.py the transformers Trainer, and its events as reports; the best pass's weights
    checkpoints.py        what an interrupted run goes on from
    folder.py             the adapter folder of what was trained; `adapters/writing.py` stages and publishes it
    search/  private/     hyper-parameter search; differential privacy
    reporting.py report/  report.md and report.png beside the adapter

Needs the extra `multilora[train]` for all but settings, progress, rows, metrics and the tasks' options.
"""
