"""The child processes of family_shapes.py: the real command line, and llama.cpp with an adapter.

A conversion runs in a process of its own, so that its peak is its own. Memory is looked at in two places:
when the identity gate is done, which holds logits of its sentence, and when training is. llama.cpp runs in a
child as it does in the identity gate: it aborts on what it does not like.

Deliberately not here: what is judged (family_shapes.py).
Sources: llama.cpp `include/llama.h`; proc(5) by way of tools/bench/bench_arms.py.

usage: family_arms.py convert REPORT.json SEQUENCES TOKENS RANK ARGUMENT ...
       family_arms.py llama MODEL.gguf ADAPTER.gguf TOKENS.npy LOGITS.npz THREADS
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))

import numpy as np
from bench_arms import peak_memory_bytes, reset_peak_memory, resident_bytes_of_file
from numpy.typing import NDArray

from ggml_diffusion.app.cli.main import main as command_line
from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.interface import Engine
from ggml_diffusion.errors import UserError
from ggml_diffusion.text.tokenizer import Tokenizer
from ggml_diffusion.training import run
from ggml_diffusion.training.identity import IdentityReport, check_identity, logits_in_context, open_llama
from ggml_diffusion.training.trainer import ConversionTrainer

Logits = NDArray[np.float32]
PASSES = ("causal", "bidirectional")


def _child(*arguments: object) -> None:
    """Run this file; what the child wrote last is the message when it fails."""
    command = [sys.executable, __file__, *(str(argument) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise UserError(
            f"{arguments[0]} ended with {done.returncode}: {lines[-1] if lines else 'no message'}"
        )


# -- the conversion --------------------------------------------------------------------------------


def convert(arguments: Sequence[object], *, n_sequences: int, n_tokens: int, rank: int) -> dict[str, int]:
    """Run `ggml-diffusion convert` with these arguments.

    Args:
        arguments: after `convert`.
        n_sequences: of a step, for the plan.
        n_tokens: of a sequence.
        rank: of the adapter.

    Returns:
        Bytes: planned of a step beside the model; gate_peak until the identity gate was done; before of what
        was resident then, without the model's pages and the gate's buffers; training_peak from there to the
        end of training, with model of it in the model's pages. What the system does not tell is left out.

    Raises:
        UserError: it failed.

    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        _child("convert", report, n_sequences, n_tokens, rank, *arguments)
        found: dict[str, int | None] = json.loads(report.read_text())
    return {name: n_bytes for name, n_bytes in found.items() if n_bytes is not None}


def _convert_child(report: str, n_sequences: str, n_tokens: str, rank: str, *arguments: str) -> None:
    found: dict[str, int | None] = {}
    export = ConversionTrainer.export

    def gate(model: Engine, tokenizer: Tokenizer) -> IdentityReport:
        result = check_identity(model, tokenizer)
        n_gate = result.n_tokens
        assert isinstance(model, Q4Model)
        found["planned"] = model.describe_step(int(n_sequences), int(n_tokens), int(rank)).memory_bytes
        found["gate_peak"] = peak_memory_bytes()
        reset_peak_memory()
        resident, of_model = peak_memory_bytes(), resident_bytes_of_file(model.file.path)
        of_gate = model.memory_bytes(n_gate, n_gate, gradients=False)
        found["before"] = None if resident is None else resident - (of_model or 0) - of_gate
        return result

    def exporting(trainer: ConversionTrainer, folder: Path) -> tuple[Path, Path]:
        found["training_peak"] = peak_memory_bytes()
        found["model"] = resident_bytes_of_file(trainer.model.file.path)
        return export(trainer, folder)

    with (
        patch.object(run, "check_identity", gate),
        patch.object(ConversionTrainer, "export", exporting),
    ):
        try:
            command_line(["convert", *arguments])
        finally:
            Path(report).write_text(json.dumps(found))


# -- llama.cpp -------------------------------------------------------------------------------------


def llama_logits(
    model: Path, adapter: Path, tokens: NDArray[np.int32], n_threads: int
) -> dict[str, tuple[Logits, Logits]]:
    """Logits (T, V) of llama.cpp by pass: of the base, and with the adapter at scale 1.

    Raises:
        UserError: llama.cpp does not load a file, or failed.

    """
    with tempfile.TemporaryDirectory() as folder:
        token_file, logits_file = Path(folder) / "tokens.npy", Path(folder) / "logits.npz"
        np.save(token_file, tokens)
        _child("llama", model, adapter, token_file, logits_file, n_threads)
        with np.load(logits_file) as found:
            return {name: (found[f"{name}_base"], found[f"{name}_adapted"]) for name in PASSES}


def _llama_child(model: str, adapter: str, token_file: str, logits_file: str, n_threads: str) -> None:
    tokens = np.load(token_file)
    api, loaded, context = open_llama(model, len(tokens), int(n_threads))
    lora = api.llama_adapter_lora_init(loaded, adapter.encode())
    if not lora:
        raise SystemExit("llama.cpp does not load the adapter")
    adapters, scales = (api.llama_adapter_lora_p_ctypes * 1)(lora), (ctypes.c_float * 1)(1.0)
    logits: dict[str, Logits] = {}
    for n_adapters, which in ((0, "base"), (1, "adapted")):
        if api.llama_set_adapters_lora(context, adapters, n_adapters, scales) != 0:
            raise SystemExit("llama.cpp does not take the adapter")
        for name in PASSES:
            api.llama_set_causal_attn(context, name == "causal")
            logits[f"{name}_{which}"] = logits_in_context(api, loaded, context, tokens)
    np.savez(logits_file, **logits)  # type: ignore[arg-type]


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        _convert_child(*sys.argv[2:])
    else:
        _llama_child(*sys.argv[2:])
