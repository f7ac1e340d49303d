"""Records of a teacher with another tokenizer: token bytes, aligned spans, and targets in the student's ids."""
