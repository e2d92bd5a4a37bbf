"""The C loader under libFuzzer, which looks for inputs that reach new code; `make fuzz` builds what it runs.

    python tools/fuzz_loader.py .venv/build-fuzz/fuzz_load --seconds 60

It begins with the sound and the damaged models of tools/fuzz.py, and with the names of keys as a dictionary.
An input that a sanitizer, an abort, ten seconds or a gigabyte ends is kept, and the exit code is then 1.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from fuzz_inputs import Corpus
from tool_errors import run_tool

MAX_BYTES = 1 << 16  # of an input; the sound ones are smaller
LIMIT_S = 10  # of processor time an input, with sanitizers
LIMIT_MIB = 1024


def write_corpus(folder: Path, n_damaged: int, seed: int) -> None:
    """Sound models and damaged ones as files, and a dictionary of what keys and tensors are called."""
    corpus = Corpus(None)
    inputs = [bytes(model.header) + model.data for model in corpus.models]
    inputs += [corpus.make("model", seed, number).content for number in range(n_damaged)]
    for number, content in enumerate(inputs):
        if len(content) <= MAX_BYTES:
            (folder / f"{number:06d}").write_bytes(content)
    names = {
        name.decode()
        for model in corpus.models
        for name in re.findall(rb"[a-z][a-z0-9_]*(?:\.[a-z0-9_]+)+", bytes(model.header))
    }
    (folder.parent / "names.dict").write_text("".join(f'"{name}"\n' for name in sorted(names)))


def main() -> None:
    """Write the corpus and run the fuzzer, whose own lines go to the screen."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("program", type=Path)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--damaged", type=int, default=2000, help="models of tools/fuzz.py to begin with")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-faults"))
    given = parser.parse_args()
    given.keep.mkdir(exist_ok=True)
    with TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        write_corpus(corpus, given.damaged, given.seed)
        command = [
            *(str(given.program.resolve()), str(corpus), f"-seed={given.seed}"),
            *(f"-max_total_time={given.seconds}", f"-max_len={MAX_BYTES}", f"-timeout={LIMIT_S}"),
            *(f"-rss_limit_mb={LIMIT_MIB}", f"-dict={corpus.parent / 'names.dict'}"),
            *(f"-artifact_prefix={given.keep.resolve()}/", "-print_final_stats=1", "-verbosity=1"),
        ]
        code = subprocess.run(command, check=False).returncode
    if code == 0 and not any(given.keep.iterdir()):
        given.keep.rmdir()
    sys.exit(int(code != 0))


if __name__ == "__main__":
    run_tool(main)
