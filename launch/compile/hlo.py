"""What a compiled program costs, read from its optimised HLO text, with loops multiplied out.

XLA's own `cost_analysis` counts the body of a loop once, is absent on GPUs and knows nothing of
fused attention kernels. Here every instruction is counted as often as it runs:

    text -> `parse` -> computations of instructions -> `work`: a walk from the entry through
    fusions, calls, the dearest branch of a conditional, and loops times their trip counts.

A compiled program is the program of one device: what is counted is per device.
"""

import dataclasses
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

COLLECTIVES = frozenset(
    (
        "all-gather",
        "all-reduce",
        "all-to-all",
        "collective-broadcast",
        "collective-permute",
        "ragged-all-to-all",
        "reduce-scatter",
    )
)
MAX_TRIPS = 1_000_000  # a loop that counts further than this is taken to be no counter


class Array(NamedTuple):
    """Type of one array."""

    dtype: str  # as HLO spells it: bf16, s32, pred
    dims: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith(("f", "bf"))

    @property
    def bytes(self) -> int:
        """Without padding and tiling."""
        bits = re.search(r"\d+", self.dtype)
        return math.ceil(math.prod(self.dims) * (int(bits[0]) if bits else 8) / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    arrays: tuple[Array, ...]  # the result; several if it is a tuple, nested ones in order
    operands: tuple[str, ...]  # names within the same computation
    literal: str  # what stands within the parentheses: a constant's value, a parameter's number
    attributes: str  # behind the parentheses, up to the metadata
    config: str  # backend_config, JSON

    def attribute(self, key: str) -> str | None:
        """The value of a plain attribute: `body=%region` -> 'region', `index=3` -> '3'."""
        found = re.search(rf"(?:^|[ ,]){key}=%?([^,{{}}\s]+)", self.attributes)
        return found and found[1]

    def numbers(self, key: str) -> tuple[int, ...]:
        """The value of an attribute that is a list: `lhs_batch_dims={0,1}` -> (0, 1)."""
        found = re.search(rf"(?:^|[ ,]){key}={{([\d,]*)}}", self.attributes)
        return tuple(map(int, found[1].split(","))) if found and found[1] else ()

    @property
    def target(self) -> str:
        """Of a custom call."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: dict[str, Instruction]
    root: str

    def operands(self, instruction: Instruction) -> list[Array]:
        """Types of what goes into an instruction, tuples taken apart."""
        return [array for name in instruction.operands for array in self.instructions[name].arrays]


@dataclasses.dataclass(frozen=True)
class Program:
    computations: dict[str, Computation]
    entry: str

    @property
    def fused(self) -> set[str]:
        """Computations within fusions, whose intermediate arrays exist in no memory."""
        found, front = set(), self._called_by(("fusion",), self.computations)
        while front := front - found:
            found |= front
            front = self._called_by(("fusion", "call", "map", "reduce"), found)
        return found

    def _called_by(self, opcodes: tuple[str, ...], names: Any) -> set[str]:
        return {
            name
            for caller in names
            for instruction in self.computations[caller].instructions.values()
            if instruction.opcode in opcodes
            if (name := instruction.attribute("calls") or instruction.attribute("to_apply"))
        }


# ---------------------------------------------------------------------------- parsing

_HEAD = re.compile(r"(ENTRY )?%(\S+) \(.*\{$")
_LINE = re.compile(r"  (ROOT )?%(\S+) = ")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\]")


def parse(text: str) -> Program:
    """Reads the text of an HLO module (`jax.stages.Compiled.as_text()`)."""
    computations, entry, name, root, instructions = {}, "", "", "", {}
    for line in _logical_lines(text):
        if head := _HEAD.match(line):
            name, root, instructions = head[2], "", {}
            entry = name if head[1] else entry
        elif start := _LINE.match(line):
            instruction = _instruction(start[2], line[start.end() :])
            instructions[instruction.name] = instruction
            root = instruction.name if start[1] else root
        elif line.startswith("}"):
            computations[name] = Computation(name, instructions, root)
    if not entry:
        raise ValueError("this is not the text of an HLO module: it has no ENTRY")
    return Program(computations, entry)


def _logical_lines(text: str) -> Iterator[str]:
    """Lines, with those joined that belong to one instruction: attributes may hold line ends."""
    held = ""
    for line in text.splitlines():
        begins = _LINE.match(line) or _HEAD.match(line) or line.startswith("}") and "=" not in line
        if begins or not held:
            if held:
                yield held
            held = line
        else:
            held += line
    yield held


def _closing(text: str, start: int) -> int:
    """Place of the bracket that closes the one at `start`."""
    depth = 0
    for found in re.finditer(r"[(){}\[\]]", text[start:]):
        depth += 1 if found[0] in "({[" else -1
        if depth == 0:
            return start + found.start()
    raise ValueError(f"no closing bracket: {text[start : start + 80]}")


def _instruction(name: str, text: str) -> Instruction:
    """`f32[2,3]{1,0} dot(%a, %b), lhs_contracting_dims={1}, metadata={...}` and the like."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    while text[end] != " ":  # a layout, which may hold brackets and blanks of its own
        end = _closing(text, end) + 1 if text[end] in "({[" else end + 1
    opening = text.index("(", end)
    closing = _closing_of_operands(text, opening, text[end + 1 : opening])
    literal = text[opening + 1 : closing]
    rest = text[closing + 1 :]
    rest, _, config = rest.partition(", backend_config=")
    return Instruction(
        name=name,
        opcode=text[end + 1 : opening],
        arrays=_arrays(text[:end]),
        operands=tuple(re.findall(r"%([^\s,()]+)", literal)),
        literal=literal,
        attributes=rest.partition(", metadata={")[0],
        config=config,
    )


def _closing_of_operands(text: str, opening: int, opcode: str) -> int:
    # A constant may be a string with any brackets; its own closing one comes before an attribute.
    if opcode == "constant":
        return min(
            (place for mark in ("), ", ")\n") if (place := text.find(mark, opening)) > 0),
            default=text.rindex(")"),
        )
    return _closing(text, opening)


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(int(size.lstrip("<=")) for size in dims.split(",") if size))
        for dtype, dims in _ARRAY.findall(text)
    )


