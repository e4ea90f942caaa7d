"""Speed and memory of torchce beside torch and its peers: ``python -m benchmarks --help``.

One way through the files::

    problems.py    what is computed: sizes, each with its reason, and their data
    contenders.py  who computes it: torchce, torch (eager, compiled, chunked), Liger, QuACK, Apple CCE
    timing.py      how a call is timed and its peak memory taken, on CPU and CUDA
    traffic.py     the bytes a call must move
    measure.py     a problem, all contenders, interleaved -> rows
    revision.py    which revision of torchce it is
    ledger.py      rows and the machine they come from, as JSON
    cases.py       rows of one problem together -> ratios
    goals.py       what is wanted of which problem
    report.py      rows -> tables on the terminal and in Markdown
    plots.py       rows -> PNG
    readme.py      rows -> the speed section of README.md, the measured one of docs/cuda.md
    variants.py    two or more builds of torchce beside each other
"""

import logging as _logging
import os as _os

# Before torch is imported, for both would talk into the progress bar: the profiler at every start and stop, and the
# module that inductor asks for compilers, which finds a CUDA toolkit without a GPU worth a warning.
_os.environ.setdefault("KINETO_LOG_LEVEL", "6")
_logging.getLogger("torch.utils.cpp_extension").setLevel(_logging.ERROR)
