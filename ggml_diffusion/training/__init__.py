"""A run and its steps: noisy batches, updates, checkpoints, metrics, and the checks before the first step.

`run.py` tells the whole run, `trainer.py` one step. The formulas are in `objective`, the network in `engine`.
"""
