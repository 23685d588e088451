"""Scores of predicted label maps: of a class, of a case, of a cohort; intervals, and a paired test between two runs."""
