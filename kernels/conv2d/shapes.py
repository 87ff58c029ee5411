"""Real shapes of the operation: the layers of ResNet-18 at 32 px (with a 3×3 stem)."""

from typing import NamedTuple


class Shape(NamedTuple):
  """B images of H rows and W columns, from C to O channels, square kernels of size K; zeros on every side."""

  batch: int
  rows: int
  columns: int
  channels: int
  outputs: int
  kernel: int
  strides: int
  padding: int


CONV2D = {
  "resnet18_stem": Shape(64, 32, 32, 3, 64, 3, 1, 1),
  "resnet18_stage1": Shape(64, 32, 32, 64, 64, 3, 1, 1),
  "resnet18_stage2_first": Shape(64, 32, 32, 64, 128, 3, 2, 1),
  "resnet18_stage2_shortcut": Shape(64, 32, 32, 64, 128, 1, 2, 0),
  "resnet18_stage2": Shape(64, 16, 16, 128, 128, 3, 1, 1),
  "resnet18_stage3": Shape(64, 8, 8, 256, 256, 3, 1, 1),
  "resnet18_stage4": Shape(64, 4, 4, 512, 512, 3, 1, 1),
}
