"""The real TPU compiler takes every kernel, at every workload, for every generation.

Needs the extra `tpu-plan` (libtpu); no TPU.
"""

import importlib.util
import math
import os
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from recurrentgemma.benchmarks import ahead_of_time
from recurrentgemma.benchmarks.report import package_version
from recurrentgemma.benchmarks.scan_programs import (
    GATE_BLOCK,
    PROGRAMS,
    estimated_programs,
)
from recurrentgemma.checkpoints.parameters import (
    describe,
    named_parameters,
    parameter_dtype,
)
from recurrentgemma.config import PRESETS, Runtime
from recurrentgemma.kernels import StepParameters, recurrent_step
from recurrentgemma.kernels.linear_scan.workloads import WORKLOADS, Workload
from recurrentgemma.kernels.rg_lru.gates import Gate
from tests.jaxprs import equations

if importlib.util.find_spec("libtpu") is None:
    pytest.skip(
        "needs libtpu: pip install 'recurrentgemma[tpu-plan]'", allow_module_level=True
    )

for name, value in ahead_of_time.ENVIRONMENT.items():
    os.environ.setdefault(name, value)

OURS = [
    name
    for name in estimated_programs(WORKLOADS["train_2b"])
    if name.endswith("pallas_tpu")
]
DTYPES = ["float32", "bfloat16"]
# The benchmarks have no rows of these, and nothing here needs their speeds.
for name in ("v2:2x2", "v4:2x2x1", "tpu7x:2x2x1"):
    chip = ahead_of_time.Chip(name, math.nan, math.nan)
    ahead_of_time.CHIPS.setdefault(name.partition(":")[0], chip)
GENERATIONS = ["v2", "v4", "v5e", "v5p", "v6e", "tpu7x"]  # v3 compiles as v2 does.
SEQUENCES = [name for name, workload in WORKLOADS.items() if workload.length > 1]
CUSTOM_CALL = 'custom_call_target="tpu_custom_call"'


def relayouts_around_kernels(text: str) -> list[str]:
    """Copies and transposes whose result a kernel reads, or which read its result."""
    instructions = {}
    for line in text.splitlines():
        match = re.match(r"\s*(?:ROOT )?%(\S+) = (\S+) ([\w-]+)\((.*)", line)
        if match:
            instructions[match[1]] = (match[3], match[2], match[4])

    def moves(name):
        opcode, shape, _ = instructions.get(name, ("", "", ""))
        named = opcode == "fusion" and re.match(r"(copy|transpose)", name)
        # Without a sequence axis there is nothing large to move.
        is_sequence = shape.count(",") >= 2 and re.match(r"\w+\[\d+,\d+,\d+\]", shape)
        return is_sequence and (opcode in ("copy", "transpose") or named)

    found = []
    kernels = {n for n, (_, _, rest) in instructions.items() if CUSTOM_CALL in rest}
    results = set(kernels)
    for name, (opcode, _, rest) in instructions.items():
        operands = re.findall(r"%([\w.-]+)", rest)
        if opcode in ("get-tuple-element", "bitcast") and results & set(operands):
            results.add(name)
        if name in kernels:
            found += [operand for operand in operands if moves(operand)]
        elif moves(name) and results & set(operands):
            found.append(name)
    return found


def test_a_relayout_is_found():
    text = f"""
  %p = f32[8,16,256]{{2,1,0}} parameter(0)
  %copy.1 = f32[8,16,256]{{1,2,0}} copy(%p)
  %k = (f32[8,16,256]{{2,1,0}}) custom-call(%copy.1), {CUSTOM_CALL}
  %g = f32[8,16,256]{{2,1,0}} get-tuple-element(%k), index=0
  ROOT %transpose.2 = f32[16,8,256]{{2,1,0}} transpose(%g)
"""
    assert relayouts_around_kernels(text) == ["copy.1", "transpose.2"]


def cases(every, by_default):
    """Parameters of a test; those not in `by_default` are slow."""
    slow = [pytest.param(*case, marks=pytest.mark.slow) for case in every]
    kept = {*by_default}
    return [
        case if case in kept else param for case, param in zip(every, slow, strict=True)
    ]


