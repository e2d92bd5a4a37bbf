"""The page of plots of an evaluation, and the folder that it is saved in.

Six panels: likelihood; masked cross-entropy and accuracy against t; future-context gain; infilling; written
text. Bars and marks carry 95% intervals; an arm has the same colour everywhere.

Needs matplotlib, which comes with the extra "plots"; without it the page is left out, with a sentence.
Deliberately not here: the figures (results.py).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ggml_diffusion.errors import UserError
from ggml_diffusion.evaluation.estimates import Estimate
from ggml_diffusion.evaluation.results import Evaluation

EVALUATION, PAGE = "evaluation.json", "evaluation.png"

CONVERTED, STEP_0, BASE, CONTROL, OTHER = "#1d5fa6", "#9aa0a6", "#d9822b", "#3b9a6d", "#7d5ba6"
ARM_STYLES: dict[str, tuple[str, str, str]] = {
    "converted": ("converted", CONVERTED, "-"),
    "converted_causal": ("converted, causal ratio 1", CONVERTED, "--"),
    "control": ("causal control", CONTROL, "--"),
    "step_0": ("step 0", STEP_0, "-"),
    "step_0_causal": ("step 0, causal ratio 1", STEP_0, "--"),
    "base": ("AR base, clean left side", BASE, "-"),
}
INFILL_STYLES = {
    "converted": ("converted, both sides", CONVERTED),
    "reranked": ("AR base, best of n by suffix", OTHER),
    "left_only": ("AR base, left side only", BASE),
}
GAIN_STYLES = {
    "a": ("(a) causal ratio", "#1d5fa6"),
    "b": ("(b) right masked", "#6fa3d8"),
    "c": ("(c) control", CONTROL),
}
_LOOK: dict[Any, Any] = {
    "font.size": 8.5,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "legend.fontsize": 7.5,
}


def save_evaluation(evaluation: Evaluation, folder: Path, note: Callable[[str], None]) -> list[Path]:
    """Write evaluation.json and, with matplotlib, evaluation.png; returns what was written.

    Args:
        evaluation: all figures.
        folder: made if it is missing.
        note: told why there is no page, if there is none.

    Raises:
        UserError: it could not be written.

    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be used as output folder: {error.strerror}") from None
    evaluation.save(folder / EVALUATION)
    written = [folder / EVALUATION]
    try:
        draw_page(evaluation, folder / PAGE)
    except ImportError:
        note("the page of plots is left out: it needs matplotlib (pip install 'ggml-diffusion[plots]')")
        return written
    except OSError as error:
        raise UserError(f"{folder / PAGE}: could not be written: {error.strerror}") from None
    return [*written, folder / PAGE]


