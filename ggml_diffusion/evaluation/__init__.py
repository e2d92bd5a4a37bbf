"""The measures that show whether a conversion works; `ggml-diffusion evaluate` runs them all (suite.py).

Every measure takes held-out sequences and gives estimates with bootstrap intervals by sequence; all arms of a
comparison see the same masks, holes or prompts.
"""
