"""What a validation pass is measured by, in numpy. No torch, no transformers.

    classes.py     accuracy, macro-F1, per-label table, confusion matrix; errors of a regression
    tags.py        precision, recall and F1 of entities, as seqeval's default mode
    spans.py       SQuAD's exact match and F1
    texts.py       BLEU and chrF (sacreBLEU, of the extra `train`), perplexity
    embeddings.py  Spearman's correlation with scores, retrieval within the validation rows
    names.py       how metrics are called and written for people

Shares are from 0 to 1; BLEU and chrF from 0 to 100, as sacreBLEU has them.
"""
