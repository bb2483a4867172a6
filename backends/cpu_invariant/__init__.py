"""The CPU, batch-invariantly: a token's numbers are bitwise the same whatever else is in the batch.

However a prompt is cut into chunks, alone or among others, drafted or decoded: as long as its tokens attend in the
absorbed form (`mla_decode`), each of them is computed as if it were the only one. Three things make that so:

- products run in tiles of fixed heights that were seen to give a row the same result at every place (`tiles`);
- attention over the cache cuts what a query sees into pieces that depend on their number alone (`mla_cache`);
- what is left works row by row, from operations whose result does not depend on where in memory a number stands:
  those that IEEE rounds once, and an exponential that was checked (`elementwise`).

It promises that within one process and number of threads. Attention with expanded keys (`mla_attention`) depends on a
sequence's own rows alone, but on all of them: there a prompt must not be cut. It is made for inference (gradients run
as their specifications) and chosen by name only, as it costs speed.
"""

from pkgutil import iter_modules

from .. import Backend

NAME = "cpu-invariant"
BACKEND = Backend(
    name=NAME,
    device="cpu",
    probe=lambda: None,
    kernels=tuple(f"{__name__}.{module.name}" for module in iter_modules(__path__)),
)
