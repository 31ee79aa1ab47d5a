"""Fine-tuning of LoRA adapters: what this package writes, the runtime loads.

    data.py, split.py     files → checked rows → train and validation rows with one label set
    settings.py           what a run is told, reports back, and tells an observer meanwhile
    task_model.py         a base with a fresh head, its LoRA targets, its fingerprint
    fitting.py            PEFT and the transformers Trainer; the best epoch is kept in memory
    folder.py             the adapter folder of what PEFT trained; `adapters/writing.py` stages and publishes it
    classify.py           `train_classifier`, the whole run

Needs the extra `multilora[train]` (peft, accelerate) from `classify.py` downwards only.
"""
