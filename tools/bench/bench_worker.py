"""The project's own arm of a benchmark: one model in one process, driven by bench.py line by line.

A training step is `ConversionTrainer.train_step`, all of it: drawing the noise, loss and gradients, clipping,
AdamW. What is measured with what is the business of bench_sections.py.

The job (argv[1], JSON): model, device, n_threads, compute, keep, memory_mib, int8, batch_size,
sequence_length, rank, targets, train. int8: False = no such products, True = forward and
backward where the engine can, or one of the engine's own names.
"""

from __future__ import annotations

import pydoc_data.topics
import statistics
import time
from typing import Any

import numpy as np
from bench_arms import Action, Reply, peak_memory_bytes, resident_bytes_of_file, serve
from numpy.typing import NDArray

from ggml_diffusion.config.groups import MaskAnnealingConfig, NoiseScheduleConfig, QLoraConversionConfig
from ggml_diffusion.config.settings import ConversionTrainingConfig
from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.ggml_graph.devices import find_device
from ggml_diffusion.engine.ggml_graph.graph_model import GraphModel
from ggml_diffusion.engine.interface import Batch, Int8, LossResult
from ggml_diffusion.formats.lora import LoraAdapter, TargetModule
from ggml_diffusion.formats.model_check import read_model
from ggml_diffusion.generation.denoise import GenerationConfig
from ggml_diffusion.generation.diffusion_model import DiffusionModel
from ggml_diffusion.objective.output_rows import to_output_rows
from ggml_diffusion.text.loader import TokenBatch
from ggml_diffusion.text.tokenizer import Tokenizer
from ggml_diffusion.training.trainer import ConversionTrainer

CHARACTERS_A_TOKEN = 10  # surely more than a token has on average
CAUSAL_RATIO = 0.5  # a fractional mask, as in the middle of the annealing


class _Timed:
    """Adds up the time of a model's training calls."""

    time_s = 0.0
    processor_s = 0.0  # of all threads

    def loss_and_gradients(self, *arguments: Any, **settings: Any) -> LossResult:
        """See `Engine`."""
        started_s, processor_from_s = time.perf_counter(), time.process_time()
        result: LossResult = super().loss_and_gradients(*arguments, **settings)  # type: ignore[misc]
        self.time_s += time.perf_counter() - started_s
        self.processor_s += time.process_time() - processor_from_s
        return result


class TimedModel(_Timed, Q4Model):
    """The core's model."""


class TimedGraphModel(_Timed, GraphModel):
    """The same on a device."""


def open_model(job: Reply) -> TimedModel | TimedGraphModel:
    """The job's model on the job's device."""
    budget = None if job["memory_mib"] is None else job["memory_mib"] << 20
    compute, n_threads = job["compute"], job["n_threads"]
    file = read_model(job["model"])
    if job["device"] == "cpu":
        return TimedModel(file, n_threads, compute=compute, keep=job["keep"], memory_budget=budget)
    device = find_device(job["device"])
    return TimedGraphModel(file, device, n_threads, compute=compute, memory_budget=budget)


def training_config(job: Reply) -> ConversionTrainingConfig:
    """The step of the benchmark: time embedding and mask row on, about half of the tokens masked."""
    return ConversionTrainingConfig(
        batch_size=job["batch_size"],
        gradient_accumulation=1,
        sequence_length=job["sequence_length"],
        warmup_steps=0,
        lr_schedule="constant",
        qlora=QLoraConversionConfig(
            rank=job["rank"],
            alpha=2.0 * job["rank"],
            target_modules=tuple(TargetModule(name) for name in job["targets"]),
            mask_annealing=MaskAnnealingConfig(total_steps=0, final_causal_ratio=CAUSAL_RATIO),
        ),
        noise_schedule=NoiseScheduleConfig(type="linear", min_time=0.05),  # as in the presets
    )


