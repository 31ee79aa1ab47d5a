"""From a model's outputs to what a caller asked for: labelled words, answers in a context, vectors. Pure functions."""
