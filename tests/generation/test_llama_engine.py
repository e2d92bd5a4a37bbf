"""llama.cpp in the place of the engine: the same text with the same seed in F32, and what it refuses.

llama.cpp keeps its own time: it rounds nothing here, so that logits agree to float32's rounding, and a draw
could only differ where two candidates are nearer than that.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TinyModel
from conversions import conversion
from numpy.typing import NDArray
from test_denoise import MASK, converted
from test_frozen_context import frozen

from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.interface import Batch
from ggml_diffusion.engine.llama_engine import LlamaEngine
from ggml_diffusion.errors import UserError
from ggml_diffusion.formats.model_check import read_model
from ggml_diffusion.generation.denoise import GenerationConfig
from ggml_diffusion.generation.diffusion_model import DiffusionModel
from ggml_diffusion.generation.sampling import log_softmax
from ggml_diffusion.generation.verified import VerifiedWriter
from ggml_diffusion.text.tokenizer import Tokenizer
from ggml_diffusion.training.identity import MEAN_KL_LIMIT

SIZES = {"L": 1, "C": 32, "H": 2, "G": 1, "F": 32}
MODELS: dict[str, dict[str, Any]] = {
    "llama, tied": {"tied": True},
    "llama, untied": {"tied": False},
    "qwen2": {"arch": "qwen2"},
    "qwen2, untied": {"arch": "qwen2", "tied": False},
    "gemma3": {"arch": "gemma3"},
}
TEXT = np.array([30, 31, MASK, MASK, 40, 41, 42, MASK, 50, MASK, MASK, MASK], np.int32)


@pytest.fixture(params=MODELS)
def engines(tiny_model: TinyModel, request: pytest.FixtureRequest) -> Iterator[tuple[Q4Model, LlamaEngine]]:
    path = tiny_model(**{**SIZES, **MODELS[request.param]})
    with Q4Model.from_gguf(path, 1, compute="f32") as ours:
        llama = LlamaEngine(read_model(path), 1)
        yield ours, llama
        llama.close()


def time_offset(t: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.outer(t, np.linspace(-1, 1, 32)).astype(np.float32)


def test_logits_are_the_engines(engines: tuple[Q4Model, LlamaEngine]) -> None:
    found = []
    for engine in engines:
        model = converted(engine, causal_ratio=0.0, time_offset=time_offset)
        tokens = np.stack([TEXT, TEXT[::-1]])
        found.append(model.logits(tokens, np.array([0.3, 0.7], np.float32)))
        model.rule = replace(model.rule, attention_sink=True)
        found[-1] = np.concatenate([found[-1], model.logits(tokens, np.array([0.3, 0.7], np.float32))])
        lengths = np.array([5, 12])
        causal = engine.logits(Batch(tokens, 1.0, lengths), None)
        assert not causal[0, 5:].any()
        found[-1][..., MASK] = 0
        found.append(causal)
    tolerance = 5e-4 if engines[0].file.arch == "gemma3" else 1e-5  # ggml's GELU is a table of float16
    for ours, llamas in zip(found[:2], found[2:], strict=True):
        error = np.abs(ours - llamas).max()
        print(f"{error:.1e}")
        assert error <= tolerance * np.abs(ours).max()


@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.parametrize(("prediction", "sink"), [("shifted", False), ("shifted", True), ("aligned", False)])
def test_the_same_seed_gives_the_same_text(
    engines: tuple[Q4Model, LlamaEngine], prediction: Any, sink: bool, block_size: int | None
) -> None:
    texts = []
    for engine in engines:
        model = converted(engine, prediction, causal_ratio=0.0, time_offset=time_offset)
        model.rule = replace(model.rule, block_size=block_size, attention_sink=sink)
        texts.append([model.fill(TEXT, GenerationConfig(seed=seed, top_p=0.9)).tolist() for seed in range(4)])
        texts[-1].append(model.generate("the sand", GenerationConfig(length=12, seed=5), suffix=" sea"))
    assert texts[0] == texts[1]
    assert len({str(text) for text in texts[0][:4]}) > 1


def test_verified_text_is_the_bases_over_its_own_cache(engines: tuple[Q4Model, LlamaEngine]) -> None:
    """The drafts are near the engine's and not the same: what they are does not matter."""
    texts = []
    for engine in engines:
        model = frozen(engine, causal_ratio=0.0)
        for config in (
            GenerationConfig(temperature=0.0, length=24),
            GenerationConfig(temperature=0.9, length=24, seed=3),
        ):
            ticks = iter(range(10_000))  # every call takes as long, so that drafts go on
            clock = lambda ticks=ticks: float(next(ticks))  # noqa: E731
            writer = VerifiedWriter(engine, model.adapter, model.rule, config, "none", clock=clock)
            written = writer.write(TEXT[:2])
            assert written.rounds > 3
            texts.append(written.tokens.tolist())
    assert texts[:2] == texts[2:]


