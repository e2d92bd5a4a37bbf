"""Training of one conversion: from a batch of clean text to an optimizer step.

`train_step` reads top-down: draw times and masks for the whole accumulated batch, ask the engine for loss and
gradients of one micro-batch after the other, add the causal next-token loss if it has a share, clip, step
AdamW, advance the annealing. All randomness of a step comes from (seed, step) alone, so that a resumed run
draws what an undisturbed one would have drawn.

This is the wiring: it sees the config, and hands plain values to the parts it wires. Deliberately not here:
where batches come from (text/loader.py), the draw of a step (noisy_batch.py), its losses and gradients
(loss_gradients.py), the arithmetic of the network (the engine), the run as a whole (run.py).
Sources: masked-diffusion objective, MDLM [Sahoo et al. 2024, arXiv:2406.07524]; attention-mask annealing,
DiffuLLaMA [Gong et al. 2024, arXiv:2410.17891]; distillation [Hinton et al. 2015, arXiv:1503.02531] at
temperature 1.
Letters: B sequences, T tokens, C hidden size.
"""

import logging
import math
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.config.groups import QLoraConversionConfig
from ggml_diffusion.config.settings import ConversionTrainingConfig
from ggml_diffusion.engine.interface import Engine, Int8
from ggml_diffusion.errors import UserError
from ggml_diffusion.formats.adapter_file import (
    CheckpointMetadata,
    DiffusionCheckpoint,
    creation_time,
)
from ggml_diffusion.formats.lora import (
    LoraAdapter,
    ModelDims,
    ParameterStore,
    lora_shapes,
)
from ggml_diffusion.formats.tensor_names import (
    LORA_B_SUFFIX,
    MASK_EMBEDDING,
    TIME_BIAS,
    TIME_WEIGHT,
)
from ggml_diffusion.objective.annealing import AttentionMaskAnnealer
from ggml_diffusion.objective.corruption import NoiseSchedule
from ggml_diffusion.objective.optim import AdamW, NormTrend, clip_by_global_norm, learning_rate_at
from ggml_diffusion.objective.time_embedding import TimeEmbedding, parameter_shapes
from ggml_diffusion.randomness import Stream, generator_of
from ggml_diffusion.text.loader import TokenBatch
from ggml_diffusion.text.special_tokens import choose_mask_token, special_ids
from ggml_diffusion.training.checkpoint import TrainingState
from ggml_diffusion.training.loss_gradients import LossGradients, lora_views
from ggml_diffusion.training.metrics import TrainMetrics
from ggml_diffusion.training.noisy_batch import NoisyBatch, block_size_of_step, draw_noise
from ggml_diffusion.training.start_values import StartValues

MAX_BAD_IN_A_ROW = 3
# Cross-entropy beyond which a step has exploded, as a multiple of that of a blind guess, ln V, and of the
# first step's: a base that is very sure of itself may begin with more than a guess. SmolLM2, with an ln V of
# 10.8 nats, begins with 8, and at a hundred times its learning rate has 14 to 80 in a dozen of steps.
EXPLODED_FROM_GUESS, EXPLODED_FROM_START = 1.3, 1.5

_log = logging.getLogger("ggml_diffusion")


class Diverged(UserError):
    """Several steps in a row were not finite or exploded; what is trained is not worth saving."""


