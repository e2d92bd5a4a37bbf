"""The mathematics of masked diffusion in NumPy: noise, blocks, annealing, time, shifted rows, and AdamW.

Components that take plain values and know no model, no file and no settings.
"""
