"""Accuracy with its uncertainty, by the scorers that training uses."""