# ------------------------------------------------------------- scalars known before the run

Path = tuple[int, ...]  # of an element within nested tuples
Environment = Callable[[int, Path], Any]  # (number of a parameter, path) -> its value


class _Unknown(Exception):
    """A value that depends on data."""


def _nothing(number: int, path: Path) -> Any:
    raise _Unknown


_PASSED_ON = frozenset(("bitcast", "copy", "copy-done", "optimization-barrier", "reshape"))
_ARITHMETIC = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
    "and": operator.and_,
    "or": operator.or_,
}
_DIRECTIONS = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}


def _scalar(
    program: Program, computation: Computation, name: str, path: Path, known: Environment
) -> Any:
    """The value of an integer or truth value that the program computes from constants alone.

    Raises:
      _Unknown: it depends on something else, or on an operation that counters do not use.
    """
    instruction = computation.instructions[name]
    opcode = instruction.opcode

    def operand(number: int, path: Path = ()) -> Any:
        return _scalar(program, computation, instruction.operands[number], path, known)

    def number(index: int) -> int:
        value = operand(index)
        if not isinstance(value, int):
            raise _Unknown
        return value

    if opcode == "parameter":
        return known(int(instruction.literal), path)
    if opcode == "constant":
        return _constant(instruction)
    if opcode == "get-tuple-element":
        return operand(0, (int(instruction.attribute("index")), *path))
    if opcode == "tuple":
        return operand(path[0], path[1:])
    if opcode in _PASSED_ON:
        return operand(0, path)
    if opcode == "copy-start":
        return operand(0)
    if opcode == "convert" and instruction.arrays[0].dtype[0] in "su":
        return number(0)
    if opcode in ("fusion", "call"):
        inner = program.computations[
            instruction.attribute("calls" if opcode == "fusion" else "to_apply")
        ]
        return _scalar(program, inner, inner.root, path, operand)
    if opcode == "compare":
        return _DIRECTIONS[instruction.attribute("direction")](number(0), number(1))
    if opcode == "not" and instruction.arrays[0].dtype == "pred":
        return not number(0)
    if opcode == "select":
        return operand(1 if number(0) else 2, path)
    if opcode in _ARITHMETIC:
        return _ARITHMETIC[opcode](number(0), number(1))
    raise _Unknown


