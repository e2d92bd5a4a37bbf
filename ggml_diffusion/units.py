"""Numbers for people: bytes, and how long something takes. Nothing here is read back."""

_UNITS = ("EiB", 60), ("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)


def in_bytes(count: int) -> str:
    """A number of bytes in the largest unit of which there are ten: "512 bytes", "1200 KiB", "24 GiB"."""
    for unit, bits in _UNITS:
        if count >= 10 << bits:
            return f"{(count + (1 << bits - 1)) >> bits} {unit}"
    return f"{count} bytes"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: "1:02:03", "2:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
