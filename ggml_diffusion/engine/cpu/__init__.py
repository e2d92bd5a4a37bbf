"""The engine on the CPU: the C core of csrc/ behind NumPy arrays.

Only this folder imports the compiled extension.
"""