class Worker:
    """The actions of one job."""

    def __init__(self, job: Reply) -> None:
        self.job = job
        self.model = open_model(job)
        self.tokenizer = Tokenizer.from_gguf(job["model"])
        self.trainer = ConversionTrainer(self.model, training_config(job)) if job["train"] else None
        if self.trainer is not None and job["int8"] is True:
            self.trainer.int8 = "both" if self.model.has_int8 else "none"
        elif self.trainer is not None and job["int8"]:
            self.trainer.int8 = job["int8"]

    def describe(self) -> Reply:
        """What is being measured."""
        model, int8 = self.model, self.trainer.int8 if self.trainer is not None else "none"
        if not isinstance(model, TimedModel):
            return {"model": model.description, "n_threads": model.n_threads, "int8": int8}
        return {
            "model": model.description,
            "n_threads": model.n_threads,
            "kernels": model.kernels,
            "element": model.element + ("" if int8 == "none" else f", int8 {int8}"),
            "int8": int8,
        }

    def peak(self, time_s: float) -> Reply:
        """The kernels' own bound."""
        return {"gflops": self._core.peak_gflops(time_s)}

    def packing(self, time_s: float) -> Reply:
        """Billions of weights a second that are packed alone, in each direction."""
        return {
            "forward": self._core.packing_rate(backward=False, time_s=time_s),
            "backward": self._core.packing_rate(backward=True, time_s=time_s),
        }

    def memory(self) -> Reply:
        """The process's peak, how much of it is the mapped model, and what the engine plans for a step."""
        job = self.job
        step = self.model.describe_step(job["batch_size"], job["sequence_length"], job["rank"])
        return {
            "planned_bytes": step.memory_bytes,
            "peak_bytes": peak_memory_bytes(),
            "model_bytes": resident_bytes_of_file(self.model.file.path),
        }

    def step(
        self,
        noise: str | None = None,
        batch_size: int | None = None,
        sequence_length: int | None = None,
    ) -> Reply:
        """One optimizer step.

        Args:
            noise: file to save the step's inputs in, for a peer that does the same step.
            batch_size: another one than the job's.
            sequence_length: another one than the job's.

        Returns:
            Seconds of the whole step, of it in the engine, of all processors in the engine, and in each
            parallel part; tokens, loss.

        """
        assert self.trainer is not None
        batch = self._batch(
            batch_size or self.job["batch_size"], sequence_length or self.job["sequence_length"]
        )
        if noise is not None:
            self._save_noise(noise, batch)
        model = self.model
        if isinstance(model, TimedModel):
            model.reset_profile()
        model.time_s = model.processor_s = 0.0
        started_s = time.perf_counter()
        metrics = self.trainer.train_step(batch)
        reply = {
            "time_s": time.perf_counter() - started_s,
            "engine_s": model.time_s,
            "processor_s": model.processor_s,
            "n_tokens": batch.tokens.size,
            "loss": metrics.loss,
        }
        return {**reply, "parts_s": model.profile()} if isinstance(model, TimedModel) else reply

    @property
    def _core(self) -> TimedModel:
        """The model of jobs that only the core has."""
        assert isinstance(self.model, TimedModel)
        return self.model

    def _batch(self, batch_size: int, sequence_length: int) -> TokenBatch:
        """English, the same in every step; its masks are not."""
        shape = (batch_size, sequence_length)
        return TokenBatch(
            tokens=self._tokens(batch_size * sequence_length).reshape(shape),
            lengths=np.full(batch_size, sequence_length, dtype=np.int32),
            document_ids=np.zeros(shape, dtype=np.int32),
        )

    def _tokens(self, count: int) -> NDArray[np.int32]:
        """The first tokens of Python's own manual."""
        text = "".join(pydoc_data.topics.topics.values())
        return self.tokenizer.encode(text[: CHARACTERS_A_TOKEN * count])[:count]

    def _save_noise(self, path: str, batch: TokenBatch) -> None:
        trainer = self.trainer
        assert trainer is not None and trainer.time_embedding is not None
        noisy = trainer.corrupt(batch)
        targets, weights = to_output_rows(noisy.clean, noisy.weights, None, trainer.config.qlora.prediction)
        np.savez(
            path,
            noisy=noisy.noisy,
            targets=targets,
            weights=weights,
            time_features=trainer.time_embedding.features(noisy.t),
            causal_ratio=CAUSAL_RATIO,
            mask_token_id=trainer.mask_token_id,
            learning_rate=trainer.config.learning_rate,
        )

    def products(self) -> Reply:
        """One forward and backward without LoRA and with one predicted row: frozen products and little else.

        Returns:
            Seconds of the products in each direction.

        """
        shape = (self.job["batch_size"], self.job["sequence_length"])
        tokens = self._tokens(shape[0] * shape[1]).reshape(shape)
        weights = np.zeros(shape, dtype=np.float32)
        weights[0, 0] = 1.0
        self._core.reset_profile()
        # the mask row's gradient asks for that of every layer's input
        mask_row = np.zeros(self.model.file.C, dtype=np.float32)
        adapter = LoraAdapter(1.0, {}, 0, mask_row)
        self.model.loss_and_gradients(
            Batch(tokens, CAUSAL_RATIO), tokens, weights, adapter, {"mask_embedding": np.zeros_like(mask_row)}
        )
        parts = self._core.profile()
        return {"forward_s": parts["frozen forward"], "backward_s": parts["frozen backward"]}

    def pass_of(self, n_rows: int, repeats: int) -> Reply:
        """Median seconds of a pass of a sequence of so many tokens, with all logits; in int8 where it can."""
        batch = Batch(self._tokens(n_rows)[None], causal_ratio=0.0)
        int8: Int8 = "both" if self.model.has_int8 else "none"
        times_s = []
        for _ in range(repeats):
            started_s = time.perf_counter()
            self.model.logits(batch, int8=int8)
            times_s.append(time.perf_counter() - started_s)
        return {"time_s": statistics.median(times_s), "parts_s": self._core.profile()}

    def generate(self, prompt_length: int, length: int, steps: int) -> Reply:
        """Denoise `length` tokens after a prompt in `steps` steps."""
        model = self._model_of("adapted")
        tokens = np.full(prompt_length + length, model.mask_token_id, dtype=np.int32)
        tokens[:prompt_length] = self._tokens(prompt_length)
        started_s = time.perf_counter()
        model.fill(tokens, GenerationConfig(steps=steps, block_length=0))
        return {"time_s": time.perf_counter() - started_s}

    def fill_hole(self, n_tokens: int, n_hole: int, context: str) -> Reply:
        """Fill a hole in the middle of a text, a token a step: seconds of the first and of other steps."""
        model = self._model_of(context)
        tokens, start = self._tokens(n_tokens), (n_tokens - n_hole) // 2
        tokens[start : start + n_hole] = model.mask_token_id
        times_s = [time.perf_counter()]
        config = GenerationConfig(steps=n_hole, block_length=0, temperature=0.0)
        model.fill(tokens, config, lambda _: times_s.append(time.perf_counter()))
        steps_s = np.diff(times_s)
        return {"first_s": float(steps_s[0]), "step_s": float(np.median(steps_s[1:]))}

    def write(self, n_prompt: int, n_written: int, context: str) -> Reply:
        """Write behind a prompt as `generate` does."""
        model = self._model_of(context)
        tokens = np.full(n_prompt + n_written, model.mask_token_id, dtype=np.int32)
        tokens[:n_prompt] = self._tokens(n_prompt)
        started_s = time.perf_counter()
        model.fill(tokens, GenerationConfig())
        return {"time_s": time.perf_counter() - started_s}

    def _model_of(self, context: str) -> DiffusionModel:
        """The untrained conversion, to be read with either kind of context and the default margin."""
        assert self.trainer is not None
        checkpoint = self.trainer.checkpoint()
        margin = QLoraConversionConfig().margin if context == "frozen" else 0
        update = {"context": context, "margin": margin}
        checkpoint.metadata = checkpoint.metadata.model_copy(update=update)
        model = DiffusionModel.from_checkpoint(self.model, self.tokenizer, checkpoint)
        model.int8 = "both" if self.model.has_int8 else "none"  # as `DiffusionModel.load` does
        return model


def start(job: Reply) -> dict[str, Action]:
    """The actions of a job by name."""
    worker = Worker(job)
    names = ("describe", "peak", "packing", "memory", "step", "products", "pass_of", "generate")
    return {name: getattr(worker, name) for name in (*names, "fill_hole", "write")}


if __name__ == "__main__":
    serve(start)
