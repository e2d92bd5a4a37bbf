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
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from ggml_diffusion.generation.sampling import RevealOrder, block_steps, highest, propose, reveal_counts
from ggml_diffusion.randomness import Stream, generator_of

# (tokens (T,) with masks, positions (N,) to predict, all positions of the block that is being denoised)
# -> logits (N, V) of the tokens at the positions to predict
Predictor = Callable[[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]


# The limits of settings that evaluation has too.
Temperature = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Probability = Annotated[float, Field(gt=0.0, le=1.0)]
ShareBelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]

# A text whose most certain tokens are written first, wherever they are, repeats itself
# (docs/results/samplers.md).
DEFAULT_BLOCK_LENGTH = 8


class GenerationConfig(BaseModel):
    """How text is denoised. One field = one setting; the flags of `generate` are derived from the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="Denoising steps; each is one forward pass, and every block takes at least one. Left "
        "out, one for each token to write.",
    )
    order: RevealOrder = Field(
        default=RevealOrder.CONFIDENCE,
        description="Positions revealed first: at random, the most certain by confidence, margin or entropy, "
        "or by threshold = all that reach it.",
    )
    threshold: Probability = Field(
        default=0.9,
        description="Probability that a token must reach; for the order threshold only.",
    )
    temperature: Temperature = Field(
        default=1.0,
        description="Temperature of the draw; 0 takes the likeliest token.",
    )
    top_k: int = Field(default=0, ge=0, description="Draw from the k likeliest tokens only; 0 = from all.")
    top_p: Probability = Field(
        default=0.9,
        description="Draw from the smallest set of tokens that holds this probability.",
    )
    length: int = Field(
        default=64, ge=1, description="Tokens to write; the text may end before, at an end-of-text."
    )
    seed: Seed = Field(default=0, description="Seed of the draws; the same seed gives the same text.")
    block_length: int | None = Field(
        default=None,
        ge=0,
        description="Finish blocks of this many tokens from left to right; 0 = all at once; left out, as the "
        f"conversion was trained, {DEFAULT_BLOCK_LENGTH} if it was on whole texts.",
    )
    remasking: ShareBelowOne = Field(
        default=0.0,
        description="Share of the tokens already written that each step masks again, the least certain "
        "first.",
    )
    approximate_cache: bool = Field(
        default=False,
        description="With an adapted context: compute the text around a block once a block, and not in every "
        "step. Faster, and the text is another one. A frozen context is computed once anyway, exactly.",
    )


@dataclass(frozen=True)
class DenoisingStep:
    """What a step left behind.

    Attributes:
        step, n_steps: this one, from 1, and how many there are at most.
        tokens: (T,), a copy; masks that are left still hold the mask token.
        scores: (T,) how sure each written token was when it was written, in the measure of the order; with
            "confidence" and "threshold" its probability. 0 where nothing was written.

    """

    step: int
    n_steps: int
    tokens: NDArray[np.int32]
    scores: NDArray[np.float64]


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
    tokens that reach the threshold, at least one more than it masked again, and the last step of a block all
    the rest.

    Args:
        tokens: (T,) with `mask_token_id` wherever a token is to be written; all else is context and stays.
        mask_token_id: never drawn, as `predict` gives it a logit of -inf.
        predict: the network.
        mask_probability: the noise schedule p(t), which sets how many tokens each step reveals.
        config: `length` is not used here, the masks are counted; a `block_length` of None is 0 here, `steps`
            of None as many as there are masks.
        stop_token: if set, it ends the text where nothing but masks to fill lies behind it: what follows is
            hidden, as it was in training, and stays as it is; no further block starts.
        hide_later_blocks: cut off the masks behind the current block, as block diffusion was trained; text
            behind the last mask stays in sight, and with it all that lies between.
        on_step: called after every step.

    Returns:
        (T,), a new array.

    """
    tokens = tokens.copy()
    was_hole = tokens == mask_token_id
    holes = np.flatnonzero(was_hole)
    if len(holes) == 0:
        return tokens
    generator = generator_of(config.seed, 0, Stream.DENOISING)
    block_length = config.block_length or len(holes)
    blocks = [holes[start : start + block_length] for start in range(0, len(holes), block_length)]
    steps_of_blocks = block_steps([len(block) for block in blocks], config.steps or len(holes))
    step = 0
    # Of each token that was written, as it was when it was written.
    confidence = np.zeros(len(tokens))
    for block, n_steps in zip(blocks, steps_of_blocks, strict=True):
        for index, count in enumerate(reveal_counts(len(block), n_steps, mask_probability)):
            is_last = index == n_steps - 1
            n_again = (
                0 if is_last else _mask_again(tokens, block, confidence, mask_token_id, config.remasking)
            )
            end = _end_of_sight(tokens, block, was_hole, stop_token, hide_later_blocks)
            masks = _masks_before(end, tokens, block, mask_token_id)
            # The order "threshold" adds all that reach it; the last step leaves no mask.
            least = 1 if config.order is RevealOrder.THRESHOLD else int(count)
            n_least = len(masks) if is_last else min(least + n_again, len(masks))
            # A slice is a view: what is written shows in `tokens`.
            _reveal(tokens[:end], masks, block, confidence, n_least, predict, config, generator)
            step += 1
            if on_step is not None:
                on_step(DenoisingStep(step, sum(steps_of_blocks), tokens.copy(), confidence.copy()))
            end = _end_of_sight(tokens, block, was_hole, stop_token, hide_later_blocks)
            is_done = len(_masks_before(end, tokens, block, mask_token_id)) == 0
            if config.order is RevealOrder.THRESHOLD and is_done:
                break
        if stop_token is not None and (tokens[block] == stop_token).any():
            break
    return tokens


