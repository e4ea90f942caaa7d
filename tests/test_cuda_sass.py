"""What the SASS of the hot CUDA kernels must not lose: registers, blocks, instructions, loads in flight, trips.

The budgets are in cuda_sass/kernels.py. How the figures are found is tested on a small kernel written by hand.
"""

from __future__ import annotations

import pytest
from cuda_sass import figures, tools
from cuda_sass.kernels import KERNELS, Kernel
from cuda_sass.model import H100, H200, blocks_of_multiprocessor, expected_share
from cuda_sass.paths import NoHotPath, around, hot_loop, loads_before_first_use, trips, waits_before
from cuda_sass.program import Program

BUDGETED_COMPILER = "13.0"
AHEAD = [kernel for kernel in KERNELS if kernel.target_ahead]

# Rows, and in each a loop over two packs a turn, whose instructions are numbered by their addresses.
SASS = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_9) ;
.L_x_1:
        /*0020*/                   LDG.E R30, desc[UR4][R2.64] ;
        /*0030*/                   ISETP.NE.AND P1, PT, R30, -0x64, PT ;
        /*0040*/              @!P1 BRA `(.L_x_8) ;
.L_x_2:
        /*0050*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0060*/                   FMNMX R20, R4, R20, !PT ;
        /*0070*/              @!P2 LDG.E.128 R8, desc[UR4][R2.64+0x1000] ;
        /*0080*/                   FSETP.NEU.AND P3, PT, R20, R21, PT ;
        /*0090*/              @!P3 BRA `(.L_x_3) ;
        /*00a0*/                   MUFU.EX2 R22, R20 ;
        /*00b0*/                   FMUL R23, R22, R23 ;
.L_x_3:
        /*00c0*/                   MUFU.EX2 R4, R4 ;
        /*00d0*/                   MUFU.EX2 R8, R8 ;
        /*00e0*/              @!P4 BRA `(.L_x_5) ;
        /*00f0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0100*/                   BRA.DIV UR6, `(.L_x_10) ;
        /*0110*/                   STG.E.128 desc[UR4][R2.64+0x1000], R8 ;
        /*0120*/                   BRA `(.L_x_7) ;
.L_x_5:
        /*0130*/                   STG.E.U16 desc[UR4][R2.64], R4 ;
        /*0140*/               @P5 BRA `(.L_x_5) ;
.L_x_7:
        /*0150*/                   IADD3 R2, R2, 0x2000, RZ ;
        /*0160*/               @P6 BRA `(.L_x_2) ;
        /*0170*/                   BRX R40 -0x180                (*"BRANCH_TARGETS .L_x_8,.L_x_9"*);
.L_x_8:
        /*0180*/               @P7 LDG.E R31, desc[UR4][R2.64] ;
        /*0184*/               @P7 FMUL R23, R31, R23 ;
        /*0188*/               @P0 BRA `(.L_x_1) ;
.L_x_9:
        /*0190*/                   EXIT ;
