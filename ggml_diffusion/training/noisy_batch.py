"""The draw of one optimizer step: from a batch of clean text to what the network sees, and what each of its
predictions weighs.

Part of the trainer's wiring: it sees the config and hands plain values to the parts. Deliberately not here:
the parts' own arithmetic (objective/), the network, where the randomness comes from
(the trainer).
Letters: B sequences, T tokens.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.config.settings import ConversionTrainingConfig
from ggml_diffusion.objective.blocks import block_groups, block_size_at, keep_one_block
from ggml_diffusion.objective.corruption import (
    NoiseSchedule,
    complement_weight,
    corrupt,
    corrupt_exactly,
    exact_counts,
    exact_weight,
    loss_weights,
    predictable,
    stratified_times,
    with_masks,
)
from ggml_diffusion.objective.holes import keep_holes
from ggml_diffusion.objective.standing_rows import NOTHING
from ggml_diffusion.text.loader import TokenBatch


@dataclass(frozen=True)
class NoisyBatch:
    """What one optimizer step trains on: the draw for its whole accumulated batch.

    Attributes:
        clean: (B, T) int32.
        noisy: (B, T) int32, the same with masks.
        weights: (B, T) float32, of each position's cross-entropy, 0 where it is not masked; normalised.
        t: (B,) float32 diffusion times, for the time embedding.
        keeps_time: (B,) bool, False where the sequence goes without its time embedding.
        lengths: (B,) int32.
        document_ids: (B, T) int32.
        bernoulli_seed: of the attention mask, None = soft mask.
        groups: (B, T) int32 with a frozen context: what is denoised together (standing_rows.py).
        in_blocks: (B,) bool, whether a sequence's groups are blocks of it.
        repeats: (B,) bool, whether a sequence is the one before it with other masks.

    """

    clean: NDArray[np.int32]
    noisy: NDArray[np.int32]
    weights: NDArray[np.float32]
    t: NDArray[np.float32]
    keeps_time: NDArray[np.bool_]
    lengths: NDArray[np.int32] | None
    document_ids: NDArray[np.int32] | None
    bernoulli_seed: int | None
    groups: NDArray[np.int32] | None = None
    in_blocks: NDArray[np.bool_] | None = None
    repeats: NDArray[np.bool_] | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens of the text, padding and repeats not."""
        lengths = np.full(len(self.clean), self.clean.shape[1]) if self.lengths is None else self.lengths
        return int(lengths.sum() if self.repeats is None else lengths[~self.repeats].sum())

    def part(self, rows: slice) -> "NoisyBatch":
        """Some of the sequences; weights stay normalised over all."""
        return NoisyBatch(
            self.clean[rows],
            self.noisy[rows],
            self.weights[rows],
            self.t[rows],
            self.keeps_time[rows],
            None if self.lengths is None else self.lengths[rows],
            None if self.document_ids is None else self.document_ids[rows],
            self.bernoulli_seed,
            None if self.groups is None else self.groups[rows],
            None if self.in_blocks is None else self.in_blocks[rows],
            None if self.repeats is None else self.repeats[rows],
        )


@dataclass(frozen=True)
class _Masks:
    """Masked positions (B, T), and of each sequence (B,) the weight in the bound and the diffusion time."""

    masked: NDArray[np.bool_]
    bound_weight: NDArray[np.float64]
    t: NDArray[np.float64]


def block_size_of_step(config: ConversionTrainingConfig, step: int) -> int | None:
    """The size of the noisy block in optimizer step `step`, None where it is the whole sequence."""
    blocks = config.block_diffusion
    if not blocks.enabled:
        return None
    size = block_size_at(
        step,
        blocks.growth_share * config.total_steps,
        blocks.initial_size,
        blocks.final_size or config.sequence_length,
    )
    return size if size < config.sequence_length else None


