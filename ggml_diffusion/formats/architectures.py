"""The table of model architectures: which tensors each has, and their shapes.

Deliberately not here: what the tensors do (the C core) and the checks (model_file.py).
Source: llama.cpp, src/models/llama.cpp. Letters: C hidden size, H query heads, G key/value heads,
D head size, F feed-forward size, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ggml_diffusion.formats.tensor_names import TOKEN_EMBEDDING


@dataclass(frozen=True)
class Architecture:
    """One model family: its tensors and their shapes in letters; "HD" is H * D, "D/2" half a head."""

    required_tensors: Mapping[str, tuple[str, ...]]
    optional_tensors: Mapping[str, tuple[str, ...]]
    layer_tensors: Mapping[str, tuple[str, ...]]  # each in every layer as "blk.N.<name>"


SUPPORTED_ARCHS: Mapping[str, Architecture] = {
    "llama": Architecture(
        required_tensors={TOKEN_EMBEDDING: ("V", "C"), "output_norm.weight": ("C",)},
        optional_tensors={"output.weight": ("V", "C"), "rope_freqs.weight": ("D/2",)},
        layer_tensors={
            "attn_norm.weight": ("C",),
            "attn_q.weight": ("HD", "C"),
            "attn_k.weight": ("GD", "C"),
            "attn_v.weight": ("GD", "C"),
            "attn_output.weight": ("C", "HD"),
            "ffn_norm.weight": ("C",),
            "ffn_gate.weight": ("F", "C"),
            "ffn_up.weight": ("F", "C"),
            "ffn_down.weight": ("C", "F"),
        },
    ),
}
