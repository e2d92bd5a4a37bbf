"""Every setting of a conversion once: its key in the file, its flag, its help and its check.

Read by `app` and `training` only; everything below takes plain values.
"""
