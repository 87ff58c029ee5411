"""What the devices of a compiled program exchange, read from its text."""

import math
import re
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4,
          "s64": 8, "u64": 8, "f64": 8}  # fmt: skip
_LINE = re.compile(r"= (.*?) (" + "|".join(KINDS) + r")(-start)?\(")
_ARRAY = re.compile(r"(" + "|".join(_BYTES) + r")\[([\d,]*)\]")
# {{0,1},{2,3}}, or [2,2]<=[4], groups and members of each, or mesh['data'=4,'fsdp'=2] {'fsdp'}.
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_COUNTED = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_LOOP = re.compile(r"(?:body|condition)=%?([\w.\-]+)")
_CALLED = re.compile(r"%([\w.\-]+)")


class Exchange(NamedTuple):
  """Operations of one kind in a program.

  Attributes:
    count: how many.
    payload: bytes of the whole arrays on one device: what is summed up, what is there after gathering, or before
      scattering.
    wire: bytes that each device sends with rings, the least there is: of n devices 2 (n − 1) / n of an all-reduce's
      payload, (n − 1) / n of a gathering's or scattering's, all of the others'.
  """

  count: int
  payload: int
  wire: float


def count(text: str) -> dict[str, Exchange]:
  """Counts the exchanges in the text of a compiled program, as `jax.stages.Compiled.as_text` gives it.

  What is in a loop counts once; see `in_loops`.

  Returns:
    Kind → `Exchange`, of the kinds that there are.
  """
  found = {}
  for line in text.splitlines():
    match = _LINE.search(line)
    if not match:
      continue
    shapes, kind, started = match.groups()
    size = _size_of_group(line)
    if size == 1:
      continue  # nothing is sent
    sizes = [_size(*array) for array in _ARRAY.findall(shapes)]
    if started and (shapes.startswith("((") or kind != "all-reduce"):  # first what goes in, then what comes out
      sizes = sizes[len(sizes) // 2 :]
    payload = sum(sizes) * (size if kind == "reduce-scatter" else 1)
    share = {"all-reduce": 2 * (size - 1) / size, "all-gather": (size - 1) / size, "reduce-scatter": (size - 1) / size}
    old = found.get(kind, Exchange(0, 0, 0.0))
    found[kind] = Exchange(old.count + 1, old.payload + payload, old.wire + payload * share.get(kind, 1.0))
  return found


def in_loops(text: str) -> dict[str, Exchange]:
  """As `count`, of the loops in the text alone: what is in them is exchanged again in every turn."""
  computations, lines = {}, []
  for line in text.splitlines():
    if match := _HEAD.match(line):
      lines = computations.setdefault(match[1], [])
    lines.append(line)
  found, waiting = set(), _LOOP.findall(text)
  while waiting:
    name = waiting.pop()
    if name in computations and name not in found:
      found.add(name)
      waiting += _CALLED.findall("\n".join(computations[name][1:]))
  return count("\n".join(line for name in sorted(found) for line in computations[name]))


def least(parameters: int, data: int, fsdp: int, width: int) -> float:
  """Bytes that each device must send in a step of data × fsdp devices.

  Along `fsdp` the parameters are gathered once and the gradients scattered once; along `data` each device's part of
  the gradients is summed up. Without what evaluation metrics and normalisation over the batch need, and taking all
  parameters as split.

  Args:
    parameters: their number.
    data, fsdp: of the mesh.
    width: bytes of a number in the products: XLA sends parameters and gradients as these take and give them.
  """
  split = 2 * (fsdp - 1) / fsdp * width * parameters
  summed = 2 * (data - 1) / data * width * parameters / fsdp
  return split + summed


def _size(dtype, dimensions):
  size = _BYTES[dtype]
  for dimension in filter(None, dimensions.split(",")):
    size *= int(dimension)
  return size


def _size_of_group(line):
  if match := _LISTED.search(line):
    return len(match[1].split(","))
  if match := _COUNTED.search(line):
    return int(match[1])
  if match := _NAMED.search(line):
    axes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
    return math.prod(int(axes[name]) for name in re.findall(r"'(\w+)'", match[2]))
  return 1
