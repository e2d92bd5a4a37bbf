"""The part of a text that will not change any more, while the rest is still being written.

A client that puts the pieces together gets the whole text: a character whose bytes are not all there waits,
and so does what may be the beginning of a stop string.

Deliberately not here: which tokens stand (jobs.py).
"""

from collections.abc import Sequence


class GrowingText:
    """Pieces of a text that grows at its end, up to the first stop string."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = stops
        self._n_held = max((len(stop) for stop in stops), default=1) - 1
        self._n_given = 0
        self.is_stopped = False

    def piece(self, text: str) -> str:
        """What can be given of a text that goes on; it begins with every text given before."""
        whole = text.rstrip("\ufffd")  # perhaps half of a character
        self._find_stop(whole)
        if self.is_stopped:
            return self._up_to(whole, len(self.cut(whole)))
        return self._up_to(whole, len(whole) - self._n_held)

    def last_piece(self, text: str) -> str:
        """The rest of the whole text."""
        self._find_stop(text)
        cut = self.cut(text)
        return self._up_to(cut, len(cut))

    def cut(self, text: str) -> str:
        """A text up to its first stop string."""
        found = [at for at in map(text.find, self._stops) if at >= 0]
        return text[: min(found)] if found else text

    def _find_stop(self, text: str) -> None:
        self.is_stopped = self.is_stopped or any(stop in text for stop in self._stops)

    def _up_to(self, text: str, end: int) -> str:
        piece = text[self._n_given : max(end, self._n_given)]
        self._n_given = max(end, self._n_given)
        return piece
