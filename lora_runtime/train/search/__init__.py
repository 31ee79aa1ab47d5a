"""Hyper-parameter search: trials of `train`, chosen by Optuna (of the extra `search`).

    space.py       what may be searched, its text form, the space that is searched by default
    progress.py    what a search reports, and whom it tells meanwhile
    store.py       the trials so far in an SQLite file, and that it is the same search that goes on
    trial.py       one trial: settings, pruning, what ends it
    run.py         `search`, the whole of it
    report.py      search.md: every trial
    figure.py      search.png: values trial by trial, and over each parameter

`space.py` and `progress.py` need neither torch nor Optuna.
"""