def _constant(instruction: Instruction) -> int | bool:
    if instruction.literal in ("true", "false"):
        return instruction.literal == "true"
    if not re.fullmatch(r"-?\d+", instruction.literal):
        raise _Unknown
    return int(instruction.literal)


def _trips(
    program: Program, computation: Computation, loop: Instruction, known: Environment
) -> int | None:
    """How often a loop's body runs: as the compiler says, else by running its counter here.

    None where that depends on data.
    """
    if stated := re.search(r'"known_trip_count":{"n":"(\d+)"', loop.config):
        return int(stated[1])
    try:
        return _run_counter(program, computation, loop, known)
    except _Unknown:
        return None


def _run_counter(
    program: Program, computation: Computation, loop: Instruction, known: Environment
) -> int:
    condition = program.computations[loop.attribute("condition")]
    body = program.computations[loop.attribute("body")]

    def start(path: Path) -> Any:
        return _scalar(program, computation, loop.operands[0], path, known)

    # The elements of the state that decide when the loop ends: those its condition reads, and
    # those that the body computes them from.
    state: dict[Path, Any] = {}

    def first(_: int, path: Path) -> Any:
        if path not in state:
            state[path] = start(path)
            _scalar(program, body, body.root, path, first)
        return state[path]

    _scalar(program, condition, condition.root, (), first)
    for trips in range(MAX_TRIPS):
        now = dict(state)
        here = lambda _, path, now=now: now[path]  # noqa: E731
        if not _scalar(program, condition, condition.root, (), here):
            return trips
        state = {path: _scalar(program, body, body.root, path, here) for path in now}
    raise _Unknown


def _within_body(
    program: Program, computation: Computation, loop: Instruction, known: Environment
) -> Environment:
    """What a loop's body knows of its state: the elements that it hands on as they came."""
    body = program.computations[loop.attribute("body")]
    itself = object()

    def value(_: int, path: Path) -> Any:
        def only_itself(_: int, other: Path) -> Any:
            if other != path:
                raise _Unknown
            return itself

        if _scalar(program, body, body.root, path, only_itself) is not itself:
            raise _Unknown
        return _scalar(program, computation, loop.operands[0], path, known)

    return value


# ------------------------------------------------------------------- FLOPs of one instruction


def dot_flops(lhs: Array, out: Array, contracted: tuple[int, ...]) -> int:
    """Two a multiply-add."""
    return 2 * math.prod(out.dims) * math.prod(lhs.dims[axis] for axis in contracted)


def convolution_flops(lhs: Array, rhs: Array, out: Array, attributes: str) -> int:
    """Two a multiply-add that meets a number, not padding and not a hole of dilation.

    TPUs turn every product of matrices into a convolution, and its batch axes into spatial ones
    with dilation, of whose positions only the batch's own meet numbers.
    """
    lhs_labels, rhs_labels, out_labels = re.split(
        r"_|->", re.search(r"dim_labels=([^\s,]+)", attributes)[1]
    )
    window = re.search(r"window={([^}]*)}", attributes)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}
    lhs_dims, rhs_dims, out_dims = (
        dict(zip(labels, array.dims, strict=True))
        for labels, array in ((lhs_labels, lhs), (rhs_labels, rhs), (out_labels, out))
    )
    positions = 1
    for axis in sorted(label for label in out_labels if label.isdigit()):

        def field(name: str, default: str, axis: int = int(axis)) -> str:
            return fields[name].split("x")[axis] if name in fields else default

        positions *= _positions(
            lhs_dims[axis],
            rhs_dims[axis],
            out_dims[axis],
            stride=int(field("stride", "1")),
            low=int(field("pad", "0_0").split("_")[0]),
            lhs_dilation=int(field("lhs_dilate", "1")),
            rhs_dilation=int(field("rhs_dilate", "1")),
        )
    groups = re.search(r"batch_group_count=(\d+)", attributes)
    batch = lhs_dims["b"] // (int(groups[1]) if groups else 1)
    return 2 * batch * rhs_dims["i"] * rhs_dims["o"] * positions


