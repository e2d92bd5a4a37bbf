"""`export`: write a conversion in the form that another program takes; a command for each form."""

import os
from contextlib import closing
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

from ggml_diffusion.app.cli.options import Adapter, Base, Threads, note_on_stderr
from ggml_diffusion.errors import UserError, escaped, quoted
from ggml_diffusion.formats.adapter_file import DiffusionCheckpoint
from ggml_diffusion.formats.model_check import read_model
from ggml_diffusion.formats.model_file import file_sha256

_MUCH_KL = 2e-2  # nats; what llama.cpp itself loses on a quantised model is a few thousandths
export = typer.Typer()


@export.command("adapter", epilog="Example: ggml-diffusion export adapter run my-adapter.gguf")
def export_adapter(
    source: Annotated[
        Path, typer.Argument(help="An output folder, adapter.safetensors or adapter.gguf.", metavar="SOURCE")
    ],
    target: Annotated[
        Path, typer.Argument(help="File to write; .safetensors or .gguf says which it is.", metavar="TARGET")
    ],
    base: Annotated[
        Path | None,
        typer.Option(help="The base GGUF, for a .gguf target; left out, where it was for the conversion."),
    ] = None,
) -> None:
    """Write a conversion as another adapter file.

    An output folder of an unfinished run gives its last checkpoint. A card says beside it what it is.
    """
    if target.suffix not in (".safetensors", ".gguf"):
        raise UserError(f"{target}: the name must end in .safetensors or .gguf")
    checkpoint = _conversion_in(source)
    if target.suffix == ".safetensors":
        checkpoint.save(target)
    else:
        base_path = Path(checkpoint.settings.base_model or "") if base is None else base
        if base is None and not os.path.isfile(base_path):
            name = quoted(checkpoint.metadata.base_model)
            raise UserError(f"where is the base model {name}? give it by --base")
        if target.exists() and target.samefile(base_path):
            raise UserError(f"{target}: is the base model: give the adapter another name")
        checkpoint.check_base(file_sha256(base_path))
        checkpoint.save_gguf(target, read_model(base_path))
    _say(f"written: {target}")
    from ggml_diffusion.training.model_card import write_adapter_card

    if card := write_adapter_card(target, checkpoint):
        _say(f"written: {card}")


@export.command(
    "standalone", epilog="Example: ggml-diffusion export standalone model.gguf run run/standalone.gguf"
)
def export_standalone(
    base: Base,
    adapter: Adapter,
    target: Annotated[Path, typer.Argument(help="GGUF file to write.", metavar="OUT.gguf")],
    arch: Annotated[
        Literal["diffusion", "same"],
        typer.Option(
            help="diffusion = as llada, dream or rnd1, which llama-diffusion-cli runs; same = the base's "
            "own, for programs that use llama.cpp as a library. Default: diffusion."
        ),
    ] = "diffusion",
    type: Annotated[
        str | None,
        typer.Option(
            help="Type of all matrices, as f16; own = each keeps its own. Default: those that change get "
            "q8_0 where they had fewer bits, the others keep theirs."
        ),
    ] = None,
    time: Annotated[
        float | None,
        typer.Option(
            help="Diffusion time, 0 to 1, whose embedding is folded in. Default: where half is masked."
        ),
    ] = None,
    threads: Threads = None,
) -> None:
    """Write a model file without adapter: LoRA deltas, mask and time embedding merged into the weights.

    What that costs is measured in llama.cpp, beside base and adapter, on a built-in text.
    """
    if target.suffix != ".gguf":
        raise UserError(f"{target}: the name must end in .gguf")
    checkpoint, file = _conversion_in(adapter), read_model(base)
    from ggml_diffusion.engine.open import open_engine
    from ggml_diffusion.export.comparison import Reference
    from ggml_diffusion.export.llama_runtime import bidirectional_logits
    from ggml_diffusion.export.standalone import plan_standalone, write_standalone
    from ggml_diffusion.export.standalone_card import write_standalone_card
    from ggml_diffusion.text.tokenizer import Tokenizer
    from ggml_diffusion.units import in_bytes

    plan = plan_standalone(file, checkpoint, arch=arch, type_name=type, time=time)
    with closing(open_engine(file, threads, compute="f32")) as engine:
        checkpoint.check_base(engine.sha256)
        write_standalone(target, file, checkpoint, plan, engine.n_threads)
        folded = "" if plan.time is None else f", time {plan.time:.3g} folded in"
        _say(f"written: {target} ({plan.arch}, {in_bytes(os.path.getsize(target))}{folded})")
        reference = Reference(engine, Tokenizer.from_file(file), checkpoint, plan.time)
        logits = bidirectional_logits(
            target,
            reference.tokens,
            attention_sink=checkpoint.metadata.attention_sink,
            n_threads=engine.n_threads,
        )
        found = reference.agreement(logits)
    _say(
        f"KL from base + adapter: {found.mean_kl:.1e} nats in llama.cpp, mean over {found.n_tokens} tokens "
        f"of which a third is masked; the likeliest token is the same at {found.top1:.0%}"
    )
    card = write_standalone_card(target, checkpoint, plan, found)
    _say(f"written: {card}" if card else f"{target.with_suffix('.md')} is not a card of ours and stays")
    if found.mean_kl > _MUCH_KL:
        _say("that is much: without --type, what merging changes is kept in 8 bits; f16 keeps it all")


@export.command("peft", epilog="Example: ggml-diffusion export peft model.gguf run run/peft")
def export_peft(
    base: Base,
    adapter: Adapter,
    target: Annotated[Path, typer.Argument(help="Folder to write; it is made.", metavar="OUT")],
) -> None:
    """Write a PEFT folder for transformers: LoRA pairs, mask and time embeddings, a program to denoise."""
    checkpoint, file = _conversion_in(adapter), read_model(base)
    from ggml_diffusion.export.peft import export_peft as write_folder

    checkpoint.check_base(file_sha256(base))
    write_folder(target, checkpoint, file)
    _say(f"written: {target} (its README.md says how to use it)")


def _conversion_in(source: Path) -> DiffusionCheckpoint:
    from ggml_diffusion.training.run import exported_weights

    return DiffusionCheckpoint.load(exported_weights(source, note_on_stderr))


def _say(text: str) -> None:
    Console().print(Text(escaped(text)), soft_wrap=True)
