"""The PyTorch + PEFT arm of a benchmark: the training step that bench_worker.py takes, in another runtime.

It takes the step's inputs from a file that the other arm has written, so both train on the same masks and
their first losses agree. The model is a plain Hugging Face Llama whose weights are those of the GGUF,
unpacked: the fastest form that PyTorch has on a processor. In bf16 everything is (adapters too, which is
faster than PEFT's default of float32 ones); only the loss is float32.

PyTorch, transformers and PEFT are no dependencies of this project: the script runs in an environment of its
own (`pip install torch transformers peft gguf`), which `bench.py --peer-python` names. It measures, it does
not convert anything.

The job (argv[1], JSON): model (GGUF; None = only matrix products), dtype, device, n_threads, rank, targets.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import gguf
import numpy as np
import torch  # type: ignore[import-not-found, unused-ignore]
from bench_arms import Action, Reply, peak_memory_bytes, reset_peak_memory, serve
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model  # type: ignore[import-not-found, unused-ignore]
from transformers import LlamaConfig, LlamaForCausalLM  # type: ignore[import-not-found, unused-ignore]

_PLACES = {"metal": "mps"}  # what PyTorch calls a kind of device, where it is another name
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
ROWS_AT_ONCE = 1024  # rows of a matrix that are unpacked to float32 together
WEIGHT_DECAY, MAX_GRAD_NORM = 0.01, 1.0

# GGUF name inside a layer -> Hugging Face name
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hugging_face_name(name: str) -> str:
    """A GGUF tensor's name in a Hugging Face Llama."""
    outside = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    stem = name.removesuffix(".weight")
    if stem in outside:
        return outside[stem] + ".weight"
    _, layer, inner = stem.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[inner]}.weight"


