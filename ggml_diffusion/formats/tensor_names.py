"""The names of all tensors that are trained, in both adapter formats, and of the base's that they belong to.

A LoRA pair has the name of the GGUF tensor that it adapts and a suffix: "blk.0.attn_q.weight.lora_a". GGUF
adapters for other programs use the same names, so nothing is renamed between training and export.
Deliberately not here: which tensors an architecture has (architectures.py), shapes (lora.py).
"""

TOKEN_EMBEDDING = "token_embd.weight"
LORA_A_SUFFIX = ".lora_a"
LORA_B_SUFFIX = ".lora_b"
MASK_EMBEDDING = "mask_embedding"
TIME_WEIGHT = "time_embedding.weight"
TIME_BIAS = "time_embedding.bias"


def layer_tensor(layer: int, part: str) -> str:
    """The name of a layer's tensor in the base, e.g. "blk.3.attn_q.weight"."""
    return f"blk.{layer}.{part}"


def is_lora(name: str) -> bool:
    """Whether a tensor is half of a LoRA pair."""
    return name.endswith((LORA_A_SUFFIX, LORA_B_SUFFIX))
