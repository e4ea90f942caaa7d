"""What the hot CUDA kernels cost, counted from the machine code (SASS) of the built extension; no GPU is needed.

`python -m tests.cuda_sass` prints them and the table of docs/cuda.md; with `--write` it puts the table there.

A kernel's *turn* is one way around its innermost loop over packs of 16 bytes: the loop is found by what one turn does,
which `kernels.py` states in numbers of 128-bit accesses (LDG, STG: global memory; LDS, STS: shared memory) and of
exponentials (EX2; each element takes one). Many paths lead around such a loop: past elements that lie beyond the end,
past the few instructions for a new largest logit, to single stores where a gradient is misaligned. The *hot path* is
the one with the fewest instructions among those that do exactly what is stated. So rare side paths (which take other
accesses or further exponentials) are out. Predicated instructions are in, whether or not they take effect: they take an
issue slot either way. Loops within the loop are gone through at most once. Branches are taken to be independent of one
another, so a path may be counted that no data take: of a kernel that tests the same thing twice, the cheaper mixture.

- *Instructions a pack*: those of the hot path over the packs of logits in a turn.
- *Loads before the first use*: the most 128-bit loads of the turn, repeated, that are issued while no register they
  write was read or written again; there the warp waits.
- *Bytes in flight*: these loads, 16 bytes each, of all threads of the blocks that fit on a multiprocessor.
- *Instructions a task*: what the loop around that one (rows, or parts of rows) takes besides, on its cheapest path
  that passes through the turns' loops.
- *Trips*: waits for memory along a task, each at the first use of something that was loaded after the wait before.
  The cheapest path may go past a load, as if there were no next row; so that a row does not wait for its own target is
  looked for on every path.
"""
