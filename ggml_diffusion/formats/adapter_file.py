"""A conversion as one file: everything that was trained, and what is needed to use it.

`adapter.safetensors` is the whole of it. `adapter.gguf` holds the same for llama.cpp (gguf_adapter.py), so a
conversion can be loaded from either. docs/formats.md describes both.

Deliberately not here: the optimizer's state (checkpoint.py), the base model, and settings: `config` is
kept as it was given and only shown. Source: the seed's "Checkpoint Format". Letters: C hidden size, R
rank.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ggml_diffusion.errors import UserError, one_line, quoted
from ggml_diffusion.formats.gguf_adapter import (
    KEY_PREFIX,
    KeyValue,
    float_array,
    read_gguf_adapter,
    write_gguf_adapter,
)
from ggml_diffusion.formats.lora import LoraAdapter, ModelDims, TargetModule, lora_ranks
from ggml_diffusion.formats.model_file import ModelFile
from ggml_diffusion.formats.safetensors_file import parse_object, read_safetensors, write_safetensors
from ggml_diffusion.formats.tensor_names import MASK_EMBEDDING, TIME_BIAS, TIME_WEIGHT
from ggml_diffusion.regular_file import open_regular

FORMAT = 1
ContextKind = Literal["frozen", "adapted"]
_LORA_NAME = re.compile(
    rf"blk\.\d+\.({'|'.join(module.gguf_name for module in TargetModule)})\.weight\.lora_[ab]"
)


# Limits of what a file may say. Alpha has to survive float32, and the counts a GGUF's 64 bits.
MIN_ALPHA, MAX_ALPHA = 1e-6, 1e6
MAX_TIMESTEPS = 1_000_000
MAX_MARGIN = 1024  # tokens
_MAX_COUNT, _MAX_SIZE = 2**63 - 1, 2**31 - 1
_Text = Annotated[str, Field(max_length=4096)]
_Count = Annotated[int, Field(ge=0, le=_MAX_COUNT)]


class CheckpointMetadata(BaseModel):
    """What a conversion belongs to, how far it was trained, and how its tensors are to be used."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    base_model: _Text = Field(description="name of the base model or its file")
    base_sha256: str = Field(pattern="^[0-9a-f]{64}$", description="of the base GGUF")
    conversion_steps: _Count = Field(description="optimizer steps")
    training_tokens: _Count = Field(description="tokens that went through the model in training")
    final_causal_ratio: float = Field(
        ge=0, le=1, description="1 = causal, 0 = bidirectional; generation uses it"
    )
    prediction: Literal["shifted", "aligned"] = Field(description="which output row predicts a token")
    mask_token_id: int = Field(ge=0, le=_MAX_SIZE)
    alpha: float = Field(ge=MIN_ALPHA, le=MAX_ALPHA, description="scale of a LoRA pair is alpha / R")
    time_max_timesteps: int | None = Field(
        default=None,
        ge=2,
        le=MAX_TIMESTEPS,
        description="rows of the sinusoidal table; None without a time embedding",
    )
    block_size: int | None = Field(
        default=None,
        ge=1,
        le=_MAX_SIZE,
        description="tokens of a block in generation; None = whole sequences",
    )
    context: ContextKind = Field(
        default="adapted",
        description="rows of tokens that stand: the base's own (frozen), or adapted as all others",
    )
    margin: int = Field(
        default=0,
        ge=0,
        le=MAX_MARGIN,
        description="tokens on each side of masks that have a noisy row beside the one that stands",
    )
    attention_sink: bool = Field(
        default=False, description="the first token of a text sees itself alone, at any causal ratio"
    )
    prompts: bool = Field(
        default=False,
        description="trained on prompts with responses: the time tells how much of these is masked",
    )
    created_at: _Text = Field(description="ISO 8601, UTC")
    version: _Text = Field(description="of ggml-diffusion")


