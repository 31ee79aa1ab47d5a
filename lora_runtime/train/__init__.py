"""Fine-tuning of LoRA adapters: what this package writes, the runtime loads.

    rows/                 files → checked rows of each task → train and validation rows
    metrics/              what a validation pass is measured by
    report/               report.md and report.png beside the adapter
    settings.py           what a run is told, reports back, and tells an observer meanwhile
    task_model.py         a base with a fresh head, its LoRA targets, its fingerprint
    fitting.py            PEFT and the transformers Trainer; the best epoch is kept in memory
    folder.py             the adapter folder: built aside, published by one rename
    classify.py           `train_classifier`, the whole run

Needs the extra `multilora[train]` (peft, accelerate) from `classify.py` downwards only.
"""
