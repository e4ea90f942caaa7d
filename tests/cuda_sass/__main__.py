"""Prints the table of docs/cuda.md and each figure that has a budget."""

import argparse
from pathlib import Path

from .figures import measure, table, write_table
from .kernels import KERNELS, Kernel
from .paths import NoHotPath
from .tools import CUOBJDUMP, EXTENSION, NVDISASM

parser = argparse.ArgumentParser(prog="python -m tests.cuda_sass", description=__doc__)
parser.add_argument("--write", action="store_true", help="put the table into docs/cuda.md")
parser.add_argument("--binary", type=Path, default=EXTENSION, help="a cubin, or another build of torchce._cuda")
arguments = parser.parse_args()
if arguments.binary is None:
    parser.error("torchce._cuda is not built; --binary names another file")
if CUOBJDUMP is None or NVDISASM is None:
    parser.error("no cuobjdump or no nvdisasm: they come with a CUDA toolkit, and with triton")


def line(kernel: Kernel) -> str:
    """What is measured beside what is allowed."""
    try:
        f, budget = measure(kernel, arguments.binary), kernel.budget
    except (LookupError, NoHotPath) as error:
        return f"{kernel.name}: {error}"
    return (
        f"{kernel.name}: registers {f.registers} of {budget.registers}, blocks {f.blocks} of {budget.blocks}, "
        f"instructions a pack {f.instructions_a_pack:.1f} of {budget.instructions}, "
        f"loads before the first use {f.loads} of {budget.loads}; a task takes {f.instructions_a_task} instructions "
        f"besides its turns, {f.trips_a_task} of {budget.trips} trips to memory and {f.trips_a_turn} a further turn"
    )


print("\n".join(map(line, KERNELS)))
try:
    print(f"\n{table(arguments.binary)}")
except (LookupError, NoHotPath) as error:
    parser.exit(1, f"\nno table: {error}\n")
if arguments.write:
    write_table(arguments.binary)
