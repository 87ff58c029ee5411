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
    assert not [line for line in kernel.warnings if "C7510" in line or "serializ" in line], kernel
    assert kernel.shared_memory is None or kernel.shared_memory <= mosaic.SHARED_MEMORY, kernel
    assert not kernel.instructions.get("LDL") and not kernel.instructions.get("STL"), kernel


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
