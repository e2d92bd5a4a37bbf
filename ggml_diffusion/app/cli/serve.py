"""`serve`: answer requests of editors and programs on this machine."""

import importlib.util
from typing import Annotated

import typer

from ggml_diffusion.app.cli.open_model import GpuLayers, Runtime, open_model
from ggml_diffusion.app.cli.options import (
    Adapter,
    AllowOtherBase,
    Base,
    Device,
    Threads,
    note_on_stderr,
)
from ggml_diffusion.errors import UserError


def serve(
    base: Base,
    adapter: Adapter,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than this machine's own need an --api-key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 = any that is free.")] = 8012,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="GGML_DIFFUSION_API_KEY", help="A key that every request must bring."),
    ] = None,
    max_waiting: Annotated[
        int, typer.Option(min=1, max=10_000, help="Requests that may wait; one is answered at a time.")
    ] = 64,
    runtime: Runtime = "engine",
    gpu_layers: GpuLayers = 0,
    device: Device = "cpu",
    threads: Threads = None,
    allow_other_base: AllowOtherBase = False,
) -> None:
    """Answer completions, chats and infilling over HTTP, with a page to fill holes at /.

    For clients of OpenAI's API and for llama.vim and llama.vscode; docs/server.md has their set-up.
    """
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} missing: pip install 'ggml-diffusion[server]'")
    from ggml_diffusion.app.server.serving import hosts_for, open_socket
    from ggml_diffusion.app.server.serving import serve as serve_model

    if api_key is not None and not api_key.strip():
        raise UserError("--api-key is empty: give one, or leave it out")
    if hosts_for(host) is not None or api_key is not None:
        listening = open_socket(host, port)
    else:
        raise UserError(f"--host {host} is open to other machines: give an --api-key too")
    with listening:
        model = open_model(
            base,
            adapter,
            threads,
            runtime=runtime,
            gpu_layers=gpu_layers,
            device=device,
            allow_other_base=allow_other_base,
        )
        name = adapter.resolve().name if adapter.is_dir() else adapter.stem
        shown = f"[{host}]" if ":" in host else host
        note_on_stderr(f"http://{shown}:{listening.getsockname()[1]} answers; Ctrl-C ends it")
        serve_model(model, name, listening, host, api_key, max_waiting)