.L_x_10:
        /*01a0*/                   BRA `(.L_x_10);
        /*01b0*/                   NOP;
.L_x_11:
"""
TURN = {"LDG": 2, "EX2": 2, "STG": 2}


def addresses(instructions: list) -> list[int]:
    return [instruction.address for instruction in instructions]


def test_the_hot_path_is_the_cheapest_that_does_its_turn() -> None:
    """The new maximum, which takes another exponential, and the misaligned stores are left out."""
    loop, path = hot_loop(Program(SASS), TURN)
    assert addresses(path) == [*range(0x50, 0xA0, 16), *range(0xC0, 0x130, 16), 0x150, 0x160]
    assert len(loop.body) == 7


def test_another_turn_takes_another_path() -> None:
    _, rebased = hot_loop(Program(SASS), {**TURN, "EX2": 3})
    assert {0xA0, 0xB0} < set(addresses(rebased))
    _, misaligned = hot_loop(Program(SASS), {"LDG": 2, "EX2": 2})
    assert {0x130, 0x140} < set(addresses(misaligned))
    assert 0xF0 not in addresses(misaligned)


def test_a_turn_that_no_loop_does_is_named() -> None:
    with pytest.raises(NoHotPath, match=r"'LDG': 4.* the nearest are \[{'EX2': 2, 'LDG': 2, 'STG': 2}"):
        hot_loop(Program(SASS), {**TURN, "LDG": 4})


def test_the_row_around_the_hot_loop() -> None:
    program = Program(SASS)
    loop, _ = hot_loop(program, TURN)
    before, after = around(program, [loop])
    assert addresses(before) == [0x20, 0x30, 0x40]
    assert addresses(after) == [0x170, 0x180, 0x184, 0x188]
    assert trips([*before, *after]) == 1, "a weight, which may be absent, is not waited for"


def test_a_use_between_two_loads_is_seen() -> None:
    _, path = hot_loop(Program(SASS), TURN)
    assert loads_before_first_use(path) == 1
    assert trips(path) == 2
    use = path.pop(1)
    assert loads_before_first_use([*path[:2], use, *path[2:]]) == 2
    assert trips([*path[:2], use, *path[2:]]) == 1


def test_loads_a_turn_ahead_of_their_use_are_counted() -> None:
    _, path = hot_loop(Program(SASS), TURN)
    loads = [instruction for instruction in path if instruction.kind == "LDG"]
    rest = [instruction for instruction in path if instruction.kind != "LDG"]
    assert loads_before_first_use([*rest, *loads]) == 2


def test_a_wait_before_the_hot_loop_is_found_on_every_path() -> None:
    program = Program(SASS)
    loop, _ = hot_loop(program, TURN)
    assert addresses(waits_before(program, loop, "LDG.E")) == [0x30]
    assert waits_before(program, loop, "LDG.E.64") == []


@pytest.mark.parametrize(
    ("registers", "shared_memory", "blocks"),
    [
        (32, 0, 8),
        (33, 0, 6),  # 40, in units of 8
        (64, 0, 4),
        (72, 0, 3),
        (80, 0, 3),
        (81, 0, 2),
        (128, 0, 2),
        (129, 0, 1),
        (32, 33 * 1024, 6),
        (32, 56 * 1024, 4),
        (32, 57 * 1024, 3),  # the system's kibibyte does not fit a fourth time
    ],
)
def test_blocks_of_a_multiprocessor(registers: int, shared_memory: int, blocks: int) -> None:
    """As the occupancy calculator of CUDA has it."""
    assert blocks_of_multiprocessor(registers, shared_memory) == blocks


def test_the_model_has_two_limits() -> None:
    plenty = {"blocks": 100, "trips": 1}
    assert expected_share(H100, **plenty, instructions=50, moved=512) == pytest.approx(1, abs=0.01)
    assert expected_share(H100, **plenty, instructions=334, moved=512) == pytest.approx(0.5, abs=0.01)
    assert expected_share(H200, **plenty, instructions=233, moved=512) == pytest.approx(0.5, abs=0.01)
    # 16 KiB a multiprocessor are in flight all the time, but for 100 cycles after 1175 of waiting.
    waiting = {"instructions": 50, "moved": 1024}
    assert expected_share(H200, blocks=2, trips=2, **waiting) == pytest.approx(0.38, abs=0.01)
    assert expected_share(H200, blocks=1, trips=1, **waiting) == pytest.approx(0.365, abs=0.01)


def test_limits_that_meet_are_not_reached() -> None:
    """Neither issue nor the copy, each at 1: the fifth root of a half."""
    share = expected_share(H100, blocks=100, trips=1, instructions=166.7, moved=512)
    assert share == pytest.approx(0.87, abs=0.005)


@pytest.fixture
def readable() -> None:
    """The library has kernels that the budgets are of."""
    if tools.EXTENSION is None:
        pytest.skip("torchce._cuda is not built")
    if tools.CUOBJDUMP is None or tools.NVDISASM is None:
        pytest.skip("no cuobjdump or no nvdisasm")
    if tools.ARCH not in {arch for arch, _ in tools.resources()}:
        pytest.skip(f"torchce._cuda has no kernels for {tools.ARCH}")
    if not tools.compiler().startswith(BUDGETED_COMPILER):
        pytest.skip(f"budgets are those of CUDA {BUDGETED_COMPILER}, this is {tools.compiler()}")


@pytest.mark.usefixtures("readable")
@pytest.mark.parametrize("kernel", KERNELS, ids=[kernel.name for kernel in KERNELS])
def test_budget(kernel: Kernel) -> None:
    found, budget = figures.measure(kernel), kernel.budget
    assert found.registers <= budget.registers
    assert found.blocks >= budget.blocks
    assert found.instructions_a_pack <= budget.instructions
    assert found.loads >= budget.loads
    assert found.trips_a_task <= budget.trips


@pytest.mark.usefixtures("readable")
@pytest.mark.parametrize("kernel", AHEAD, ids=[kernel.name for kernel in AHEAD])
def test_a_row_does_not_wait_for_its_target(kernel: Kernel) -> None:
    assert figures.waits_for_target(kernel) == []


@pytest.mark.usefixtures("readable")
@pytest.mark.skipif(not figures.PAGE.exists(), reason="the pages are not here")
def test_the_table_in_the_docs_is_of_this_build() -> None:
    assert figures.committed_table() == figures.table(), "python -m tests.cuda_sass --write writes it"
