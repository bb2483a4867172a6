"""What reinforcement rewards, and what distillation keeps: functions that score completions, and how they are run."""
