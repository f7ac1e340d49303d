"""Distillation from a teacher with another tokenizer: its aligned targets, and the loss over them."""
