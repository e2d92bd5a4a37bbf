"""`generate`: write text by denoising."""

import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from ggml_diffusion.app.cli.open_model import GpuLayers, Runtime, open_model
from ggml_diffusion.app.cli.options import (
    Adapter,
    AllowOtherBase,
    Base,
    Device,
    Threads,
    field_option,
    from_flags,
    note_on_stderr,
)
from ggml_diffusion.errors import UserError
from ggml_diffusion.generation.denoise import GenerationConfig

if TYPE_CHECKING:
    from ggml_diffusion.generation.diffusion_model import DiffusionModel


def generate(
    base: Base,
    adapter: Adapter,
    prompt: Annotated[str, typer.Option(help="Text that comes before; may be empty.")] = "",
    suffix: Annotated[str, typer.Option(help="Text that comes after: fills the hole between the two.")] = "",
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Put the prompt into the model's chat template, as a message to be answered; for "
            "conversions that were trained on messages.",
        ),
    ] = False,
    steps: Annotated[int | None, field_option(GenerationConfig, "steps")] = None,
    order: Annotated[str | None, field_option(GenerationConfig, "order")] = None,
    temperature: Annotated[float | None, field_option(GenerationConfig, "temperature")] = None,
    top_k: Annotated[int | None, field_option(GenerationConfig, "top_k")] = None,
    top_p: Annotated[float | None, field_option(GenerationConfig, "top_p")] = None,
    length: Annotated[int | None, field_option(GenerationConfig, "length")] = None,
    seed: Annotated[int | None, field_option(GenerationConfig, "seed")] = None,
    threshold: Annotated[float | None, field_option(GenerationConfig, "threshold")] = None,
    block_length: Annotated[int | None, field_option(GenerationConfig, "block_length")] = None,
    remasking: Annotated[float | None, field_option(GenerationConfig, "remasking")] = None,
    approximate_cache: Annotated[bool | None, field_option(GenerationConfig, "approximate_cache")] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Draft, and keep what the base itself would have written: its text with this seed, sooner; "
            "for conversions with a frozen context.",
        ),
    ] = False,
    runtime: Runtime = "engine",
    gpu_layers: GpuLayers = 0,
    device: Device = "cpu",
    threads: Threads = None,
    allow_other_base: AllowOtherBase = False,
) -> None:
    """Write text by denoising.

    On a terminal it appears out of the masks; elsewhere only its end is printed.
    """
    settings = {
        "steps": steps,
        "order": order,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "length": length,
        "seed": seed,
        "threshold": threshold,
        "block_length": block_length,
        "remasking": remasking,
        "approximate_cache": approximate_cache,
    }
    config = from_flags(GenerationConfig, settings)
    model = open_model(
        base,
        adapter,
        threads,
        runtime=runtime,
        gpu_layers=gpu_layers,
        device=device,
        allow_other_base=allow_other_base,
    )
    if verify:
        if suffix or steps is not None or order is not None or remasking is not None:
            raise UserError(
                "--verify writes from the left: leave out --suffix, --steps, --order and --remasking"
            )
        show_verified(Console(), model, prompt, config, chat=chat)
        return
    show_generation(Console(), model, prompt, suffix, config, chat=chat)


def show_verified(
    console: Console, model: "DiffusionModel", prompt: str, config: GenerationConfig, *, chat: bool
) -> None:
    """Write a text that the base agrees with, and say on standard error what its drafts were worth."""
    from ggml_diffusion.app.display import printable

    started_s = time.perf_counter()
    text, written = model.write_verified(prompt, config, chat=chat)
    time_s, n_tokens = time.perf_counter() - started_s, len(written.tokens)
    before = f"{prompt}\n" if chat else prompt
    if console.is_terminal:
        console.print(Text.assemble(before, (printable(text), "bold")), soft_wrap=True)
    else:
        console.file.write(f"{before}{text}\n")
        console.file.flush()
    note_on_stderr(
        f"{n_tokens} tokens, {n_tokens / time_s:.1f} tokens/s: {written.rounds} drafts, "
        f"{written.accepted} of {written.drafted} tokens accepted, {written.tokens_a_round:.2f} tokens a "
        f"draft; {written.singles} tokens one by one"
    )


def show_generation(
    console: Console,
    model: "DiffusionModel",
    prompt: str,
    suffix: str,
    config: GenerationConfig,
    *,
    chat: bool = False,
) -> None:
    """Write a text and show it: on a terminal as it appears, elsewhere its end."""
    from ggml_diffusion.app.display import DenoisingDisplay, printable

    before = f"{prompt}\n" if chat else prompt
    if not console.is_terminal:  # the text and nothing else: no tab becomes blanks
        written = model.generate(prompt, config, suffix=suffix, chat=chat)
        console.file.write(f"{before}{written}{suffix}\n")
        console.file.flush()
        return
    with DenoisingDisplay(console, model.tokenizer, model.mask_token_id) as display:
        written = model.generate(prompt, config, display.step, suffix=suffix, chat=chat)
    console.print(Text.assemble(before, (printable(written), "bold"), suffix), soft_wrap=True)
