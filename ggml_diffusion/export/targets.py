"""Which architecture of llama.cpp a converted base becomes, and what that one would compute wrongly.

llama.cpp has three architectures for text diffusion whose layers are those of an autoregressive one: `llada`
is `llama`, `dream` is `qwen2`, and `rnd1` is `qwen3` with experts, of which one is as good as none. Only
these are run by its llama-diffusion-cli. Any other base stays what it is, with attention that is not causal.

Deliberately not here: tensors' values (standalone.py).
Source: llama.cpp, src/models/llada.cpp, dream.cpp and rnd1.cpp beside llama.cpp, qwen2.cpp and qwen3.cpp.
"""

from collections.abc import Mapping

from ggml_diffusion.errors import quoted
from ggml_diffusion.formats.architectures import ARCHITECTURES
from ggml_diffusion.formats.gguf_writer import KeyValue
from ggml_diffusion.formats.model_file import ModelFile

DIFFUSION_TWINS: Mapping[str, str] = {"llama": "llada", "qwen2": "dream", "qwen3": "rnd1"}
_SAME = "--arch same writes it for programs that use llama.cpp as a library"
# rnd1 has no dense feed-forward block: one expert stands for it, and a router with nothing to choose.
_EXPERT_NAMES = {
    "ffn_gate.weight": "ffn_gate_exps.weight",
    "ffn_up.weight": "ffn_up_exps.weight",
    "ffn_down.weight": "ffn_down_exps.weight",
}
ROUTER = "ffn_gate_inp.weight"
# llada has a place for these biases in its file, and does not add them.
_UNUSED_BIASES = ("attn_output.bias", "ffn_gate.bias", "ffn_up.bias", "ffn_down.bias")


def diffusion_arch(base: ModelFile) -> str:
    """The architecture that llama-diffusion-cli runs a base as.

    Raises:
        UserError: it has none, or one that would compute this base wrongly; says why and what to do instead.

    """
    if base.arch not in DIFFUSION_TWINS:
        base.fail(
            f"llama.cpp has no diffusion architecture for {quoted(base.arch)}, only for "
            f"{', '.join(DIFFUSION_TWINS)}; {_SAME}"
        )
    twin = DIFFUSION_TWINS[base.arch]
    for name in base.tensors:
        if name.startswith("rope_"):
            base.fail(
                f"llama.cpp's {twin} loads {quoted(name)} and does not apply it, so long positions would be "
                f"wrong; {_SAME}"
            )
        if twin == "llada" and name.endswith(_UNUSED_BIASES):
            base.fail(f"llama.cpp's {twin} loads {quoted(name)} and does not add it; {_SAME}")
        if twin == "rnd1" and name.startswith("blk.") and name.endswith("attn_qkv.weight"):
            base.fail(f"llama.cpp's {twin} was never tried with tensors such as {quoted(name)}; {_SAME}")
    if base.optional(f"{base.arch}.rope.scaling.type", "linear") == "longrope":
        base.fail(f"llama.cpp's {twin} has no longrope factors; {_SAME}")
    return twin


def explicit_head(base: ModelFile, *, every_row_changes: bool) -> bool:
    """Whether the file needs an output matrix of its own, because its token embedding changes.

    Raises:
        UserError: it does, and llama.cpp reads none for this architecture.

    """
    if not base.tied_head:
        return False
    if ARCHITECTURES[base.arch].head != "absent":
        return True
    if every_row_changes:
        base.fail(
            f"llama.cpp reads no output matrix for {quoted(base.arch)} beside the token embedding, so a time "
            f"embedding cannot be folded in; train without one (time_embedding.enabled = false), or use "
            f"adapter.gguf"
        )
    return False  # the mask token's own row, whose logit is never used


def target_keys(base: ModelFile, arch: str) -> dict[str, KeyValue]:
    """The base's keys under another architecture's name, with what that one asks for, not causal."""
    dropped = ("general.architecture", "general.alignment", "split.")
    keys: dict[str, KeyValue] = {}
    for name, value in base.metadata.items():
        if name.startswith(dropped):
            continue
        if name.startswith(f"{base.arch}."):
            name_there = f"{arch}.{name.removeprefix(f'{base.arch}.')}"
        else:
            name_there = name
        keys[name_there] = KeyValue(value, base.key_types[name])
    keys[f"{arch}.attention.causal"] = KeyValue(False, "bool")
    if arch == "rnd1":
        keys[f"{arch}.expert_count"] = keys[f"{arch}.expert_used_count"] = KeyValue(1, "u32")
        keys[f"{arch}.expert_feed_forward_length"] = KeyValue(base.F, "u32")
    return keys


def target_place(arch: str, name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Name and shape that one of the base's tensors has in the target."""
    for end, expert in _EXPERT_NAMES.items():
        if arch == "rnd1" and name.startswith("blk.") and name.endswith(f".{end}"):
            return name.removesuffix(end) + expert, (1, *shape)
    return name, shape
