"""What a file holds, for people: a GGUF model, a GGUF LoRA adapter, a conversion of ours, or a run's folder.

Describes whatever can be read, and says of a model whether it can be converted, and if not, why. Deliberately
not here: printing (the command line shows a `Description` through rich), and the weights themselves.
Letters: C hidden size, H query heads, G key/value heads, D head size, F feed-forward size, V vocabulary,
R rank, L layers.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ggml_diffusion.errors import UserError, one_line, quoted
from ggml_diffusion.formats.adapter_file import DiffusionCheckpoint, is_gguf
from ggml_diffusion.formats.gguf_adapter import KEY_PREFIX, read_gguf_adapter
from ggml_diffusion.formats.gguf_reader import StringArray
from ggml_diffusion.formats.lora import TargetModule, lora_ranks
from ggml_diffusion.formats.model_check import check_model, check_tokenizer
from ggml_diffusion.formats.model_file import ModelFile, read_gguf
from ggml_diffusion.formats.tensor_types import TENSOR_TYPES
from ggml_diffusion.run_folder import CHECKPOINTS, EXPORTS, TOKENS
from ggml_diffusion.text.special_tokens import choose_mask_token, token_id
from ggml_diffusion.text.token_store import Manifest, read_manifest
from ggml_diffusion.text.tokenizer import Tokenizer

Rows = tuple[tuple[str, str], ...]

THROUGH_GGML = ", unpacked through ggml, slower"  # said of types that have no kernels here
_SIZES = {
    "L": "layers",
    "C": "hidden size",
    "H": "query heads",
    "G": "key/value heads",
    "D": "head size",
    "F": "feed-forward size",
    "V": "vocabulary",
}


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it: pairs of a name and a value, each one printable line."""

    title: str
    rows: Rows


@dataclass(frozen=True)
class Description:
    """What a file holds; `rich` can print it."""

    path: Path
    kind: str  # "GGUF model", "GGUF LoRA adapter", "conversion" or "run"
    sections: tuple[Section, ...]

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [Text(f"{self.path}: {self.kind}", style="bold")]
        for section in self.sections:
            table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
            table.add_column(no_wrap=True)
            table.add_column(overflow="fold")
            for name, value in section.rows:  # Text: names in a file are not markup
                table.add_row(Text(name, style="dim"), Text(value))
            parts += [Text(""), Text(section.title, style="bold"), table]
        return Group(*parts)


def describe_file(path: str | Path, device: str | None = None) -> Description:
    """Look into a file, whose content decides what it is, or into the folder of a run.

    Args:
        path: the file.
        device: also say what of a model that kind of device computes.

    Raises:
        UserError: it cannot be read, or is damaged; or there is no such device.

    """
    path = Path(path)
    if path.is_dir():
        return Description(path, "run", _run_sections(path))
    if not is_gguf(path):
        return Description(path, "conversion", _conversion_sections(DiffusionCheckpoint.load(path)))
    file = read_gguf(path)
    if file.optional("general.type", "model") != "adapter":
        return Description(path, "GGUF model", (*_model_sections(file), *_device_sections(file, device)))
    if KEY_PREFIX + "format" in file.metadata:
        sections = _conversion_sections(DiffusionCheckpoint.load(path))
        return Description(path, "GGUF LoRA adapter, a conversion", (_file_section(file), *sections))
    method = file.metadata.get("adapter.type", "lora")  # of any type, an array too
    kind = "GGUF LoRA adapter" if isinstance(method, str) and method == "lora" else "GGUF adapter"
    return Description(path, kind, (_file_section(file), *_foreign_adapter_sections(file)))


def _foreign_adapter_sections(file: ModelFile) -> tuple[Section, ...]:
    """Another program's adapter, and whether it can be applied."""
    tensors = Section("Tensors", tuple(_type_rows(file)))
    try:
        adapter, _ = read_gguf_adapter(file.path)
    except UserError as error:
        return tensors, Section("LoRA", (("can be applied", f"no: {_fault(file, error)}"),))
    can = ("can be applied", "yes, to its base model; it cannot denoise, since it has no mask")
    return tensors, Section("LoRA", (*_lora_rows(adapter.tensors, adapter.alpha), can))


