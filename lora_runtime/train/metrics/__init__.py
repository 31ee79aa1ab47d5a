"""What a validation pass is measured by, in numpy. No torch, no transformers.

classes.py     accuracy, macro-F1, per-label table, confusion matrix; errors of a regression
"""
