"""Every Mosaic GPU kernel at every shape, compiled to machine code for an H200; needs no GPU but JAX's CUDA plugin."""

import pathlib
import re

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kernels import cases, compile, dispatch, mosaic

# Every kernel at the number of threads that it may have, there where it takes most registers and shared memory; the
# other shapes have nothing else, and are `exhaustive`.
TIGHTEST = {
  "fft_mixing": ("fnet_tokens1024_width1024", "fnet_path_x"),  # one and two levels
  "nystrom_attention": ("nystromformer_tiny32", "lra_text"),  # one and two warpgroups
  "lstm": ("sequencer2d_s_stage1", "sequencer2d_s_stage2", "steps1024_hidden256_batch64"),  # one, two and four
  "lipschitz_rnn": ("cifar10_sequence_64", "cifar10_sequence_128_rk4", "cifar10_sequence_256_gated"),  # likewise
  "linear_recurrence": ("s5_lra_path_x", "varying"),  # decays that stay and that vary
}
DOCS = pathlib.Path(__file__).parents[2] / "docs/kernels.md"
CASES = [
  pytest.param(
    case,
    grad,
    id=f"{case.operation}-{case.name}-{case.dtype.__name__}-{'grad' if grad else 'forward'}",
    marks=() if case.name in TIGHTEST[case.operation] else pytest.mark.exhaustive,
  )
  for operation in cases.OPERATIONS
  for case in cases.all_cases(operation)
  if "mosaic" in case.implementations
  for grad in (False, True)
]
needs_plugin = pytest.mark.skipif(compile.missing() is not None, reason=f"{compile.missing()}")


@needs_plugin
@pytest.mark.parametrize("case,grad", CASES)
def test_no_spills_no_serialised_products_and_memory_within_limits(case, grad):
  program = compile.compile_for_h200(case.function("mosaic", grad), *case.arguments)
  assert program.kernels
  for kernel in program.kernels:
    assert kernel.spilled == 0, kernel
    # C7519: an arrival that the compiler adds before a product. Everything else is a loss, as serialised products are.
    assert not [line for line in kernel.warnings if "C7519" not in line], kernel
    assert kernel.shared_memory is None or kernel.shared_memory <= mosaic.SHARED_MEMORY, kernel
    assert not kernel.instructions.get("LDL") and not kernel.instructions.get("STL"), kernel


def test_docs_have_every_shape_and_the_compiled_ones_every_kernel():
  """A new shape, or a kernel that none of TIGHTEST has, must be compiled: `python -m kernels.compile`."""
  text = DOCS.read_text()
  kernels = {}
  for line in text.splitlines():
    if match := re.fullmatch(r"\| (\w+) (\w+) \| (\w+) \| (forward|gradient) \|.*\| (`.*) \|", line):
      operation, name, dtype, what, found = match.groups()
      # The name and the threads of `name` registers, KiB, threads, blocks, products.
      kernels[operation, name, dtype, what] = set(re.findall(r"`(\w+)` \d+, \d+, (\d+)", found))
  wanted = {(c.operation, c.name, c.dtype.__name__, ("forward", "gradient")[g]) for c, g in (p.values for p in CASES)}
  assert set(kernels) == wanted
  assert "Bytes of registers spilled to memory, all kernels together: 0." in text
  for operation, names in TIGHTEST.items():
    for dtype in ("float32", "bfloat16"):
      rows = {row: found for row, found in kernels.items() if row[0] == operation and row[2] == dtype}
      assert set.union(*rows.values()) == set.union(*(found for row, found in rows.items() if row[1] in names))


def test_reports_name_their_kernel():
  """The assembler prints what it remarks before it names the function it compiles."""
  text = """\
ptxas info    : (C7510) Potential Performance Loss: instructions are serialized in function 'a_mosaic_gpu_kernel'
ptxas info    : Compiling entry function 'a_mosaic_gpu_kernel' for 'sm_90a'
    0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
ptxas info    : (C7519) warpgroup.arrive is injected in around line 7 in function 'b_mosaic_gpu_kernel'
ptxas info    : Compiling entry function 'b_mosaic_gpu_kernel' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 1 barriers
"""
  first, second = compile._parse(text)
  assert (first.name, first.registers, first.spilled) == ("a", 40, 12) and "C7510" in first.warnings[0]
  assert (second.name, second.registers, second.spilled) == ("b", 24, 0) and "C7519" in second.warnings[0]
  assert len(first.warnings) == len(second.warnings) == 1


# One shape of every operation: in how the batch is split the others do not differ. Its gradient has the forward in it,
# and one `dispatch.per_device` is around both.
SPLIT = {case.values[0].operation: case for case in reversed(CASES) if case.id.endswith("bfloat16-grad")}


@needs_plugin
@pytest.mark.parametrize("case", [pytest.param(c.values[0], id=c.id) for c in SPLIT.values()])
def test_four_devices_need_no_gathering(case):
  """Under `dispatch.batches_split` every device runs the kernel on its part of the batch."""
  mesh = compile.mesh(4)
  arguments = [
    jax.ShapeDtypeStruct(
      (4 * spec.shape[0], *spec.shape[1:]) if batched else spec.shape,
      spec.dtype,
      sharding=NamedSharding(mesh, PartitionSpec("data") if batched else PartitionSpec()),
    )
    for spec, batched in zip(case.arguments, case.batched, strict=True)
  ]
  with dispatch.batches_split(mesh):
    program = compile.compile_for_h200(case.function("mosaic", True), *arguments)
  text = program.compiled.as_text()
  assert "mosaic_gpu" in text
  assert "all-gather" not in text and "all-to-all" not in text
