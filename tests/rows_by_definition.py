"""Which noisy rows a text has when its context is frozen: the definition, token by token."""

from ggml_diffusion.objective.standing_rows import NOTHING

MASK = 99


def expected_rows(
    clean: list[int],
    noisy: list[int],
    groups: list[int],
    documents: list[int],
    prediction: str,
    blocks: bool,
    mask: int = MASK,
) -> set[tuple[int, ...]]:
    """(group, position, token, target, tokens that it sees) of every noisy row of one sequence."""
    rows: set[tuple[int, ...]] = set()
    for group in set(groups) - {NOTHING}:
        members = [i for i, other in enumerate(groups) if other == group]
        document = documents[members[0]]
        start = documents.index(document)
        limit = members[0] if blocks else len(documents) - documents[::-1].index(document)
        sees = sum(1 for i in range(start, limit) if blocks or groups[i] == NOTHING)
        for i in members:
            is_mask = noisy[i] == mask
            if prediction == "aligned":
                rows.add((group, i - start, noisy[i], i if is_mask else NOTHING, sees))
                continue
            if is_mask:  # its row is at the place before, with what stands there in the group's own view
                token = noisy[i - 1] if groups[i - 1] == group else clean[i - 1]
                rows.add((group, i - 1 - start, token, i, sees))
            elif not (i + 1 in members and noisy[i + 1] == mask):  # else the next mask's row shows it
                rows.add((group, i - start, noisy[i], NOTHING, sees))
    return rows
