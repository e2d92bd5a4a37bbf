"""A conversion as one GGUF without adapter, for programs that take a model file and nothing else.

W + (alpha / R) B A goes into each adapted tensor, the mask embedding into the mask token's row, and the time
embedding at one time t into every row of the token embedding. Where the head is the token embedding, the file
gets an output matrix of its own, as the head was. What nothing changes is copied byte for byte. What changes
is packed again, and a second rounding to four bits costs as much as the first one did: on a SmolLM2 of Q4_1
it takes a third of the predictions with it (docs/formats.md). So it goes to eight bits, unless other types
are asked for.

A piece of one tensor is unpacked at a time. Deliberately not here: which architecture the file is
(targets.py), and what packing again costs (cost.py).
Letters: C hidden size, V vocabulary, R rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.errors import UserError, quoted
from ggml_diffusion.export.targets import ROUTER, diffusion_arch, explicit_head, target_keys, target_place
from ggml_diffusion.formats.adapter_file import DiffusionCheckpoint
from ggml_diffusion.formats.fused_lora import layout_of, stack_pairs
from ggml_diffusion.formats.gguf_adapter import KEY_PREFIX
from ggml_diffusion.formats.gguf_reader import TensorInfo, read_header
from ggml_diffusion.formats.gguf_writer import KeyValue, NewTensor, write_gguf
from ggml_diffusion.formats.model_file import ModelFile
from ggml_diffusion.formats.packing import NEED_IMPORTANCE, pack_rows, row_bytes, unpack_rows
from ggml_diffusion.formats.tensor_names import (
    LORA_A_SUFFIX,
    LORA_B_SUFFIX,
    MASK_EMBEDDING,
    TOKEN_EMBEDDING,
    layer_tensor,
)
from ggml_diffusion.formats.tensor_types import TENSOR_TYPES
from ggml_diffusion.generation.reading import ReadingRule
from ggml_diffusion.regular_file import open_regular

OWN, CHANGED_TYPE = "OWN", "Q8_0"
ArchChoice = Literal["diffusion", "same"]
STANDALONE_KEY, TIME_KEY = KEY_PREFIX + "standalone", KEY_PREFIX + "time"
_PIECE_VALUES = 1 << 22  # numbers of a tensor that are unpacked at a time: 16 MiB
_HEAD = "output.weight"
# llama-diffusion-cli puts every prompt into the file's chat template, and ChatML where there is none. A
# conversion that was trained on plain text gets a template that adds nothing.
_TEMPLATE_KEY = "tokenizer.chat_template"
_PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@dataclass(frozen=True)
class Standalone:
    """How a conversion is written as one file.

    Attributes:
        arch: of the file, as llama.cpp calls it.
        type_name: of all matrices, "F16"; "OWN" = each keeps its own; None = those that change get
            `CHANGED_TYPE` where theirs has fewer bits, the others keep theirs.
        time: diffusion time whose embedding is folded in; None = the conversion has no time embedding.

    """

    arch: str
    type_name: str | None
    time: float | None


def plan_standalone(
    base: ModelFile,
    checkpoint: DiffusionCheckpoint,
    *,
    arch: ArchChoice = "diffusion",
    type_name: str | None = None,
    time: float | None = None,
) -> Standalone:
    """How a conversion would be written, or why it cannot be.

    Args:
        base: from `read_model`; the conversion must fit it.
        checkpoint: the conversion.
        arch: "diffusion" = one that llama-diffusion-cli runs; "same" = the base's own.
        type_name: of `TENSOR_TYPES`, or "own", in either case; see `Standalone`.
        time: in [0, 1]; None = where half of the text is masked.

    Raises:
        UserError: the conversion does not fit, or llama.cpp would compute something else.

    """
    checkpoint.check_merges()
    checkpoint.check_shapes(base)
    rule = ReadingRule.of_checkpoint(checkpoint)
    if rule.causal_ratio > 0:
        raise UserError(
            f"the conversion's attention is at causal ratio {rule.causal_ratio:g}, and llama.cpp knows only "
            f"0 and 1: train until final_causal_ratio 0 is reached"
        )
    if rule.attention_sink and arch == "diffusion":
        raise UserError(
            "the first token sees itself alone in this conversion, and llama-diffusion-cli cannot do that: "
            "convert with --no-attention-sink, or take --arch same for programs that decode it by itself"
        )
    if time is not None and rule.time_offset is None:
        raise UserError(f"--time {time:g}: the conversion has no time embedding")
    if time is not None and not 0 <= time <= 1:
        raise UserError(f"--time {time:g}: a diffusion time is a number from 0 to 1")
    if time is None and rule.time_offset is not None:
        time = rule.noise_schedule.time_at(0.5)
    if type_name is not None and (type_name := type_name.upper()) not in (OWN, *TENSOR_TYPES):
        known = ", ".join((OWN, *TENSOR_TYPES)).lower()
        raise UserError(f"--type {quoted(type_name.lower())}: known are {known}")
    target = diffusion_arch(base) if arch == "diffusion" else base.arch
    plan = Standalone(target, type_name, time)
    for edit in _edits(base, checkpoint, plan, 1):
        edit.check(base)
    return plan


def write_standalone(
    path: Path, base: ModelFile, checkpoint: DiffusionCheckpoint, plan: Standalone, n_threads: int = 1
) -> None:
    """Write the file so that it is whole or not there.

    Args:
        path: where to; not one of the base's own files.
        base: as for the plan.
        checkpoint: as for the plan.
        plan: from `plan_standalone`.
        n_threads: that pack.

    Raises:
        UserError: reading or writing failed, or a merged number is too large for its type.

    """
    if any(path.resolve() == part.resolve() for part in base.parts):
        raise UserError(f"{path}: is the base model itself; name another file")
    tensors = [
        NewTensor(*target_place(plan.arch, edit.name, edit.info.shape), edit.type_name, edit.pieces)
        for edit in _edits(base, checkpoint, plan, n_threads)
    ]
    if plan.arch == "rnd1":
        tensors += [
            NewTensor(layer_tensor(layer, ROUTER), (1, base.C), "F32", lambda: [bytes(4 * base.C)])
            for layer in range(base.L)
        ]
    write_gguf(path, plan.arch, _keys(base, checkpoint, plan), tensors)


def _keys(base: ModelFile, checkpoint: DiffusionCheckpoint, plan: Standalone) -> dict[str, KeyValue]:
    metadata = checkpoint.metadata
    keys = target_keys(base, plan.arch)
    keys["tokenizer.ggml.mask_token_id"] = KeyValue(metadata.mask_token_id, "u32")
    keys["diffusion.shift_logits"] = KeyValue(metadata.prediction == "shifted", "bool")
    if plan.type_name not in (None, OWN):
        keys.pop("general.file_type", None)  # which speaks of the base's types
    if plan.arch != base.arch and not metadata.prompts:
        keys = {name: key for name, key in keys.items() if not name.startswith(_TEMPLATE_KEY)}
        keys[_TEMPLATE_KEY] = KeyValue(_PLAIN_TEMPLATE, "str")
    keys[STANDALONE_KEY] = KeyValue(True, "bool")
    keys[KEY_PREFIX + "base_model"] = KeyValue(metadata.base_model, "str")
    keys[KEY_PREFIX + "base_sha256"] = KeyValue(metadata.base_sha256, "str")
    keys[KEY_PREFIX + "conversion_steps"] = KeyValue(metadata.conversion_steps, "u64")
    keys[KEY_PREFIX + "version"] = KeyValue(metadata.version, "str")
    if plan.time is not None:
        keys[TIME_KEY] = KeyValue(plan.time, "f64")
    return keys


# -- tensors -----------------------------------------------------------------------------------------


def _offset(checkpoint: DiffusionCheckpoint, plan: Standalone) -> NDArray[np.float32] | None:
    """The time embedding (C,) at the plan's time."""
    if plan.time is None:
        return None
    offset = ReadingRule.of_checkpoint(checkpoint).embedding_offset(np.array([plan.time], np.float32))
    assert offset is not None
    row: NDArray[np.float32] = offset[0]
    return row


