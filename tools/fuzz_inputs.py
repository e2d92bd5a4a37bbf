"""Inputs of the fuzzer: sound files of each kind, and how they are damaged with knowledge of their structure.

An input is a function of (kind, seed, number) alone: any of them can be made again. Most are sound files with
one to four changes. Of the kinds in GGUF every fifth is a header cut at the next boundary of its structure,
one byte before, at and behind it, until all have been.

Deliberately not here: who reads them (fuzz_targets.py), processes and limits (fuzz.py).
Source: the GGUF specification (ggml, docs/gguf.md) and the format section of the safetensors README.
"""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from make_tiny_gguf import make_tiny_gguf
from tiny_architectures import ARCHITECTURES

from ggml_diffusion.formats.adapter_file import CheckpointMetadata, DiffusionCheckpoint
from ggml_diffusion.formats.lora import TargetModule, lora_shapes
from ggml_diffusion.formats.model_check import read_model

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Of keys that change what a file is, or that few files have.
_KEYS = [
    *(b"general.type", b"general.architecture", b"general.alignment", b"adapter.type", b"adapter.lora.alpha"),
    *(b"split.count", b"split.no", b"split.tensors.count", b"llama.expert_count", b"llama.expert_used_count"),
    *(
        b"llama.attention.key_length",
        b"llama.attention.value_length",
        b"llama.rope.scaling.type",
        b"llama.ssm.x",
    ),
    *(
        b"llama.rope.scaling.factor",
        b"llama.rope.scale_linear",
        b"llama.attention.head_count_kv",
        b"llama.vocab_size",
    ),
    *(b"tokenizer.ggml.pre", b"tokenizer.ggml.model", b"tokenizer.ggml.scores", b"tokenizer.ggml.token_type"),
    *(b"tokenizer.ggml.add_bos_token", b"tokenizer.ggml.add_space_prefix", b"tokenizer.ggml.mask_token_id"),
    *(
        b"tokenizer.chat_template",
        b"adapter.alora.invocation_tokens",
        b"ggml_diffusion.fused",
        b"ggml_diffusion.format",
    ),
    *(
        b"ggml_diffusion.time_max_timesteps",
        b"ggml_diffusion.alpha",
        b"ggml_diffusion.config",
        b"general.name",
    ),
]
CUT_EVERY = 5  # every fifth input is a header cut at a boundary, as long as there are such
_KEPT_IN_LISTS = 64  # entries that a real vocabulary keeps
_INTEGERS = [0, 1, 2, 3, 7, 8, 31, 32, 33, 255, 256, 65535, 65536]
_INTEGERS += [2**bits + shift for bits in (20, 24, 30, 31, 32, 40, 53, 62, 63, 64) for shift in (-1, 0, 1)]
_FLOATS = [0.0, -0.0, 1.0, -1.0, 1e-45, 3e38, -3e38, 1e300, float("nan"), float("inf"), float("-inf")]
_TEXTS = [
    *(
        b"",
        b"\0",
        b"a\0b",
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b" ",
        b"\n",
        b"\r\n\x1b[2J",
        b"%s%n",
        b"../../etc/passwd",
    ),
    *(
        b"llama",
        b"qwen3",
        b"gemma2",
        b"gpt2",
        b"whitespace",
        b"tekken",
        b"model",
        b"adapter",
        b"<|eos|>",
        b"a" * 70000,
    ),
    *("é漢🎉".encode(), b"<0x0A>", b"[EMPTY_3]", b"yarn", b"longrope", b"none", b"{{ 7 * 7 }}", b"x" * 64),
]
_JSON: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2**31,
        2**63,
        2**64,
        2**70,
        0.5,
        1e300,
        1e-300,
        -0.0,
        "",
        "a",
        "\0",
        "\ud800",
    ),
    *(
        "x" * 5000,
        "nan",
        [],
        {},
        [[]],
        [1, 2, 3],
        {"a": {}},
        ["a"],
        [None],
        "F32",
        "F16",
        "I64",
        [0, 0],
        [4, 0],
    ),
]
_TOML = [
    *(
        "0",
        "-1",
        "1",
        "2",
        "1e300",
        "-1e300",
        "nan",
        "inf",
        "9223372036854775807",
        "9223372036854775808",
        "1e-320",
    ),
    *(
        '""',
        '"a"',
        '"\\u0000"',
        '"q_proj"',
        "[]",
        "[[]]",
        '["q_proj"]',
        "[1, 2]",
        "{}",
        "{ a = 1 }",
        "true",
        "false",
    ),
    *(
        "1979-05-27",
        "07:32:00",
        "[" * 2000,
        '"',
        "'''",
        "0x7fffffffffffffff",
        '"cosine"',
        '"cpu"',
        "[[0, 1.0]]",
    ),
]


