"""Compiles for an NVIDIA H200 on a machine without any GPU, and reads what the assembler says of the Mosaic kernels.

Needs JAX's CUDA plugin (`pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt`, in JAX's version), ptxas of a CUDA
toolkit, and for the counts of machine instructions `nvidia-cuda-nvdisasm`. Nothing is executed.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import os
import pathlib
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, PartitionSpec

from kernels import cases, dispatch

# What XLA needs to know of the chip (NVIDIA H200 SXM, CUDA 13.0).
_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 150754820096
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H200"
"""
_INSTRUCTIONS = ("HGMMA", "UTMALDG", "UTMASTG", "MUFU", "LDL", "STL", "BAR")
_MARKS = "<!-- written by kernels.compile -->", "<!-- end of what kernels.compile wrote -->"
_EXPLANATION = """jax {}; written by `python -m kernels.compile --out docs/kernels.md`. Least time: bytes at 4.3 TB/s or
products at 780 (bfloat16) or 390 (TF32) TFLOP/s, the larger of the two, in the form that the kernel takes; it does not
know that steps follow each other. After each kernel: registers per thread, KiB of shared memory, threads per block,
blocks a multiprocessor holds, instructions of the tensor cores (HGMMA) in the machine code."""
_HEADER = "| operation, shape | dtype | what | least µs | steps | kernels |", "|---|---|---|---|---|---|"
_programs = itertools.count()