class ConversionTrainer:
    """Trains LoRA pairs, mask embedding and time embedding of one frozen base model.

    Attributes:
        model: the base.
        config: as given.
        mask_token_id: the token that stands for a mask; `mask_token_reason` says why it is that one.
        int8: products of the base that training does in int8; int8_gate.py decides.
        step_count: optimizer steps taken, skipped ones included.
        tokens_seen: training tokens of those steps, padding not.
        learning_rate: after the warm-up; the config's, until a run that diverged halves it (resume.py).
        rate_changes: (step, learning rate from there on), the first of them (0, the config's).
        rollbacks: how often the run has gone back to a checkpoint since the user last chose the rate.
        rolled_back_to: the step of the last time in this process, None = it has not.
        norm_trend: shortens steps whose gradient is far larger than usual, where the config wants that.
        start: what that was before the first step.
        parameters: everything that is trained; its views are what the engine and the exports read.
        adapter: the LoRA pairs and the mask embedding, as views of `parameters`.

    """

    def __init__(
        self,
        model: Engine,
        config: ConversionTrainingConfig,
        *,
        data_fingerprint: str = "",
        warn: Callable[[str], None] = _log.warning,
    ) -> None:
        self.model = model
        self.config = config
        vocabulary = model.file.metadata
        self.mask_token_id, self.mask_token_reason = choose_mask_token(config.qlora.mask_token_id, vocabulary)
        self._bos_id, _ = special_ids(vocabulary)
        self.int8: Int8 = "none"
        self.step_count = 0
        self.tokens_seen = 0
        self.data_fingerprint = data_fingerprint
        self.warn = warn
        self._bad_in_a_row = 0
        self._start_cross_entropy = 0.0
        self._has_prompts = False
        self.learning_rate = config.learning_rate
        self.rate_changes: list[tuple[int, float]] = [(0, config.learning_rate)]
        self.rollbacks = 0
        self.rolled_back_to: int | None = None
        self.norm_trend = NormTrend(config.norm_damping)

        qlora = config.qlora
        self.noise_schedule = NoiseSchedule(config.noise_schedule.type)
        self.annealer = AttentionMaskAnnealer(qlora.mask_annealing)
        self.time_embedding: TimeEmbedding | None = None
        shapes = trained_shapes(model.file, qlora)
        if qlora.time_embedding.enabled:
            self.time_embedding = TimeEmbedding(
                qlora.time_embedding.dim, model.file.C, qlora.time_embedding.max_timesteps
            )
        self.parameters = ParameterStore(shapes)
        self._gradients = ParameterStore(shapes)
        self.start = StartValues(config, model.file)
        self.start.fill(self.parameters)
        self.adapter = LoraAdapter(
            alpha=qlora.alpha,
            tensors=lora_views(self.parameters),
            mask_token_id=self.mask_token_id,
            mask_embedding=self.parameters.views[MASK_EMBEDDING],
        )
        self._losses = LossGradients(model, config, self.adapter, self.parameters, self.time_embedding)
        self.optimizer = AdamW(
            self.parameters.flat,
            decayed=[self.parameters.slices[name] for name, shape in shapes.items() if len(shape) == 2],
            rate_factors=[
                (self.parameters.slices[name], factor)
                for name in shapes
                if (factor := self._rate_factor(name)) != 1.0
            ],
            weight_decay=config.weight_decay,
        )

    def _rate_factor(self, name: str) -> float:
        """The learning rate of a parameter, as a multiple of that of the LoRA matrices A.

        The time projection adds up `dim` features of size one, and AdamW moves each of its entries by about
        the learning rate: at the full rate its output outgrows the token embeddings within a few dozen steps.
        """
        config, time_embedding = self.config, self.config.qlora.time_embedding
        if name.endswith(LORA_B_SUFFIX):
            return config.lora_b_rate_factor
        if name == TIME_WEIGHT:
            return config.embedding_rate_factor * (time_embedding.rate_factor or 1.0 / time_embedding.dim)
        return config.embedding_rate_factor if name in (MASK_EMBEDDING, TIME_BIAS) else 1.0

    @property
    def is_in_doubt(self) -> bool:
        """Whether the last step was not finite or exploded: not a state to come back to."""
        return self._bad_in_a_row > 0

    def lower_rate(self, learning_rate: float) -> None:
        """Go on with a lower learning rate, and keep that on record."""
        self.learning_rate = learning_rate
        self._bad_in_a_row = 0
        self.rate_changes.append((self.step_count, learning_rate))

    def restart(self) -> None:
        """Forget all steps: what is trained is as it was at the start, whatever the learning rate is now."""
        self.start.fill(self.parameters)
        self.optimizer.first_moment[...] = 0.0
        self.optimizer.second_moment[...] = 0.0
        self.optimizer.step_count = self.step_count = self.annealer.current_step = self.tokens_seen = 0
        self._bad_in_a_row = 0
        self.norm_trend.usual = None

    # -- one optimizer step ----------------------------------------------------------------------

    def train_step(self, batch: TokenBatch) -> TrainMetrics:
        """Take one optimizer step on a whole accumulated batch.

        Sequences go through the engine `config.batch_size` at a time; weights are normalised over all of
        them, so that the split changes nothing but rounding. A loss or gradient that is not finite leaves the
        parameters as they are, with a warning that names the batch.

        Raises:
            Diverged: three steps in a row were skipped, or far worse than a blind guess; or what is trained
                is not finite any more.

        """
        started_s = time.perf_counter()
        causal_ratio = self.annealer.causal_ratio_at(self.step_count)
        learning_rate = self._learning_rate()
        noisy_batch = self.corrupt(batch)
        self._gradients.flat[...] = 0.0
        masked = self._losses.add_masked(noisy_batch, causal_ratio, self._gradients, self.int8)
        ar_loss = None
        if self.config.ar_loss_share:
            ar_loss = self._losses.add_causal(batch, self._gradients, self.int8)
        grad_norm = clip_by_global_norm(self._gradients.flat, self.config.max_grad_norm)
        loss = masked.loss + (masked.distillation_loss or 0.0) + (ar_loss or 0.0)
        if math.isfinite(loss) and math.isfinite(grad_norm):
            if self.config.norm_damping:
                learning_rate *= self.norm_trend.share_of_rate(grad_norm)
            self.optimizer.step(self._gradients.flat, learning_rate)
            if not np.isfinite(self.parameters.flat).all():
                raise Diverged(
                    f"batch {self.step_count}: the weights are no numbers after a step at a learning rate of "
                    f"{self.learning_rate:g}"
                )
        self._judge(loss, grad_norm, masked.cross_entropy)
        self.step_count += 1
        self.annealer.step()
        n_tokens = noisy_batch.n_tokens
        self.tokens_seen += n_tokens
        self._has_prompts |= batch.maskable is not None
        return TrainMetrics(
            step=self.step_count,
            loss=masked.loss,
            masked_accuracy=masked.accuracy,
            causal_ratio=causal_ratio,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            tokens=self.tokens_seen,
            tokens_per_second=n_tokens / (time.perf_counter() - started_s),
            ar_loss=ar_loss,
            distillation_loss=masked.distillation_loss,
        )

    def first_gradient(self, batch: TokenBatch) -> NDArray[np.float32]:
        """The gradient (n,) of the next step's first micro-batch; the next gradient overwrites it."""
        self._gradients.flat[...] = 0.0
        part = self.corrupt(batch).part(slice(0, self.config.batch_size))
        ratio = self.annealer.causal_ratio_at(self.step_count)
        self._losses.add_part(part, ratio, self._gradients, self.int8)
        return self._gradients.flat

    def corrupt(self, batch: TokenBatch) -> NoisyBatch:
        """The noise that the next step adds to a batch: a function of (seed, step) and the batch."""
        return draw_noise(
            batch,
            self.config,
            self.noise_schedule,
            generator_of(self.config.seed, self.step_count, Stream.TRAINING_STEP),
            step=self.step_count,
            bos_id=self._bos_id,
            mask_token_id=self.mask_token_id,
        )

    def loss_and_gradients(
        self,
        clean: NDArray[np.int32],
        noisy: NDArray[np.int32],
        weights: NDArray[np.float32],
        t: NDArray[np.floating],
        causal_ratio: float,
        lengths: NDArray[np.int32] | None = None,
        document_ids: NDArray[np.int32] | None = None,
        bernoulli_seed: int | None = None,
    ) -> tuple[float, dict[str, NDArray[np.float32]]]:
        """Loss and gradients of all that is trained, for given noise; changes nothing.

        Args:
            clean: (B, T), the tokens to predict.
            noisy: (B, T), the tokens that the model sees.
            weights: (B, T), of each position's cross-entropy; indexed by the target's own position whatever
                the prediction is, and 0 on padding.
            t: (B,) diffusion times, for the time embedding.
            causal_ratio: of the attention mask.
            lengths: (B,), positions from there on are padding; None = no padding.
            document_ids: (B, T), attention stays within runs of equal numbers; None = one document a
                sequence.
            bernoulli_seed: draws the Bernoulli attention mask; None = soft mask.

        Returns:
            The sum of weights * cross-entropy in nats, not normalised, and float32 gradients named
            "blk.N.attn_q.weight.lora_a" and so on, "mask_embedding", and, if there is a time embedding,
            "time_embedding.weight" and "time_embedding.bias".

        Raises:
            ValueError: with prediction "shifted", the first position of a document has a weight.

        """
        batch = NoisyBatch(
            clean,
            np.ascontiguousarray(noisy, dtype=np.int32),
            weights,
            np.asarray(t, dtype=np.float32),
            np.ones(len(clean), dtype=bool),
            lengths,
            document_ids,
            bernoulli_seed,
        )
        return self.gradients_of(batch, causal_ratio)

    def gradients_of(
        self, batch: NoisyBatch, causal_ratio: float
    ) -> tuple[float, dict[str, NDArray[np.float32]]]:
        """The same for a draw, as `corrupt` makes it."""
        gradients = ParameterStore({name: view.shape for name, view in self.parameters.views.items()})
        return self._losses.add_part(batch, causal_ratio, gradients, self.int8).loss, gradients.views

    def _learning_rate(self) -> float:
        config = self.config
        return learning_rate_at(
            self.step_count,
            peak=self.learning_rate,
            warmup_steps=config.warmup_steps,
            total_steps=config.total_steps,
            schedule=config.lr_schedule,
        )

    def _judge(self, loss: float, grad_norm: float, cross_entropy: float) -> None:
        """Warn of a step that was not finite, and raise where several in a row were bad."""
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if self.step_count == 0 and is_finite:
            self._start_cross_entropy = cross_entropy
        guess = math.log(self.model.file.V)
        limit = max(EXPLODED_FROM_GUESS * guess, EXPLODED_FROM_START * self._start_cross_entropy)
        if is_finite and cross_entropy <= limit:
            self._bad_in_a_row = 0
            return
        self._bad_in_a_row += 1
        what = f"batch {self.step_count}: loss {loss:.4g}, gradient norm {grad_norm:.4g}"
        if self._bad_in_a_row >= MAX_BAD_IN_A_ROW:
            raise Diverged(
                f"{what}: {MAX_BAD_IN_A_ROW} batches in a row are not finite or far worse than a guess, at a "
                f"learning rate of {self.learning_rate:g}"
            )
        if not is_finite:
            self.warn(f"{what}: the step is skipped")

    # -- what comes out ----------------------------------------------------------------------------

    def checkpoint(self) -> DiffusionCheckpoint:
        """The conversion as it is now; its arrays are not copies: training changes them."""
        config = self.config
        return DiffusionCheckpoint(
            config=config.model_dump(mode="json"),
            tensors=dict(self.parameters.views),
            metadata=CheckpointMetadata(
                base_model=self.model.file.path.name,
                base_sha256=self.model.sha256,
                conversion_steps=self.step_count,
                training_tokens=self.tokens_seen,
                final_causal_ratio=self.annealer.causal_ratio_at(self.step_count),
                prediction=config.qlora.prediction,
                mask_token_id=self.mask_token_id,
                alpha=config.qlora.alpha,
                block_size=block_size_of_step(config, self.step_count),
                context=config.qlora.context,
                margin=config.margin,
                attention_sink=config.attention_sink,
                prompts=self._has_prompts,
                time_max_timesteps=self.time_embedding.max_timesteps if self.time_embedding else None,
                created_at=creation_time(),
                version=version("ggml-diffusion"),
            ),
            noise_schedule=config.noise_schedule.model_dump(mode="json"),
        )

    def state(self) -> TrainingState:
        """What another trainer of the same run needs to continue exactly; its arrays are not copies."""
        return TrainingState(
            step=self.step_count,
            tokens_seen=self.tokens_seen,
            parameters=self.parameters.flat,
            first_moment=self.optimizer.first_moment,
            second_moment=self.optimizer.second_moment,
            config=self.config.model_dump(mode="json"),
            base_sha256=self.model.sha256,
            data_fingerprint=self.data_fingerprint,
            extra={
                "optimizer_steps": self.optimizer.step_count,
                "bad_in_a_row": self._bad_in_a_row,
                "start_cross_entropy": self._start_cross_entropy,
                "usual_norm": self.norm_trend.usual,
                "rollbacks": self.rollbacks,
                "rate_changes": self.rate_changes,
                "mask_token_id": self.mask_token_id,
                "has_prompts": self._has_prompts,
                "int8": self.int8,
                "start_sha256": self.start.sha256,
            },
        )

    def restore(self, state: TrainingState) -> None:
        """Continue from a state that is of this run (resume.py checks that)."""
        self.parameters.flat[...] = state.parameters
        self.optimizer.first_moment[...] = state.first_moment
        self.optimizer.second_moment[...] = state.second_moment
        self.optimizer.step_count = int(state.extra["optimizer_steps"])
        self._bad_in_a_row = int(state.extra["bad_in_a_row"])
        self._start_cross_entropy = float(state.extra["start_cross_entropy"])
        self.norm_trend.usual = state.extra.get("usual_norm")
        self.rollbacks = int(state.extra["rollbacks"])
        self.rate_changes = [(int(step), float(rate)) for step, rate in state.extra["rate_changes"]]
        self.learning_rate = self.rate_changes[-1][1]
        self._has_prompts = bool(state.extra.get("has_prompts", False))
        self.int8 = state.extra["int8"]
        self.step_count = self.annealer.current_step = state.step
        self.tokens_seen = state.tokens_seen

    def export(self, folder: str | Path) -> tuple[Path, Path]:
        """Write adapter.safetensors (everything that was trained) and adapter.gguf (for llama.cpp).

        Returns:
            The two paths.

        Raises:
            UserError: writing failed; what was there before is still there.

        """
        folder = Path(folder)
        checkpoint = self.checkpoint()
        safetensors, gguf = folder / "adapter.safetensors", folder / "adapter.gguf"
        checkpoint.save(safetensors)
        checkpoint.save_gguf(gguf, self.model.file)
        return safetensors, gguf


def trained_shapes(base: ModelDims, qlora: QLoraConversionConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of all that is trained, in the order of the flat vector."""
    shapes: dict[str, tuple[int, ...]] = dict(lora_shapes(base, qlora.target_modules, qlora.rank))
    shapes[MASK_EMBEDDING] = (base.C,)
    if qlora.time_embedding.enabled:
        shapes |= parameter_shapes(qlora.time_embedding.dim, base.C)
    return shapes