# -- GGUF in parts -----------------------------------------------------------------------------------


@dataclass
class Span:
    """Bytes of a header with one meaning."""

    start: int
    end: int
    kind: str  # "number", "float", "text", "type", "count", "length"


@dataclass
class Gguf:
    """A sound file cut into its spans."""

    header: bytes
    size: int  # of the whole file; what the bytes do not cover is zeros
    data: bytes
    arch: bytes
    spans: list[Span] = field(default_factory=list)
    keys: list[tuple[int, int]] = field(default_factory=list)
    tensors: list[tuple[int, int]] = field(default_factory=list)

    @cached_property
    def boundaries(self) -> list[int]:
        """Every place where one part of the structure ends and the next begins."""
        places = {0, self.size} | {place for span in self.spans for place in (span.start, span.end)}
        return sorted(
            {cut + shift for cut in places for shift in (-1, 0, 1) if 0 <= cut + shift <= self.size}
        )


def parse_gguf(content: bytes, size: int, cut_lists: bool = False) -> Gguf:
    """The structure of a sound file; with `cut_lists` a real vocabulary's lists keep their first entries."""
    out, spans, keys, tensors = bytearray(), [], [], []
    place = 0

    def take(n_bytes: int, kind: str) -> bytes:
        nonlocal place
        spans.append(Span(len(out), len(out) + n_bytes, kind))
        raw = content[place : place + n_bytes]
        out.extend(raw)
        place += n_bytes
        return raw

    def number(code: str, kind: str = "number") -> int:
        return int(struct.unpack("<" + code, take(struct.calcsize(code), kind))[0])

    def text() -> bytes:
        return take(number("Q", "length"), "text")

    def value(type_id: int) -> None:
        if type_id == _STRING:
            text()
        else:
            take(_SIZES[type_id], "float" if type_id in (6, 12) else "number")

    take(4, "text"), number("I")
    n_tensors, n_keys = number("Q", "count"), number("Q", "count")
    for _ in range(n_keys):
        start = len(out)
        text()
        type_id = number("I", "type")
        if type_id == _ARRAY:
            type_id = number("I", "type")
            at = len(out)
            count = number("Q", "count")
            kept = min(count, _KEPT_IN_LISTS) if cut_lists else count
            out[at : at + 8] = struct.pack("<Q", kept)
            for _ in range(kept):
                value(type_id)
            for _ in range(count - kept):  # passed over
                place += (
                    8 + struct.unpack_from("<Q", content, place)[0] if type_id == _STRING else _SIZES[type_id]
                )
        else:
            value(type_id)
        keys.append((start, len(out)))
    for _ in range(n_tensors):
        start = len(out)
        text()
        for _ in range(number("I", "count")):
            number("Q")
        number("I", "type"), number("Q")
        tensors.append((start, len(out)))
    data_start = (place + 31) // 32 * 32
    header = bytes(out) + bytes(-len(out) % 32)
    at = header.find(b"general.architecture") + len(b"general.architecture") + 12
    arch = header[at : at + struct.unpack_from("<Q", header, at - 8)[0]]
    return Gguf(header, len(header) + size - data_start, content[data_start:size], arch, spans, keys, tensors)