@pytest.mark.parametrize(
    ("generation", "workload", "dtype"),
    cases(
        [(g, w, dtype) for g in GENERATIONS for w in SEQUENCES for dtype in DTYPES],
        [
            ("v2", "train_2b", "float32"),  # The least memory, the most spills.
            ("v4", "train_2b", "bfloat16"),
            ("v5e", "train_9b", "float32"),  # The largest blocks.
            ("v6e", "prefill_67m", "bfloat16"),
        ],
    ),
)
@pytest.mark.parametrize("program", OURS)
def test_every_workload_compiles(program, generation, workload, dtype):
    function, shapes = PROGRAMS[program](WORKLOADS[workload], dtype)
    compiled = ahead_of_time.compile_for(generation, function, *shapes)
    text = compiled.as_text()
    assert text.count(CUSTOM_CALL) == 1
    assert relayouts_around_kernels(text) == []
    # Nothing as large as a sequence beside arguments and results. Gradients of both
    # gates' matrices come for each row; some chips have no on-chip memory for them.
    allowed = 3 * 2**19
    if program == "rg_lru_with_gates gradient: pallas_tpu":
        batch, _, width = WORKLOADS[workload]
        allowed += 2 * batch * width * min(GATE_BLOCK, width) * 4
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    assert temporaries < allowed, f"{temporaries} bytes of temporaries"


@pytest.mark.parametrize("program", OURS)
def test_two_cores_share_one_row(program):
    """The mesh tells how many cores the chip has, under the compiler alone too."""
    function, shapes = PROGRAMS[program](Workload(1, 256, 2560), "bfloat16")
    channel_blocks = {}
    for generation in ("v5e", "v5p"):
        replicated = NamedSharding(ahead_of_time.one_device(generation), P())
        placed = jax.tree.map(
            lambda leaf, at=replicated: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=at
            ),
            shapes,
        )
        jaxpr = jax.jit(function).trace(*placed).jaxpr.jaxpr
        channel_blocks[generation] = {
            equation.params["grid_mapping"].grid[0]
            for equation in equations(jaxpr)
            if equation.primitive.name == "pallas_call"
        }
    halves = {2} if program == "rg_lru_with_gates gradient: pallas_tpu" else {1}
    assert channel_blocks == {"v5e": halves, "v5p": {2}}


ODD_SHAPES = [
    *((8, 64, 1024), (6, 7, 2048), (4, 64, 1536), (2, 1, 256), (8, 20, 8192)),
    *((3, 7, 13), (1, 1000, 300), (40, 20, 200), (1, 9, 9000)),
]


def takes(program, shape):
    """Whether a kernel with products has whole gate blocks to take."""
    return "with_gates" not in program or shape[2] % 256 == 0


@pytest.mark.parametrize(
    ("program", "shape", "dtype"),
    cases(
        [
            (program, shape, dtype)
            for program in OURS
            for shape in ODD_SHAPES
            for dtype in DTYPES
            if takes(program, shape)
        ],
        [
            (program, shape, "bfloat16")
            for program in OURS
            for shape in [(6, 7, 2048), (1, 1000, 300)]
        ],
    ),
)
def test_odd_shapes_compile(program, shape, dtype):
    """Any number of rows in a block of them, in blocks of channels or not."""
    function, arguments = PROGRAMS[program](Workload(*shape), dtype)
    compiled = ahead_of_time.compile_for("v5e", function, *arguments)
    assert compiled.as_text().count(CUSTOM_CALL) == 1


SPILLS = {  # By kernel, in float32 and bfloat16, with libtpu 0.0.52.
    "linear_scan": (0, 0),
    "linear_scan_gradient": (0, 0),
    "rg_lru": (0, 0),
    "rg_lru_gradient": (42, 121),  # It has more values than registers.
    # So have the products of a block, which are taken at once: in fewer cycles than in
    # halves. A float32 product is six passes of bfloat16.
    "rg_lru_with_gates": (2339, 654),
    "rg_lru_with_gates_gradient": (4383, 714),
}
SPILLS_MARGIN = 16, 0.25
"""How many more another compiler may need, and what share more."""


def compile_all(dtype):
    for program in OURS:
        function, shapes = PROGRAMS[program](WORKLOADS["prefill_2b"], dtype)
        ahead_of_time.compile_for("v5e", function, *shapes)


def profile_of(call):
    """The compiler's profile of a call of a function of this module."""
    code = f"from tests.kernels import test_tpu_compiler as tests; tests.{call}"
    root = str(Path(__file__).parents[2])
    return ahead_of_time.profile(code, path=[root])


