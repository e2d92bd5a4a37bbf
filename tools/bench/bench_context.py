"""Filling and writing over text that stands, beside whole passes with the same adapter.

A section of tools/bench/bench.py. A hole lies in the middle of a text, and a token of it is written a step;
text is written as `generate` does unless told otherwise. The adapter has the rank of the other sections, on
all seven projections, and was not trained: what it writes is not looked at. It neither prints nor judges.
"""

from __future__ import annotations

from bench_sections import ALL_TARGETS, Row, Settings, Work, our_arm, spread

HOLE_TOKENS, TEXT_TOKENS = 8, 1024
PROMPT_TOKENS, WRITTEN_TOKENS = 64, 64
CONTEXTS = ("frozen", "adapted")


def context(settings: Settings) -> Row:
    """Seconds of a hole's first and other steps, and tokens a second of writing, by kind of context."""
    holes: dict[str, list[dict[str, float]]] = {kind: [] for kind in CONTEXTS}
    speeds: dict[str, list[float]] = {kind: [] for kind in CONTEXTS}
    work = Work("all seven", 1, 8, targets=ALL_TARGETS)
    with our_arm(settings, "ggml-diffusion", settings.model, work) as arm:
        for round_number in range(settings.n_rounds + 1):
            for kind in CONTEXTS:
                hole = arm.ask("fill_hole", n_tokens=TEXT_TOKENS, n_hole=HOLE_TOKENS, context=kind)
                time_s = arm.ask("write", n_prompt=PROMPT_TOKENS, n_written=WRITTEN_TOKENS, context=kind)
                if round_number > 0:
                    holes[kind].append(hole)
                    speeds[kind].append(WRITTEN_TOKENS / time_s["time_s"])
        kernels = arm.about["kernels"]
    return {
        "kernels": kernels,
        "text_tokens": TEXT_TOKENS,
        "hole_tokens": HOLE_TOKENS,
        "prompt_tokens": PROMPT_TOKENS,
        "written_tokens": WRITTEN_TOKENS,
        "arms": [
            {
                "context": kind,
                "first_step_s": spread(one["first_s"] for one in holes[kind]),
                "step_s": spread(one["step_s"] for one in holes[kind]),
                "tokens_per_s": spread(speeds[kind]),
            }
            for kind in CONTEXTS
        ],
        "ratio": {
            "step": spread(
                whole["step_s"] / own["step_s"]
                for own, whole in zip(holes["frozen"], holes["adapted"], strict=True)
            ),
            "writing": spread(
                own / whole for own, whole in zip(speeds["frozen"], speeds["adapted"], strict=True)
            ),
        },
    }
