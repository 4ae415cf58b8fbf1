"""Files, processes, the machine, tensors on disk and formatting; nothing here knows a model."""