def _positions(
    lhs: int, rhs: int, out: int, *, stride: int, low: int, lhs_dilation: int, rhs_dilation: int
) -> int:
    """Pairs of an output and a kernel element, along one axis, that meet an element of `lhs`."""
    count = 0
    places = np.arange(out) * stride - low
    for tap in range(rhs):
        place = places + tap * rhs_dilation
        there = (place >= 0) & (place <= (lhs - 1) * lhs_dilation) & (place % lhs_dilation == 0)
        count += int(there.sum())
    return count


def attention_flops(query: Array, key: Array, *, products: int = 2, head_major: bool = True) -> int:
    """Full attention: 2 B N T S H a product, so 4 B N T S H forward; the softmax is not counted.

    Args:
      query, key: [..., T, H] and [..., S, H], or, not `head_major`, [B, T, N, H] and [B, S, N, H].
      products: of matrices; QK^T and AV forward, five in all backward.
    """
    axis = -2 if head_major else -3
    return 2 * products * math.prod(query.dims) * key.dims[axis]


# Custom calls by which a TPU program talks about memory and order, and computes nothing.
_BOOKKEEPING = frozenset(
    (
        "AllocateBuffer",
        "AssumeGatherIndicesInBound",
        "AsyncCollectiveDone",
        "AsyncCollectiveStart",
        "ConcatBitcast",
        "GatherScatterIndicesBitpacked",
    )
)
# cuDNN's fused attention, forward and backward, by the products of matrices it does.
_CUDNN_PRODUCTS = {"Backward": 5, "": 2}
# Those of a Pallas attention kernel, by its name: splash and flash attention share the spelling.
_PALLAS_PRODUCTS = {"dkv": 4, "dq": 3, "": 2}


def _pallas_attention(arrays: list[Array]) -> tuple[Array, Array] | None:
    """Query and key of a kernel that looks like attention.

    Its first three float operands of three axes or more are query, key and value: the last two
    alike, and like the first but for its length.
    """
    floats = [array for array in arrays if array.is_float and len(array.dims) >= 3][:3]
    if len(floats) < 3:
        return None
    query, key, value = floats
    alike = query.dims[:-2] == key.dims[:-2] and query.dims[-1] == key.dims[-1]
    return (query, key) if alike and key.dims == value.dims else None


def _custom_call(call: Instruction, arrays: list[Array]) -> tuple[int | None, bool]:
    """FLOPs of a library call or a kernel, None where unknown; and whether it is attention."""
    target, out = call.target, call.arrays[0] if call.arrays else None
    if target.startswith("__cublas"):
        axes = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', call.config)[1]
        return dot_flops(arrays[0], out, tuple(map(int, re.findall(r"\d+", axes)))), False
    if target == "__onednn$matmul":
        lhs, rhs = (math.prod(array.dims) for array in arrays[:2])
        batch = math.prod(out.dims[:-2])
        contracted = math.isqrt(lhs * rhs // math.prod(out.dims) // batch)
        return 2 * math.prod(out.dims) * contracted, False
    if target.startswith("__cudnn$conv"):
        lhs, rhs = arrays[:2]
        if "BackwardInput" in target:  # out is the gradient of what the forward pass read
            lhs, out = out, lhs
        elif "BackwardFilter" in target:
            rhs, out = out, rhs
        return convolution_flops(lhs, rhs, out, call.attributes), False
    if target.startswith("__cudnn$fmha"):
        products = next(n for name, n in _CUDNN_PRODUCTS.items() if name in target)
        query, key = arrays[:2]
        return attention_flops(query, key, products=products, head_major=False), True
    if target == "tpu_custom_call":
        attention = _pallas_attention(arrays)
        if stated := re.search(r'"cost_estimate":{"flops":"(\d+)"', call.config):
            return int(stated[1]), attention is not None
        if attention:
            products = next(n for name, n in _PALLAS_PRODUCTS.items() if name in call.name)
            return attention_flops(*attention, products=products), True
    return 0 if target in _BOOKKEEPING else None, False


# ------------------------------------------------------------------------------- the walk


@dataclasses.dataclass
class _Tally:
    flops: int = 0
    cycles: int = 0
    places: Counter = dataclasses.field(default_factory=Counter)  # in the program, by kind
    runs: Counter = dataclasses.field(default_factory=Counter)  # in a run of it
    bytes: Counter = dataclasses.field(default_factory=Counter)  # moved in a run
    beside: Counter = dataclasses.field(default_factory=Counter)  # what runs meanwhile
    fused_attention: Counter = dataclasses.field(default_factory=Counter)
    uncounted: Counter = dataclasses.field(default_factory=Counter)
    unknown_loops: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: "_Tally", times: int = 1) -> None:
        self.flops += times * other.flops
        self.cycles += times * other.cycles
        self.places += other.places
        for own, others in (
            (self.runs, other.runs), (self.bytes, other.bytes), (self.beside, other.beside)
        ):  # fmt: skip
            own.update({kind: times * count for kind, count in others.items()})
        self.fused_attention += other.fused_attention
        self.uncounted += other.uncounted
        self.unknown_loops += other.unknown_loops

    def move(self, kind: str, size: int) -> None:
        self.places[kind] += 1
        self.runs[kind] += 1
        self.bytes[kind] += size


