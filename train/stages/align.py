"""Alignment: cross-entropy on the supervised tokens, while the recipe trains the projector alone."""

from __future__ import annotations

from train.stages import sft

# The stages differ in what their recipes train and on which data, not in the loss.
make_loss = sft.make_loss
