"""Judging what a model wrote: answers, formats, languages, rules, code. Ground floor: needs no torch and no model."""
