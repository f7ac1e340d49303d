"""Checkpoints that are more than one model's weights in full precision: adapters on a base, and quantised weights."""