class RecordedSettings(BaseModel):
    """Those of the run's settings that are used again; all others are only shown."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)

    base_model: _Text | None = Field(default=None, description="path of the base GGUF")
    data: list[_Text] | None = Field(default=None, description="paths of the training text")
    include: list[_Text] | None = Field(default=None, description="patterns of other files read in folders")
    sequence_length: int | None = Field(default=None, ge=2, le=_MAX_SIZE)
    held_out_fraction: float | None = Field(default=None, ge=0, lt=1)


class RecordedSchedule(BaseModel):
    """Of the noise schedule what the conversion is read by."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    type: str = Field(default="none", max_length=64)


@dataclass
class DiffusionCheckpoint:
    """A conversion.

    Attributes:
        config: the resolved settings of the run, as plain JSON values.
        tensors: float32: LoRA pairs "blk.N.<projection>.weight.lora_a" (R, in) and ".lora_b" (out, R),
            "mask_embedding" (C,) and, with a time embedding, "time_embedding.weight" (C, dim) and
            "time_embedding.bias" (C,).
        metadata: what it belongs to and how it is used.
        noise_schedule: parameters of the noise schedule, as plain JSON values.

    """

    config: dict[str, Any]
    tensors: dict[str, NDArray[np.float32]]
    metadata: CheckpointMetadata
    noise_schedule: dict[str, Any]

    @property
    def settings(self) -> RecordedSettings:
        """Of `config` what is used again.

        Raises:
            UserError: a value of another type or out of its range.

        """
        return _validated(RecordedSettings, self.config, "adapter", "config")

    @property
    def schedule(self) -> RecordedSchedule:
        """Of `noise_schedule` what is used; raises as `settings`."""
        return _validated(RecordedSchedule, self.noise_schedule, "adapter", "noise_schedule")

    def adapter(self) -> LoraAdapter:
        """What the engine takes; the arrays are shared, not copied."""
        lora = {name: array for name, array in self.tensors.items() if _LORA_NAME.fullmatch(name)}
        return LoraAdapter(
            self.metadata.alpha, lora, self.metadata.mask_token_id, self.tensors[MASK_EMBEDDING]
        )

    def check_base(self, sha256: str, allow_other_base: bool = False) -> None:
        """Refuse a base model that this conversion was not trained on.

        Raises:
            UserError: another base, unless it is allowed.

        """
        expected = self.metadata.base_sha256
        if sha256 != expected and not allow_other_base:
            raise UserError(
                f"the adapter was trained on another base model, {quoted(self.metadata.base_model)} "
                f"(sha256 {expected[:12]}...), than the one given (sha256 {sha256[:12]}...)"
            )

    def check_shapes(self, dims: ModelDims) -> None:
        """Refuse a model whose sizes do not fit.

        Raises:
            UserError: names the tensor.

        """
        self.adapter().check(dims)
        if TIME_WEIGHT in self.tensors and self.tensors[TIME_WEIGHT].shape[0] != dims.C:
            shape = self.tensors[TIME_WEIGHT].shape
            raise UserError(
                f"adapter: tensor '{TIME_WEIGHT}' has shape {shape}, but the model needs ({dims.C}, dim)"
            )

    def check_merges(self) -> None:
        """Refuse an export that lets the adapter act on all tokens.

        Raises:
            UserError: a frozen context.

        """
        if self.metadata.context == "frozen":
            raise UserError(
                "the conversion has a frozen context: its adapter acts on masks alone and cannot be merged; "
                "use generate, or convert with --context adapted"
            )

    def save(self, path: str | Path) -> None:
        """Write `adapter.safetensors`; the file is whole or not there.

        Raises:
            UserError: a tensor is missing, unknown, of the wrong shape or not finite, or writing failed.

        """
        _check_tensors(self.tensors, self.metadata, str(path))
        document = {
            "format": FORMAT,
            "config": self.config,
            "metadata": self.metadata.model_dump(),
            "noise_schedule": self.noise_schedule,
        }
        write_safetensors(Path(path), self.tensors, document)

    def save_gguf(self, path: str | Path, base: ModelFile) -> None:
        """Write `adapter.gguf` for llama.cpp; the file is whole or not there.

        Raises:
            UserError: the tensors do not fit the base, are not finite, or writing failed.

        """
        _check_tensors(self.tensors, self.metadata, str(path))
        self.check_shapes(base)
        keys: dict[str, KeyValue] = {"format": FORMAT}
        # Alpha and the mask token have keys of their own; a key cannot hold None.
        keys |= self.metadata.model_dump(exclude={"alpha", "mask_token_id"}, exclude_none=True)
        keys["noise_schedule"] = json.dumps(self.noise_schedule, sort_keys=True, allow_nan=False)
        keys["config"] = json.dumps(self.config, sort_keys=True, allow_nan=False)
        keys |= {name: self.tensors[name] for name in (TIME_WEIGHT, TIME_BIAS) if name in self.tensors}
        write_gguf_adapter(Path(path), self.adapter(), base, keys)

    @classmethod
    def load(cls, path: str | Path) -> "DiffusionCheckpoint":
        """Read a conversion from `adapter.safetensors` or `adapter.gguf`; the content decides which it is.

        Raises:
            UserError: the file is missing, malformed, or holds no conversion; the message names the key
            at fault.

        """
        path = Path(path)
        return _from_gguf(path) if is_gguf(path) else _from_safetensors(path)