def draw_noise(
    batch: TokenBatch,
    config: ConversionTrainingConfig,
    schedule: NoiseSchedule,
    generator: np.random.Generator,
    *,
    step: int,
    bos_id: int | None,
    mask_token_id: int,
) -> NoisyBatch:
    """Draw times, block, masks, time dropout and the seed of the attention mask for an optimizer step.

    With complementary masks the result has every sequence twice: all of them as they are drawn, then all of
    them with the masks turned around. A response whose end is masked has further masks behind it: nobody
    knows where a text will end before it is written.
    """
    t = stratified_times(
        len(batch), generator, config.noise_schedule.num_timesteps, config.noise_schedule.min_time
    )
    may_mask = predictable(batch, config.qlora.prediction, bos_id, mask_token_id)
    has_holes = np.zeros(len(batch), dtype=bool)
    if config.holes.share > 0.0:
        holes = config.holes
        may_mask, has_holes = keep_holes(may_mask, holes.share, holes.longest, holes.most, generator)
    clean, document_ids, lengths = batch.tokens, batch.document_ids, batch.lengths
    repeats = np.zeros(len(batch), dtype=bool)
    if config.holes.draws > 1 and has_holes.any():
        source = np.repeat(np.arange(len(batch)), np.where(has_holes, config.holes.draws, 1))
        clean, document_ids, lengths = clean[source], document_ids[source], lengths[source]
        may_mask, has_holes = may_mask[source], has_holes[source]
        repeats = np.diff(source, prepend=-1) == 0
        noise = config.noise_schedule
        t = stratified_times(len(source), generator, noise.num_timesteps, noise.min_time)
    ends = np.full(len(clean), clean.shape[1], dtype=np.int32)
    block_size = block_size_of_step(config, step)
    is_frozen = config.qlora.context == "frozen"
    if block_size is not None and not is_frozen:
        in_block, block_ends = keep_one_block(may_mask, block_size, generator)
        may_mask = np.where(has_holes[:, None], may_mask, in_block)
        ends = np.where(has_holes, ends, block_ends)
        lengths = np.minimum(lengths, ends)
    sides = _draw_masks(clean, may_mask, t, config, schedule, generator, mask_token_id)
    masked = np.concatenate([side.masked for side in sides])
    clean, may_mask, document_ids, lengths, ends, has_holes, repeats = (
        np.concatenate([array] * len(sides))
        for array in (clean, may_mask, document_ids, lengths, ends, has_holes, repeats)
    )
    noisy = with_masks(clean, masked, mask_token_id)
    groups, in_blocks = None, None
    if is_frozen:
        groups, in_blocks = _groups(may_mask, masked, lengths, document_ids, has_holes, block_size)
    elif batch.maskable is not None:
        noisy, lengths = _hide_ends(noisy, lengths, ends, block_size is not None, mask_token_id, generator)
    weights = loss_weights(
        masked,
        may_mask,
        np.concatenate([side.bound_weight for side in sides]),
        config.loss_weighting,
        config.nelbo_clip,
    )
    keeps_time = generator.random(len(clean)) >= config.qlora.time_embedding.dropout
    mask_seed = int(generator.integers(2**64, dtype=np.uint64))
    return NoisyBatch(
        clean,
        noisy,
        weights,
        np.concatenate([side.t for side in sides]).astype(np.float32),
        keeps_time,
        lengths,
        document_ids,
        mask_seed if config.qlora.mask_annealing.mask == "bernoulli" else None,
        groups,
        in_blocks,
        repeats,
    )


def _groups(
    may_mask: NDArray[np.bool_],
    masked: NDArray[np.bool_],
    lengths: NDArray[np.int32],
    document_ids: NDArray[np.int32],
    has_holes: NDArray[np.bool_],
    block_size: int | None,
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """What is denoised together, (B, T), and which sequences (B,) are in blocks.

    The holes of a document are one group, with what has been written in them; so are its scattered masks.
    """
    documents = np.cumsum(np.diff(document_ids, axis=1, prepend=document_ids[:, :1]) != 0, axis=1)
    is_noisy = np.where(has_holes[:, None], may_mask, masked)
    groups = np.where(is_noisy, documents, NOTHING).astype(np.int32)
    in_blocks = np.full(len(has_holes), block_size is not None) & ~has_holes
    if block_size is not None:
        blocks = block_groups(may_mask, lengths, document_ids, block_size)
        groups = np.where(in_blocks[:, None], blocks, groups)
    return groups, in_blocks


def _draw_masks(
    clean: NDArray[np.int32],
    may_mask: NDArray[np.bool_],
    t: NDArray[np.float64],
    config: ConversionTrainingConfig,
    schedule: NoiseSchedule,
    generator: np.random.Generator,
    mask_token_id: int,
) -> list[_Masks]:
    """One set of masks, or a set and its complement."""
    noise = config.noise_schedule
    if noise.masking == "exact":
        n_maskable = may_mask.sum(axis=1)
        counts = exact_counts(n_maskable, t, from_none=noise.complementary)
        _, masked = corrupt_exactly(clean, may_mask, counts, mask_token_id, generator)
        share = counts / np.maximum(1, n_maskable)
        bound_weight = exact_weight(counts, n_maskable, from_none=noise.complementary)
        other_weight = exact_weight(n_maskable - counts, n_maskable, from_none=noise.complementary)
        sides = [_Masks(masked, bound_weight, schedule.times_at(share))]
    else:
        share, bound_weight = schedule.mask_probability(t), schedule.nelbo_weight(t)
        _, masked = corrupt(
            clean,
            may_mask,
            share,
            mask_token_id,
            generator,
            at_least_one=config.loss_weighting == "uniform",
        )
        sides = [_Masks(masked, bound_weight, t)]
        other_weight = complement_weight(bound_weight, share)
    if noise.complementary:
        sides.append(_Masks(may_mask & ~masked, other_weight, schedule.times_at(1.0 - share)))
    return sides


def _hide_ends(
    noisy: NDArray[np.int32],
    lengths: NDArray[np.int32],
    ends: NDArray[np.int32],
    fill: bool,
    mask_token_id: int,
    generator: np.random.Generator,
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Put masks, which are no targets, behind sequences that are shorter than they could be and whose last
    token is masked.

    Args:
        noisy: (B, T).
        lengths: (B,).
        ends: (B,), where the block, or the batch, ends; masks go up to there at most.
        fill: up to there, as a block is always whole; False: any number of them, each with equal chance.
        mask_token_id: what stands in a masked place.
        generator: the step's own.

    Returns:
        noisy (B, T), a new array, and lengths (B,) with those masks.

    """
    room = np.minimum(ends, noisy.shape[1]) - lengths
    n_more = room if fill else generator.integers(room, endpoint=True)
    last_tokens = np.take_along_axis(noisy, lengths[:, None] - 1, axis=1)[:, 0]
    new_lengths = np.where(last_tokens == mask_token_id, lengths + n_more, lengths).astype(np.int32)
    places = np.arange(noisy.shape[1])
    is_new = (places >= lengths[:, None]) & (places < new_lengths[:, None])
    return with_masks(noisy, is_new, mask_token_id), new_lengths
