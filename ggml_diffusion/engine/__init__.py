"""The frozen network: logits, losses and gradients of a GGUF model.

What a step keeps and how rows are cut is here; `cpu/` is the engine that computes on the CPU.
"""