def row_order(name: str, n_rows: int, heads: dict[str, int]) -> NDArray[np.int64]:
    """Which GGUF row each Hugging Face row is: rows of Q and K are pairs there, halves of a head here."""
    rows = np.arange(n_rows)
    if n_heads := heads.get(name.split(".")[-2], 0):
        return rows.reshape(n_heads, n_rows // n_heads // 2, 2).swapaxes(1, 2).reshape(-1)
    return rows


def unpacked(tensor: Any, order: NDArray[np.int64]) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """A GGUF matrix or vector in float32, some rows at a time, in the given order."""
    for start in range(0, len(order), ROWS_AT_ONCE):
        rows = slice(start, min(start + ROWS_AT_ONCE, len(order)))
        yield rows, gguf.quants.dequantize(np.ascontiguousarray(tensor.data[order[rows]]), tensor.tensor_type)


def load(path: str, dtype: Any) -> Any:
    """The GGUF's model with unpacked weights of one type."""
    reader = gguf.GGUFReader(path)

    def setting(key: str, default: Any = None) -> Any:
        field = reader.get_field(f"llama.{key}")
        return default if field is None else field.contents()

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    n_heads = setting("attention.head_count")
    heads = {"attn_q": n_heads, "attn_k": setting("attention.head_count_kv", n_heads)}
    hidden_size = setting("embedding_length")
    config = LlamaConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        hidden_size=hidden_size,
        intermediate_size=setting("feed_forward_length"),
        num_hidden_layers=setting("block_count"),
        num_attention_heads=n_heads,
        num_key_value_heads=heads["attn_k"],
        head_dim=setting("attention.key_length", hidden_size // n_heads),
        max_position_embeddings=setting("context_length"),
        rms_norm_eps=setting("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": setting("rope.freq_base", 10000.0)},
        tie_word_embeddings="output.weight" not in tensors,
        attn_implementation="sdpa",
        use_cache=False,
    )
    torch.set_default_dtype(dtype)  # so that a float32 copy of the model never exists
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameter = parameters.pop(hugging_face_name(name))
            for rows, values in unpacked(tensor, row_order(name, len(parameter), heads)):
                parameter[rows] = torch.from_numpy(values).to(dtype)
    if parameters:
        raise ValueError(f"the GGUF has no weights for {', '.join(parameters)}")
    return model


class Trainer:
    """The model with everything that is trained, and its optimizer step."""

    def __init__(self, job: Reply) -> None:
        self.dtype, self.device = (
            DTYPES[job["dtype"]],
            torch.device(_PLACES.get(job["device"], job["device"])),
        )
        self.base = load(job["model"], self.dtype).to(self.device)
        config = LoraConfig(r=job["rank"], lora_alpha=2 * job["rank"], target_modules=list(job["targets"]))
        self.adapted = get_peft_model(self.base, config, autocast_adapter_dtype=False)
        mask_row = torch.zeros(self.base.config.hidden_size, dtype=self.dtype, device=self.device)
        self.mask_row = torch.nn.Parameter(mask_row)
        self.time_projection: Any = None  # made when the first step tells how many features the time has
        self.optimizer: Any = None
        reset_peak_memory()  # of the steps alone: unpacking is no part of training

    def prepare(self, n_features: int, learning_rate: float) -> None:
        """Make what the first step needs."""
        size = self.base.config.hidden_size
        projection = torch.nn.Linear(n_features, size, dtype=self.dtype, device=self.device)
        torch.nn.init.zeros_(projection.weight)
        torch.nn.init.zeros_(projection.bias)
        self.time_projection = projection
        lora = [parameter for parameter in self.adapted.parameters() if parameter.requires_grad]
        groups = [
            {"params": [*lora, projection.weight], "weight_decay": WEIGHT_DECAY},
            {"params": [projection.bias, self.mask_row], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, fused=True)

    def step(self, noise: str) -> Reply:
        """One optimizer step on the inputs in a file."""
        with np.load(noise) as arrays:
            on_host = {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}
        inputs = {name: array.to(self.device) if array.dim() else array for name, array in on_host.items()}
        if self.optimizer is None:
            self.prepare(inputs["time_features"].shape[1], float(inputs["learning_rate"]))
        started_s = time.perf_counter()
        loss = self.loss(inputs)
        loss.backward()
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        value = loss.item()  # waits for the device's work up to the loss; the rest is waited for below
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        time_s = time.perf_counter() - started_s
        return {"time_s": time_s, "n_tokens": inputs["noisy"].numel(), "loss": value}

    def loss(self, inputs: dict[str, Any]) -> Any:
        """Weighted cross-entropy; the head is computed on predicted rows only."""
        tokens, mask_token_id = inputs["noisy"].long(), int(inputs["mask_token_id"])
        n_sequences, n_tokens = tokens.shape
        embeddings = self.base.model.embed_tokens(tokens)
        embeddings = embeddings + (tokens == mask_token_id).unsqueeze(-1) * self.mask_row
        embeddings = embeddings + self.time_projection(inputs["time_features"].to(self.dtype)).unsqueeze(1)
        log_weight = math.log(1.0 - float(inputs["causal_ratio"]))
        future = torch.full((n_tokens, n_tokens), log_weight, device=self.device)
        mask = torch.triu(future, 1).to(self.dtype).expand(n_sequences, 1, n_tokens, n_tokens)
        hidden = self.base.model(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state
        used = inputs["weights"] != 0
        logits = self.base.lm_head(hidden[used])
        logits[:, mask_token_id] = -math.inf
        losses = torch.nn.functional.cross_entropy(
            logits.float(), inputs["targets"].long()[used], reduction="none"
        )
        return (losses * inputs["weights"][used]).sum()


def products(shapes: list[tuple[int, int]], n_rows: int, dtype: str) -> Reply:
    """Y = X W^T and dX = dY W for weights of shapes (out, in), unpacked: seconds in each direction."""
    forward_s = backward_s = 0.0
    for out_size, in_size in shapes:
        w = torch.randn(out_size, in_size, dtype=DTYPES[dtype])
        x = torch.randn(n_rows, in_size, dtype=DTYPES[dtype])
        started_s = time.perf_counter()
        y = torch.matmul(x, w.T)
        done_s = time.perf_counter()
        torch.matmul(y, w)
        forward_s += done_s - started_s
        backward_s += time.perf_counter() - done_s
    return {"forward_s": forward_s, "backward_s": backward_s}


def start(job: Reply) -> dict[str, Action]:
    """The actions of a job by name."""
    torch.set_num_threads(job["n_threads"])
    torch.manual_seed(0)
    trainer = None if job["model"] is None else Trainer(job)

    def describe() -> Reply:
        versions = {name: version(name) for name in ("torch", "transformers", "peft")}
        return {
            "versions": versions,
            "n_threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        }

    def step(noise: str) -> Reply:
        assert trainer is not None
        return trainer.step(noise)

    def memory() -> Reply:
        return {"peak_bytes": peak_memory_bytes(), "model_bytes": None}

    return {"describe": describe, "step": step, "products": products, "memory": memory}


if __name__ == "__main__":
    serve(start)