def draw_page(evaluation: Evaluation, path: Path) -> Any:
    """Draw the page into a .png, .pdf or .svg file; returns it as a matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file could not be written.

    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_LOOK):
        figure = Figure(figsize=(13, 8))
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(
            2, 3, left=0.105, right=0.985, top=0.875, bottom=0.085, wspace=0.3, hspace=0.36
        )
        _likelihood_panel(figure.add_subplot(grid[0, 0]), evaluation)
        _masked_panel(figure.add_subplot(grid[0, 1]), evaluation, "cross_entropy")
        _masked_panel(figure.add_subplot(grid[0, 2]), evaluation, "accuracy")
        _gain_panel(figure.add_subplot(grid[1, 0]), evaluation)
        if evaluation.infilling:
            _infilling_panels(_stacked(figure, grid[1, 1]), evaluation)
        if evaluation.texts:
            _writing_panels(_stacked(figure, grid[1, 2]), evaluation)
        _frame(figure, evaluation)
        figure.savefig(path, dpi=150)  # inside of the context: part of the look counts when it is drawn
    return figure


def _stacked(figure: Any, place: Any) -> list[Any]:
    """Two panels with one axis below the other in one place of the grid."""
    inner = place.subgridspec(2, 1, hspace=0.18)
    upper = figure.add_subplot(inner[0])
    lower = figure.add_subplot(inner[1], sharex=upper)
    upper.tick_params(labelbottom=False)
    return [upper, lower]


def _frame(figure: Any, evaluation: Evaluation) -> None:
    about = evaluation.about
    conversion, settings = about["conversion"], about["settings"]
    figure.text(
        0.015, 0.955, f"Conversion of {about['base']} to masked diffusion", fontsize=15, fontweight="bold"
    )
    figure.text(
        0.015,
        0.925,
        f"{conversion['conversion_steps']:,} steps, {conversion['training_tokens']:,} training tokens, "
        f"{conversion['prediction']} prediction; measured on {about['n_sequences']} held-out sequences of "
        f"{about['sequence_length']} tokens, {settings['seeds']} mask seeds",
        fontsize=9.5,
        color="#555555",
    )
    check = evaluation.base_check
    figure.text(
        0.015,
        0.018,
        f"95% bootstrap intervals by sequence. With the adapter off the base is "
        f"{'unchanged, bit for bit' if check.unchanged else 'CHANGED'} (sha256 {check.sha256[:12]}). "
        f"Data sha256 {about['data_sha256'][:12]}.",
        fontsize=7.5,
        color="#555555" if check.unchanged else "#c00000",
    )


def _errors(estimates: list[Estimate]) -> Any:
    """Lengths of the error bars (2, n) of estimates; none where there is no interval."""
    below = [one.value - one.low for one in estimates]
    above = [one.high - one.value for one in estimates]
    return np.nan_to_num(np.maximum([below, above], 0.0))


def _likelihood_panel(axes: Any, evaluation: Evaluation) -> None:
    figures = evaluation.likelihoods
    rows = [
        ("AR base,\nexact", figures["base"].nats_per_token, BASE),
        ("converted,\nNELBO", figures["converted"].nats_per_token, CONVERTED),
        ("unigram", figures["unigram"].nats_per_token, "#c4c8cc"),
        ("step 0,\nNELBO", figures["step_0"].nats_per_token, STEP_0),
    ]
    n = figures["base"].nats_per_token.n
    flat = evaluation.ln_vocabulary
    rows.append(("ln V", Estimate(flat, flat, flat, 0.0, n), "#e0e2e5"))
    rows.sort(key=lambda row: -row[1].value)
    estimates = [row[1] for row in rows]
    axes.barh(
        [row[0] for row in rows],
        [one.value for one in estimates],
        xerr=_errors(estimates),
        color=[row[2] for row in rows],
        error_kw={"elinewidth": 1.0, "capsize": 2.5, "ecolor": "#333333"},
        height=0.62,
    )
    for place, one in enumerate(estimates):
        end = one.value if np.isnan(one.high) else one.high
        axes.text(end, place, f"  {one.value:.2f}", va="center")
    axes.set_xlim(0, max(one.value for one in estimates) * 1.2)
    axes.grid(axis="y", visible=False)
    axes.set_title("Likelihood: nats a token, lower is better")


def _masked_panel(axes: Any, evaluation: Evaluation, figure_name: str) -> None:
    shares = np.array([one.share for one in evaluation.masked])
    drawn = [name for name in ARM_STYLES if name in evaluation.masked[0].arms]
    for place, name in enumerate(drawn):
        label, color, line = ARM_STYLES[name]
        estimates = [getattr(one.arms[name], figure_name) for one in evaluation.masked]
        axes.errorbar(
            shares + 0.006 * (place - len(drawn) / 2),  # apart, so that no interval hides another
            [one.value for one in estimates],
            yerr=_errors(estimates),
            color=color,
            linestyle=line,
            marker="o",
            markersize=3.5,
            capsize=2.0,
            linewidth=1.6,
            elinewidth=1.0,
            label=label,
        )
    axes.set_xticks(shares, [f"{share:g}" for share in shares])
    axes.set_xlabel("t, share of tokens that is masked")
    axes.set_ylim(bottom=0)
    if figure_name == "cross_entropy":
        axes.set_title("Masked tokens: cross-entropy, nats")
        axes.set_ylim(top=axes.get_ylim()[1] * 1.28)
        axes.legend(loc="upper left", ncols=2, columnspacing=1.0, handlelength=2.4)
    else:
        axes.set_title("Masked tokens: accuracy")


def _grouped_bars(axes: Any, groups: list[str], series: list[tuple[str, str, list[Estimate]]]) -> None:
    """Bars of several series side by side, group by group."""
    width = 0.8 / len(series)
    for place, (label, color, estimates) in enumerate(series):
        axes.bar(
            np.arange(len(groups)) + (place - (len(series) - 1) / 2) * width,
            [one.value for one in estimates],
            width=width * 0.92,
            yerr=_errors(estimates),
            color=color,
            label=label,
            error_kw={"elinewidth": 1.0, "capsize": 2.0, "ecolor": "#333333"},
        )
    axes.set_xticks(range(len(groups)), groups)
    axes.grid(axis="x", visible=False)
    axes.tick_params(axis="x", length=0)


def _gain_panel(axes: Any, evaluation: Evaluation) -> None:
    forms = [form for form in GAIN_STYLES if form in evaluation.masked[0].gain]
    series = [(*GAIN_STYLES[form], [one.gain[form] for one in evaluation.masked]) for form in forms]
    _grouped_bars(axes, [f"t = {one.share:g}" for one in evaluation.masked], series)
    axes.axhline(0.0, color="#333333", linewidth=0.8)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.22 * (high - low))
    axes.legend(loc="upper left", ncols=len(forms), columnspacing=0.9, handlelength=1.0)
    axes.set_title("Future-context gain, nats")


def _infilling_panels(panels: list[Any], evaluation: Evaluation) -> None:
    groups = [f"{one.span_length} token{'s' if one.span_length > 1 else ''}" for one in evaluation.infilling]
    for axes, figure_name in zip(panels, ("exact_match", "token_accuracy"), strict=True):
        series = [
            (label, color, [getattr(one.arms[name], figure_name) for one in evaluation.infilling])
            for name, (label, color) in INFILL_STYLES.items()
        ]
        _grouped_bars(axes, groups, series)
        highest = max(one.value if np.isnan(one.high) else one.high for _, _, each in series for one in each)
        axes.set_ylim(0, max(0.1, 1.08 * highest))
    panels[0].set_title("Infilling of spans cut out")
    panels[0].set_ylabel("exact match")
    panels[1].set_ylabel("tokens right")
    panels[0].legend(loc="upper right", handlelength=1.2)


def _writing_panels(panels: list[Any], evaluation: Evaluation) -> None:
    denoised = [text for text in evaluation.texts if text.steps is not None]
    steps = [text.steps for text in denoised]
    for axes, figure_name in zip(panels, ("perplexity", "entropy"), strict=True):
        estimates = [getattr(text.fluency, figure_name) for text in denoised]
        axes.errorbar(
            steps,
            [one.value for one in estimates],
            yerr=_errors(estimates),
            color=CONVERTED,
            marker="o",
            markersize=3.5,
            capsize=2.0,
            linewidth=1.6,
            elinewidth=1.0,
            label="converted",
        )
        for origin, color, label in (
            ("base", BASE, "AR base, sampled"),
            ("held-out text", "#333333", "held-out text"),
        ):
            for text in evaluation.texts:
                if text.origin == origin:
                    value = getattr(text.fluency, figure_name).value
                    axes.axhline(value, color=color, linestyle=":", linewidth=1.6, label=label)
        axes.set_xscale("log", base=2)
    panels[0].set_yscale("log")
    low, high = panels[0].get_ylim()
    panels[0].set_ylim(low, high * (high / low) ** 0.7)  # room for the legend
    panels[0].set_title("Written text, by denoising steps")
    panels[0].set_ylabel("perplexity\nunder the base")
    panels[0].legend(loc="upper right", ncols=3, columnspacing=0.8, handlelength=1.4, borderaxespad=0.1)
    panels[1].set_ylabel("entropy, nats")
    panels[1].set_xticks(steps, [str(one) for one in steps])
    panels[1].minorticks_off()
    panels[1].set_xlabel("steps")
