"""A converted model, ready for use: a frozen base, its adapter, and how the two were trained to be read.

Deliberately not here: the denoising loop (denoise.py), the choice of tokens (sampling.py), training
(trainer.py).
Letters: B sequences, T tokens, C hidden size, V vocabulary, N positions.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.engine.interface import Engine, Int8
from ggml_diffusion.engine.open import open_engine
from ggml_diffusion.errors import UserError, quoted
from ggml_diffusion.formats.adapter_file import DiffusionCheckpoint
from ggml_diffusion.formats.lora import LoraAdapter
from ggml_diffusion.formats.model_check import read_model
from ggml_diffusion.generation.approximate_cache import ApproximateText
from ggml_diffusion.generation.denoise import (
    DEFAULT_BLOCK_LENGTH,
    DenoisingStep,
    GenerationConfig,
    Predictor,
    denoise,
)
from ggml_diffusion.generation.frozen_context import StandingText, rows_batch
from ggml_diffusion.generation.reading import ReadingRule
from ggml_diffusion.generation.verified import VerifiedText, VerifiedWriter
from ggml_diffusion.objective.output_rows import rows_of_positions
from ggml_diffusion.objective.standing_rows import NOTHING, lay_out_rows
from ggml_diffusion.text.chat import Chat
from ggml_diffusion.text.prompts import with_start
from ggml_diffusion.text.tokenizer import Tokenizer


class DiffusionModel:
    """A base model with its conversion.

    Attributes:
        engine: the base model; an engine may serve several conversions.
        adapter: LoRA pairs, mask token and mask embedding.
        tokenizer: the base's own vocabulary.
        rule: how the two are to be read.
        int8: products of the frozen weights that go in int8 while text is written.

    """

    def __init__(self, engine: Engine, adapter: LoraAdapter, tokenizer: Tokenizer, rule: ReadingRule) -> None:
        if adapter.mask_token_id is None:
            raise UserError(
                "the adapter does not say which token is the mask token: it is no diffusion adapter"
            )
        self.engine = engine
        self.adapter = adapter
        self.tokenizer = tokenizer
        self.mask_token_id: int = adapter.mask_token_id
        self.rule = rule
        self.int8: Int8 = "none"

    @classmethod
    def load(
        cls,
        base: str | Path,
        weights: str | Path,
        n_threads: int | None = None,
        *,
        device: str = "cpu",
        allow_other_base: bool = False,
    ) -> "DiffusionModel":
        """Read a base GGUF and a conversion of it, to write with in int8 where the engine has it.

        That is no further from exact than what llama.cpp writes with.

        Args:
            base: the GGUF that was converted.
            weights: adapter.safetensors, or adapter.gguf where it carries the same.
            n_threads: None = as many as there are cores.
            device: "cpu", "metal", "cuda" or "vulkan".
            allow_other_base: use the conversion although it was trained on another file.

        Raises:
            UserError: a file is missing or malformed, the conversion belongs to another base, or there
                is no such device.

        """
        checkpoint = DiffusionCheckpoint.load(weights)
        file = read_model(base)
        engine = open_engine(file, n_threads, device=device)
        checkpoint.check_base(engine.sha256, allow_other_base=allow_other_base)
        model = cls.from_checkpoint(engine, Tokenizer.from_file(file), checkpoint)
        model.int8 = "both" if engine.has_int8 else "none"
        return model

    @classmethod
    def from_checkpoint(
        cls, engine: Engine, tokenizer: Tokenizer, checkpoint: DiffusionCheckpoint
    ) -> "DiffusionModel":
        """The same from parts in memory, e.g. `ConversionTrainer.checkpoint()`; arrays are not copied.

        Raises:
            UserError: the conversion does not fit the engine's model, or says something impossible.

        """
        checkpoint.check_shapes(engine.file)
        return cls(engine, checkpoint.adapter(), tokenizer, ReadingRule.of_checkpoint(checkpoint))

    def untrained(self) -> "DiffusionModel":
        """The base read by the same rule, as before the first step: no adapter, no mask row, no time."""
        rule = replace(self.rule, block_size=None, prompts=False, time_offset=None)
        adapter = LoraAdapter(1.0, {}, mask_token_id=self.mask_token_id)
        return DiffusionModel(self.engine, adapter, self.tokenizer, rule)

    def logits(self, tokens: NDArray[np.int32], t: float | NDArray[np.float32]) -> NDArray[np.float32]:
        """What the converted model predicts, by output row.

        Args:
            tokens: (B, T) or (T,) int32, masks included.
            t: diffusion time in [0, 1] of all sequences, or of each (B,); it only reaches the time embedding.

        Returns:
            (B, T, V) or (T, V) float32; row i predicts the token at i + 1 ("shifted") or at i ("aligned").
            The mask token is at -inf. With a frozen context only masks are predicted; other rows are 0.

        """
        batch = np.atleast_2d(np.asarray(tokens, dtype=np.int32))
        offset = self.rule.embedding_offset(np.broadcast_to(t, len(batch)))
        if self.rule.context == "frozen":
            result = self._logits_of_masks(batch, offset)
        else:
            result = self.engine.logits(self.rule.batch(batch, offset), self.adapter)
        result[..., self.mask_token_id] = -np.inf
        return result if np.ndim(tokens) == 2 else result[0]

    def _logits_of_masks(
        self, tokens: NDArray[np.int32], offset: NDArray[np.float32] | None
    ) -> NDArray[np.float32]:
        """Logits (B, T, V) by output row with a frozen context, 0 where no mask is predicted."""
        masked = tokens == self.mask_token_id
        groups = np.where(masked, 0, NOTHING).astype(np.int32)
        rule = self.rule
        rows = lay_out_rows(tokens, tokens, masked, groups, None, None, rule.prediction, margin=rule.margin)
        result = np.zeros((*tokens.shape, self.engine.file.V), dtype=np.float32)
        kept = rows.lengths > 0
        if kept.any():
            offset = None if offset is None else offset[kept]
            rows, n_tokens = rows.of_sequences(kept), tokens.shape[1]
            batch = rows_batch(rows, self.rule.causal_ratio, offset, n_positions=n_tokens)
            predicts = rows.targets != NOTHING
            sequence = np.flatnonzero(kept)[np.nonzero(predicts)[0]]
            places = rows_of_positions(rows.targets[predicts], self.rule.prediction)
            result[sequence, places] = self.engine.logits(batch, self.adapter, select=predicts)
        return result

    def generate(
        self,
        prompt: str,
        config: GenerationConfig | None = None,
        on_step: Callable[[DenoisingStep], None] | None = None,
        *,
        suffix: str = "",
        chat: bool = False,
    ) -> str:
        """Write the text between a prompt and a suffix; both may be empty.

        Args:
            prompt: the text before, not repeated in the result.
            config: None = the defaults; `config.length` tokens are denoised.
            on_step: called after every step with all tokens, prompt and suffix included.
            suffix: the text after the hole, for infilling.
            chat: put the prompt into the model's chat template, as a user's message that is to be answered;
                for conversions that were trained on messages.

        Returns:
            The text of the hole, up to the first end-of-text, or with `chat` to the end of the answer.

        Raises:
            UserError: prompt, hole and suffix together are longer than the model's context, the prompt or the
                suffix contains the mask token, or the model has no chat template that could be used.

        """
        before = self._chat_tokens(prompt) if chat else self.start_tokens(self.tokenizer.encode(prompt))
        after = self.tokenizer.encode(suffix, continued=True)
        ends = self.tokenizer.end_ids if chat else frozenset[int]()
        written = self.write_between(before, after, config or GenerationConfig(), on_step, ends=ends)
        return self.tokenizer.decode(written, continued=self.goes_on(before))

    def write_between(
        self,
        before: NDArray[np.int32],
        after: NDArray[np.int32],
        config: GenerationConfig,
        on_step: Callable[[DenoisingStep], None] | None = None,
        *,
        ends: Collection[int] = (),
    ) -> NDArray[np.int32]:
        """Write `config.length` tokens between others; `generate` for tokens.

        Args:
            before: (n,), behind the token that the base wants there; see `start_tokens`.
            after: (n,).
            config: how.
            on_step: see `generate`.
            ends: tokens that end the text beside end-of-text.

        Returns:
            (n,), those before the first that ends the text.

        Raises:
            UserError: as `generate`.

        """
        if self.mask_token_id in before or self.mask_token_id in after:
            name = quoted(self.tokenizer.token_text(self.mask_token_id))
            raise UserError(f"the prompt or the suffix contains the mask token, {name}: leave that out")
        self._check_length(len(before) + config.length + len(after))
        hole = np.full(config.length, self.mask_token_id, dtype=np.int32)
        end_of_text = self.tokenizer.eos_id
        filled = self._denoise(np.concatenate([before, hole, after]), config, on_step, end_of_text)
        written = filled[len(before) : len(before) + config.length]
        return self.up_to_end(written, ends)

    def up_to_end(self, written: NDArray[np.int32], ends: Collection[int] = ()) -> NDArray[np.int32]:
        """The tokens (n,) before the first end-of-text, or the first of `ends`."""
        end_of_text = self.tokenizer.eos_id
        is_end = np.isin(written, [*ends, *([] if end_of_text is None else [end_of_text])])
        return written[: int(np.argmax(is_end))] if is_end.any() else written

    def goes_on(self, before: NDArray[np.int32]) -> bool:
        """Whether what is written behind these tokens goes on with their text."""
        return len(before) > 0 and self.tokenizer.is_text(int(before[-1]))

    def write_verified(
        self,
        prompt: str,
        config: GenerationConfig | None = None,
        on_tokens: Callable[[NDArray[np.int32]], None] | None = None,
        *,
        chat: bool = False,
    ) -> tuple[str, VerifiedText]:
        """Write what the base itself writes with this seed, drafted by the conversion (verified.py).

        Args:
            prompt: the text before.
            config: `length`, `temperature`, `top_k`, `top_p` and `seed` count, and as `block_length` the
                tokens of a draft.
            on_tokens: told all tokens that are written so far.
            chat: see `generate`.

        Returns:
            The text, up to the first end-of-text, and how it was written.

        Raises:
            UserError: an adapted context, or as `generate`.

        """
        if self.rule.context != "frozen":
            raise UserError(
                "only a conversion with a frozen context can be verified: with an adapted one the base's own "
                "prediction is another pass; convert with --context frozen"
            )
        config = config or GenerationConfig()
        before = self._chat_tokens(prompt) if chat else self.start_tokens(self.tokenizer.encode(prompt))
        if len(before) == 0:
            raise UserError("give a prompt: the base has to begin with something")
        self._check_length(len(before) + config.length)
        ends = set() if self.tokenizer.eos_id is None else {self.tokenizer.eos_id}
        if chat:
            ends |= self.tokenizer.end_ids
        writer = VerifiedWriter(self.engine, self.adapter, self.rule, config, self.int8)
        written = writer.write(before, ends, on_tokens)
        tokens = written.tokens[:-1] if len(written.tokens) and written.tokens[-1] in ends else written.tokens
        return self.tokenizer.decode(tokens, continued=self.tokenizer.is_text(int(before[-1]))), written

    def fill(
        self,
        tokens: NDArray[np.int32] | Sequence[int],
        config: GenerationConfig | None = None,
        on_step: Callable[[DenoisingStep], None] | None = None,
        *,
        never: Mapping[int, NDArray[np.bool_]] | None = None,
        standing: StandingText | None = None,
    ) -> NDArray[np.int32]:
        """Replace every mask token of a sequence (T,), wherever it is; `config.length` is not used.

        Args:
            tokens: with masks.
            config: None = the defaults.
            on_step: called after every step.
            never: tokens (V,) that are not written in a place; not all of them.
            standing: from `open_standing`, for several calls with texts that begin alike.

        Raises:
            UserError: longer than the model's context, a token outside of the vocabulary, or, with a shifted
                prediction, a mask in the first place.

        """
        return self._denoise(
            np.asarray(tokens, dtype=np.int32),
            config or GenerationConfig(),
            on_step,
            stop_token=None,
            never=never,
            standing=standing,
        )

    def open_standing(self, n_tokens: int) -> StandingText | None:
        """What `fill` keeps of texts of up to `n_tokens`, to be closed; None with an adapted context.

        Raises:
            UserError: not enough memory, or an engine without contexts.

        """
        if self.rule.context != "frozen":
            return None
        return StandingText(self.engine, n_tokens, self.adapter, self.rule)

    def chat_tokens(self, messages: Sequence[Mapping[str, Any]]) -> NDArray[np.int32]:
        """Messages with "role" and "content" and what opens the answer, as the model's chat template writes
        them, (n,).

        Raises:
            UserError: the model has no chat template, or it refuses the messages.

        """
        template = self.tokenizer.open_chat_template()
        if template is None:
            raise UserError("this model has no chat template: give the prompt as it is")
        with Chat(template, self.tokenizer) as chat:
            return chat.opening(messages)

    def _chat_tokens(self, prompt: str) -> NDArray[np.int32]:
        return self.chat_tokens([{"role": "user", "content": prompt}])

    def start_tokens(self, prompt: NDArray[np.int32]) -> NDArray[np.int32]:
        """A prompt's tokens (n,), behind the token that the base wants there.

        An empty prompt gets the token that a shifted prediction needs to start from.

        Raises:
            UserError: there is no such token.

        """
        tokens = with_start(prompt, self.tokenizer)
        if len(tokens) or self.rule.prediction == "aligned":
            return tokens
        start = self.tokenizer.bos_id if self.tokenizer.bos_id is not None else self.tokenizer.eos_id
        if start is None:
            raise UserError("this vocabulary has neither a BOS nor an end-of-text token: give a prompt")
        return np.array([start], dtype=np.int32)

    def _check_length(self, n_tokens: int) -> None:
        context = self.engine.file.context_length
        if n_tokens > context:
            raise UserError(
                f"{n_tokens} tokens are more than the model's context of {context}: "
                f"shorten the prompt or the length"
            )
        self.engine.check_memory(1, n_tokens, self.adapter)

    def _denoise(
        self,
        tokens: NDArray[np.int32],
        config: GenerationConfig,
        on_step: Callable[[DenoisingStep], None] | None,
        stop_token: int | None,
        never: Mapping[int, NDArray[np.bool_]] | None = None,
        standing: StandingText | None = None,
    ) -> NDArray[np.int32]:
        self._check_length(len(tokens))
        if self.rule.prediction == "shifted" and len(tokens) and tokens[0] == self.mask_token_id:
            raise UserError(
                "the first token cannot be a mask: a shifted prediction reads it from the token before"
            )
        if config.block_length is None:
            config = config.model_copy(update={"block_length": self.rule.block_size or DEFAULT_BLOCK_LENGTH})
        has_start = len(tokens) > 0 and tokens[0] == self.tokenizer.start_id
        n_not_masked = 1 if self.rule.prediction == "shifted" or has_start else 0
        if self.rule.prompts:
            n_not_masked = int((tokens != self.mask_token_id).sum())

        def predict_whole(
            seen: NDArray[np.int32], positions: NDArray[np.int64], block: NDArray[np.int64]
        ) -> NDArray[np.float32]:
            # What was masked in training, and may be here: a block, or the text.
            n_maskable = len(seen) - n_not_masked if self.rule.block_size is None else len(block)
            is_mask = (seen if self.rule.block_size is None else seen[block]) == self.mask_token_id
            return self._predict(seen, positions, block, float(is_mask.sum()) / n_maskable, kept)

        text: StandingText | None = None
        kept: ApproximateText | None = None
        predict: Predictor = predict_whole
        if self.rule.context == "frozen":
            text = standing or self.open_standing(len(tokens))
            assert text is not None
            predict = self._predictor_over(text, tokens)
        elif config.approximate_cache:
            kept = ApproximateText(self.engine, len(tokens), self.adapter, self.rule)
        try:
            return denoise(
                tokens,
                self.mask_token_id,
                _without(predict, never or {}),
                self.rule.noise_schedule.mask_probability,
                config,
                stop_token=stop_token,
                hide_later_blocks=text is not None or self.rule.block_size is not None,
                on_step=on_step,
            )
        finally:
            if text is not None and text is not standing:
                text.close()
            if kept is not None:
                kept.close()

    def _predictor_over(self, text: StandingText, tokens: NDArray[np.int32]) -> Predictor:
        """Predictions with a frozen context, which is computed once.

        Holes with text behind them are denoised together, and see it. What is written at the end goes block
        by block: a finished one stands.
        """
        holes = np.flatnonzero(tokens == self.mask_token_id)
        stands = np.flatnonzero(tokens != self.mask_token_id)
        inner = holes[holes < stands[-1]] if len(stands) else holes[:0]

        def predict(
            seen: NDArray[np.int32], positions: NDArray[np.int64], block: NDArray[np.int64]
        ) -> NDArray[np.float32]:
            group = np.union1d(inner, block) if np.isin(block, inner).any() else block
            share_masked = float((seen[group] == self.mask_token_id).mean())
            t = self.rule.noise_schedule.time_at(share_masked)
            offset = self.rule.embedding_offset(np.array([t], dtype=np.float32))
            ratio = self.rule.causal_ratio
            logits = text.logits(seen, group, positions, ratio, offset, self.int8)
            logits[:, self.mask_token_id] = -np.inf
            return logits

        return predict

    def _predict(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int64],
        block: NDArray[np.int64],
        share_masked: float,
        kept: ApproximateText | None,
    ) -> NDArray[np.float32]:
        """Logits (N, V) of the tokens at `positions` of a block, computing the head for no other row."""
        t = self.rule.noise_schedule.time_at(share_masked)
        offset = self.rule.embedding_offset(np.array([t], dtype=np.float32))
        if kept is not None:
            logits = kept.logits(tokens, block, positions, offset, self.int8)
        else:
            select = np.zeros((1, len(tokens)), dtype=bool)
            select[0, rows_of_positions(positions, self.rule.prediction)] = True
            batch = self.rule.batch(tokens[None], offset)
            logits = self.engine.logits(batch, self.adapter, select=select, int8=self.int8)
        logits[:, self.mask_token_id] = -np.inf
        return logits


def _without(predict: Predictor, never: Mapping[int, NDArray[np.bool_]]) -> Predictor:
    """Predictions that leave out tokens (V,) in some places."""
    if not never:
        return predict

    def restricted(
        seen: NDArray[np.int32], positions: NDArray[np.int64], block: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        logits = predict(seen, positions, block)
        for row, position in zip(logits, positions, strict=True):
            if int(position) in never:
                row[never[int(position)]] = -np.inf
        return logits

    return restricted
