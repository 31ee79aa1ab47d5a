"""Private training: DP-SGD (Abadi et al. 2016) of a classifier's LoRA and head, through Opacus (the extra `private`).

    settings.py    what is asked for; `PrivacyBudget`, what is guaranteed; neither torch nor Opacus
    checks.py      what would break the guarantee is refused
    accounting.py  noise ↔ ε, by Opacus' accountant
    trainer.py     Poisson samples, gradients row by row, clipping and noise in the Trainer's loop
    report.py      what report.md says of it

What is guaranteed: with or without any one training row, any set of adapters is about as likely to be written,
within a factor e^ε, but for a probability δ. It covers the weights that training changes, and nothing else.
"""
