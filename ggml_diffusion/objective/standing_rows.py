"""Two kinds of rows: tokens that stand, which the base alone computes, and noisy ones, which see them.

With a frozen context the adapter acts on the noisy rows only. Groups of noisy rows are denoised together: the
holes of a text, which see all of it that stands, on both sides; or the blocks of a text, each of which sees
what stands before it. This file says which rows a batch has, at which position and with which token each
stands, what it sees and what it predicts. Rows of a group are those of a whole pass over the text, as far as
they are needed: with a shifted prediction the token at i is read from the row at i - 1, which carries the
token at i - 1, or the mask token where that one is masked; so before training the first row of a hole is the
base's own prediction.

Deliberately not here: what is masked (corruption.py), and the network, which hides a row that stands from a
noisy one at the same position.
Source: block diffusion with clean context, BD3-LM [Arriola et al. 2025, arXiv:2503.09573].
Letters: B sequences, T tokens, R noisy rows of a sequence, S standing ones, both at most.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.objective.output_rows import Prediction, Scalar

NOTHING = -1


@dataclass(frozen=True)
class StandingRows:
    """The rows that stand: tokens, positions in their document, and document (B, S), and lengths (B,)."""

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    document_ids: NDArray[np.int32]
    lengths: NDArray[np.int32]


@dataclass(frozen=True)
class NoisyRows:
    """The noisy rows of a batch, without those that are needed for nothing.

    Attributes:
        tokens: (B, R) int32, with masks.
        positions: (B, R) int32, in the document.
        groups: (B, R) int32, rows of the same number see each other.
        lengths: (B,) int32, rows from there on are padding.
        targets: (B, R) int64, the place in its sequence of the token that a row predicts, `NOTHING` for none.
        standing: the other kind.
        seen: (B, R, 2) int32, the standing rows [first, end) of its sequence that a row sees.

    """

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    groups: NDArray[np.int32]
    lengths: NDArray[np.int32]
    targets: NDArray[np.int64]
    standing: StandingRows
    seen: NDArray[np.int32]

    def of_sequences(self, chosen: NDArray[np.bool_]) -> "NoisyRows":
        """The rows of some sequences, (B,) bool."""
        standing = self.standing
        return NoisyRows(
            self.tokens[chosen],
            self.positions[chosen],
            self.groups[chosen],
            self.lengths[chosen],
            self.targets[chosen],
            StandingRows(
                standing.tokens[chosen],
                standing.positions[chosen],
                standing.document_ids[chosen],
                standing.lengths[chosen],
            ),
            self.seen[chosen],
        )

    def of_rows(self, values: NDArray[Scalar]) -> NDArray[Scalar]:
        """Values (B, T) of tokens, by the row that predicts each (B, R); 0 where a row predicts none."""
        taken = np.take_along_axis(values, np.maximum(self.targets, 0), axis=1)
        return np.where(self.targets >= 0, taken, np.zeros((), values.dtype))

    def of_tokens(self, rows: NDArray[Scalar], n_tokens: int) -> NDArray[Scalar]:
        """Values (B, R) of rows, by the place (B, T) that each predicts; 0 where nothing was."""
        result = np.zeros((len(rows), n_tokens), dtype=rows.dtype)
        sequence, row = np.nonzero(self.targets >= 0)
        result[sequence, self.targets[sequence, row]] = rows[sequence, row]
        return result


def lay_out_rows(
    clean: NDArray[np.int32],
    noisy: NDArray[np.int32],
    masked: NDArray[np.bool_],
    groups: NDArray[np.int32],
    lengths: NDArray[np.int32] | None,
    document_ids: NDArray[np.int32] | None,
    prediction: Prediction,
    *,
    in_blocks: NDArray[np.bool_] | None = None,
) -> NoisyRows:
    """The rows of both kinds for a batch of texts.

    Args:
        clean: (B, T) int32, what stands.
        noisy: (B, T) int32, the same with masks, and whatever else is being denoised.
        masked: (B, T), the tokens to predict.
        groups: (B, T), the group of each token that is masked or being denoised, `NOTHING` elsewhere. A group
            lies in one document, and groups rise along the text.
        lengths: (B,), padding from there on; None = none.
        document_ids: (B, T); None = one document a sequence.
        prediction: which row predicts a token.
        in_blocks: (B,), where a group sees what stands before it, and all tokens stand: they are clean for
            later blocks. Else a group sees all that stands in its document, and its own tokens do not. None =
            nowhere.

    Returns:
        The rows; a sequence without a mask has none.

    Raises:
        ValueError: with "shifted", the first token of a document is masked.

    """
    n_sequences, n_tokens = clean.shape
    documents = np.zeros(clean.shape, np.int32) if document_ids is None else document_ids
    ends = np.full(n_sequences, n_tokens) if lengths is None else lengths
    parts = [
        _sequence_rows(
            clean[b, :end],
            noisy[b, :end],
            masked[b, :end],
            groups[b, :end],
            documents[b, :end],
            prediction,
            in_blocks is not None and bool(in_blocks[b]),
        )
        for b, end in enumerate(ends)
    ]
    tokens, positions, own_groups, targets, first, end = (
        _padded([own[field] for own, _ in parts], NOTHING if field == 3 else 0) for field in range(6)
    )
    standing = StandingRows(
        tokens=_padded([stands[0] for _, stands in parts]),
        positions=_padded([stands[1] for _, stands in parts]),
        document_ids=_padded([stands[2] for _, stands in parts]),
        lengths=_counts([stands[0] for _, stands in parts]),
    )
    return NoisyRows(
        tokens,
        positions,
        own_groups,
        _counts([own[0] for own, _ in parts]),
        targets.astype(np.int64),
        standing,
        np.stack([first, end], axis=-1),
    )


def _counts(rows: list[NDArray[np.int32]]) -> NDArray[np.int32]:
    return np.array([len(row) for row in rows], dtype=np.int32)


def _padded(rows: list[NDArray[np.int32]], filler: int = 0) -> NDArray[np.int32]:
    """Rows of several lengths as one array, the filler behind their ends; at least one column."""
    result = np.full((len(rows), max(1, *(len(row) for row in rows))), filler, dtype=np.int32)
    for target, row in zip(result, rows, strict=True):
        target[: len(row)] = row
    return result


_Fields = tuple[NDArray[np.int32], ...]


def _sequence_rows(
    clean: NDArray[np.int32],
    noisy: NDArray[np.int32],
    masked: NDArray[np.bool_],
    groups: NDArray[np.int32],
    documents: NDArray[np.int32],
    prediction: Prediction,
    blocks: bool,
) -> tuple[_Fields, _Fields]:
    """Of one sequence (T,): the noisy rows' tokens, positions, groups, targets, first and end of what they
    see; the standing rows' tokens, positions and documents."""
    places = np.arange(len(clean))
    runs = np.cumsum(np.diff(documents, prepend=documents[:1]) != 0)
    starts, document_ends = np.searchsorted(runs, runs), np.searchsorted(runs, runs, side="right")
    is_noisy = groups != NOTHING
    stands = np.ones(len(clean), dtype=bool) if blocks else ~is_noisy
    target = np.where(masked, places, NOTHING)
    if prediction == "aligned":
        place, token, group = places[is_noisy], noisy[is_noisy], groups[is_noisy]
        target = target[is_noisy]
    else:
        if (masked & (places == starts)).any():
            raise ValueError(
                "the first token of a document is masked, but a shifted prediction has no row for it"
            )
        place, token, group, target = _shifted_rows(clean, noisy, masked, groups)
    before = np.concatenate([[0], np.cumsum(stands)])  # how many stand before each place
    n_groups = int(group.max(initial=NOTHING)) + 1
    group_start = np.zeros(n_groups, dtype=np.int64)
    group_start[groups[is_noisy][::-1]] = places[is_noisy][::-1]  # the first of each is written last
    limit = group_start[group] if blocks else document_ends[place]
    own = (token, place - starts[place], group, target, before[starts[place]], before[limit])
    return (
        tuple(np.asarray(field, dtype=np.int32) for field in own),
        (clean[stands], (places - starts)[stands].astype(np.int32), documents[stands]),
    )


def _shifted_rows(
    clean: NDArray[np.int32],
    noisy: NDArray[np.int32],
    masked: NDArray[np.bool_],
    groups: NDArray[np.int32],
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
    """Places, tokens, groups and targets of the rows where the token at i is read from the row at i - 1."""
    is_next_masked = np.append(masked[1:], False)
    next_group = np.append(groups[1:], NOTHING)
    same = next_group == groups
    # A token of a group has a row if it says something, or if the next one is read from it.
    inside = np.flatnonzero((groups != NOTHING) & (~masked | (is_next_masked & same)))
    # The row before a group's masks is the clean token's, in the group.
    entering = np.flatnonzero(is_next_masked & ~same)
    place = np.concatenate([inside, entering])
    token = np.concatenate([noisy[inside], clean[entering]])
    group = np.concatenate([groups[inside], next_group[entering]])
    target = np.concatenate([np.where((is_next_masked & same)[inside], inside + 1, NOTHING), entering + 1])
    order = np.lexsort((place, group))
    return place[order], token[order], group[order], target[order]
