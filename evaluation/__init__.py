"""Benchmarks, their protocols, and reports that stand beside the published numbers."""
