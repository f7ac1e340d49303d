"""A cache in training loops that are not this project's: plain PyTorch, HF Trainer, and TRL's DPO trainer."""