def _edits(
    base: ModelFile, checkpoint: DiffusionCheckpoint, plan: Standalone, n_threads: int
) -> list["_Edit"]:
    """What becomes of each of the base's tensors, in its order, and the output matrix where it is new."""
    adapter = checkpoint.adapter()
    pairs = stack_pairs(adapter.tensors, layout_of(base, adapter.tensors))
    places = _Places(base)
    edits = []
    for info in base.tensors.values():
        edit = _Edit(info.name, info, places, plan.type_name, n_threads)
        if info.name == TOKEN_EMBEDDING:
            edit.mask_row = (checkpoint.metadata.mask_token_id, checkpoint.tensors[MASK_EMBEDDING])
            edit.offset = _offset(checkpoint, plan)
        elif info.name + LORA_A_SUFFIX in pairs:
            a, b = pairs[info.name + LORA_A_SUFFIX], pairs[info.name + LORA_B_SUFFIX]
            edit.pair = (a, b * np.float32(checkpoint.metadata.alpha / len(a)))
        edits.append(edit)
    if explicit_head(base, every_row_changes=plan.time is not None):
        edits.append(_Edit(_HEAD, base.tensors[TOKEN_EMBEDDING], places, plan.type_name, n_threads))
    return edits


class _Places:
    """Reads rows of the base's tensors, from whichever part of it has them."""

    def __init__(self, base: ModelFile) -> None:
        self._path_of: dict[str, Path] = {}
        for part in base.parts:
            names = base.tensors if len(base.parts) == 1 else read_header(part).tensors
            self._path_of |= dict.fromkeys(names, part)

    def pieces(self, info: TensorInfo, rows_a_piece: int) -> Iterator[tuple[int, bytes]]:
        """First row and bytes of a tensor's rows, so many at a time."""
        path, n_row = self._path_of[info.name], row_bytes(info.type_name, info.shape[-1])
        with open_regular(path) as file:
            try:
                file.seek(info.offset_bytes)
                for first in range(0, info.n_bytes // n_row, rows_a_piece):
                    wanted = min(rows_a_piece * n_row, info.n_bytes - first * n_row)
                    piece = file.read(wanted)
                    if len(piece) != wanted:
                        raise UserError(f"{path}: has become shorter while it was read")
                    yield first, piece
            except OSError as error:
                raise UserError(f"{path}: cannot be read: {error.strerror}") from None


@dataclass
class _Edit:
    """What becomes of one tensor of the base.

    Attributes:
        name: in the file that is written, if that has the base's architecture.
        info: where it is read from.
        places: reads it.
        wanted_type: as in `Standalone`.
        n_threads: that pack.
        pair: A (R, in) and B (out, R), B times the scale.
        mask_row: a row's number, and what is added to it (C,).
        offset: what is added to every row (C,).

    """

    name: str
    info: TensorInfo
    places: _Places
    wanted_type: str | None
    n_threads: int
    pair: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
    mask_row: tuple[int, NDArray[np.float32]] | None = None
    offset: NDArray[np.float32] | None = None

    @property
    def type_name(self) -> str:
        """In the file that is written; vectors stay as they are."""
        own = self.info.type_name
        if len(self.info.shape) == 1 or self.wanted_type == OWN:
            return own
        if self.wanted_type is not None:
            return self.wanted_type
        is_coarse = TENSOR_TYPES[own].bits < TENSOR_TYPES[CHANGED_TYPE].bits
        return CHANGED_TYPE if self._has_edits and is_coarse else own

    def pieces(self) -> Iterator[bytes | memoryview]:
        """The tensor's new bytes."""
        columns = self.info.shape[-1]
        rows_a_piece = max(1, _PIECE_VALUES // columns)
        for first, piece in self.places.pieces(self.info, rows_a_piece):
            if not self._changes_all:
                yield self._with_mask_row(first, piece)
                continue
            values = unpack_rows(piece, self.info.type_name, columns)
            if self.pair is not None:
                values += self.pair[1][first : first + len(values)] @ self.pair[0]
            if self.offset is not None:
                values += self.offset
            if self.mask_row is not None and first <= self.mask_row[0] < first + len(values):
                values[self.mask_row[0] - first] += self.mask_row[1]
            yield self._packed(values).data.cast("B")

    @property
    def _changes_all(self) -> bool:
        is_repacked = self.type_name != self.info.type_name
        return is_repacked or self.pair is not None or self.offset is not None

    @property
    def _has_edits(self) -> bool:
        return self.pair is not None or self.offset is not None or self.mask_row is not None

    def check(self, base: ModelFile) -> None:
        """Refuse a type in which the tensor cannot be packed."""
        known, columns = TENSOR_TYPES[self.type_name], self.info.shape[-1]
        if columns % known.block:
            base.fail(
                f"tensor {quoted(self.info.name)} has rows of {columns}, and {known.name} packs blocks of "
                f"{known.block}; give another --type, such as q8_0"
            )
        if (self._changes_all or self._has_edits) and known.name in NEED_IMPORTANCE:
            base.fail(
                f"tensor {quoted(self.info.name)} would be of type {known.name}, which ggml packs only with "
                f"an importance matrix; give another --type, such as q4_k"
            )

    def _with_mask_row(self, first: int, piece: bytes) -> bytes:
        """Rows as they are, but for the mask token's."""
        n_row = row_bytes(self.info.type_name, self.info.shape[-1])
        if self.mask_row is None or not first <= self.mask_row[0] < first + len(piece) // n_row:
            return piece
        start = (self.mask_row[0] - first) * n_row
        values = unpack_rows(piece[start : start + n_row], self.info.type_name, self.info.shape[-1])
        row = self._packed(values + self.mask_row[1])
        return piece[:start] + row.tobytes() + piece[start + n_row :]

    def _packed(self, values: NDArray[np.float32]) -> NDArray[np.uint8]:
        try:
            return pack_rows(values, self.type_name, self.n_threads)
        except UserError as error:
            raise UserError(f"tensor {quoted(self.info.name)}, merged, {error}") from None