@pytest.mark.parametrize("dtype", DTYPES)
def test_spills(dtype):
    """About as many as are explained above."""
    found = {}
    for name, count in profile_of(f"compile_all({dtype!r})").spills.items():
        kernel = name.split("-")[-1].split(".")[0]
        if kernel in SPILLS:
            found[kernel] = count
    assert found.keys() == SPILLS.keys()
    known = {kernel: spills[DTYPES.index(dtype)] for kernel, spills in SPILLS.items()}
    more, share = SPILLS_MARGIN
    excess = {k: n for k, n in found.items() if n > known[k] * (1 + share) + more}
    libtpu = package_version("libtpu")
    assert not excess, f"libtpu {libtpu} spills {found}; known are {known}"


def model_2b():
    """The shapes and dtypes of the model that `load` gives for inference."""
    runtime = Runtime(compute_dtype="bfloat16")
    model = describe(PRESETS["recurrentgemma-2b"], runtime)
    leaves = [
        jax.ShapeDtypeStruct(leaf.shape, parameter_dtype(name, model.config, runtime))
        for name, leaf in named_parameters(model).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(model), leaves)


def compile_decode_steps(generation, batches, dtypes=DTYPES):
    """The kernel of the decode step at the sizes of the 2B and the 9B model."""
    shape = jax.ShapeDtypeStruct
    for blocks in (10, 16):
        width = 256 * blocks
        vector = shape((width,), jnp.float32)
        for batch in batches:
            for dtype in dtypes:
                matrices = shape((blocks, 256, 256), dtype)
                gate = Gate(matrices, shape((blocks, 256), jnp.float32))
                parameters = StepParameters(
                    shape((4, width), dtype), vector, gate, gate, vector
                )
                ahead_of_time.compile_for(
                    generation,
                    partial(recurrent_step, implementation="pallas_tpu"),
                    shape((batch, width), dtype),
                    parameters,
                    shape((batch,), jnp.int32),
                    shape((batch, width), jnp.float32),
                    shape((batch, 3, width), dtype),
                )


STEP_SPILLS = {"float32": 134, "bfloat16": 0}
"""In each kernel, with libtpu 0.0.52. A float32 product is six passes of bfloat16."""


@pytest.mark.parametrize(
    ("generation", "dtype"),
    cases(
        [(generation, dtype) for generation in GENERATIONS[1:5] for dtype in DTYPES],
        [("v5e", "bfloat16")],
    ),
)
def test_spills_of_decode_steps(generation, dtype):
    call = f"compile_decode_steps({generation!r}, (1, 8, 64), [{dtype!r}])"
    profile = profile_of(call)
    found = [n for name, n in profile.spills.items() if "recurrent_step" in name]
    assert len(found) == 6
    more, share = SPILLS_MARGIN
    known = STEP_SPILLS[dtype]
    libtpu = package_version("libtpu")
    message = f"libtpu {libtpu} spills {found} in each kernel; known are {known}"
    assert max(found) <= known * (1 + share) + more, message


@pytest.mark.parametrize(
    ("generation", "batches"),
    cases([("v4", (1, 8)), ("v5e", (3, 21, 100))], [("v4", (1, 8))]),
)
def test_other_decode_steps_compile(generation, batches):
    compile_decode_steps(generation, batches)


@pytest.mark.parametrize(
    ("batch", "length"), cases([(1, 2048), (1, 1), (64, 1)], [(1, 1)])
)
def test_the_2b_model_compiles_for_v5e(batch, length):
    """One kernel a recurrent layer, with no relayout around it."""
    model = model_2b()
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    cache = jax.eval_shape(lambda model: model.init_cache(batch), model)

    @partial(jax.jit, donate_argnums=2)
    def run(model, tokens, cache):
        hidden, cache = model(tokens, cache=cache)
        return model.logits(hidden[:, -1:]), cache

    compiled = ahead_of_time.compile_for("v5e", run, model, tokens, cache)
    text = compiled.as_text()
    recurrent = model.config.block_types.count("recurrent")
    kernels = re.findall(r"%(rg_lru|recurrent_step)[\w.]* = .* custom-call", text)
    assert kernels == ["rg_lru" if length > 1 else "recurrent_step"] * recurrent
    assert relayouts_around_kernels(text) == []
    if length == 1:
        # The states of the convolutions are updated where they lie.
        copied = re.findall(r" = bf16\[([\d,]+)\]\S* copy\(", text)
        sizes = {math.prod(map(int, shape.split(","))) for shape in copied}
        assert batch * 3 * model.config.lru_width not in sizes
