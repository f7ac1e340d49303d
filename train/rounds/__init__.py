"""Rounds of distillation on a student's own answers: it writes, the teacher scores, it learns."""
