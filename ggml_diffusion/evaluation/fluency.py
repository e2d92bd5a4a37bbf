"""How good text is that is written from masks: perplexity under the base, and how varied it is.

Perplexity alone can be gamed: a text that repeats itself is likely. So it is reported with the entropy of a
sample's own token frequencies (nats), distinct-2 (the share of a sample's pairs of neighbours that are
distinct) and repetition (the share of its groups of four tokens that it has said before), beside the same
figures of the true continuations and of samples of the base.

All texts continue the same prompts, which are the beginnings of held-out documents, or, where the prompt
length is 0, from the token that starts a text.
Sources: generative perplexity with entropy, MDLM [Sahoo et al. 2024, arXiv:2406.07524] and [Zheng et al.
2024, arXiv:2409.02908]; distinct-n [Li et al. 2016, arXiv:1510.03055]; repetition of four tokens [Welleck et
al. 2020, arXiv:1908.04319].
Letters: N samples, K tokens of a sample.
"""

import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.engine.interface import Engine
from ggml_diffusion.errors import UserError
from ggml_diffusion.evaluation.continuation import continuation_losses, continue_sampled
from ggml_diffusion.evaluation.estimates import Estimate, estimate_ratio, exponential
from ggml_diffusion.evaluation.infilling import document_parts
from ggml_diffusion.evaluation.scoring import OnTokens, ignore_tokens
from ggml_diffusion.generation.denoise import GenerationConfig
from ggml_diffusion.generation.diffusion_model import DiffusionModel
from ggml_diffusion.randomness import Stream, generator_of
from ggml_diffusion.text.loader import TokenBatch
from ggml_diffusion.text.tokenizer import Tokenizer

REPEATED_GROUP = 4


@dataclass(frozen=True)
class Fluency:
    """Figures of several samples.

    Attributes:
        perplexity: exp of the base's cross-entropy a token, given the prompt.
        entropy: nats; of K different tokens it is ln K.
        distinct_2: share of neighbouring pairs that are distinct, 1 = no pair comes twice.
        repetition: share of groups of four tokens that came before in the same sample.
        n_samples: N.
        sample_length: K.

    """

    perplexity: Estimate
    entropy: Estimate
    distinct_2: Estimate
    repetition: Estimate
    n_samples: int
    sample_length: int


@dataclass(frozen=True)
class WrittenText:
    """Text of one origin.

    Attributes:
        origin: "held-out text", "base" or "converted".
        steps: denoising steps allowed, None where the text was not denoised.
        forward_passes: a text, on average; None for held-out text.
        fluency: its figures.
        tokens_per_second: how fast it was written, None for held-out text.
        example: tokens (K,) of the first sample, its prompt not included.

    """

    origin: str
    steps: int | None
    forward_passes: float | None
    fluency: Fluency
    tokens_per_second: float | None
    example: list[int]