@dataclasses.dataclass(frozen=True)
class Kernel:
  """What the assembler said of one Mosaic kernel.

  Attributes:
    name: of the body's function.
    registers: per thread.
    spilled: bytes of stores and loads that spills cause, summed.
    shared_memory: bytes per block; None where it could not be told.
    threads: of a block.
    warnings: of the assembler, such as serialised wgmma; those that name no function stand with every kernel.
    instructions: name → how many the machine code has; {} without nvdisasm.
  """

  name: str
  registers: int
  spilled: int
  shared_memory: int | None
  threads: int
  warnings: tuple[str, ...]
  instructions: dict[str, int]

  @property
  def blocks(self) -> int:
    """How many blocks a multiprocessor holds at once (Hopper: 64 Ki registers, 228 KiB shared memory, 2048 threads)."""
    registers = self.threads * -(-self.registers // 8) * 8
    return min(2**16 // registers, 228 * 1024 // ((self.shared_memory or 0) + 1024), 2048 // self.threads)


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled function and its Mosaic kernels, one entry for each distinct one."""

  compiled: jax.stages.Compiled
  kernels: tuple[Kernel, ...]


def missing() -> str | None:
  """What this machine lacks for compiling for a GPU, in words; None if nothing."""
  if importlib.util.find_spec("jax_cuda13_plugin") is None:
    return "the package jax-cuda13-plugin is not installed"
  if shutil.which("ptxas") is None and not pathlib.Path("/usr/local/cuda/bin/ptxas").exists():
    return "ptxas of a CUDA toolkit is not in PATH"
  return None


@functools.lru_cache(maxsize=4)
def mesh(devices: int = 1) -> Mesh:
  """A mesh of H200s that are not there, with the axis `data`."""
  topology = topologies.get_topology_desc(platform="cuda", target_config=_H200, topology=f"1x{devices}x1")
  return Mesh(np.array(topology.devices[:devices]), ("data",))


def compile_for_h200(function: Callable, *arguments: Any) -> Program:
  """Compiles `function` for H200s, dispatch included: None takes what is best there.

  Args:
    function: of arrays; jitted here unless it is already.
    *arguments: arrays or `jax.ShapeDtypeStruct`s, or pytrees of them. One that has no sharding over devices of `mesh`
      is whole on one device.

  Raises:
    RuntimeError: something is missing here (see `missing`).
  """
  if (lacking := missing()) is not None:
    raise RuntimeError(f"cannot compile for a GPU: {lacking}")
  whole = NamedSharding(mesh(), PartitionSpec())

  def placed(a):
    sharding = getattr(a, "sharding", None)
    placed_there = isinstance(sharding, NamedSharding) and sharding.mesh.devices.flat[0].platform != "cpu"
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding if placed_there else whole)

  # Pallas asks which GPU it lowers for; without one present it takes this description.
  gpu = AbstractMesh((), (), abstract_device=AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu"))
  jitted = function if hasattr(function, "lower") else jax.jit(function)
  with _reports() as text, dispatch.compiling_for("gpu"), jax.sharding.use_abstract_mesh(gpu):
    compiled = jitted.lower(*jax.tree.map(placed, arguments)).compile()
  return Program(compiled, tuple(_parse(text[0])))


@contextlib.contextmanager
def _reports() -> Iterator[list[str]]:
  """Makes the compiler print its reports and collects them; they come from C++ and so from the file descriptors."""
  from kernels import mosaic  # imports Pallas, which overwrites MOSAIC_GPU_CUDA_ROOT the first time

  settings = {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_RESOURCES": "1"}
  disassembler = _disassembler()
  if disassembler is not None:
    settings |= {"MOSAIC_GPU_DUMP_SASS": "1", "MOSAIC_GPU_CUDA_ROOT": str(disassembler.parent.parent)}
  before = {name: os.environ.get(name) for name in settings}
  os.environ.update(settings)
  suffix = mosaic.name_suffix.set(f"__{next(_programs)}")
  text: list[str] = []
  sys.stdout.flush(), sys.stderr.flush()
  saved = os.dup(1), os.dup(2)
  with tempfile.TemporaryFile() as file:
    os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    try:
      yield text
    finally:
      sys.stdout.flush(), sys.stderr.flush()
      for descriptor, copy in zip((1, 2), saved, strict=True):
        os.dup2(copy, descriptor)
        os.close(copy)
      file.seek(0)
      text.append(file.read().decode(errors="replace"))
      mosaic.name_suffix.reset(suffix)
      for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


def _disassembler() -> pathlib.Path | None:
  spec = importlib.util.find_spec("nvidia")
  for folder in spec.submodule_search_locations if spec else ():
    for path in pathlib.Path(folder).glob("*/bin/nvdisasm"):
      return path
  return None


def _parse(text: str) -> Iterator[Kernel]:
  from kernels import mosaic

  # They stand before the section of the function that they name.
  remarks = re.findall(r"ptxas[^\n]*(?:C75\d\d|[Ww]arning|Potential)[^\n]*", text)
  shared = [int(size) for size in re.findall(r"smem_scratch_bytes=(\d+)", text)]
  sections = re.split(r"(?=ptxas info\s*: Compiling entry function)", text)[1:]
  for index, section in enumerate(sections):
    name = re.search(r"entry function '(\w+)'", section)[1]
    if not name.endswith("_mosaic_gpu_kernel"):
      continue
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", section)
    warnings = [line for line in remarks if f"'{name}'" in line or "in function '" not in line]
    counts = {op: len(re.findall(rf"\*/\s+(?:@!?U?P\w+\s+)?{op}\b", section)) for op in _INSTRUCTIONS}
    yield Kernel(
      re.sub(r"(__\d+)?_mosaic_gpu_kernel$", "", name),
      int(re.search(r"Used (\d+) registers", section)[1]),
      int(spills[1]) + int(spills[2]),
      shared[index] if len(shared) == len(sections) else None,
      mosaic.threads_of.get(name.removesuffix("_mosaic_gpu_kernel"), 128),
      tuple(warnings),
      counts if any(counts.values()) else {},
    )


def main() -> None:
  """Compiles every Mosaic kernel at every shape and writes the table into a file, between two marks."""
  parser = argparse.ArgumentParser(description="Compiles the Mosaic kernels for an H200 and tabulates the reports.")
  parser.add_argument("operation", nargs="*", choices=[*cases.OPERATIONS, []], default=[])
  parser.add_argument("--out", type=pathlib.Path, help="file with the marks, such as docs/kernels.md")
  flags = parser.parse_args()
  if flags.out and flags.operation:
    parser.error("--out replaces the whole table; leave out the names of operations")
  if (lacking := missing()) is not None:
    sys.exit(f"error: cannot compile for a GPU: {lacking}; see the heading of kernels/compile.py")
  if not jax.config.jax_platforms:
    jax.config.update("jax_platforms", "cpu")  # nothing runs; JAX would look for the libraries of a GPU
  lines, spilled = [_EXPLANATION.format(jax.__version__), "", *_HEADER], 0
  for operation in flags.operation or cases.OPERATIONS:
    for case in cases.all_cases(operation):
      if "mosaic" not in case.implementations:
        continue
      for grad in (False, True):
        program = compile_for_h200(case.function("mosaic", grad), *case.arguments)
        spilled += sum(kernel.spilled for kernel in program.kernels)
        lines.append(_row(case, grad, program))
        print(lines[-1], flush=True)
  lines += ["", f"Bytes of registers spilled to memory, all kernels together: {spilled}."]
  if flags.out:
    before, rest = flags.out.read_text().split(_MARKS[0])
    after = rest.split(_MARKS[1])[1]
    flags.out.write_text("\n".join([before + _MARKS[0], *lines, _MARKS[1] + after]))


def _row(case: cases.Case, grad: bool, program: Program) -> str:
  rate = 780e12 if case.dtype == jnp.bfloat16 else 390e12
  least = max(case.transferred[grad] / 4.3e12, case.operations[grad] / rate) * 1e6
  kernels = "; ".join(
    f"`{k.name}` {k.registers}, {(k.shared_memory or 0) / 1024:.0f}, {k.threads}, {k.blocks}, "
    f"{k.instructions.get('HGMMA', '?')}"
    for k in program.kernels
  )
  what = "gradient" if grad else "forward"
  dtype = jnp.dtype(case.dtype).name
  return f"| {case.operation} {case.name} | {dtype} | {what} | {least:,.0f} | {case.steps[grad]:,} | {kernels} |"


if __name__ == "__main__":
  main()
