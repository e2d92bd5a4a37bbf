"""What is on disk: GGUF models, adapters in both formats, safetensors, and the names of tensors.

Readers are strict and refuse a bad file in one line; writers leave the old file until the new one is whole.
"""
