"""llama.cpp's arm of a benchmark: a model and a context in one process, driven by bench.py line by line.

The library is the one inside llama-cpp-python, with its defaults: weights are repacked for the processor
where it has a form for them.

The job (argv[1], JSON): model, n_threads, n_cached, repack.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import llama_cpp
from bench_arms import Action, Reply, serve

MOST_TOKENS = 64


class Worker:
    """The actions of one job."""

    def __init__(self, job: Reply) -> None:
        api: Any = llama_cpp
        self.api, self.n_cached, self.repack = api, job["n_cached"], job["repack"]
        params = api.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = job["repack"]
        self.model = api.llama_model_load_from_file(job["model"].encode(), params)
        context_params = api.llama_context_default_params()
        context_params.n_ctx = context_params.n_batch = job["n_cached"] + MOST_TOKENS
        context_params.n_threads = context_params.n_threads_batch = job["n_threads"]
        self.context = api.llama_init_from_model(self.model, context_params)
        self._decode(0, job["n_cached"])

    def describe(self) -> Reply:
        """What is being measured."""
        system = self.api.llama_print_system_info().decode()
        return {
            "system": system if self.repack else f"{system}without repacked weights",
            "n_cached": self.n_cached,
        }

    def pass_of(self, n_rows: int, repeats: int) -> Reply:
        """Median seconds of `llama_decode` of so many tokens behind the cached ones, with all logits."""
        times_s = []
        for _ in range(repeats):
            started_s = time.perf_counter()
            self._decode(self.n_cached, n_rows)
            times_s.append(time.perf_counter() - started_s)
            memory = self.api.llama_get_memory(self.context)
            self.api.llama_memory_seq_rm(memory, 0, self.n_cached, -1)
        return {"time_s": statistics.median(times_s)}

    def _decode(self, first: int, count: int) -> None:
        batch = self.api.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for i in range(count):
            batch.token[i] = 100 + i
            batch.pos[i] = first + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = 1
        failed = self.api.llama_decode(self.context, batch) != 0
        self.api.llama_batch_free(batch)
        if failed:
            raise SystemExit("llama_decode failed")


def start(job: Reply) -> dict[str, Action]:
    """The actions of a job by name."""
    worker = Worker(job)
    return {"describe": worker.describe, "pass_of": worker.pass_of}


if __name__ == "__main__":
    serve(start)
