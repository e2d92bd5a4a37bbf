"""Programs that are not always there: transformers + peft in some interpreter, and llama-diffusion-cli.

Both run as processes of their own; what they say on failure becomes one line. Deliberately not here:
llama.cpp as a library (llama_runtime.py), what is compared and how near is near enough (verify.py).
Source: llama.cpp, examples/diffusion/diffusion-cli.cpp, for what it prints and how it is steered.
"""

import importlib.util
import os
import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.child import isolated, reason_in_log
from ggml_diffusion.errors import UserError

TIME_LIMIT_S = 1800.0
_CHILD = Path(__file__).with_name("peft_child.py")
# It writes its log in a thread, and now and then ends before that has said the last of it.
_TRIES = 5
# What stands before a line of llama.cpp's log: "0.01.453.928 I ".
_LOG_MARK = re.compile(r"\d+\.\d\d\.\d\d\d\.\d\d\d [A-Z] ")


def has_peft() -> bool:
    """Whether this interpreter has what a PEFT folder is run with."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers", "peft"))


def peft_logits(
    folder: Path, base: Path, tokens: NDArray[np.int32], time: float | None, python: Path | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits (T, V) of a PEFT folder on its base, and those of the base alone, causal.

    Args:
        folder: with adapter_config.json.
        base: the GGUF, which transformers unpacks.
        tokens: (T,), masks included.
        time: of the time embedding.
        python: an interpreter with torch, transformers and peft; None = this one.

    Raises:
        UserError: it could not be run, or failed; the message holds what it said.

    """
    with tempfile.TemporaryDirectory() as place:
        request, response = Path(place) / "request.npz", Path(place) / "response.npz"
        np.savez(request, tokens=tokens, time=np.float64(np.nan if time is None else time))
        if python is None:
            program = isolated("ggml_diffusion.export.peft_child", "main(*sys.argv[2:])")
        else:
            program = [str(python), "-I", str(_CHILD)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        _run([*program, str(folder), str(base), str(request), str(response)], environment)
        with np.load(response) as answer:
            return np.asarray(answer["logits"], np.float32), np.asarray(answer["base"], np.float32)


def diffusion_cli_text(
    program: Path, model: Path, prompt: str, n_tokens: int, n_threads: int, n_steps: int
) -> str:
    """What llama-diffusion-cli writes behind a prompt, the likeliest token everywhere.

    Args:
        program: where it is.
        model: a standalone file.
        prompt: the text before.
        n_tokens: of prompt and what is written together.
        n_threads: of llama.cpp.
        n_steps: 1 = all tokens out of the first pass.

    Raises:
        UserError: it could not be run, or failed; the message holds what it said.

    """
    arguments = {
        "-m": model,
        "-p": prompt,
        "-ub": n_tokens,
        "-t": n_threads,
        "--diffusion-steps": n_steps,
        "--diffusion-eps": 0.001,
        "--diffusion-algorithm": 4,
        "--top-k": 1,
    }
    flat = [str(one) for pair in arguments.items() for one in pair]
    log = ""
    for _ in range(_TRIES):
        # Repacked weights are a second copy, in instructions that not every virtual machine really has.
        log = _run([str(program), *flat], {**os.environ, "LLAMA_ARG_REPACK": "0"})
        # The text comes as the log's last line, which begins with a line break of its own.
        *_, text = _LOG_MARK.split(log)
        if text.startswith("\n") and text.strip():
            return text.removeprefix("\n").removesuffix("\n")
    raise UserError(f"{program}: wrote nothing: {reason_in_log(log)}")


def _run(command: list[str], environment: dict[str, str]) -> str:
    """What a program says on both of its streams; an error in a line if it fails."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            timeout=TIME_LIMIT_S,
            check=False,
        )
    except OSError as error:
        raise UserError(f"{command[0]}: cannot be run: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]}: did not finish within {TIME_LIMIT_S:.0f} s") from None
    log = done.stdout.decode(errors="replace")
    if done.returncode != 0:
        raise UserError(f"{command[0]}: failed with exit code {done.returncode}: {reason_in_log(log)}")
    return log
