"""Training files → checked rows → train and validation rows. No torch, no transformers.

    place.py       where a row stands, and the error that says so
    cells.py       checks of single values: texts, labels, numbers
    delimited.py   CSV and TSV
    json_files.py  JSON lines, and JSON arrays of objects
    datasets_folder.py   folders of the library `datasets`, and parquet files (extra `datasets`)
    files.py       `read_cells`: any of those by ending; columns that must be there
    classify.py  tokens.py (conll.py)  answer.py (squad.py, locate.py)  prompt.py  embed.py
                   each a schema, a row, `read_…_rows` and `load_…_rows`
    split.py       `TaskRows`; which rows are held out where no validation file is given

Every refusal is one TrainingDataInvalid: file, line or row, what is wrong, and the remedy. It never repeats a text.
"""
