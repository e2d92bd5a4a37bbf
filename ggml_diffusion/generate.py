"""The denoising loop: starts from masks and turns them into tokens step by step.

Deliberately not here: the network (it comes in as a function, see diffusion_model.py), and which token is
drawn and which position goes first (sampling.py).
Sources: ancestral sampling of masked diffusion, MDLM [Sahoo et al. 2024, arXiv:2406.07524];
semi-autoregressive blocks, LLaDA [Nie et al. 2025, arXiv:2502.09992], with masks to come in sight, or BD3-LM
[Arriola et al. 2025, arXiv:2503.09573], without; remasking, ReMDM [Wang et al. 2025, arXiv:2503.00307].
Letters: T tokens, N candidate positions, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from ggml_diffusion.sampling import RevealOrder, block_steps, highest, propose, reveal_counts

# (tokens (T,) with masks, positions (N,) to predict, all positions of the block that is being denoised)
# -> logits (N, V) of the tokens at the positions to predict
Predictor = Callable[[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]


class GenerationConfig(BaseModel):
    """How text is denoised. One field = one setting: the flags of `generate` and their help come of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(default=64, ge=1, description="Denoising steps; each is one forward pass.")
    order: RevealOrder = Field(
        default=RevealOrder.CONFIDENCE,
        description="Positions revealed first: at random, the surest by confidence, margin or entropy, or by "
        "threshold = all that are sure.",
    )
    threshold: float = Field(
        default=0.9,
        gt=0.0,
        le=1.0,
        description="Probability from which a token is sure; for the order threshold only.",
    )
    temperature: float = Field(
        default=1.0,
        ge=0.0,
        allow_inf_nan=False,
        description="Temperature of the draw; 0 takes the likeliest token.",
    )
    top_k: int = Field(default=0, ge=0, description="Draw from the k likeliest tokens only; 0 = from all.")
    top_p: float = Field(
        default=0.9,
        gt=0.0,
        le=1.0,
        description="Draw from the smallest set of tokens that holds this probability.",
    )
    length: int = Field(
        default=64, ge=1, description="Tokens to write; the text may end before, at an end-of-text."
    )
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="Seed of the draws; the same seed gives the same text."
    )
    block_length: int | None = Field(
        default=None,
        ge=0,
        description="Finish blocks of this many tokens from left to right; 0 = all at once; left out, as the "
        "conversion was trained.",
    )
    remasking: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="Share of the tokens already written that each step masks again, the least sure first.",
    )


@dataclass(frozen=True)
class DenoisingStep:
    """What a step left behind. `tokens` (T,) is a copy; masks that are left still hold the mask token."""

    step: int
    n_steps: int
    tokens: NDArray[np.int32]


def denoise(
    tokens: NDArray[np.int32],
    mask_token_id: int,
    predict: Predictor,
    mask_probability: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    config: GenerationConfig,
    *,
    stop_token: int | None = None,
    hide_later_blocks: bool = False,
    on_step: Callable[[DenoisingStep], None] | None = None,
) -> NDArray[np.int32]:
    """Replace every mask of a sequence.

    Each block takes its share of the steps, or fewer with the order "threshold": a step then reveals all
    tokens that are sure, at least one more than it masked again, and the block's last step all that are left.

    Args:
        tokens: (T,) with `mask_token_id` wherever a token is to be written; all else is context and stays.
        mask_token_id: never drawn, as `predict` gives it a logit of -inf.
        predict: the network.
        mask_probability: the noise schedule p(t), which sets how many tokens each step reveals.
        config: `length` is not used here, the masks are counted; a `block_length` of None is 0 here.
        stop_token: if set, no further block is begun once a finished block holds it; its masks are left.
        hide_later_blocks: cut off the masks behind the current block, as block diffusion was trained; text
            behind the last mask stays in sight, and with it all that lies between.
        on_step: called after every step.

    Returns:
        (T,), a new array.

    """
    tokens = tokens.copy()
    holes = np.flatnonzero(tokens == mask_token_id)
    if len(holes) == 0:
        return tokens
    generator = np.random.Generator(np.random.Philox(key=config.seed))
    block_length = config.block_length or len(holes)
    blocks = [holes[start : start + block_length] for start in range(0, len(holes), block_length)]
    steps_of_blocks = block_steps([len(block) for block in blocks], config.steps)
    step = 0
    for block, n_steps in zip(blocks, steps_of_blocks, strict=True):
        visible = tokens
        if hide_later_blocks and (tokens[block[-1] + 1 :] == mask_token_id).all():
            visible = tokens[: block[-1] + 1]  # a view: what is written shows in `tokens`
        surety = np.zeros(len(tokens))  # of each token written in this block, as it was when it was written
        counts = reveal_counts(len(block), n_steps, mask_probability)
        for index, count in enumerate(counts):
            is_last = index == n_steps - 1
            n_again = 0 if is_last else _mask_again(tokens, block, surety, mask_token_id, config.remasking)
            if config.order is not RevealOrder.THRESHOLD:
                n_least = n_most = int(count) + n_again
            else:
                n_most = int((tokens[block] == mask_token_id).sum())
                n_least = n_most if is_last else n_again + 1
            _reveal(visible, block, surety, mask_token_id, (n_least, n_most), predict, config, generator)
            step += 1
            if on_step is not None:
                on_step(DenoisingStep(step, sum(steps_of_blocks), tokens.copy()))
            if config.order is RevealOrder.THRESHOLD and not (tokens[block] == mask_token_id).any():
                break
        if stop_token is not None and (tokens[block] == stop_token).any():
            break
    return tokens


def _mask_again(
    tokens: NDArray[np.int32],
    block: NDArray[np.int64],
    surety: NDArray[np.float64],
    mask_token_id: int,
    share: float,
) -> int:
    """Mask the least sure `share` of the tokens that are written in a block; returns how many that is."""
    written = block[tokens[block] != mask_token_id]
    least_sure = written[highest(-surety[written], int(share * len(written)))]
    tokens[least_sure] = mask_token_id
    return len(least_sure)


def _reveal(
    tokens: NDArray[np.int32],
    block: NDArray[np.int64],
    surety: NDArray[np.float64],
    mask_token_id: int,
    counts: tuple[int, int],
    predict: Predictor,
    config: GenerationConfig,
    generator: np.random.Generator,
) -> None:
    """Write into the masks of a block, in place: the least count of tokens, and up to the most count of those
    that are sure."""
    n_least, n_most = counts
    if n_most == 0:
        return
    candidates = block[tokens[block] == mask_token_id]
    if config.order is RevealOrder.RANDOM:  # no need to look at positions that are not revealed
        candidates = np.sort(generator.choice(candidates, size=n_least, replace=False))
    drawn, scores = propose(
        predict(tokens, candidates, block),
        config.order,
        generator,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
    )
    n_sure = int((scores >= config.threshold).sum())
    chosen = highest(scores, min(max(n_least, n_sure), n_most))
    tokens[candidates[chosen]] = drawn[chosen]
    surety[candidates[chosen]] = scores[chosen]
