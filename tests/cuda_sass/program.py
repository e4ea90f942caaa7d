"""SASS as instructions, blocks and loops."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property

INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]+)\*/\s+(?:@(!?U?P[T\d]+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
LABEL = re.compile(r"\s*(\.L_x_\d+):")
ENDS = ("BRA", "BRX", "JMP", "JMX", "EXIT", "RET", "BRXU")
# Opcodes whose first operand, though a register, is read: all others write it.
READ_FIRST = ("BRX", "JMX", "RET", "WARPSYNC", "CALL")
ACCESSES = ("LDG", "STG", "LDS", "STS")
KINDS = (*ACCESSES, "EX2")  # of instructions that say what a turn does


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str
    opcode: str
    operands: str
    targets: tuple[str, ...]  # labels it may jump to

    @cached_property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @cached_property
    def kind(self) -> str:
        """Of KINDS, accesses being of 128 bits; empty for all others."""
        if self.name == "MUFU":
            return "EX2" if self.opcode.startswith("MUFU.EX2") else ""
        return self.name if self.name in ACCESSES and ".128" in self.opcode else ""

    @cached_property
    def registers(self) -> tuple[frozenset[int], frozenset[int]]:
        """Those it writes and those it reads. Of 64-bit arithmetic only the lower halves, which is enough here."""
        first, _, rest = self.operands.partition(",")
        writes = re.fullmatch(r"R(\d+)", first.strip()) and self.name not in READ_FIRST
        width = 4 if ".128" in self.opcode else 2 if ".64" in self.opcode else 1
        written = range(int(first.strip()[1:]), int(first.strip()[1:]) + width) if writes else ()
        read = set()
        for number, wide in re.findall(r"\bR(\d+)((?:\.64)?)", rest if writes else self.operands):
            read |= {int(number), int(number) + bool(wide)}
        if self.kind in ("STG", "STS"):
            data = int(re.findall(r"\bR(\d+)", self.operands)[-1])
            read |= set(range(data, data + 4))
        return frozenset(written), frozenset(read)

    @cached_property
    def goes_on(self) -> bool:
        """Whether the next instruction may follow."""
        if self.name not in ENDS:
            return True
        # A branch on divergence (BRA.DIV) or on a predicate among its operands may not be taken either.
        extra = self.name == "BRA" and not self.operands.lstrip().startswith("`(")
        return bool(self.predicate) or extra


@dataclass
class Block:
    instructions: list[Instruction] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)


def parse(sass: str) -> list[Block]:
    """The basic blocks of one kernel, in the order of their addresses."""
    blocks, at, open_block = [Block()], {}, True
    for line in sass.splitlines():
        if found := LABEL.match(line):
            if blocks[-1].instructions:
                blocks.append(Block())
            at[found[1]] = len(blocks) - 1
        elif found := INSTRUCTION.match(line):
            if not open_block and blocks[-1].instructions:
                blocks.append(Block())
            address, predicate, opcode, operands = found.groups()
            is_branch = opcode.split(".")[0] in ENDS
            targets = tuple(re.findall(r"\.L_x_\d+", line)) if is_branch else ()
            blocks[-1].instructions.append(Instruction(int(address, 16), predicate or "", opcode, operands, targets))
            open_block = not is_branch
    if not blocks[-1].instructions:  # the label of the end
        blocks.pop()
    for number, block in enumerate(blocks):
        last = block.instructions[-1]
        following = [number + 1] if last.goes_on and block is not blocks[-1] else []
        block.successors = [*following, *(at[label] for label in last.targets)]
    return blocks


@dataclass(frozen=True)
class Loop:
    header: int
    body: frozenset[int]


class Program:
    """The control flow of one kernel."""

    def __init__(self, sass: str) -> None:
        self.blocks = parse(sass)
        self.order, self.back_edges = self._walk()

    def _walk(self) -> tuple[list[int], set[tuple[int, int]]]:
        """Blocks such that every one comes before those it leads to, but for the edges that close a loop."""
        back, finished, state = set(), [], {0: "open"}
        stack = [(0, iter(self.blocks[0].successors))]
        while stack:
            block, rest = stack[-1]
            following = next(rest, None)
            if following is None:
                state[block] = "done"
                finished.append(block)
                stack.pop()
            elif following not in state:
                state[following] = "open"
                stack.append((following, iter(self.blocks[following].successors)))
            elif state[following] == "open":
                back.add((block, following))
        return finished[::-1], back

    @cached_property
    def loops(self) -> list[Loop]:
        """The natural loops, those that share a header as one; inner ones first."""
        before = defaultdict(set)
        for number in self.order:
            for following in self.blocks[number].successors:
                before[following].add(number)
        bodies = defaultdict(set)
        for last, header in self.back_edges:
            body, open_blocks = {header}, [last]
            while open_blocks:
                block = open_blocks.pop()
                if block not in body:
                    body.add(block)
                    open_blocks += before[block]
            bodies[header] |= body
        return sorted((Loop(h, frozenset(b)) for h, b in bodies.items()), key=lambda loop: len(loop.body))

    def forward(self, block: int) -> list[int]:
        """Successors, but for the edges that close a loop."""
        return [following for following in self.blocks[block].successors if (block, following) not in self.back_edges]
