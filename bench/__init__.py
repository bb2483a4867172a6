"""Measuring: what ops cost on this machine, beside its roofline and beside other kernels; what chips that are not here
would make of the kernels; and the search for tiles."""
