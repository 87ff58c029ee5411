"""Tasks, where their bytes come from, the order of examples, and augmentation on the device."""
