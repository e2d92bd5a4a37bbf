"""The types in which a GGUF stores tensors that the engine can read: one table.

The core has the same list by itself (csrc/load.c); tests/formats/test_tensor_types.py compares the two.
Deliberately not here: what the blocks hold (csrc/kernels/unpack.h, and ggml for types without own kernels).
Source: ggml's `ggml_type` and its type traits (ggml.h, ggml-common.h).
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class TensorType:
    """One type of tensors.

    Attributes:
        name: as gguf writes it, "Q4_K".
        id: ggml's number.
        block: elements of a block; rows are whole blocks.
        bytes_block: bytes of a block.
        own_kernels: False: unpacked through ggml, which is slower.

    """

    name: str
    id: int
    block: int
    bytes_block: int
    own_kernels: bool

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.bytes_block / self.block


_ALL = (
    TensorType("F32", 0, 1, 4, True),
    TensorType("F16", 1, 1, 2, True),
    TensorType("BF16", 30, 1, 2, True),
    TensorType("Q8_0", 8, 32, 34, True),
    TensorType("Q4_0", 2, 32, 18, True),
    TensorType("Q4_1", 3, 32, 20, True),
    TensorType("Q5_0", 6, 32, 22, True),
    TensorType("Q5_1", 7, 32, 24, True),
    TensorType("Q2_K", 10, 256, 84, True),
    TensorType("Q3_K", 11, 256, 110, True),
    TensorType("Q4_K", 12, 256, 144, True),
    TensorType("Q5_K", 13, 256, 176, True),
    TensorType("Q6_K", 14, 256, 210, True),
    TensorType("IQ4_NL", 20, 32, 18, True),
    TensorType("IQ4_XS", 23, 256, 136, True),
    TensorType("MXFP4", 39, 32, 17, True),
    TensorType("NVFP4", 40, 64, 36, False),
    TensorType("IQ1_S", 19, 256, 50, False),
    TensorType("IQ1_M", 29, 256, 56, False),
    TensorType("IQ2_XXS", 16, 256, 66, False),
    TensorType("IQ2_XS", 17, 256, 74, False),
    TensorType("IQ2_S", 22, 256, 82, False),
    TensorType("IQ3_XXS", 18, 256, 98, False),
    TensorType("IQ3_S", 21, 256, 110, False),
    TensorType("TQ1_0", 34, 256, 54, False),
    TensorType("TQ2_0", 35, 256, 66, False),
    TensorType("Q1_0", 41, 128, 18, False),
    TensorType("Q2_0", 42, 64, 18, False),
)
TENSOR_TYPES: Mapping[str, TensorType] = {tensor_type.name: tensor_type for tensor_type in _ALL}
SUPPORTED_TYPES = tuple(TENSOR_TYPES)

# Of types that no model stores its matrices in: ggml's number -> name, elements and bytes of a block.
OTHER_TYPES: Mapping[int, tuple[str, int, int]] = {
    9: ("Q8_1", 32, 40),
    15: ("Q8_K", 256, 292),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
}