def _run_sections(folder: Path) -> tuple[Section, ...]:
    from ggml_diffusion.training.run import exported_weights  # the whole of training: for folders alone

    has_weights = any((folder / name).exists() for name in (*EXPORTS, CHECKPOINTS))
    sections = _conversion_sections(DiffusionCheckpoint.load(exported_weights(folder))) if has_weights else ()
    kept = [read_manifest(place) for place in sorted((folder / TOKENS).glob("[!.]*"))]
    texts = tuple(Section("Text", _text_rows(manifest)) for manifest in kept if manifest is not None)
    if not sections and not texts:
        raise UserError(f"{folder}: the folder holds no conversion and no text of one")
    return (*sections, *texts)


def _text_rows(text: Manifest) -> Rows:
    names = [_printable(source.path) for source in text.sources]
    return (
        ("files", names[0] if len(names) == 1 else f"{len(names):,}, from {names[0]} to {names[-1]}"),
        ("documents", f"{text.n_documents:,}, {text.n_skipped:,} of them without text"),
        ("examples", f"{text.n_examples:,}"),
        ("tokens", f"{text.n_text_tokens + text.n_example_tokens:,}, {text.token_bytes} bytes each"),
        ("size on disk", _bytes(sum(file.n_bytes for file in text.files.values()))),
        ("sha256", f"{text.fingerprint}, in sequences of {text.fingerprint_length}"),
    )


def _model_sections(file: ModelFile) -> tuple[Section, ...]:
    return (
        _file_section(file),
        Section("Sizes", tuple(_size_rows(file))),
        Section("Tensors", tuple(_type_rows(file))),
        Section("Tokenizer", tuple(_tokenizer_rows(file))),
        Section("Conversion", (_verdict(file),)),
    )


def _device_sections(file: ModelFile, device: str | None) -> tuple[Section, ...]:
    if device is None:
        return ()
    from ggml_diffusion.app.devices import model_on_device  # it loads GGML's backends, for those who ask

    return (Section("On the device", tuple(model_on_device(file, device))),)


def _file_section(file: ModelFile) -> Section:
    rows = [("format", f"GGUF {file.version}, alignment {file.alignment} bytes")]
    for name, key in (
        ("architecture", "general.architecture"),
        ("name", "general.name"),
        ("license", "general.license"),
    ):
        if key in file.metadata:
            rows.append((name, _printable(file.metadata[key])))
    if len(file.parts) > 1:
        rows.append(("parts", f"{len(file.parts)}, from {_printable(file.path.name)} on"))
    rows.append(("size", _bytes(sum(part.stat().st_size for part in file.parts))))
    return Section("File", tuple(rows))


def _size_rows(file: ModelFile) -> Iterator[tuple[str, str]]:
    """The sizes that the file states; one that is missing or impossible is what the verdict is about."""
    for letter, name in _SIZES.items():
        size = _or_none(file, letter)
        if size is not None:
            yield f"{letter}  {name}", f"{size:,}"
    for name, attribute in (
        ("context length", "context_length"),
        ("RoPE base", "rope_freq_base"),
        ("RoPE scaling factor", "rope_scaling_factor"),
        ("RMS epsilon", "rms_eps"),
    ):
        value = _or_none(file, attribute)
        if value is not None:
            yield name, f"{value:,}" if isinstance(value, int) else f"{value:g}"
    yield "output matrix", "tied: the token embedding" if file.tied_head else "its own"


def _or_none(file: ModelFile, attribute: str) -> Any:
    try:
        return getattr(file, attribute)
    except UserError:
        return None


def _type_rows(file: ModelFile) -> Iterator[tuple[str, str]]:
    """Tensor types, the one with most bytes first."""
    n_weights = sum(math.prod(info.shape) for info in file.tensors.values())
    yield "all", f"{_count(len(file.tensors), 'tensor')}, {n_weights:,} weights"
    totals: dict[str, list[int]] = {}
    for info in file.tensors.values():
        total = totals.setdefault(info.type_name, [0, 0])
        total[0] += 1
        total[1] += info.n_bytes
    for name, (count, n_bytes) in sorted(totals.items(), key=lambda item: -item[1][1]):
        through_ggml = name in TENSOR_TYPES and not TENSOR_TYPES[name].own_kernels
        yield name, f"{_count(count, 'tensor')}, {_bytes(n_bytes)}" + (THROUGH_GGML if through_ggml else "")