def step_counts(length: int) -> list[int]:
    """Denoising steps to try for texts of K tokens: 8, K/4, K/2, K."""
    return sorted({min(8, length), max(1, length // 4), max(1, length // 2), length})


def cut_prompts(
    held_out: TokenBatch, tokenizer: Tokenizer, mask_token_id: int, n: int, prompt_length: int, length: int
) -> tuple[list[NDArray[np.int32]], list[NDArray[np.int32]]]:
    """At most n prompts, and how the text went on (K tokens each).

    Only documents that have room for both give one, the first of each sequence. With a prompt length of 0
    every prompt is the token that starts a text, and what follows are the beginnings of documents' parts.

    Raises:
        UserError: no held-out text is long enough, or the vocabulary has no token to start from.

    """
    start: list[int] = []
    if prompt_length == 0:
        first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        if first is None:
            raise UserError("this vocabulary has no token to start a text from: give a prompt length above 0")
        start = [first]
    prompts, truths = [], []
    for tokens, n_tokens, documents in zip(
        held_out.tokens, held_out.lengths, held_out.document_ids, strict=True
    ):
        for part in document_parts(tokens[:n_tokens], documents[:n_tokens]):
            text = part[1:] if start and part[0] == start[0] else part  # that stands in the prompt already
            if len(text) >= prompt_length + length and not (text == mask_token_id).any():
                prompts.append(np.array([*start, *text[:prompt_length]], dtype=np.int32))
                truths.append(text[prompt_length : prompt_length + length])
                break
    if not prompts:
        raise UserError(
            f"no held-out text has {prompt_length} tokens of prompt and {length} to compare with in one "
            f"sequence: shorten them, or lengthen the sequences"
        )
    return prompts[:n], truths[:n]


def compare_texts(
    model: DiffusionModel,
    prompts: list[NDArray[np.int32]],
    truths: list[NDArray[np.int32]],
    config: GenerationConfig,
    *,
    batch_size: int,
    on_tokens: OnTokens = ignore_tokens,
) -> list[WrittenText]:
    """Held-out text, samples of the base, and text denoised in ever more steps.

    Args:
        model: the conversion; its engine is the base.
        prompts: (N) token sequences.
        truths: how they went on, (K,) each.
        config: how text is denoised; its steps are those of `step_counts`, its length is not used.
        batch_size: texts a forward pass where perplexity is measured.
        on_tokens: told about progress.

    """
    reference = reference_texts(model, prompts, truths, config.seed, batch_size, on_tokens)
    return reference + denoised_texts(model, prompts, len(truths[0]), config, batch_size, on_tokens)


def reference_texts(
    model: DiffusionModel,
    prompts: list[NDArray[np.int32]],
    truths: list[NDArray[np.int32]],
    seed: int,
    batch_size: int,
    on_tokens: OnTokens = ignore_tokens,
) -> list[WrittenText]:
    """How the prompts went on, and samples of the base at temperature 1; see `compare_texts`."""
    engine, length = model.engine, len(truths[0])
    held_out = fluency(engine, prompts, truths, batch_size, on_tokens)
    started_s = time.perf_counter()
    generator = generator_of(seed, 0, Stream.BASE_TEXT)
    sampled = continue_sampled(engine, prompts, length, 1, generator, model.mask_token_id, on_tokens)[:, 0]
    tokens_per_second = sampled.size / max(time.perf_counter() - started_s, 1e-9)
    base = fluency(engine, prompts, list(sampled), batch_size, on_tokens)
    return [
        WrittenText("held-out text", None, None, held_out, None, truths[0].tolist()),
        WrittenText("base", None, float(length), base, tokens_per_second, sampled[0].tolist()),
    ]


def denoised_texts(
    model: DiffusionModel,
    prompts: list[NDArray[np.int32]],
    length: int,
    config: GenerationConfig,
    batch_size: int,
    on_tokens: OnTokens = ignore_tokens,
) -> list[WrittenText]:
    """Texts of K = `length` tokens denoised in each of `step_counts`; see `compare_texts`."""
    results = []
    for steps in step_counts(length):
        started_s = time.perf_counter()
        texts, n_passes = [], 0
        for index, prompt in enumerate(prompts):
            own = config.model_copy(update={"steps": steps, "seed": config.seed + index})
            text, passes = _denoise(model, prompt, length, own)
            texts.append(text)
            n_passes += passes
            on_tokens(passes * (len(prompt) + length))
        tokens_per_second = len(texts) * length / max(time.perf_counter() - started_s, 1e-9)
        figures = fluency(model.engine, prompts, texts, batch_size, on_tokens)
        passes_a_text = n_passes / len(texts)
        results.append(
            WrittenText("converted", steps, passes_a_text, figures, tokens_per_second, texts[0].tolist())
        )
    return results


def _denoise(
    model: DiffusionModel, prompt: NDArray[np.int32], length: int, config: GenerationConfig
) -> tuple[NDArray[np.int32], int]:
    """A text (K,) and the forward passes that it took: a step that reveals nothing takes none."""
    blank = np.concatenate([prompt, np.full(length, model.mask_token_id, dtype=np.int32)])
    states = [blank]
    text = model.fill(blank, config, lambda step: states.append(step.tokens))[len(prompt) :]
    return text, sum(not np.array_equal(*pair) for pair in pairwise(states))


def fluency(
    engine: Engine,
    prompts: list[NDArray[np.int32]],
    texts: list[NDArray[np.int32]],
    batch_size: int,
    on_tokens: OnTokens = ignore_tokens,
) -> Fluency:
    """Figures of texts (N, K), each after its prompt."""
    losses = continuation_losses(
        engine,
        [np.concatenate([prompt, text]) for prompt, text in zip(prompts, texts, strict=True)],
        [len(prompt) for prompt in prompts],
        batch_size,
        on_tokens,
    )
    lengths = np.array([len(text) for text in texts])
    one_each = np.ones(len(texts), dtype=np.int64)

    def mean(values: list[float]) -> Estimate:
        return estimate_ratio(np.array(values), one_each)

    return Fluency(
        exponential(estimate_ratio(losses, lengths)),
        mean([token_entropy(text) for text in texts]),
        mean([distinct_share(text, 2) for text in texts]),
        mean([1.0 - distinct_share(text, REPEATED_GROUP) for text in texts]),
        len(texts),
        int(lengths[0]),
    )


def token_entropy(text: NDArray[np.int32]) -> float:
    """Entropy in nats of the token frequencies of a text (K,)."""
    share = np.unique(text, return_counts=True)[1] / len(text)
    return float(-(share * np.log(share)).sum())


def distinct_share(text: NDArray[np.int32], n: int) -> float:
    """Distinct groups of n neighbours over all of them; 1 where the text (K,) is shorter than n."""
    groups = Counter(tuple(text[start : start + n].tolist()) for start in range(len(text) - n + 1))
    return len(groups) / groups.total() if groups else 1.0


def writing_tokens(prompts: list[NDArray[np.int32]], length: int) -> int:
    """At most how many tokens go through the model in `compare_texts`."""
    total = 0
    for prompt in prompts:
        whole = len(prompt) + length
        total += sum(len(prompt) + step for step in range(length))  # samples of the base
        total += whole * (2 + sum(steps + 1 for steps in step_counts(length)))
    return total