def _end_of_sight(
    tokens: NDArray[np.int32],
    block: NDArray[np.int64],
    was_hole: NDArray[np.bool_],
    stop_token: int | None,
    hide_later_blocks: bool,
) -> int:
    """Tokens that the model sees: all, or up to the block's end, or up to the first stop token in it."""
    cuts_here = hide_later_blocks and bool(was_hole[block[-1] :].all())
    block_end = int(block[-1]) + 1 if cuts_here else len(tokens)
    stops = block[tokens[block] == stop_token] if stop_token is not None else block[:0]
    if len(stops) and was_hole[stops[0] :].all():
        return min(block_end, int(stops[0]) + 1)
    return block_end


def _masks_before(
    end: int, tokens: NDArray[np.int32], block: NDArray[np.int64], mask_token_id: int
) -> NDArray[np.int64]:
    """The masked positions (N,) of a block that lie before `end`."""
    result: NDArray[np.int64] = block[(tokens[block] == mask_token_id) & (block < end)]
    return result


def _mask_again(
    tokens: NDArray[np.int32],
    block: NDArray[np.int64],
    confidence: NDArray[np.float64],
    mask_token_id: int,
    share: float,
) -> int:
    """Mask the least certain `share` of the tokens that are written in a block; returns how many that is."""
    written = block[tokens[block] != mask_token_id]
    least_confident = written[highest(-confidence[written], int(share * len(written)))]
    tokens[least_confident] = mask_token_id
    confidence[least_confident] = 0.0
    return len(least_confident)


def _reveal(
    tokens: NDArray[np.int32],
    masks: NDArray[np.int64],
    block: NDArray[np.int64],
    confidence: NDArray[np.float64],
    n_least: int,
    predict: Predictor,
    config: GenerationConfig,
    generator: np.random.Generator,
) -> None:
    """Write `n_least` tokens, or by the order "threshold" all that reach it, into a block, in place."""
    if n_least == 0:
        return
    if config.order is RevealOrder.RANDOM:  # no need to look at positions that are not revealed
        masks = np.sort(generator.choice(masks, size=n_least, replace=False))
    drawn, scores = propose(
        predict(tokens, masks, block[block < len(tokens)]),
        config.order,
        generator,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
    )
    n_certain = int((scores >= config.threshold).sum()) if config.order is RevealOrder.THRESHOLD else 0
    chosen = highest(scores, max(n_least, n_certain))
    tokens[masks[chosen]] = drawn[chosen]
    confidence[masks[chosen]] = scores[chosen]
