"""Every Mosaic GPU kernel at every shape, compiled to machine code for an H200; needs no GPU but JAX's CUDA plugin."""

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kernels import cases, compile, dispatch, mosaic

CASES = [
  pytest.param(case, grad, id=f"{case.operation}-{case.name}-{case.dtype.__name__}-{'grad' if grad else 'forward'}")
  for operation in cases.OPERATIONS
  for case in cases.all_cases(operation)
  if "mosaic" in case.implementations
  for grad in (False, True)
]
pytestmark = pytest.mark.skipif(compile.missing() is not None, reason=f"{compile.missing()}")


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


# One shape of every operation: in how the batch is split the others do not differ.
FIRST = {case.values[0].operation: case.values[0].name for case in reversed(CASES)}


@pytest.mark.parametrize(
  "case,grad",
  [c for c in CASES if "bfloat16" in c.id and FIRST[c.values[0].operation] == c.values[0].name],
)
def test_four_devices_need_no_gathering(case, grad):
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
    program = compile.compile_for_h200(case.function("mosaic", grad), *arguments)
  text = program.compiled.as_text()
  assert "mosaic_gpu" in text
  assert "all-gather" not in text and "all-to-all" not in text