def test_a_longer_text_gets_more_room_and_an_adapter_another_place(
    engines: tuple[Q4Model, LlamaEngine],
) -> None:
    ours, llama = engines
    first, second = converted(llama, causal_ratio=0.0), converted(llama, causal_ratio=0.0)
    for pair in second.adapter.tensors.values():
        pair *= 2
    for model in (first, second, first, first.untrained()):
        for n in (3, 12, 5):
            tokens = np.resize(TEXT, (1, n))
            expected = ours.logits(Batch(tokens, 0.0), model.adapter)
            found = llama.logits(Batch(tokens, 0.0), model.adapter)
            # ggml looks Gemma's GELU up in a table of float16.
            tolerance = 5e-4 if llama.file.arch == "gemma3" else 1e-5
            assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def open_llama(tiny_model: TinyModel, **more: Any) -> LlamaEngine:
    return LlamaEngine(read_model(tiny_model(**{**SIZES, **more})), 1)


def test_what_it_cannot_do_is_refused_in_a_sentence(tiny_model: TinyModel) -> None:
    llama = open_llama(tiny_model)
    with pytest.raises(UserError, match=r"a causal ratio of 0\.25"):
        converted(llama, causal_ratio=0.25).fill(TEXT)
    with pytest.raises(UserError, match=r"cache cannot hold what this needs.*--verify"):
        frozen(llama, causal_ratio=0.0).fill(TEXT)
    with pytest.raises(UserError, match="cache cannot hold what this needs"):
        frozen(llama, causal_ratio=0.0).generate("the", GenerationConfig(length=24, seed=1))
    with pytest.raises(UserError, match="cache cannot hold what this needs"):
        llama.context(20, drafts=True).refill(Batch(TEXT[None]), keep=np.ones(len(TEXT), bool))
    with pytest.raises(UserError, match="cache cannot hold what this needs"):
        llama.context(20, drafts=True).extend(TEXT, np.arange(3, 15))
    with pytest.raises(UserError, match="no room"):
        llama.context(4, drafts=True).extend(TEXT)
    with pytest.raises(UserError, match="cache cannot hold what this needs"):
        converted(llama, causal_ratio=0.0).fill(TEXT, GenerationConfig(approximate_cache=True))
    with pytest.raises(UserError, match="no losses and gradients"):
        llama.loss(Batch(TEXT[None]), TEXT[None], np.ones((1, len(TEXT)), np.float32))
    with pytest.raises(UserError, match="cache cannot hold what this needs"):
        frozen(llama, causal_ratio=0.0).logits(TEXT, 0.5)
    with pytest.raises(UserError, match="no documents"):
        llama.logits(Batch(TEXT[None], document_ids=np.zeros((1, len(TEXT)), np.int32)))
    llama.close()


def test_a_text_beyond_a_window_is_refused(tiny_model: TinyModel) -> None:
    window = {"attention.sliding_window": 8, "attention.sliding_window_pattern": 2}
    llama = open_llama(tiny_model, arch="gemma3", keys=window)
    with pytest.raises(UserError, match="see 8 tokens"):
        converted(llama, causal_ratio=0.0).fill(TEXT)
    llama.close()


def test_a_file_that_llama_cpp_does_not_load_is_one_line(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_model(**SIZES).read_bytes())
    file = read_model(path)
    path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(UserError) as caught:
        LlamaEngine(file, 1)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_llama_cpp_is_not_left_with_what_is_gone(tiny_model: TinyModel) -> None:
    """It keeps a bare pointer to whoever listens to it: another model is loaded after the engine went."""
    path = tiny_model(**SIZES)
    program = f"""
import gc
from llama_cpp import Llama
from ggml_diffusion.engine.llama_engine import LlamaEngine
from ggml_diffusion.formats.model_check import read_model
for _ in range(3):
    engine = LlamaEngine(read_model({str(path)!r}), 1)
    del engine
    gc.collect()
    Llama({str(path)!r}, n_ctx=32, verbose=False)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-1000:]


@pytest.mark.slow
def test_on_quantised_weights_it_agrees_as_the_identity_gate_wants(smollm2_path: Path) -> None:
    """llama.cpp rounds activations to 8 bits: 4e-3 nats on plain text, more where a third of it is masked."""
    file = read_model(smollm2_path)
    checkpoint = conversion(file, time=False, scale=0.003)
    changed = {"final_causal_ratio": 0.0, "mask_token_id": 0}
    checkpoint.metadata = checkpoint.metadata.model_copy(update=changed)
    tokenizer = Tokenizer.from_file(file)
    text = tokenizer.encode(
        " ".join(["The old mill ground corn for the village, and the miller sang of it."] * 4)
    )
    masked = np.random.default_rng(0).random(len(text)) < 1 / 3
    masked[0] = False
    noisy = np.where(masked, 0, text).astype(np.int32)
    said = []
    for engine in (Q4Model.from_gguf(smollm2_path, 2, compute="f32"), LlamaEngine(file, 2)):
        model = DiffusionModel.from_checkpoint(engine, tokenizer, checkpoint)
        logits = model.logits(noisy, 0.5)[masked].astype(np.float64)
        said.append(log_softmax(np.delete(logits, 0, axis=1)))
        engine.close()
    exact, llamas = said
    kl = float((np.exp(exact) * (exact - llamas)).sum(axis=1).mean())
    same = float((exact.argmax(axis=1) == llamas.argmax(axis=1)).mean())
    print(f"KL {kl:.1e}, the likeliest token is the same at {same:.2f} of {masked.sum()}")
    assert 0.0 < kl < MEAN_KL_LIMIT
    assert same > 0.8
