"""The profiler's counters of ``make gpu``: the problems run, and what the profiler prints of them is read."""

from __future__ import annotations

from gpu import counters

NCU = """==PROF== Connected to process 7 (/usr/bin/python3.12)
problem: CE forward 2x3
==PROF== Profiling "forward_by_block" - 0: 0%....50%....100% - 8 passes
problem: BCE forward
==PROF== Profiling "forward" - 1: 0%....50%....100% - 8 passes
==PROF== Disconnected from process 7
"ID","Process ID","Kernel Name","dram__bytes.sum","gpu__time_duration.sum","launch__registers_per_thread"
"","","","byte","ns","register/thread"
"0","7","void forward_by_block<float, Index>(Forward, GridScratch)","300,000,000","100,000","72"
"1","7","void forward<float>(Elements)","n/a","2,000,000","40"
"""


def test_counters_are_read() -> None:
    verdict = counters.judge(0, NCU)
    assert verdict.result == "ok"
    assert verdict.details == (
        ("CE forward 2x3", "0.1 ms, 300 MB at 3 TB/s, 72 registers"),
        ("BCE forward", "2 ms, 40 registers"),
    )


def test_counters_of_a_problem_with_several_kernels_go_by_the_kernels_names() -> None:
    verdict = counters.judge(0, NCU.replace("problem: BCE forward\n", ""))
    assert [name for name, _ in verdict.details] == ["void forward_by_block<float, Index>", "void forward<float>"]


def test_counters_are_read_beside_what_is_no_row() -> None:
    whole = counters.judge(0, NCU)
    units = NCU.index('"0"')
    assert counters.judge(0, f'{NCU[:units]}"a word" of the program\n{NCU[units:]}"2","7","void for') == whole
    assert counters.judge(0, NCU[: NCU.index('"",')])[0] == "MISSING"


def test_counters_that_may_not_be_read_are_missing_with_the_profilers_words() -> None:
    words = "ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters"
    assert counters.judge(1, f"==PROF== Connected\nproblem: CE\n==ERROR== {words}\n")[:2] == ("MISSING", words)
    assert counters.judge(1, "LibraryNotLoaded")[:2] == ("MISSING", "no counters: LibraryNotLoaded")


def test_the_problems_of_the_counters_run() -> None:
    names = []
    for name, call in counters.problems("cpu"):
        call()
        names.append(name)
    assert len(set(names)) == 7
