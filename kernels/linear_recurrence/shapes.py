"""Real shapes of the operation, as one direction of one layer sees it."""

from typing import NamedTuple


class Shape(NamedTuple):
  """B sequences of T steps, N complex states."""

  batch: int
  steps: int
  states: int


LINEAR_RECURRENCE = {
  "s5_lra_image": Shape(50, 1024, 192),  # 384 states with conjugate symmetry: half of them are computed
  "lru_lra_image": Shape(32, 1024, 256),
  "digits": Shape(64, 64, 32),
}
