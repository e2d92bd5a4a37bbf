"""Training steps on a device beside the same steps on the processor, and beside PyTorch on that device.

The core's own arm comes first, so that every ratio is to it. It neither prints nor judges.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from bench_sections import ALL_TARGETS, Settings, Work, compare_steps, model_of, our_arm, peer_arm

WORKS = (
    Work("q,k,v,o 8x256", 8, 256),
    Work("all seven 8x256", 8, 256, targets=ALL_TARGETS),
    Work("all seven 8x256, no int8", 8, 256, targets=ALL_TARGETS, int8=False),
    Work("all seven 32x512", 32, 512, targets=ALL_TARGETS),
)


def device_steps(settings: Settings) -> list[dict[str, Any]]:
    """Steps of all works on the processor, the device and, where there is a peer, in PyTorch on it."""
    assert settings.device is not None
    rows = []
    for work in WORKS:
        if settings.work not in work.name:
            continue
        model = model_of(settings, work)
        with ExitStack() as stack:
            core = our_arm(settings, "ggml-diffusion, cpu", model, work)
            name = f"ggml-diffusion, {settings.device}"
            arms = [
                stack.enter_context(core),
                stack.enter_context(our_arm(settings, name, model, work, device=settings.device)),
            ]
            if settings.peer_python:
                peer = peer_arm(settings, model, work.targets, settings.peer_dtype, device=settings.device)
                arms.append(stack.enter_context(peer))
            rows.append({"work": work.name, "model": model.name, "arms": compare_steps(settings, arms)})
    return rows
