"""`estimate`: what a conversion would need of memory, disk and time."""

from rich.console import Console

from ggml_diffusion.app.cli import options


def estimate(
    model: options.Model = None,
    config: options.ConfigFile = None,
    data: options.Data = None,
    include: options.Include = None,
    strict: options.Strict = None,
    output: options.Output = None,
    preset: options.Preset = None,
    steps: options.Steps = None,
    batch_size: options.BatchSize = None,
    gradient_accumulation: options.Accumulation = None,
    sequence_length: options.SequenceLength = None,
    learning_rate: options.LearningRate = None,
    rank: options.Rank = None,
    alpha: options.Alpha = None,
    target_modules: options.TargetModules = None,
    start_from: options.StartFrom = None,
    prediction: options.Prediction = None,
    context: options.ContextKind = None,
    attention_sink: options.AttentionSink = None,
    holes: options.Holes = None,
    mask_token_id: options.MaskTokenId = None,
    seed: options.Seed = None,
    checkpoint_every: options.CheckpointEvery = None,
    device: options.RunDevice = None,
    threads: options.Threads = None,
    memory_mib: options.MemoryMib = None,
) -> None:
    """Say what a conversion would need of memory, disk and time, and what would need less.

    Takes the flags of `convert`, reads the model's header and the text, and times two steps. Writes nothing.
    """
    settings = options.config_from(locals())
    from ggml_diffusion.app.display import TrainingDisplay
    from ggml_diffusion.training.estimate import estimate_run

    estimate_run(settings, TrainingDisplay(Console()))
