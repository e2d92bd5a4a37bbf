"""Files that another library has mapped into this process: a truncated one is to be a line there, too.

Where the library mapped them is read from Linux's list of a process's maps; elsewhere nothing is watched.
Deliberately not here: the maps of the core, which watches them itself (csrc/bus.h).
"""

import os
from collections.abc import Iterable
from pathlib import Path

from ggml_diffusion.engine.native import ffi, lib

_MAPS = Path("/proc/self/maps")
Maps = dict[int, tuple[int, Path]]  # start -> bytes, file


def maps_of(paths: Iterable[Path]) -> Maps:
    """Where these files are mapped now."""
    wanted = {os.path.realpath(path): path for path in paths}
    found: Maps = {}
    try:
        lines = _MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return found
    for line in lines:
        fields = line.split(maxsplit=5)  # range, rights, offset, device, inode, file
        if len(fields) == 6 and fields[5] in wanted:
            start, _, end = fields[0].partition("-")
            found[int(start, 16)] = int(end, 16) - int(start, 16), wanted[fields[5]]
    return found


def watch(maps: Maps) -> None:
    """Let a read past the end of one of these files end the process with a line and exit code 2."""
    for start, (n_bytes, path) in maps.items():
        lib.ggd_bus_watch(ffi.cast("void *", start), n_bytes, os.fsencode(path))


def forget(maps: Maps) -> None:
    """Watch them no longer: before they are unmapped."""
    for start in maps:
        lib.ggd_bus_forget(ffi.cast("void *", start))
