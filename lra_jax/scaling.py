"""Predicts the throughput of data-parallel training on 1 to 1024 GPUs: `python -m lra_jax.scaling [MODEL@SIZE ...]`.

A model of weak scaling: the batch of one GPU stays the same, and every step sums up the gradients of all.

  step time = compute + max(0, exchange − share · backward) + latency

Compute: operations of the products at a fixed share of the GPU's peak. Backward: two thirds of it; gradients are ready
layer by layer, so a share of it hides their exchange. Exchange, as NCCL does it between nodes of 8 GPUs: scattered and
gathered in the node over NVLink, an eighth of the gradients summed up between nodes over the network. Latency: a tree
over the nodes. Every number in `Machine` and the share of the peak are assumptions, said with the result.
"""

import dataclasses
import math
import sys

from lra_jax import errors

DEFAULT = ("sequencer2d_l@224", "vit_b16@224")
# Share of the peak that products reach in a training step. Assumed: a plain ViT in bfloat16 reaches about this on
# Hopper; a Sequencer's LSTMs are recurrences of small products.
PEAK_SHARE = {"sequencer2d_l": 0.15, "vit_b16": 0.4}
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclasses.dataclass(frozen=True)
class Machine:
  """NVIDIA H200 SXM in nodes of 8, one 400 Gbit/s adapter a GPU; bandwidths of NCCL's rings, a tenth below the wire's.

  Attributes:
    peak: bfloat16 operations a second.
    node: GPUs of a node.
    nvlink, network: bytes a second that each GPU sends in its node, and to other nodes.
    latency: seconds of one hop between nodes.
    hidden: share of the backward pass that hides the exchange.
  """

  peak: float = 989e12
  node: int = 8
  nvlink: float = 400e9
  network: float = 45e9
  latency: float = 15e-6
  hidden: float = 0.8


def step_seconds(
  parameters: int, operations: float, batch: int, gpus: int, peak_share: float, machine: Machine, width: int = 2
) -> float:
  """Time of one step.

  Args:
    parameters: their number.
    operations: of the forward pass of one example; the backward pass has twice as many.
    batch: examples of one GPU.
    gpus: n; up to a node, or whole nodes.
    peak_share: see `PEAK_SHARE`.
    machine: what they run on.
    width: bytes of a gradient as it is sent; XLA sends bfloat16 where products are.
  """
  compute = 3 * operations * batch / (machine.peak * peak_share)
  local = min(gpus, machine.node)
  nodes = gpus // local
  size = width * parameters
  exchange = 2 * (local - 1) / local * size / machine.nvlink
  exchange += 2 * (nodes - 1) / nodes * size / local / machine.network
  latency = 2 * math.log2(nodes) * machine.latency
  return compute + max(0.0, exchange - machine.hidden * compute * 2 / 3) + latency


def describe(name: str, size: int) -> tuple[int, float]:
  """Parameters of a model at S = 1000 classes, and operations of the products of one image's forward pass.

  Args:
    name: of the model.
    size: H = W of the image in pixels.

  Raises:
    UserError: no such model.
  """
  import jax
  import jax.numpy as jnp
  from flax import nnx

  from lra_jax import flops, models

  make = lambda: models.create(name, input_shape=(size, size, 3), num_classes=1000, rngs=nnx.Rngs(0))
  model = nnx.eval_shape(make)
  graphdef, state = nnx.split(model)
  image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  traced = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)).trace(state, image)
  return models.count_params(model), flops.count(traced.jaxpr)


def table(name: str, size: int, batch: int, machine: Machine) -> str:
  """A Markdown table of throughput by number of GPUs, with the assumptions above it."""
  parameters, operations = describe(name, size)
  share = PEAK_SHARE.get(name, 0.3)
  lines = [
    f"{name} at {size} px: {parameters:,} parameters, {operations / 1e9:.1f} GFLOP forward; {batch} images a GPU, "
    f"{share:.0%} of {machine.peak / 1e12:.0f} TFLOP/s assumed",
    "",
    "| GPUs | ms a step | images/s | efficiency |",
    "|---|---|---|---|",
  ]
  alone = step_seconds(parameters, operations, batch, 1, share, machine)
  for gpus in GPUS:
    seconds = step_seconds(parameters, operations, batch, gpus, share, machine)
    lines.append(f"| {gpus} | {1e3 * seconds:.2f} | {gpus * batch / seconds:,.0f} | {alone / seconds:.1%} |")
  return "\n".join(lines)


def main() -> None:
  """Prints a table for every model."""
  names = errors.parse_flags(sys.argv, required=(), positional="models", optional=True) or list(DEFAULT)
  for text in names:
    name, _, size = text.partition("@")
    if not size.isdigit():
      raise errors.UserError(f"{text!r}: expected a model and its image size, such as vit_b16@224")
    print(table(name, int(size), 128, Machine()), end="\n\n", flush=True)


if __name__ == "__main__":
  errors.exit_on_user_error(main)
