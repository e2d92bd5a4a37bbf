"""Files for other programs: a model without adapter, a PEFT folder, and their comparison with the engine.

What a run exports by itself, the adapter in two formats, lies below in formats, since the engine loads it.
"""
