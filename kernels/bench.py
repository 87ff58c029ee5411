"""Times the operations at their real shapes: `python -m kernels.bench [operation ...] [--grad] [--csv FILE]`.

Every implementation that can serve takes its turn, round after round, so that noise hits all. On a GPU the time is the
device's: a chain of calls, long enough to hide the start of each, between two waits; with its share of what the device
could do, from the bandwidth and the matrix rate measured in the same run and the bytes and operations that
`shapes.py` counts. Where the host needed most of the time to start the calls, the row says so: the device may be
faster. Without a GPU, forms that need one are left out, and said so; freed memory is kept for the next call,
as in training.
"""

import argparse
import csv
import dataclasses
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels import cases

_CHAIN_SECONDS = 0.02  # device time of a chain of calls


@dataclasses.dataclass(frozen=True)
class Row:
  """One implementation at one shape; a line of the table and of the CSV file.

  Attributes:
    ratio: its time over the best other's.
    compile_s: seconds.
    megabytes: that must cross device memory at least.
    gflop: billions of operations of the products and transforms in the form that "mosaic" takes.
    roofline: share of the rate that the device can reach at this intensity; "" where not known.
    host: share of the time in which the host was starting calls; "" on CPU, where it computes as well.
  """

  operation: str
  shape: str
  dtype: str
  what: str
  implementation: str
  milliseconds: float
  ratio: float | str
  compile_s: float
  megabytes: float
  gflop: float
  roofline: float | str
  host: float | str


def peaks() -> tuple[float, dict[str, float]] | None:
  """Bytes a second of a copy, and operations a second of a product by dtype, measured here; None on CPU."""
  if jax.default_backend() == "cpu":
    return None
  size = 2**28
  copied = jnp.zeros(size, jnp.float32)
  bandwidth = 2 * 4 * size / _seconds(jax.jit(lambda x: x + 1), (copied,), 5)
  rates = {}
  for dtype in (jnp.bfloat16, jnp.float32):
    matrix = jnp.ones((8192, 8192), dtype)
    product = jax.jit(lambda x: jnp.matmul(x, x, precision="default"))
    rates[jnp.dtype(dtype).name] = 2 * 8192**3 / _seconds(product, (matrix,), 5)
  return bandwidth, rates


def _seconds(function: Callable, arguments: tuple, rounds: int) -> float:
  jax.block_until_ready(function(*arguments))
  return statistics.median(_chain(function, arguments, 3)[0] for _ in range(rounds))


def _chain(function: Callable, arguments: tuple, calls: int) -> tuple[float, float]:
  """Of one of `calls` calls that the host starts without waiting in between: its seconds, and those of its start."""
  start = time.perf_counter()
  for _ in range(calls):
    result = function(*arguments)
  started = time.perf_counter()
  jax.block_until_ready(result)
  return (time.perf_counter() - start) / calls, (started - start) / calls


def measure(case: cases.Case, grad: bool, rounds: int, limits) -> tuple[list[Row], dict[str, str]]:
  """Rows of the implementations that can serve, and why the others cannot."""
  arguments = case.arrays(0)
  functions, compile_seconds, refused = {}, {}, {}
  for name in case.implementations:
    start = time.perf_counter()
    try:
      function = jax.jit(case.function(name, grad)).lower(*arguments).compile()
      compile_seconds[name] = time.perf_counter() - start
      jax.block_until_ready(function(*arguments))
    except (ValueError, jax.errors.JaxRuntimeError) as error:  # the latter: out of memory, no cuDNN
      refused[name] = str(error).partition("\n")[0]
      continue
    functions[name] = function
  calls = {}
  for name, function in functions.items():
    once, _ = _chain(function, arguments, 1)
    calls[name] = 1 if limits is None else max(1, round(_CHAIN_SECONDS / once))
  times = {name: [] for name in functions}
  for _ in range(rounds):
    for name, function in functions.items():
      times[name].append(_chain(function, arguments, calls[name]))
  medians = {name: statistics.median(seconds for seconds, _ in measured) for name, measured in times.items()}
  rows = []
  for name, seconds in medians.items():
    others = [s for other, s in medians.items() if other != name]
    roofline = host = ""
    if limits is not None:
      host = statistics.median(start / whole for whole, start in times[name])
      bandwidth, rates = limits
      floor = max(case.transferred[grad] / bandwidth, case.operations[grad] / rates[jnp.dtype(case.dtype).name])
      roofline = floor / seconds
    rows.append(
      Row(
        case.operation,
        case.name,
        jnp.dtype(case.dtype).name,
        "gradient" if grad else "forward",
        name,
        seconds * 1e3,
        seconds / min(others) if others else "",
        compile_seconds[name],
        case.transferred[grad] / 1e6,
        case.operations[grad] / 1e9,
        roofline,
        host,
      )
    )
  return rows, refused


def main() -> None:
  """Parses the command line and prints a table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("operation", nargs="*", choices=[*cases.OPERATIONS, []], default=[])
  parser.add_argument("--grad", action="store_true", help="forward and gradient of all arguments")
  parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="only this (default: on CPU float32, else both)")
  parser.add_argument("--shape", help="only shapes whose name contains this")
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--csv", type=pathlib.Path, help="also write a file")
  flags = parser.parse_args()
  from lra_jax import parallel  # as the trainer does; the library itself does not need lra_jax

  parallel.keep_freed_memory()
  limits = peaks()
  device = jax.devices()[0]
  print(f"jax {jax.__version__}, {device.device_kind}, {'forward and gradient' if flags.grad else 'forward'}, median")
  if limits is None:
    flags.dtype = flags.dtype or "float32"
  else:
    rates = ", ".join(f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in limits[1].items())
    print(f"measured here: {limits[0] / 1e12:.2f} TB/s, {rates}")
  rows = []
  print(f"{'operation, shape':58}{'dtype':>9}  {'form':14}{'ms':>9}{'ratio':>7}{'compile s':>11}", end="")
  print(f"{'MB':>8}{'GFLOP':>8}{'roofline':>10}")
  for operation in flags.operation or cases.OPERATIONS:
    for case in cases.all_cases(operation):
      if flags.dtype not in (None, jnp.dtype(case.dtype).name) or (flags.shape or "") not in case.name:
        continue
      new, refused = measure(case, flags.grad, flags.rounds, limits)
      rows += new
      for row in new:
        ratio, roofline = (f"{x:.2f}" if x != "" else "" for x in (row.ratio, row.roofline))
        print(
          f"{operation + ' ' + row.shape:58}{row.dtype:>9}  {row.implementation:14}{row.milliseconds:9.3f}{ratio:>7}"
          f"{row.compile_s:11.1f}{row.megabytes:8,.0f}{row.gflop:8,.1f}{roofline:>10}"
          + ("  host-bound" if row.host != "" and row.host > 0.9 else ""),
          flush=True,
        )
      for name, reason in refused.items():
        print(f"  {name} left out: {reason}", file=sys.stderr)
  if flags.csv:
    with flags.csv.open("w", newline="") as file:
      writer = csv.writer(file)
      writer.writerow(field.name for field in dataclasses.fields(Row))
      writer.writerows(dataclasses.astuple(row) for row in rows)


if __name__ == "__main__":
  main()