def _tokenizer_rows(file: ModelFile) -> Iterator[tuple[str, str]]:
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, StringArray):
        yield "vocabulary", "none"
        return
    kind, pre = (file.metadata.get(f"tokenizer.ggml.{key}", "unknown") for key in ("model", "pre"))
    yield "kind", f"{_printable(kind)}, pre-tokenizer {_printable(pre)}"
    yield "tokens", f"{len(tokens):,}"
    for key, value in file.metadata.items():
        if key.startswith("tokenizer.ggml.") and key.endswith("_token_id") and isinstance(value, int):
            role = key.removeprefix("tokenizer.ggml.").removesuffix("_token_id")
            token = token_id(file.metadata, role)
            outside = f"none: {value} is outside of the vocabulary"
            yield _printable(role), f"{token}  {quoted(tokens[token])}" if token == value else outside
    try:
        check_tokenizer(file)
        token, reason = choose_mask_token(None, file.metadata)
        yield "mask token", f"{token}  {_printable(reason)}"
    except UserError as error:
        yield "mask token", _fault(file, error)


def _verdict(file: ModelFile) -> tuple[str, str]:
    try:
        check_model(file)
        if isinstance(file.metadata.get("tokenizer.ggml.tokens"), StringArray):
            Tokenizer.from_file(file).close()  # llama.cpp dies of some vocabularies, in a process of its own
    except UserError as error:
        return "possible", f"no: {_fault(file, error)}"
    return "possible", "yes: every setting, tensor and type is supported"


def _fault(file: ModelFile, error: UserError) -> str:
    return str(error).removeprefix(f"{file.path}: ")


def _conversion_sections(checkpoint: DiffusionCheckpoint) -> tuple[Section, ...]:
    metadata, lora = checkpoint.metadata, checkpoint.adapter().tensors
    schedule = ", ".join(f"{name} {value}" for name, value in _flat(checkpoint.noise_schedule))
    training = (
        ("base model", f"{_printable(metadata.base_model)}, sha256 {metadata.base_sha256}"),
        ("steps", f"{metadata.conversion_steps:,}"),
        ("training tokens", f"{metadata.training_tokens:,}"),
        ("final causal ratio", f"{metadata.final_causal_ratio:g}"),
        *((("first token", "sees itself alone"),) if metadata.attention_sink else ()),
        ("prediction", metadata.prediction),
        ("mask token", str(metadata.mask_token_id)),
        ("noise schedule", schedule or "none"),
        ("created", f"{_printable(metadata.created_at)} by ggml-diffusion {_printable(metadata.version)}"),
    )
    others = {name: array for name, array in checkpoint.tensors.items() if name not in lora}
    return (
        Section("Conversion", training),
        Section("LoRA", _lora_rows(lora, metadata.alpha)),
        Section("Also trained", tuple((name, str(array.shape)) for name, array in others.items())),
        Section("Settings", tuple(_flat(checkpoint.config))),
    )


def _lora_rows(tensors: Mapping[str, NDArray[np.float32]], alpha: float) -> Rows:
    ranks = lora_ranks(tensors)
    layers = {name.split(".")[1] for name in ranks if name.startswith("blk.")}
    modules = [module.value for module in TargetModule if any(module.gguf_name in name for name in ranks)]
    return (
        ("target modules", ", ".join(modules) or "none"),
        ("layers", str(len(layers))),
        ("rank R", ", ".join(str(rank) for rank in sorted(set(ranks.values()))) or "none"),
        ("alpha", f"{alpha:g}"),
        ("parameters", f"{sum(array.size for array in tensors.values()):,}"),
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as pairs ("training.seed", "0")."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield _printable(f"{prefix}{key}"), _printable(value)


def _printable(value: object) -> str:
    return one_line(str(value))


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _bytes(number: int) -> str:
    return f"{number:,} bytes" if number < 1 << 20 else f"{number / (1 << 20):,.1f} MiB"