# A fusion of nothing but these is a copy in another layout.
_COPYING = frozenset(("bitcast", "copy", "parameter", "reshape", "transpose"))


def _walk(program: Program, computation: Computation, known: Environment, *, fused: bool) -> _Tally:
    """Costs of running a computation once.

    Args:
      known: values of its parameters that do not depend on data.
      fused: within a fusion, where nothing is copied and cycles are the fusion's.
    """
    tally = _Tally()
    begun: dict[str, int] = {}  # asynchronous collectives, and the operations before them
    for instruction in computation.instructions.values():
        before = tally.flops
        if not fused and (ended := _ends(instruction)) in begun:
            with_products = int(tally.flops > begun.pop(ended))
            tally.beside.update(runs=1, with_products=with_products)
        _count(program, computation, instruction, known, tally, fused=fused)
        if begun:
            tally.beside.update(flops=tally.flops - before)
        if not fused and _is_begun(program, instruction):
            begun[instruction.name] = tally.flops
    return tally


def _is_begun(program: Program, instruction: Instruction) -> bool:
    """Whether a collective begins here that ends at another instruction."""
    if instruction.opcode == "async-start":  # of a GPU: reduce-scatter and others
        inner = program.computations[instruction.attribute("calls")]
        return any(one.opcode in COLLECTIVES for one in inner.instructions.values())
    if instruction.opcode == "fusion":  # of a TPU
        return instruction.name.startswith("async-collective-start")
    opcode = instruction.opcode
    return opcode.endswith("-start") and opcode.removesuffix("-start") in COLLECTIVES


def _ends(instruction: Instruction) -> str | None:
    """The name of what began the asynchronous work that ends here."""
    if instruction.opcode == "fusion" and instruction.name.startswith("async-collective-done"):
        return instruction.name.replace("done", "start")
    return instruction.operands[0] if instruction.opcode.endswith("-done") else None


