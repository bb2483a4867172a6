"""Supervised fine-tuning: `dsv3 train sft`."""
