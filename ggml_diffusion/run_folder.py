"""What an output folder holds, by name, and whether a folder is one.

Deliberately not here: what is in the files.
"""

from pathlib import Path

CHECKPOINTS, TOKENS = "checkpoints", "tokens"
METRICS, CONFIG, EVALUATION, BASE = "metrics.jsonl", "config.toml", "evaluation.json", "base.json"
CARD = "README.md"
EXPORTS = ("adapter.safetensors", "adapter.gguf")
LOCK, PID = ".lock", ".pid"
OWN_NAMES = frozenset([CHECKPOINTS, TOKENS, METRICS, CONFIG, EVALUATION, BASE, CARD, *EXPORTS, LOCK, PID])


def is_run_folder(folder: Path) -> bool:
    """Whether a conversion has written into a folder, by the names that it holds."""
    return (folder / CONFIG).is_file() and any(
        (folder / name).exists() for name in (CHECKPOINTS, METRICS, *EXPORTS)
    )
