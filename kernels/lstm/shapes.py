"""Real shapes of the operation: the stages of Sequencer2D-S at 224 px and of our presets at 32 px."""

from typing import NamedTuple


class Shape(NamedTuple):
  """B images of H rows and W columns, C input channels, K hidden units of each of the four directions."""

  batch: int
  rows: int
  columns: int
  channels: int
  hidden: int


BILSTM2D = {
  "sequencer2d_s_stage1": Shape(64, 32, 32, 192, 48),
  "sequencer2d_s_stage2": Shape(64, 16, 16, 384, 96),
  "sequencer2d_small32_stage1": Shape(64, 16, 16, 192, 48),
  "sequencer2d_small32_stage2": Shape(64, 8, 8, 384, 96),
  "sequencer2d_tiny32_stage1": Shape(64, 16, 16, 96, 24),
}
