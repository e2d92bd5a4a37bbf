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
    margin: int = 0,
) -> set[tuple[int, ...]]:
    """(group, position, token, target, tokens that it sees) of every noisy row of one sequence."""
    rows: set[tuple[int, ...]] = set()
    for group in set(groups) - {NOTHING}:
        members = [i for i, other in enumerate(groups) if other == group]
        document = documents[members[0]]
        start = documents.index(document)
        limit = members[0] if blocks else len(documents) - documents[::-1].index(document)
        sees = sum(1 for i in range(start, limit) if blocks or groups[i] == NOTHING)
        masks = {i for i in members if noisy[i] == mask}
        places = set(members)
        if prediction == "shifted":  # a mask is read from the row at the place before
            places |= {i - 1 for i in masks}
        for i in [] if blocks else range(start, limit):
            # What stands beside a group has a row in the nearest; of two as near, in the first.
            near = sorted((abs(i - j), j) for j in range(start, limit) if groups[j] != NOTHING)
            if near[0][0] <= margin and groups[near[0][1]] == group:
                places.add(i)
        for i in places:
            target = i + 1 if prediction == "shifted" else i
            token = noisy[i] if i in members else clean[i]
            rows.add((group, i - start, token, target if target in masks else NOTHING, sees))
    return rows
