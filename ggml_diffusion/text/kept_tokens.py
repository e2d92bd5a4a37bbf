"""The tokens of a text that were kept from before, or new ones.

Stores lie in one folder, each under the name of its key, until `keep_only` deletes the others: so that a run
that is refused because its text has changed still finds the tokens of the old text. Without such a folder the
store has no name, and goes with the process.

Deliberately not here: how tokens are made (tokenising.py), their files (token_store.py), when a text is still
the same (text_key.py).
"""

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ggml_diffusion.errors import UserError
from ggml_diffusion.text.prompts import TextEncoder
from ggml_diffusion.text.sequences import Sequences
from ggml_diffusion.text.sources import TextFile
from ggml_diffusion.text.text_key import describe_sources, is_as_recorded, key_of, stamp_of
from ggml_diffusion.text.token_store import (
    FILES,
    FORMAT,
    UNFINISHED_PREFIX,
    Manifest,
    SourceFile,
    TokenStore,
    TokenWriter,
    fault_of,
    put_in_place,
    read_manifest,
    sums_of_parts,
    token_bytes,
    write_manifest,
)
from ggml_diffusion.text.tokenising import OnProgress, check_refusals, tokenise
from ggml_diffusion.text.tokenizer import Tokenizer

_NAME_DIGITS = 16
_STORE_NAME = re.compile(rf"[0-9a-f]{{{_NAME_DIGITS}}}")


@dataclass(frozen=True)
class Reading:
    """How a text is read, beside what it says.

    Attributes:
        folder: where tokens are looked for, None: nowhere.
        keep: put them there, if they are not there; nobody else may write there meanwhile.
        n_processes: that tokenise a large text; None = as many as there are processors.
        warn: told in a sentence why kept tokens are not used.
        strict: refuse a text with any document that cannot be used; else up to a tenth are left out.
        on_progress: told how far a text is that has to be tokenised, from (0, total) to (total, total).

    """

    folder: Path | None = None
    keep: bool = False
    n_processes: int | None = None
    warn: Callable[[str], None] = lambda text: None
    strict: bool = False
    on_progress: OnProgress = lambda done, total: None


def open_tokens(files: Sequence[TextFile], tokenizer: TextEncoder, T: int, reading: Reading) -> TokenStore:
    """The tokens of a text.

    Args:
        files: of the text, in their order.
        tokenizer: only the tokens of a `Tokenizer`, which has a fingerprint, are kept.
        T: sequence length that the fingerprint of a new store is taken for.
        reading: how.

    Raises:
        UserError: a file or documents that cannot be used, named; the text changed meanwhile; or the disk has
            no room.

    """
    store = _open_tokens(files, tokenizer, T, reading)
    check_refusals(
        store.manifest.n_documents, store.manifest.n_refused, store.manifest.refusals, reading.strict
    )
    return store


def _open_tokens(files: Sequence[TextFile], tokenizer: TextEncoder, T: int, reading: Reading) -> TokenStore:
    if reading.folder is None or not isinstance(tokenizer, Tokenizer):
        return _nameless(files, tokenizer, reading)
    if reading.keep:
        _delete_unfinished(reading.folder)
    kept = _kept(reading.folder, tokenizer.fingerprint, reading.warn)
    for place, manifest in kept.items():
        if is_as_recorded(files, manifest.sources) and _is_whole(place, manifest, reading.warn):
            return TokenStore.open(place, manifest)
    if not kept and not reading.keep:
        return _nameless(files, tokenizer, reading)
    stamps = [stamp_of(file.path) for file in files]
    sources = describe_sources(files, time.time_ns())
    key = key_of(sources, tokenizer.fingerprint)
    place = reading.folder / key[:_NAME_DIGITS]
    if place in kept and kept[place].key == key and _is_whole(place, kept[place], reading.warn):
        manifest = kept[place].model_copy(update={"sources": sources})
        if reading.keep:
            write_manifest(place, manifest)  # so that the next time its files need not be read
        return TokenStore.open(place, manifest)
    if not reading.keep:
        return _nameless(files, tokenizer, reading)
    return _new(place, key, files, stamps, sources, tokenizer, T, reading)


def keep_only(stores: Sequence[TokenStore]) -> None:
    """Delete the stores beside these, of other texts or vocabularies, and nothing that is somebody else's."""
    kept = {store.folder for store in stores}
    for folder in {place.parent for place in kept if place.is_dir()}:
        for other in folder.iterdir():
            if other not in kept and _is_ours(other):
                shutil.rmtree(other, ignore_errors=True)