def _count(
    program: Program,
    computation: Computation,
    instruction: Instruction,
    known: Environment,
    tally: _Tally,
    *,
    fused: bool,
) -> None:
    opcode = instruction.opcode
    arrays = computation.operands(instruction)

    def called(name: str, environment: Environment = _nothing, *, fused: bool = fused) -> _Tally:
        return _walk(program, program.computations[name], environment, fused=fused)

    def passed(number: int, path: Path) -> Any:
        return _scalar(program, computation, instruction.operands[number], path, known)

    if not fused and (cycles := re.search(r'"estimated_cycles":"(\d+)"', instruction.config)):
        tally.cycles += int(cycles[1])
    if opcode == "dot":
        contracted = instruction.numbers("lhs_contracting_dims")
        tally.flops += dot_flops(arrays[0], instruction.arrays[0], contracted)
    elif opcode == "convolution":
        tally.flops += convolution_flops(
            arrays[0], arrays[1], instruction.arrays[0], instruction.attributes
        )
    elif opcode == "custom-call":
        flops, attention = _custom_call(instruction, arrays)
        tally.flops += flops or 0
        if flops is None:
            tally.uncounted[instruction.target] += 1
        if attention:
            tally.fused_attention[f"{instruction.target} {instruction.name}"] += 1
    elif opcode in ("ragged-dot", "scaled-dot"):
        tally.uncounted[opcode] += 1
    elif opcode == "fusion":
        inner = program.computations[instruction.attribute("calls")]
        opcodes = {one.opcode for one in inner.instructions.values()}
        if opcodes <= _COPYING and opcodes & {"copy", "transpose"} and not fused:
            tally.move("copy", _moved(instruction, arrays))
        tally.add(called(inner.name, passed, fused=True))
    elif opcode in ("call", "async-start"):
        # An asynchronous call's computation is named either way, by kind of its thread.
        name = instruction.attribute("to_apply") or instruction.attribute("calls")
        tally.add(called(name, passed))
    elif opcode == "conditional":
        branches = [called(name) for name in _branches(instruction)]
        dearest = max(branches, key=lambda one: (one.flops, one.cycles, one.bytes.total()))
        tally.add(dearest)
        for branch in branches:  # those of the others would be lost without a word
            tally.unknown_loops += branch.unknown_loops if branch is not dearest else []
    elif opcode == "while":
        trips = _trips(program, computation, instruction, known)
        if trips is None:
            tally.unknown_loops.append(instruction.name)
        inside = _within_body(program, computation, instruction, known)
        times = 1 if trips is None else trips
        tally.add(called(instruction.attribute("body"), inside), times)
        tally.add(called(instruction.attribute("condition"), inside), times + 1)
    elif opcode.removesuffix("-start") in COLLECTIVES:
        if _begins(computation, instruction):
            tally.move(opcode.removesuffix("-start"), _moved(instruction, arrays))
    elif fused:
        return
    elif opcode == "copy" and instruction.arrays[0].dims:
        tally.move("copy", _moved(instruction, arrays))
    elif opcode == "copy-start":  # between memories, beside the computation
        tally.move("prefetch", sum(array.bytes for array in arrays))


def _begins(computation: Computation, collective: Instruction) -> bool:
    """False where a TPU program names a collective again that it began elsewhere.

    One that runs beside several fusions stands in each of them; the first has the call that starts
    it.
    """
    if "async_collective_fusion_config" not in collective.config:
        return True
    return any(
        one.target == "AsyncCollectiveStart" and collective.name in one.operands
        for one in computation.instructions.values()
    )


def _branches(conditional: Instruction) -> list[str]:
    if found := re.search(r"branch_computations={([^}]*)}", conditional.attributes):
        return re.findall(r"%([^\s,]+)", found[1])
    return [conditional.attribute("true_computation"), conditional.attribute("false_computation")]


def _moved(instruction: Instruction, operands: list[Array]) -> int:
    """The larger of what goes in and what comes out, in bytes."""
    size_in = sum(array.bytes for array in operands)
    size_out = sum(array.bytes for array in instruction.arrays)
    if instruction.opcode.endswith("-start"):  # these hand on their operands beside the result
        size_out -= size_in
    return max(size_in, size_out)