def creation_time() -> str:
    """Now, in UTC; SOURCE_DATE_EPOCH overrides it, so that equal runs can write equal files.

    Raises:
        UserError: it is no number of seconds, or of a time that no calendar has.

    """
    fixed = os.environ.get("SOURCE_DATE_EPOCH", "").strip()
    try:
        now = datetime.fromtimestamp(int(fixed), timezone.utc) if fixed else datetime.now(timezone.utc)
    except (ValueError, OverflowError, OSError):
        raise UserError(
            f"the environment's SOURCE_DATE_EPOCH is {quoted(fixed)}: it must be seconds since 1970"
        ) from None
    return now.isoformat(timespec="seconds")


def load_adapter(path: str | Path, arch: str | None = None) -> LoraAdapter:
    """Read what the engine takes from a conversion or from any LoRA adapter for llama.cpp.

    Args:
        path: .safetensors of this package, or .gguf.
        arch: if given, the architecture that a GGUF adapter must be for.

    Raises:
        UserError: the file is missing, malformed, for another architecture, or of another kind.

    """
    path = Path(path)
    if not is_gguf(path):
        return _from_safetensors(path).adapter()
    adapter, file = read_gguf_adapter(path)
    if arch is not None and file.arch != arch:
        file.fail(f"is an adapter for architecture {quoted(file.arch)}, but the model is {quoted(arch)}")
    return adapter


def is_gguf(path: Path) -> bool:
    """Whether a file starts as a GGUF file does; False also if it cannot be read."""
    try:
        with open_regular(path) as file:
            return file.read(4) == b"GGUF"
    except (UserError, OSError):
        return False  # the safetensors reader says what is wrong with it


def _from_safetensors(path: Path) -> DiffusionCheckpoint:
    tensors, document = read_safetensors(path)
    if not document:
        raise UserError(f"{path}: has no 'ggml_diffusion' metadata: it was not written by ggml-diffusion")
    _check_format(path, document.get("format"))
    for key in ("config", "metadata", "noise_schedule"):
        if not isinstance(document.get(key), dict):
            raise UserError(f"{path}: key '{key}' of its metadata is missing or no JSON object")
    metadata = _validated(CheckpointMetadata, document["metadata"], str(path), "metadata")
    return _checked(
        path, DiffusionCheckpoint(document["config"], tensors, metadata, document["noise_schedule"])
    )


