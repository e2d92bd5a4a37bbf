"""Two kinds of rows: tokens that stand, which the base alone computes, and noisy ones, which see them.

With a frozen context the adapter acts on the noisy rows only. Groups of noisy rows are denoised together: the
holes of a text, which see all of it that stands, on both sides; or the blocks of a text, each of which sees
what stands before it. This file says which rows a batch has, at which position and with which token each
stands, what it sees and what it predicts. Each token of a group has a row. With a shifted prediction the mask
at i is read from the row at i - 1, so the token before a group's masks has one, too: under a causal mask it
is the base's own prediction before training.

Tokens near a group may have a noisy row as well, its margin: the text beside a hole, read again with the hole
in sight. The token stands all the same, so that what is kept of it serves the next step.

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
    """The noisy rows of a batch.

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
    margin: int = 0,
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
        margin: tokens that stand and are this near to one of a group, in its document, have a row in that
            group as well, of the nearest group if there are several; not in blocks.

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
            margin,
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
    margin: int,
) -> tuple[_Fields, _Fields]:
    """Of one sequence (T,): the noisy rows' tokens, positions, groups, targets, first and end of what they
    see; the standing rows' tokens, positions and documents."""
    places = np.arange(len(clean))
    runs = np.cumsum(np.diff(documents, prepend=documents[:1]) != 0)
    starts, document_ends = np.searchsorted(runs, runs), np.searchsorted(runs, runs, side="right")
    is_noisy = groups != NOTHING
    stands = np.ones(len(clean), dtype=bool) if blocks else ~is_noisy
    group_start = np.zeros(int(groups.max(initial=NOTHING)) + 1, dtype=np.int64)
    group_start[groups[is_noisy][::-1]] = places[is_noisy][::-1]  # the first of each is written last
    if margin and not blocks:
        groups = _with_margin(groups, starts, document_ends, margin)
        is_noisy = groups != NOTHING
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
    limit = group_start[group] if blocks else document_ends[place]
    own = (token, place - starts[place], group, target, before[starts[place]], before[limit])
    return (
        tuple(np.asarray(field, dtype=np.int32) for field in own),
        (clean[stands], (places - starts)[stands].astype(np.int32), documents[stands]),
    )


def _with_margin(
    groups: NDArray[np.int32], starts: NDArray[np.int64], document_ends: NDArray[np.int64], margin: int
) -> NDArray[np.int32]:
    """The groups (T,) with their margins; between two at the same distance a place joins the first.

    Args:
        groups: (T,).
        starts: (T,), where the document of each place begins.
        document_ends: (T,), and where it ends.
        margin: in tokens.

    """
    n = len(groups)
    places = np.arange(n)
    members = np.flatnonzero(groups != NOTHING)
    if not len(members):
        return groups
    following = np.searchsorted(members, places)
    before = members[np.maximum(following - 1, 0)]
    behind = members[np.minimum(following, len(members) - 1)]
    beyond = margin + 1
    to_before = np.where((following > 0) & (before >= starts), places - before, beyond)
    to_behind = np.where((following < len(members)) & (behind < document_ends), behind - places, beyond)
    joined = np.where(to_before <= to_behind, groups[before], groups[behind])
    joins = (groups == NOTHING) & (np.minimum(to_before, to_behind) <= margin)
    return np.where(joins, joined, groups)


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
    inside = np.flatnonzero(groups != NOTHING)
    # The row before a group's masks is the clean token's, in the group.
    entering = np.flatnonzero(is_next_masked & ~same)
    place = np.concatenate([inside, entering])
    token = np.concatenate([noisy[inside], clean[entering]])
    group = np.concatenate([groups[inside], next_group[entering]])
    target = np.concatenate([np.where((is_next_masked & same)[inside], inside + 1, NOTHING), entering + 1])
    order = np.lexsort((place, group))
    return place[order], token[order], group[order], target[order]
