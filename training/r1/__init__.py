"""The R1 pipeline: from a base model to one that reasons, and on to its students (DeepSeek-R1 report, section 2)."""
