"""Operations on arrays: one folder each, with a reference, the fastest XLA form and, later, GPU kernels.

Nothing here knows of models, tasks or configs. Importing this package touches no device.
"""
