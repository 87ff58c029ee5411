"""Real shapes of the operation: ConvMixer at 32 px (patches of 2 and of 1), and a small one for tests on CPU."""

from typing import NamedTuple


class Shape(NamedTuple):
  """B images of H rows and W columns, C channels, square kernels of size K."""

  batch: int
  rows: int
  columns: int
  channels: int
  kernel: int


DEPTHWISE_CONV = {
  "convmixer256_patch2_kernel5": Shape(64, 16, 16, 256, 5),
  "convmixer256_patch2_kernel9": Shape(64, 16, 16, 256, 9),
  "convmixer256_patch1_kernel9": Shape(64, 32, 32, 256, 9),
  "small": Shape(64, 8, 8, 64, 3),
}
