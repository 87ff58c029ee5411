"""Shapes of the operation: the lengths of LRA's Image and Text, FNet-Base as published, digits, and the corners."""

from typing import NamedTuple


class Shape(NamedTuple):
  """B sequences of L tokens, D channels."""

  batch: int
  tokens: int
  width: int


FFT_MIXING = {
  "digits": Shape(64, 64, 64),
  "fnet_tokens256_width128": Shape(16, 256, 128),
  "fnet_lra_image": Shape(16, 1024, 256),
  "fnet_tokens256_width1024": Shape(16, 256, 1024),
  "fnet_base": Shape(16, 512, 768),
  "fnet_tokens1024_width1024": Shape(8, 1024, 1024),
  "fnet_lra_text": Shape(4, 4096, 256),
  "fnet_tokens4096_width1024": Shape(2, 4096, 1024),
}
