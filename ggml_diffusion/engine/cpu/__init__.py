"""The engine on the CPU: the C core of csrc/ behind NumPy arrays."""
