"""Distillation: a student learns from what a teacher writes, or from the teacher's probabilities."""
