"""Rows of logits on their way to a gradient: measured in one pass, written in another, by Triton on a GPU."""
