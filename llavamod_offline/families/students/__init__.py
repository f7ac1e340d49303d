"""Students of any family: from samples to batches, through the forward pass, to a checkpoint folder."""
