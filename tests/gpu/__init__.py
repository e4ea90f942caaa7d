"""``make gpu``: everything that needs a GPU, in one command, and ``make gpu-carry``: what it needs without a network.

__main__.py    looks for the GPU, runs the plan, prints the table
plan.py        the steps, in order, each a command with a time limit
steps.py       how steps are run, timed out and judged
table.py       what became of them
libraries.py   a step: torchce's libraries, carried or built
kernels.py     a step: every kernel once on small problems, without pytest; what the sanitizer watches too
counters.py    a step: the hot kernels under the profiler
carry.py       collects and unpacks what travels
"""