def _damaged_gguf(file: Gguf, others: Sequence[Gguf], rng: random.Random) -> tuple[bytes, int]:
    header, data = bytearray(file.header), bytearray(file.data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        what = rng.random()
        if what < 0.25:
            start, end = rng.choice(file.keys)
            name = header[start : start + 8 + struct.unpack_from("<Q", file.header, start)[0]]
            if rng.random() < 0.3:
                name = bytearray(_text(rng.choice(_KEYS).replace(b"llama.", file.arch + b".")))
            header[start:end] = name + _value(rng)
        elif what < 0.55:
            span = rng.choice(file.spans)
            if span.end > len(header):
                continue
            if span.kind in ("text", "float") or rng.random() < 0.9:
                _change_span(header, span, rng)
            else:
                header[span.start : span.end] = b""
        elif what < 0.75:  # entries as a whole: left out, doubled, or another file's
            entries, count_at = (
                (file.keys, 16) if rng.random() < 0.7 or not file.tensors else (file.tensors, 8)
            )
            start, end = rng.choice(entries)
            if len(header) < 24:
                continue
            count = struct.unpack_from("<Q", header, count_at)[0]
            how = rng.randrange(3)
            if how == 0:
                header[start:end] = b""
                count = max(0, count - 1)
            else:
                other = file if how == 1 else rng.choice(others)
                other_start, other_end = rng.choice(
                    other.keys if count_at == 16 else other.tensors or [(0, 0)]
                )
                header[start:start] = other.header[other_start:other_end]
                count += 1
            if rng.random() < 0.9 and len(header) >= 24:
                struct.pack_into("<Q", header, count_at, min(count, 2**64 - 1))
        elif what < 0.85 and data:  # of the weights
            for _ in range(rng.choice((1, 4, 64))):
                at = rng.randrange(len(data))
                data[at : at + 2] = rng.choice(
                    (b"\0\x7c", b"\xff\xff", b"\0\x7e", b"\x80\x7f", rng.randbytes(2))
                )
        elif what < 0.95:
            at = rng.randrange(max(1, len(header)))
            header[at : at + 1] = rng.randbytes(1)
        else:
            header = header[: rng.randrange(len(header) + 1)]
            data = bytearray()
    size = len(header) + max(0, file.size - len(file.header))
    return bytes(header + data), size


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _value(rng: random.Random) -> bytes:
    """A sound value of any type."""
    kind = rng.choice((*_CODES, _STRING))
    values = [
        _text(rng.choice(_TEXTS)) if kind == _STRING else _number(kind, rng)
        for _ in range(rng.choice((0, 1, 2, 3, 12)))
    ]
    if values and rng.random() < 0.5:
        return struct.pack("<I", kind) + values[0]
    return struct.pack("<IIQ", _ARRAY, kind, len(values)) + b"".join(values)


def _number(kind: int, rng: random.Random) -> bytes:
    if kind in (6, 12):
        value = rng.choice(_FLOATS)
        return struct.pack("<" + _CODES[kind], value if kind == 12 or not 1e39 < abs(value) < 1e301 else 3e38)
    if kind == 7:
        return rng.choice((b"\0", b"\1"))
    return (rng.choice(_INTEGERS) % (1 << 8 * _SIZES[kind])).to_bytes(_SIZES[kind], "little")


def _change_span(header: bytearray, span: Span, rng: random.Random) -> None:
    width = span.end - span.start
    if span.kind == "text":
        text = rng.choice(_TEXTS) if rng.random() < 0.7 else rng.randbytes(width)
        if rng.random() < 0.7 and 8 <= span.start <= len(header):  # with the length that belongs to it
            struct.pack_into("<Q", header, span.start - 8, len(text))
        header[span.start : span.end] = text
    elif span.kind == "float" and width in (4, 8):
        value = rng.choice(_FLOATS)
        header[span.start : span.end] = struct.pack(
            "<f" if width == 4 else "<d", value if width == 8 or abs(value) < 1e39 else 0.0
        )
    elif span.kind == "type":
        header[span.start : span.end] = struct.pack("<I", rng.choice((*range(45), 2**31, 2**32 - 1)))
    else:
        before = int.from_bytes(header[span.start : span.end], "little")
        value = (
            rng.choice((before - 1, before + 1, before * 2)) if rng.random() < 0.3 else rng.choice(_INTEGERS)
        )
        header[span.start : span.end] = (value % (1 << 8 * width)).to_bytes(width, "little")


# -- the kinds ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Input:
    """A file: its bytes, the size to which zeros fill it up, and the end of its name."""

    content: bytes
    size: int
    suffix: str


class Corpus:
    """The sound files of every kind; made once, before the workers are forked."""

    def __init__(self, real_model: Path | None) -> None:
        with TemporaryDirectory() as name:
            folder = Path(name)
            tiny: dict[str, Any] = {"C": 32, "F": 32, "H": 4, "V": 384, "L": None}
            shapes = [
                ("llama", "bpe", "F32"),
                ("llama", "spm", "Q4_0"),
                ("qwen2", "bpe", "Q8_0"),
                ("gemma3", "spm", "F16"),
            ]
            models = [
                make_tiny_gguf(folder / f"{i}.gguf", arch=arch, tokenizer=kind, type=packed, **tiny)
                for i, (arch, kind, packed) in enumerate(
                    shapes + [(arch, "bpe", "F32") for arch in ARCHITECTURES]
                )
            ]
            self.models = [parse_gguf(path.read_bytes(), path.stat().st_size) for path in models]
            if real_model is not None:
                size = real_model.stat().st_size
                with real_model.open("rb") as file:
                    self.models.append(parse_gguf(file.read(8 << 20), size, cut_lists=True))
                self.models[-1].data = b""
            self.base = models[0].read_bytes()
            base = read_model(models[0])
            fused = next(read_model(path) for path in reversed(models) if read_model(path).arch == "phi3")
            adapters = []
            for i, model in enumerate((base, fused)):
                for path in (folder / f"{i}.adapter.gguf", folder / f"{i}.safetensors"):
                    conversion = _conversion(model)
                    conversion.save(path) if path.suffix == ".safetensors" else conversion.save_gguf(
                        path, model
                    )
                    adapters.append(path.read_bytes())
            self.gguf_adapters = [parse_gguf(content, len(content)) for content in adapters[::2]]
            self.safetensors = adapters[1::2]
        # The real header, which is the last one, first.
        self._cuts = [
            [(file, cut) for file in reversed(files) for cut in file.boundaries]
            for files in (self.models, self.gguf_adapters)
        ]
        example = Path(__file__).resolve().parents[1] / "examples" / "conversion_config.toml"
        self.toml = example.read_text(encoding="utf-8").splitlines()

    def make(self, kind: str, seed: int, number: int) -> Input:
        """The input of a number."""
        return _MAKERS[kind](self, number, random.Random(f"{kind} {seed} {number}"))

    def _gguf(
        self, files: list[Gguf], cuts: list[tuple[Gguf, int]], number: int, rng: random.Random
    ) -> Input:
        if number % CUT_EVERY == 0 and number // CUT_EVERY < len(cuts):
            file, cut = cuts[number // CUT_EVERY]
            return Input((file.header + file.data)[:cut], cut, ".gguf")
        content, size = _damaged_gguf(rng.choice(files), self.models + self.gguf_adapters, rng)
        return Input(content, max(size, len(content)), ".gguf")

    def _model(self, number: int, rng: random.Random) -> Input:
        return self._gguf(self.models, self._cuts[0], number, rng)

    def _gguf_adapter(self, number: int, rng: random.Random) -> Input:
        return self._gguf(self.gguf_adapters, self._cuts[1], number, rng)

    def _safetensors(self, number: int, rng: random.Random) -> Input:
        content = rng.choice(self.safetensors)
        n_header = struct.unpack_from("<Q", content)[0]
        header, data = content[8 : 8 + n_header], content[8 + n_header :]
        if rng.random() < 0.75:
            tree = json.loads(header)
            inner = json.loads(tree["__metadata__"]["ggml_diffusion"])
            for _ in range(rng.choice((1, 1, 2, 4))):
                _change_json(inner if rng.random() < 0.6 else tree, rng)
            if isinstance(tree.get("__metadata__"), dict) and rng.random() < 0.95:
                tree["__metadata__"]["ggml_diffusion"] = json.dumps(inner)
            header = json.dumps(tree).encode()
            if rng.random() < 0.1:
                header = header.replace(b"0.5", b"1e999").replace(
                    b"{", b'{"a":' * rng.choice((1, 40, 3000)), 1
                )
        changed = bytearray(struct.pack("<Q", len(header)) + header + data)
        if rng.random() < 0.4:
            _change_bytes(changed, rng)
        return Input(bytes(changed), len(changed), ".safetensors")

    def _data(self, number: int, rng: random.Random) -> Input:
        lines = []
        for _ in range(rng.randrange(1, 6)):
            record: Any = rng.choice(_RECORDS)
            record = json.loads(json.dumps(record))
            if rng.random() < 0.7:
                _change_json(record, rng)
            lines.append(json.dumps(record, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass"))
        changed = bytearray(rng.choice((b"\n", b"\r\n", b"\n\n")).join(lines))
        if rng.random() < 0.3:
            _change_bytes(changed, rng)
        return Input(bytes(changed), len(changed), rng.choice((".jsonl", ".jsonl", ".jsonl", ".txt")))

    def _toml(self, number: int, rng: random.Random) -> Input:
        lines = list(self.toml)
        for _ in range(rng.choice((1, 1, 2, 4, 8))):
            at = rng.randrange(len(lines))
            key, equals, _ = lines[at].partition("=")
            how = rng.random()
            if how < 0.7 and equals:
                lines[at] = f"{key}= {rng.choice(_TOML)}"
            elif how < 0.8:
                lines[at : at + 1] = []
            elif how < 0.9:
                lines.insert(at, rng.choice(lines))
            else:
                lines[at] = "".join(
                    chr(rng.choice((0, 10, 34, 39, 61, 91, 92, 93, 123, 233, 0x1F600))) for _ in range(9)
                )
        changed = bytearray("\n".join(lines).encode())
        if rng.random() < 0.2:
            _change_bytes(changed, rng)
        return Input(bytes(changed), len(changed), ".toml")


_RECORDS: list[Any] = [
    {"text": "The sand and the sea.\nAnother line."},
    {"prompt": "the sand", "completion": " and the sea"},
    {"messages": [{"role": "user", "content": "the sand"}, {"role": "assistant", "content": "the sea"}]},
    {
        "messages": [
            {"role": "system", "content": "x"},
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
        ]
    },
]
_MAKERS: dict[str, Callable[[Corpus, int, random.Random], Input]] = {
    "model": Corpus._model,
    "gguf-adapter": Corpus._gguf_adapter,
    "safetensors": Corpus._safetensors,
    "data": Corpus._data,
    "toml": Corpus._toml,
}
KINDS = tuple(_MAKERS)


def _change_json(tree: Any, rng: random.Random) -> None:
    """Change one place of a JSON value, in it."""
    node: Any = tree
    while True:
        places: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not places:
            if isinstance(node, list):
                node.append(copy.deepcopy(rng.choice(_JSON)))
            else:
                node["x"] = copy.deepcopy(rng.choice(_JSON))
            return
        place = rng.choice(places)
        if isinstance(node[place], dict | list) and rng.random() < 0.8:
            node = node[place]
            continue
        how = rng.random()
        if how < 0.7:
            node[place] = copy.deepcopy(rng.choice(_JSON))
        elif how < 0.85:
            del node[place]
        elif isinstance(node, dict):
            node[f"{place}{rng.choice(('', 'x', chr(0), '.lora_a'))}"] = node.pop(place)
        return


def _change_bytes(content: bytearray, rng: random.Random) -> None:
    if not content:
        return
    for _ in range(rng.choice((1, 2, 8))):
        at = rng.randrange(len(content))
        content[at : at + 1] = rng.choice((rng.randbytes(1), b"", b"\xff", b"\0", b"{", b'"', b"\n"))
        if not content:
            return
    if rng.random() < 0.2:
        del content[rng.randrange(len(content)) :]


def _conversion(model: Any) -> DiffusionCheckpoint:
    """A small conversion of a model."""
    generator = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = dict(lora_shapes(model, TargetModule, 2))
    shapes |= {
        "mask_embedding": (model.C,),
        "time_embedding.weight": (model.C, 4),
        "time_embedding.bias": (model.C,),
    }
    metadata = CheckpointMetadata(
        base_model="tiny",
        base_sha256="ab" * 32,
        conversion_steps=3,
        training_tokens=300,
        final_causal_ratio=0.5,
        prediction="shifted",
        mask_token_id=3,
        alpha=4.0,
        time_max_timesteps=100,
        block_size=4,
        created_at="2025-01-02T03:04:05+00:00",
        version="0",
    )
    config = {"base_model": "tiny.gguf", "data": ["x.txt"], "sequence_length": 8, "held_out_fraction": 0.5}
    tensors = {name: generator.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    return DiffusionCheckpoint(config, tensors, metadata, {"type": "cosine", "num_timesteps": 10})
