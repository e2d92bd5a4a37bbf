"""Losses of a step's noisy batch, and their gradients with respect to all that is trained.

`LossGradients` lays a batch out as the engine takes it, whole sequences or the noisy rows of a frozen
context, asks the engine for loss and gradients, and goes on from there to the time embedding's. Gradients are
added to what is there, so that a step may come in parts and of several losses.

Deliberately not here: the draw of the noise (noisy_batch.py), what is done with the gradients (trainer.py),
the arithmetic of the network (the engine).
Letters: B sequences, T tokens, C hidden size.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.config.settings import ConversionTrainingConfig
from ggml_diffusion.engine.interface import Batch, Engine, Int8, LossResult, Teacher
from ggml_diffusion.formats.lora import LoraAdapter, ParameterStore
from ggml_diffusion.formats.tensor_names import MASK_EMBEDDING, TIME_BIAS, TIME_WEIGHT, is_lora
from ggml_diffusion.generation.frozen_context import rows_batch
from ggml_diffusion.objective.corruption import maskable, predictable
from ggml_diffusion.objective.output_rows import to_output_rows
from ggml_diffusion.objective.standing_rows import NOTHING, lay_out_rows
from ggml_diffusion.objective.time_embedding import TimeEmbedding
from ggml_diffusion.text.loader import TokenBatch
from ggml_diffusion.text.special_tokens import special_ids
from ggml_diffusion.training.noisy_batch import NoisyBatch


@dataclass(frozen=True)
class MaskedTerms:
    """Of a step's masked tokens: loss and distillation loss in nats, without their weights, accuracy, and the
    plain mean of the cross-entropy in nats."""

    loss: float
    accuracy: float
    cross_entropy: float
    distillation_loss: float | None


class LossGradients:
    """The losses of one run; what is trained changes between calls, by whoever takes the steps."""

    def __init__(
        self,
        model: Engine,
        config: ConversionTrainingConfig,
        adapter: LoraAdapter,
        parameters: ParameterStore,
        time_embedding: TimeEmbedding | None,
    ) -> None:
        """Take hold of the run's parts.

        Args:
            model: the base.
            config: of the run.
            adapter: the LoRA pairs and the mask embedding, as views of `parameters`.
            parameters: everything that is trained.
            time_embedding: None = the run has none.

        """
        self._model, self._config = model, config
        self._adapter, self._parameters = adapter, parameters
        self._time_embedding = time_embedding
        self._bos_id, _ = special_ids(model.file.metadata)

    def add_masked(
        self, batch: NoisyBatch, causal_ratio: float, gradients: ParameterStore, int8: Int8
    ) -> MaskedTerms:
        """Add the gradients of the masked-diffusion loss, and of the distillation, of a step's whole draw."""
        share, distillation = 1.0 - self._config.ar_loss_share, self._config.distillation_weight
        loss, distilled, cross_entropy, n_right, n_predicted = 0.0, 0.0, 0.0, 0, 0
        for start in range(0, len(batch.clean), self._config.batch_size):
            part = batch.part(slice(start, start + self._config.batch_size))
            part = replace(part, weights=part.weights * np.float32(share))
            result = self.add_part(part, causal_ratio, gradients, int8, distillation)
            loss += result.loss / share
            distilled += result.distillation_loss / share
            cross_entropy += float(result.row_loss.sum(dtype=np.float64))
            n_right += int(result.row_correct.sum())
            n_predicted += int((part.weights != 0.0).sum())
        return MaskedTerms(
            loss,
            n_right / max(1, n_predicted),
            cross_entropy / max(1, n_predicted),
            distilled / distillation if distillation else None,
        )

    def add_causal(self, batch: TokenBatch, gradients: ParameterStore, int8: Int8) -> float:
        """Add the gradients of the causal next-token loss on the clean text; returns its mean in nats.

        Its rows are shifted whatever the prediction is, as the base's, and there is no time embedding: this
        is the adapted model as any program for autoregressive models would run it.
        """
        predicted = predictable(batch, "shifted", self._bos_id, self._adapter.mask_token_id)
        share = self._config.ar_loss_share
        weight = np.float32(share / max(1, int(predicted.sum())))
        targets, weights = to_output_rows(batch.tokens, predicted * weight, batch.document_ids, "shifted")
        loss = 0.0
        for start in range(0, len(batch), self._config.batch_size):
            rows = slice(start, start + self._config.batch_size)
            loss += self._model.loss_and_gradients(
                Batch(batch.tokens[rows], 1.0, batch.lengths[rows], batch.document_ids[rows]),
                targets[rows],
                weights[rows],
                self._adapter,
                self._engine_gradients(gradients),
                int8=int8,
            ).loss
        return loss / share

    def add_part(
        self,
        batch: NoisyBatch,
        causal_ratio: float,
        gradients: ParameterStore,
        int8: Int8,
        distillation_weight: float = 0.0,
    ) -> LossResult:
        """Add the gradients of one micro-batch."""
        if batch.groups is not None:
            return self._add_noisy_rows(batch, batch.groups, causal_ratio, gradients, int8)
        targets, weights = to_output_rows(
            batch.clean, batch.weights, batch.document_ids, self._config.qlora.prediction
        )
        teacher = None
        if distillation_weight:
            teacher = self._teacher(batch, weights * np.float32(distillation_weight))
        result = self._model.loss_and_gradients(
            Batch(
                batch.noisy,
                causal_ratio,
                batch.lengths,
                batch.document_ids,
                self._embedding_offset(batch),
                batch.bernoulli_seed,
                teacher,
                attention_sink=self._config.attention_sink,
            ),
            targets,
            weights,
            self._adapter,
            self._engine_gradients(gradients),
            int8=int8,
        )
        self._add_time_gradients(batch.t, batch.keeps_time, result, gradients)
        return result

    def _add_noisy_rows(
        self,
        batch: NoisyBatch,
        groups: NDArray[np.int32],
        causal_ratio: float,
        gradients: ParameterStore,
        int8: Int8,
    ) -> LossResult:
        """The same with a frozen context; what the result has by row are the noisy rows."""
        masked = (batch.noisy == self._adapter.mask_token_id) & (groups != NOTHING)
        rows = lay_out_rows(
            batch.clean,
            batch.noisy,
            masked,
            groups,
            batch.lengths,
            batch.document_ids,
            self._config.qlora.prediction,
            in_blocks=batch.in_blocks,
            margin=self._config.margin,
        )
        kept = rows.lengths > 0  # a sequence without a mask has none
        if not kept.any():
            nothing = np.zeros(rows.tokens.shape, dtype=np.float32)
            return LossResult(0.0, nothing, nothing != 0.0)
        rows, offset = rows.of_sequences(kept), self._embedding_offset(batch)
        result = self._model.loss_and_gradients(
            rows_batch(
                rows,
                causal_ratio,
                None if offset is None else offset[kept],
                batch.bernoulli_seed,
                n_positions=batch.clean.shape[1],
            ),
            rows.of_rows(batch.clean[kept]),
            rows.of_rows(batch.weights[kept]),
            self._adapter,
            self._engine_gradients(gradients),
            int8=int8,
        )
        self._add_time_gradients(batch.t[kept], batch.keeps_time[kept], result, gradients)
        return result

    def _add_time_gradients(
        self,
        t: NDArray[np.float32],
        keeps_time: NDArray[np.bool_],
        result: LossResult,
        gradients: ParameterStore,
    ) -> None:
        """From the offsets' gradients to those of the time embedding."""
        if self._time_embedding is not None:
            assert result.offset_gradient is not None
            d_weight, d_bias = self._time_embedding.backward(t, result.offset_gradient * keeps_time[:, None])
            gradients.views[TIME_WEIGHT] += d_weight
            gradients.views[TIME_BIAS] += d_bias

    def _teacher(self, batch: NoisyBatch, weights: NDArray[np.float32]) -> Teacher:
        """The frozen base on the clean text, for the rows (B, T) with a weight."""
        if self._config.qlora.prediction == "shifted":
            return Teacher(batch.clean, weights)
        # Aligned, a document's first token may be masked; the base has no prediction for it.
        has_teacher = maskable(batch.clean, batch.document_ids, batch.lengths, "shifted", None)
        return Teacher(batch.clean, weights * has_teacher, rows_back=1)

    def _engine_gradients(self, gradients: ParameterStore) -> dict[str, NDArray[np.float32]]:
        """Where the engine adds its gradients; without one for the mask embedding that stays 0."""
        views = lora_views(gradients)
        if self._config.qlora.train_mask_embedding:
            views[MASK_EMBEDDING] = gradients.views[MASK_EMBEDDING]
        return views

    def _embedding_offset(self, batch: NoisyBatch) -> NDArray[np.float32] | None:
        """The time embedding (B, C), 0 where a sequence goes without it."""
        if self._time_embedding is None:
            return None
        views = self._parameters.views
        offset = self._time_embedding.forward(batch.t, views[TIME_WEIGHT], views[TIME_BIAS])
        return np.ascontiguousarray(offset * batch.keeps_time[:, None], dtype=np.float32)


def lora_views(store: ParameterStore) -> dict[str, NDArray[np.float32]]:
    """The LoRA pairs among all that is trained, by name."""
    return {name: view for name, view in store.views.items() if is_lora(name)}
