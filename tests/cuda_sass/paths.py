"""The hot path of a kernel and what is counted on it. The package's docstring says what a hot path is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from .program import KINDS, Instruction, Loop, Program

Turn = Mapping[str, int]  # kind of instruction -> how many of them one turn has


class NoHotPath(Exception):
    """No path does what was stated; the message says what paths there are."""


def _turns(program: Program, loop: Loop) -> dict[tuple[tuple[str, int], ...], tuple[int, tuple[int, ...]]]:
    """What a way around the loop may do -> the fewest instructions that do it, and the blocks they are in."""
    reached = {loop.header: {(): (0, ())}}
    whole: dict = {}
    for block in program.order:
        if block not in loop.body or block not in reached:
            continue
        instructions = program.blocks[block].instructions
        own = Counter(i.kind for i in instructions if i.kind)
        closes = (block, loop.header) in program.back_edges
        ends = [whole] if closes else []
        ends += [reached.setdefault(following, {}) for following in program.forward(block) if following in loop.body]
        for done, (count, blocks) in reached[block].items():
            total = tuple(sorted((own + Counter(dict(done))).items()))
            path = (count + len(instructions), (*blocks, block))
            for end in ends:
                if total not in end or path < end[total]:
                    end[total] = path
    return whole


def _difference(a: Turn, b: Turn) -> int:
    return sum(abs(a.get(kind, 0) - b.get(kind, 0)) for kind in KINDS)


def hot_loop(program: Program, turn: Turn) -> tuple[Loop, list[Instruction]]:
    """The innermost loop with a way around it that does what `turn` states, and the cheapest such way."""
    wanted = tuple(sorted(turn.items()))
    found: list[tuple[int, Loop, list[Instruction]]] = []
    seen = set()
    for loop in program.loops:
        if any(inner.body < loop.body for _, inner, _ in found):
            continue
        turns = _turns(program, loop)
        seen |= turns.keys()
        if wanted in turns:
            count, blocks = turns[wanted]
            found.append((count, loop, [i for block in blocks for i in program.blocks[block].instructions]))
    if not found:
        nearest = sorted(map(dict, seen), key=lambda done: _difference(done, turn))
        raise NoHotPath(f"no loop does {dict(turn)} in a turn; the nearest are {nearest[:3]}")
    _, loop, path = min(found, key=lambda f: f[0])
    return loop, path


def loads_before_first_use(path: Iterable[Instruction]) -> int:
    """Of the path gone around twice, for loads that are asked for in the turn before their use."""
    most = 0
    waiting: list[frozenset[int]] = []
    for instruction in list(path) * 2:
        written, read = instruction.registers
        if any(load & (written | read) for load in waiting):
            waiting.clear()  # what was asked for before comes at about the same time
        if instruction.kind == "LDG":
            waiting.append(written)
            most = max(most, len(waiting))
    return most


def trips(path: Iterable[Instruction]) -> int:
    """How often a warp waits for memory: uses of what was loaded after the wait before.

    Single elements under a predicate are not counted: operands that may be absent, as weights are.
    """
    waiting: set[int] = set()
    count = 0
    for instruction in path:
        written, read = instruction.registers
        if waiting & (written | read):
            count += 1
            waiting.clear()
        if instruction.kind == "LDG" or (instruction.name == "LDG" and not instruction.predicate):
            waiting |= written
    return count


def _cheapest(program: Program, within: Loop, starts: Iterable[int], ends: set[int]) -> tuple[int, ...] | None:
    """The blocks between a start and an end, the start among them, that have the fewest instructions."""
    reached: dict[int, tuple[int, tuple[int, ...]]] = {start: (0, ()) for start in starts}
    for block in program.order:
        if block not in reached or block not in within.body or block in ends:
            continue
        length, path = reached[block]
        beyond = (length + len(program.blocks[block].instructions), (*path, block))
        for following in program.forward(block):
            reached[following] = min(reached.get(following, beyond), beyond)
    return min((reached[end] for end in ends if end in reached), default=(0, None))[1]


def around(program: Program, hot: list[Loop]) -> list[list[Instruction]]:
    """What the loop around the hot ones does before, between and after them, on its cheapest path.

    Nothing, but in as many pieces, where there is no such loop.
    """
    enclosing = [loop for loop in program.loops if all(inner.body < loop.body for inner in hot)]
    if not enclosing:
        return [[] for _ in range(len(hot) + 1)]
    outer = enclosing[0]
    starts, pieces = [outer.header], []
    for inner in hot:
        piece = _cheapest(program, outer, starts, {inner.header})
        if piece is None:
            raise NoHotPath("the hot loops do not follow one another")
        pieces.append(piece)
        starts = [f for block in inner.body for f in program.forward(block) if f not in inner.body]
    closing = {block for block, header in program.back_edges if header == outer.header}
    last: tuple[int, ...] = ()
    if not closing & hot[-1].body:
        ends = [(*piece, end) for end in closing if (piece := _cheapest(program, outer, starts, {end})) is not None]
        last = min(ends, key=lambda path: sum(len(program.blocks[block].instructions) for block in path))
    return [[i for block in piece for i in program.blocks[block].instructions] for piece in (*pieces, last)]


def waits_before(program: Program, hot: Loop, load: str) -> list[Instruction]:
    """First uses of what a `load` brings, in the loop around the hot one and before it, on any path past inner loops.

    What was asked for the turn before is not looked at: it had the whole turn to come.
    """
    outer = next(loop for loop in program.loops if hot.body < loop.body)
    inner = frozenset().union(*(loop.body for loop in program.loops if loop.body < outer.body))
    asked_for: dict[int, frozenset[int]] = {outer.header: frozenset()}
    found = []
    for block in program.order:
        if block == hot.header:
            break
        if block not in asked_for or block in inner:
            continue
        waiting = asked_for[block]
        for instruction in program.blocks[block].instructions:
            written, read = instruction.registers
            if waiting & (written | read):
                found.append(instruction)
                waiting = frozenset()
            if instruction.opcode == load:
                waiting |= written
        for following in program.forward(block):
            if following in outer.body:
                asked_for[following] = asked_for.get(following, frozenset()) | waiting
    return found
