"""Which rows a text has when its context is frozen: against the definition, token by token."""

import numpy as np
import pytest
from numpy.typing import NDArray
from rows_by_definition import MASK, expected_rows

from ggml_diffusion.objective.output_rows import Prediction
from ggml_diffusion.objective.standing_rows import NOTHING, NoisyRows, lay_out_rows


def random_text(rng: np.random.Generator, blocks: bool) -> tuple[NDArray[np.int32], ...]:
    """Clean, noisy, groups and documents (B, T), and lengths (B,); no document begins with a group.

    Without blocks the last document has two groups, as holes that are denoised apart."""
    B, T = 4, 23
    clean = rng.integers(1, 90, (B, T)).astype(np.int32)
    documents = np.sort(rng.integers(0, 3, (B, T)), axis=1).astype(np.int32)[:, ::-1].copy()
    lengths = rng.integers(1, T + 1, B).astype(np.int32)
    groups = np.full((B, T), NOTHING, np.int32)
    for b in range(B):
        number = 0
        for document in set(documents[b].tolist()):
            places = np.flatnonzero(documents[b] == document)[1:]
            for size in range(0, len(places), 4):
                if blocks:
                    groups[b, places[size : size + 4]] = number + 10 * (2 - document)
                    number += 1
                else:
                    chosen = places[size : size + 4][: rng.integers(0, 5)]
                    groups[b, chosen] = 2 - document + (document == 0 and size >= 8)
    noisy = np.where((groups != NOTHING) & (rng.random((B, T)) < 0.6), MASK, clean).astype(np.int32)
    return clean, noisy, groups, documents, lengths


def found_rows(rows: NoisyRows, b: int) -> list[tuple[int, ...]]:
    seen = rows.seen[b, :, 1] - rows.seen[b, :, 0]
    fields = (rows.groups[b], rows.positions[b], rows.tokens[b], rows.targets[b], seen)
    return [tuple(int(field[i]) for field in fields) for i in range(rows.lengths[b])]


@pytest.mark.parametrize(("blocks", "margin"), [(False, 0), (False, 1), (False, 4), (True, 0), (True, 3)])
@pytest.mark.parametrize("prediction", ["shifted", "aligned"])
@pytest.mark.parametrize("seed", range(10))
def test_every_row_is_there_once_and_sees_what_it_may(
    prediction: Prediction, blocks: bool, margin: int, seed: int
) -> None:
    clean, noisy, groups, documents, lengths = random_text(np.random.default_rng(seed), blocks)
    rows = lay_out_rows(
        clean,
        noisy,
        noisy == MASK,
        groups,
        lengths,
        documents,
        prediction,
        in_blocks=np.full(4, blocks),
        margin=margin,
    )
    for b, n in enumerate(lengths):
        expected = expected_rows(
            clean[b, :n].tolist(),
            noisy[b, :n].tolist(),
            groups[b, :n].tolist(),
            documents[b, :n].tolist(),
            prediction,
            blocks,
            margin=margin,
        )
        found = found_rows(rows, b)
        assert len(found) == len(expected) and set(found) == expected
        assert found == sorted(found, key=lambda row: row[:2])  # group by group, positions rise
        stands = np.flatnonzero(blocks | (groups[b, :n] == NOTHING))
        standing = rows.standing
        assert standing.lengths[b] == len(stands)
        np.testing.assert_array_equal(standing.tokens[b, : len(stands)], clean[b, stands])
        # what is seen begins with the group's own document
        for row in range(rows.lengths[b]):
            first, end = rows.seen[b, row]
            seen_documents = set(standing.document_ids[b, first:end].tolist())
            target = rows.targets[b, row]
            assert target == NOTHING or seen_documents <= {int(documents[b, target])}


def test_values_go_to_the_rows_that_predict_and_back() -> None:
    clean, noisy, groups, documents, lengths = random_text(np.random.default_rng(3), False)
    rows = lay_out_rows(clean, noisy, noisy == MASK, groups, lengths, documents, "shifted")
    is_valid = np.arange(clean.shape[1]) < lengths[:, None]
    back = rows.of_tokens(rows.of_rows(clean), clean.shape[1])
    np.testing.assert_array_equal(back, np.where((noisy == MASK) & is_valid, clean, 0))


def test_a_document_that_begins_with_a_mask_is_refused() -> None:
    clean = np.arange(1, 7, dtype=np.int32)[None]
    documents = np.array([[0, 0, 0, 1, 1, 1]], np.int32)
    masked = np.array([[False, False, False, True, False, False]])
    noisy = np.where(masked, MASK, clean).astype(np.int32)
    groups = np.where(masked, 0, NOTHING).astype(np.int32)
    lay_out_rows(clean, noisy, masked, groups, None, documents, "aligned")
    with pytest.raises(ValueError, match="first token"):
        lay_out_rows(clean, noisy, masked, groups, None, documents, "shifted")
