"""``make gpu``: everything that needs a GPU, in one command.

The build for the visible card, every CUDA test, compute-sanitizer's four tools, the largest tensors, the benchmark.

    __main__.py   the steps, in order, and the table at the end
    steps.py      how a step is run, timed out and judged
    kernels.py    every kernel once on small problems, without pytest: what the sanitizer watches
"""