# ----------------------------------------------------------------------------- the results


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What one run of a program does on one device. Counts are `*_places` in the program, and
    `*_runs`: as often as the loops around them make them run."""

    flops: int
    """Of dots and convolutions, two a multiply-add, and of attention kernels as if their attention
    were full (`attention_flops`), unless the kernel states its own cost."""
    cycles: int | None
    """What the TPU compiler estimates; blind to kernels, sorts, collectives and overlap."""
    copy_places: int
    """Copies of arrays, to another layout or out of a loop's way."""
    copy_runs: int
    copy_bytes: int
    prefetch_places: int
    """Asynchronous copies between memories."""
    prefetch_runs: int
    prefetch_bytes: int
    collective_places: dict[str, int]
    """By kind."""
    collective_runs: dict[str, int]
    collective_bytes: dict[str, int]
    """The larger of what goes in and what comes out of each, on one device."""
    async_collective_runs: int
    """Collectives that begin at one instruction and end at another."""
    overlapping_collective_runs: int
    """Those of them with matrix products between."""
    overlapping_flops: int
    """Of those products."""
    fused_attention: tuple[str, ...]
    """Target and name of the calls that are fused attention."""
    unknown_loops: tuple[str, ...]
    """Loops whose trip count depends on data: counted once."""
    uncounted: dict[str, int]
    """Custom calls, by target, of whose FLOPs nothing is known: counted as none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs(Work):
    """What a compiled program costs on one device: its work and its memory, in bytes."""

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    """Of the outputs that take the place of arguments."""
    temp_bytes: int
    code_bytes: int
    """0 where the compiler does not say (GPU, CPU)."""
    peak_bytes: int


def work(text: str) -> Work:
    """Counts what a program does from the text of its HLO module."""
    program = parse(text)
    tally = _walk(program, program.computations[program.entry], _nothing, fused=False)

    def collectives(counts: Counter) -> dict[str, int]:
        return {kind: counts[kind] for kind in sorted(counts.keys() & COLLECTIVES)}

    return Work(
        flops=tally.flops,
        cycles=tally.cycles if '"estimated_cycles":' in text else None,
        copy_places=tally.places["copy"],
        copy_runs=tally.runs["copy"],
        copy_bytes=tally.bytes["copy"],
        prefetch_places=tally.places["prefetch"],
        prefetch_runs=tally.runs["prefetch"],
        prefetch_bytes=tally.bytes["prefetch"],
        collective_places=collectives(tally.places),
        collective_runs=collectives(tally.runs),
        collective_bytes=collectives(tally.bytes),
        async_collective_runs=tally.beside["runs"],
        overlapping_collective_runs=tally.beside["with_products"],
        overlapping_flops=tally.beside["flops"],
        fused_attention=tuple(sorted(tally.fused_attention)),
        unknown_loops=tuple(tally.unknown_loops),
        uncounted=dict(sorted(tally.uncounted.items())),
    )


def costs(compiled: jax.stages.Compiled) -> Costs:
    """Counts what a compiled program does on one device, and the memory it takes there."""
    return Costs(**dataclasses.asdict(work(compiled.as_text())), **memory(compiled))


def memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """The memory of `Costs`."""
    found = compiled.memory_analysis()
    return {
        "argument_bytes": found.argument_size_in_bytes,
        "output_bytes": found.output_size_in_bytes,
        "alias_bytes": found.alias_size_in_bytes,
        "temp_bytes": found.temp_size_in_bytes,
        "code_bytes": found.generated_code_size_in_bytes,
        "peak_bytes": found.peak_memory_in_bytes,
    }


@dataclasses.dataclass(frozen=True)
class ArrayUse:
    """Where a program has arrays of one type."""

    array: Array
    opcodes: tuple[str, ...]  # that make them
    in_memory: bool  # False where all of them are intermediates of fusions


# These make no array of their own.
_VIEWS = frozenset(("bitcast", "get-tuple-element", "parameter", "tuple", "while"))


def _array_uses(text: str) -> list[ArrayUse]:
    program = parse(text)
    fused = program.fused
    opcodes, in_memory = {}, set()
    for computation in program.computations.values():
        for instruction in computation.instructions.values():
            for array in instruction.arrays:
                opcodes.setdefault(array, set()).add(instruction.opcode)
                if computation.name not in fused:
                    in_memory.add(array)
    return [
        ArrayUse(array, tuple(sorted(made - _VIEWS or made)), array in in_memory)
        for array, made in opcodes.items()
    ]


def square_arrays(text: str, length: int, *, at_most: int | None = None) -> list[ArrayUse]:
    """The float arrays of a program, of whatever rank, with two axes of `length` or more.

    Args:
      text: of the HLO module.
      length: T; an attention over T frames that is not fused has an array of T x T scores.
      at_most: longest axis that counts, to tell scores, whose axes are T rounded up, from weights
        and logits, whose axes are longer.

    Returns:
      one entry a type, the largest first; those that only exist within fusions as well.
    """
    most = math.inf if at_most is None else at_most
    return sorted(
        (
            use
            for use in _array_uses(text)
            if use.array.is_float and sum(length <= size <= most for size in use.array.dims) >= 2
        ),
        key=lambda use: -use.array.bytes,
    )


def largest_arrays(text: str, count: int) -> list[ArrayUse]:
    """The `count` largest types of array that a program makes in memory, its arguments aside."""
    uses = [use for use in _array_uses(text) if use.in_memory and not set(use.opcodes) <= _VIEWS]
    return sorted(uses, key=lambda use: -use.array.bytes)[:count]