def _from_gguf(path: Path) -> DiffusionCheckpoint:
    adapter, file = read_gguf_adapter(path)
    if KEY_PREFIX + "format" not in file.metadata:
        file.fail("is a LoRA adapter, but not one written by ggml-diffusion: it cannot denoise")
    _check_format(path, file.metadata[KEY_PREFIX + "format"])
    fields = {
        name: file.metadata[KEY_PREFIX + name]
        for name in CheckpointMetadata.model_fields
        if KEY_PREFIX + name in file.metadata
    }
    metadata = _validated(CheckpointMetadata, fields | {"alpha": adapter.alpha}, str(path), "metadata")
    tensors = dict(adapter.tensors)
    tensors[MASK_EMBEDDING] = float_array(file, KEY_PREFIX + MASK_EMBEDDING)
    if metadata.time_max_timesteps is not None:
        bias = float_array(file, KEY_PREFIX + TIME_BIAS)
        weight = float_array(file, KEY_PREFIX + TIME_WEIGHT)
        if len(bias) == 0 or len(weight) % len(bias):
            file.fail(f"key '{KEY_PREFIX}{TIME_WEIGHT}' has {len(weight)} numbers for {len(bias)} rows")
        tensors[TIME_WEIGHT], tensors[TIME_BIAS] = weight.reshape(len(bias), -1), bias
    objects = [
        parse_object(path, file.require(KEY_PREFIX + name, str), f"key '{KEY_PREFIX}{name}'")
        for name in ("config", "noise_schedule")
    ]
    return _checked(path, DiffusionCheckpoint(objects[0], tensors, metadata, objects[1]))


def _check_format(path: Path, found: object) -> None:
    if type(found) is not int or found != FORMAT:
        raise UserError(f"{path}: is of format {quoted(str(found))}; this version reads format {FORMAT}")


def _checked(path: Path, checkpoint: DiffusionCheckpoint) -> DiffusionCheckpoint:
    """A conversion as it was read, with all that is used of it within its limits, whatever the format."""
    _check_tensors(checkpoint.tensors, checkpoint.metadata, str(path))
    _validated(RecordedSettings, checkpoint.config, str(path), "config")
    _validated(RecordedSchedule, checkpoint.noise_schedule, str(path), "noise_schedule")
    return checkpoint


_Model = TypeVar("_Model", bound=BaseModel)


def _validated(kind: type[_Model], values: Mapping[str, object], source: str, what: str) -> _Model:
    """Values out of a file as what they should be; the key at fault is named."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        key = ".".join(str(part) for part in fault["loc"])
        raise UserError(f"{source}: {what} key {quoted(key)}: {one_line(fault['msg'])}") from None


def _check_tensors(
    tensors: Mapping[str, NDArray[np.float32]], metadata: CheckpointMetadata, source: str
) -> None:
    """Refuse missing or unknown tensors, and shapes that contradict each other."""
    others = {name: array for name, array in tensors.items() if not _LORA_NAME.fullmatch(name)}
    expected = [MASK_EMBEDDING] + (
        [TIME_WEIGHT, TIME_BIAS] if metadata.time_max_timesteps is not None else []
    )
    for name in expected:
        if name not in others:
            raise UserError(f"{source}: tensor '{name}' is missing")
    for name in others:
        if name not in expected:
            raise UserError(f"{source}: tensor {quoted(name)} is unknown")
    try:
        lora_ranks({name: array for name, array in tensors.items() if name not in others})
    except UserError as error:
        raise UserError(f"{source}: {str(error).removeprefix('adapter: ')}") from None
    hidden_size = others[MASK_EMBEDDING].size
    for name, array in others.items():
        n_dims = 2 if name == TIME_WEIGHT else 1
        if array.ndim != n_dims or array.size == 0 or array.shape[0] != hidden_size:
            raise UserError(f"{source}: tensor '{name}' has shape {array.shape}, but C is {hidden_size}")
