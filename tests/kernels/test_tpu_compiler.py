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
from flax import nnx

from recurrentgemma.benchmarks import ahead_of_time
from recurrentgemma.benchmarks.scan_estimates import program_code
from recurrentgemma.benchmarks.scan_programs import PROGRAMS, programs
from recurrentgemma.config import PRESETS, Runtime
from recurrentgemma.griffin import Griffin
from recurrentgemma.kernels import StepParameters, recurrent_step
from recurrentgemma.kernels.linear_scan.workloads import WORKLOADS, Workload
from recurrentgemma.kernels.rg_lru.gates import Gate

if importlib.util.find_spec("libtpu") is None:
    pytest.skip(
        "needs libtpu: pip install 'recurrentgemma[tpu-plan]'", allow_module_level=True
    )

for name, value in ahead_of_time.ENVIRONMENT.items():
    os.environ.setdefault(name, value)

OURS = [
    name
    for name in programs("tpu", WORKLOADS["train_2b"])
    if name.endswith("pallas_tpu")
]
DTYPES = ["float32", "bfloat16"]
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


@pytest.mark.parametrize("generation", ahead_of_time.CHIPS)
@pytest.mark.parametrize("workload", SEQUENCES)
@pytest.mark.parametrize("program", OURS)
def test_every_workload_compiles(program, workload, generation):
    for dtype in DTYPES:
        function, shapes = PROGRAMS[program](WORKLOADS[workload], dtype)
        compiled = ahead_of_time.compile_for(generation, function, *shapes)
        text = compiled.as_text()
        assert text.count(CUSTOM_CALL) == 1
        assert relayouts_around_kernels(text) == []
        # Nothing as large as a sequence beside arguments and results.
        temporaries = compiled.memory_analysis().temp_size_in_bytes
        assert temporaries < 2**20, f"{temporaries} bytes of temporaries"


@pytest.mark.parametrize("program", OURS)
def test_odd_shapes_compile(program):
    """Any number of rows in a block of them, in blocks of channels or not."""
    shapes = [(8, 64, 1024), (6, 7, 2048), (4, 64, 1536), (2, 1, 256), (8, 20, 8192)]
    if "with_gates" not in program:
        shapes += [(3, 7, 13), (1, 1000, 300), (40, 20, 200), (1, 9, 9000)]
    for shape in shapes:
        for dtype in DTYPES:
            function, arguments = PROGRAMS[program](Workload(*shape), dtype)
            compiled = ahead_of_time.compile_for("v5e", function, *arguments)
            assert compiled.as_text().count(CUSTOM_CALL) == 1


SPILLS = {
    "rg_lru gradient: pallas_tpu": 128,  # It has more values than registers.
    # So have the products of a block, which it takes at once: fewer cycles than halves.
    "rg_lru_with_gates: pallas_tpu": 500,
    "rg_lru_with_gates gradient: pallas_tpu": 1600,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("program", OURS)
def test_spills(program, dtype):
    """None unexplained."""
    code = program_code("v5e", program, "prefill_2b", dtype)
    profile = ahead_of_time.profile(code, cycles=False)
    spills = sum(profile.spills.values())
    assert spills <= SPILLS.get(program, 0)


def model_2b(**fields):
    model = nnx.eval_shape(
        lambda: Griffin(
            PRESETS["recurrentgemma-2b"],
            rngs=nnx.Rngs(0),
            runtime=Runtime(compute_dtype="bfloat16"),
        )
    )

    def inference_dtype(path, leaf):
        matrix = path[-2:] != ("a_param",) and leaf.ndim > 1
        return jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16 if matrix else leaf.dtype)

    return jax.tree_util.tree_map_with_path(inference_dtype, model)


def compile_decode_steps(generation, batches):
    """The kernel of the decode step at the sizes of the 2B and the 9B model."""
    shape = jax.ShapeDtypeStruct
    for blocks in (10, 16):
        width = 256 * blocks
        vector = shape((width,), jnp.float32)
        for batch in batches:
            for dtype in DTYPES:
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


@pytest.mark.parametrize("generation", ahead_of_time.CHIPS)
def test_decode_steps_compile_without_spills(generation):
    module = "tests.kernels.test_tpu_compiler"
    run = f"compile_decode_steps({generation!r}, (1, 8, 64))"
    code = f"from {module} import compile_decode_steps; {run}"
    root = str(Path(__file__).parents[2])
    profile = ahead_of_time.profile(code, path=[root], cycles=False)
    kernels = [name for name in profile.spills if "recurrent_step" in name]
    assert len(kernels) == 12
    assert sum(profile.spills[name] for name in kernels) == 0


def test_odd_decode_steps_compile():
    compile_decode_steps("v5e", (3, 21, 100))


@pytest.mark.parametrize(("batch", "length"), [(1, 2048), (1, 1), (64, 1)])
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