def _is_ours(place: Path) -> bool:
    """Whether a path is a store, whole or not: by its name, and reached by no link."""
    is_named = bool(_STORE_NAME.fullmatch(place.name)) or place.name.startswith(UNFINISHED_PREFIX)
    return is_named and not place.is_symlink() and not place.parent.is_symlink()


def _kept(folder: Path, vocabulary: str, warn: Callable[[str], None]) -> dict[Path, Manifest]:
    """The stores of a vocabulary, by their folders."""
    found = {}
    for place in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not _STORE_NAME.fullmatch(place.name):
            continue
        manifest = read_manifest(place)
        if manifest is None:
            warn(f"the tokens kept in {place} are damaged, or of another version, and are not used")
        elif manifest.vocabulary == vocabulary:
            found[place] = manifest
    return found


def _is_whole(place: Path, manifest: Manifest, warn: Callable[[str], None]) -> bool:
    fault = fault_of(place, manifest)
    if fault is not None:
        warn(f"the tokens kept in {place} are damaged ({fault}), and are not used")
    return fault is None


def _delete_unfinished(folder: Path) -> None:
    """Delete what a process that was killed left behind."""
    for place in folder.glob(f"{UNFINISHED_PREFIX}*"):
        if _is_ours(place):
            shutil.rmtree(place, ignore_errors=True)


def _new(
    place: Path,
    key: str,
    files: Sequence[TextFile],
    stamps: Sequence[tuple[int, int, int, int]],
    sources: list[SourceFile],
    tokenizer: Tokenizer,
    T: int,
    reading: Reading,
) -> TokenStore:
    """Tokenise a text, and put its store in its place."""
    unfinished = place.with_name(f"{UNFINISHED_PREFIX}{os.getpid()}")
    try:
        with TokenWriter(unfinished, token_bytes(tokenizer.vocab_size)) as writer:
            manifest = _write(writer, files, tokenizer, reading, key, tokenizer.fingerprint, sources)
            for file, stamp in zip(files, stamps, strict=True):
                if stamp_of(file.path) != stamp:
                    raise UserError(
                        f"{file.place()}: changed while it was read: start again once it is finished"
                    )
            store = TokenStore(place, manifest, writer.finish())
            manifest = manifest.model_copy(
                update={
                    "fingerprint": Sequences(store, T).fingerprint(),
                    "fingerprint_length": T,
                    "files": {name: sums_of_parts(unfinished / name) for name in FILES},
                }
            )
            store.manifest = manifest
            write_manifest(unfinished, manifest)
            put_in_place(unfinished, place)
    except OSError as error:
        raise UserError(
            f"{place.parent}: the tokens could not be written: {error.strerror or error}"
        ) from error
    return store


def _nameless(files: Sequence[TextFile], tokenizer: TextEncoder, reading: Reading) -> TokenStore:
    """Tokenise a text into files that go with this process."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="ggml-diffusion-"))
        with TokenWriter(folder / "tokens", 4, nameless=True) as writer:
            folder.rmdir()
            manifest = _write(writer, files, tokenizer, reading)
            return TokenStore(folder, manifest, writer.finish())
    except OSError as error:
        raise UserError(
            f"{tempfile.gettempdir()}: the tokens could not be written: {error.strerror or error}; the "
            f"environment variable TMPDIR names another folder"
        ) from error


def _write(
    writer: TokenWriter,
    files: Sequence[TextFile],
    tokenizer: TextEncoder,
    reading: Reading,
    key: str = "",
    vocabulary: str = "",
    sources: Sequence[SourceFile] = (),
) -> Manifest:
    """Write all tokens of a text; the manifest lacks sums and fingerprint."""
    text = tokenise(files, tokenizer, writer, reading.n_processes, reading.on_progress, strict=reading.strict)
    return Manifest(
        format=FORMAT,
        key=key,
        vocabulary=vocabulary,
        sources=list(sources),
        token_bytes=writer.token_bytes,
        n_documents=text.n_documents,
        n_skipped=text.n_skipped,
        n_blank=text.n_blank,
        n_refused=text.n_refused,
        refusals=text.refusals,
        n_text_tokens=writer.n_text_tokens,
        n_examples=writer.n_examples,
        n_example_tokens=writer.n_example_tokens,
    )
