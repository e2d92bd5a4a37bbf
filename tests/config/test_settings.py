"""Settings: the seed's file, refusals that name the key, presets, the way back to TOML, short runs."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
from pydantic import ValidationError

from ggml_diffusion.config.fit import scaled_to_run
from ggml_diffusion.config.groups import MaskAnnealingConfig, QLoraConversionConfig, TimeEmbeddingConfig
from ggml_diffusion.config.presets import PRESETS
from ggml_diffusion.config.settings import SECTIONS, SETTINGS, ConversionTrainingConfig
from ggml_diffusion.config.toml import load_config, to_toml
from ggml_diffusion.errors import UserError
from ggml_diffusion.formats.lora import TargetModule
from ggml_diffusion.objective.annealing import AnnealingSchedule, AttentionMaskAnnealer

EXAMPLES = Path(__file__).parents[2] / "examples"

# A value of each setting that is allowed and is not its default.
OTHER_VALUES = {
    "model.base_model": 'a "quoted" name\\with\ttab\x7f é.gguf',
    "model.qlora_rank": 8,
    "model.qlora_alpha": 16.5,
    "model.target_modules": ["down_proj", "q_proj"],
    "model.quantization_bits": 8,
    "model.prediction": "aligned",
    "model.mask_token_id": 7,
    "model.train_mask_embedding": False,
    "model.start_from": "a/folder",
    "training.data": ["a.txt", "b"],
    "training.include": ["*.py"],
    "training.strict": True,
    "training.output": "out",
    "training.batch_size": 2,
    "training.gradient_accumulation": 1,
    "training.sequence_length": 64,
    "training.learning_rate": 3e-5,
    "training.lora_b_rate_factor": 8.0,
    "training.embedding_rate_factor": 4.0,
    "training.lr_schedule": "constant",
    "training.warmup_steps": 0,
    "training.total_steps": 20,
    "training.weight_decay": 0.0,
    "training.max_grad_norm": 0.5,
    "training.loss_weighting": "nelbo",
    "training.nelbo_clip": 5.0,
    "training.ar_loss_share": 0.25,
    "training.distillation_weight": 0.5,
    "training.held_out_fraction": 0.125,
    "training.checkpoint_every": 0,
    "training.seed": 2**63 - 1,
    "mask_annealing.total_steps": 0,
    "mask_annealing.schedule": "exponential",
    "mask_annealing.initial_causal_ratio": 0.75,
    "mask_annealing.final_causal_ratio": 0.25,
    "mask_annealing.mask": "bernoulli",
    "mask_annealing.decay": 2.0,
    "mask_annealing.steps": [[0, 0.9], [100, 0.5]],
    "noise_schedule.type": "geometric",
    "noise_schedule.num_timesteps": 0,
    "noise_schedule.min_time": 0.05,
    "noise_schedule.masking": "exact",
    "noise_schedule.complementary": True,
    "model.context": "frozen",
    "model.margin": 3,
    "model.attention_sink": True,
    "training.norm_damping": 2.5,
    "holes.share": 0.5,
    "holes.longest": 8,
    "holes.most": 2,
    "holes.draws": 3,
    "block_diffusion.enabled": True,
    "block_diffusion.initial_size": 8,
    "block_diffusion.final_size": 32,
    "block_diffusion.growth_share": 0.25,
    "time_embedding.enabled": False,
    "time_embedding.dim": 64,
    "time_embedding.max_timesteps": 100,
    "time_embedding.dropout": 0.1,
    "time_embedding.rate_factor": 0.5,
    "hardware.device": "cuda",
    "hardware.num_threads": 3,
    "hardware.use_simd": False,
    "hardware.int8": False,
    "hardware.memory_mib": 512,
    "hardware.compute": "f32",
}


def file_with(folder: Path, text: str) -> Path:
    path = folder / "conversion_config.toml"
    path.write_text(text, encoding="utf-8")
    return path


def with_companions(name: str, value: object) -> dict[str, object]:
    """The overrides that set one setting; two of them need another."""
    companions = {"mask_annealing.steps": {"mask_annealing.schedule": "stepwise"}}
    return {name: value, **companions.get(name, {})}


def plain(value: object) -> object:
    """As TOML would have it."""
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return getattr(value, "value", value)


def test_the_seeds_file_is_read_and_every_key_of_it_arrives():
    config = load_config(EXAMPLES / "conversion_config.toml")
    assert config.base_model == "llama-7b-q4.gguf"
    assert (config.qlora.rank, config.qlora.alpha) == (32, 64.0)
    assert [target.value for target in config.qlora.target_modules] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    ]
    assert (config.batch_size, config.gradient_accumulation, config.learning_rate) == (8, 4, 1e-4)
    assert (config.warmup_steps, config.total_steps, config.weight_decay) == (1000, 50_000, 0.01)
    annealing = config.qlora.mask_annealing
    assert (annealing.total_steps, annealing.schedule) == (20_000, AnnealingSchedule.COSINE)
    assert (annealing.initial_causal_ratio, annealing.final_causal_ratio) == (1.0, 0.0)
    assert (config.noise_schedule.type, config.noise_schedule.num_timesteps) == ("cosine", 1000)
    assert (config.qlora.time_embedding.dim, config.qlora.time_embedding.max_timesteps) == (256, 1000)
    hardware = config.hardware
    assert (hardware.device, hardware.num_threads, hardware.use_simd) == ("cpu", 16, True)


def test_the_defaults_are_the_seeds_recipe():
    seed = load_config(EXAMPLES / "conversion_config.toml", {"model.base_model": "x"})
    defaults = load_config(None, {"model.base_model": "x", "hardware.num_threads": 16})
    assert seed == defaults
    assert load_config(preset="seed") == ConversionTrainingConfig()


def test_the_laptop_example_is_the_laptop_preset():
    assert load_config(EXAMPLES / "laptop.toml") == load_config(preset="laptop")


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.name)
def test_examples_set_no_key_without_a_comment(example):
    lines = example.read_text(encoding="utf-8").splitlines()
    for above, line in pairwise(lines):
        if "=" in line.split("#")[0]:
            assert "#" in line or above.startswith("#"), line


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_can_be_set_in_the_file_and_by_an_override(name, tmp_path):
    value = OTHER_VALUES[name]
    config = load_config(None, with_companions(name, value))
    assert plain(SETTINGS[name].of(config)) == value
    assert plain(SETTINGS[name].of(ConversionTrainingConfig())) != value
    assert load_config(file_with(tmp_path, to_toml(config))) == config


def test_every_setting_is_in_the_table_of_other_values():
    assert OTHER_VALUES.keys() == SETTINGS.keys()


def test_settings_have_a_sentence_of_help_and_a_section():
    for setting in SETTINGS.values():
        assert setting.description.endswith(".") and len(setting.description) > 10
        assert setting.section in SECTIONS
        assert setting.name == f"{setting.section}.{setting.key}"


def test_all_settings_at_once_survive_the_way_through_toml(tmp_path):
    alone = {"model.context": "adapted", "holes.share": 0.0}  # do not go with all of the others
    stepwise = {"mask_annealing.schedule": "stepwise", "mask_annealing.total_steps": 200}
    config = load_config(None, {**OTHER_VALUES, **stepwise, **alone})
    assert load_config(file_with(tmp_path, to_toml(config))) == config
    assert [line[1:-1] for line in to_toml(config).splitlines() if line.startswith("[")] == list(SECTIONS)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_the_way_through_toml(preset, tmp_path):
    config = load_config(preset=preset)
    assert load_config(file_with(tmp_path, to_toml(config))) == config


@pytest.mark.parametrize("preset", ["laptop", "demo"])
def test_short_presets_end_their_annealing_early_enough_to_train_bidirectionally(preset):
    config = load_config(preset=preset)
    assert scaled_to_run(config) == (config, None)
    assert config.qlora.mask_annealing.total_steps == config.total_steps / 5
    assert config.warmup_steps == config.total_steps / 20
    assert set(config.qlora.target_modules) == set(TargetModule)


def test_the_file_overrides_the_preset_and_flags_override_the_file(tmp_path):
    path = file_with(tmp_path, "[training]\nbatch_size = 3\nlearning_rate = 1e-3\n")
    config = load_config(path, {"training.batch_size": 5, "training.seed": None}, preset="laptop")
    assert (config.batch_size, config.learning_rate, config.total_steps, config.seed) == (5, 1e-3, 2000, 0)


def test_a_presets_annealing_and_warm_up_keep_their_share_of_a_run_of_another_length(tmp_path):
    path = file_with(tmp_path, "[training]\ntotal_steps = 400\n[mask_annealing]\ntotal_steps = 7\n")
    from_file = load_config(path, preset="laptop")
    assert (from_file.warmup_steps, from_file.qlora.mask_annealing.total_steps) == (20, 7)
    config = load_config(None, {"training.total_steps": 5000}, preset="laptop")
    assert (config.warmup_steps, config.qlora.mask_annealing.total_steps) == (250, 1000)
    short = load_config(None, {"training.total_steps": 60}, preset="laptop")
    assert (short.warmup_steps, short.qlora.mask_annealing.total_steps) == (10, 12)
    seed = load_config(None, {"training.total_steps": 30_000}, preset="seed")
    assert (seed.warmup_steps, seed.qlora.mask_annealing.total_steps) == (1000, 20_000)


def test_nothing_given_means_the_defaults():
    assert load_config() == ConversionTrainingConfig()


@pytest.mark.parametrize(
    "text, key, closest",
    [
        ("[training]\nlearning_rat = 1", "key [training] learning_rat", "[training] learning_rate"),
        ("[model]\nrank = 8", "key [model] rank", "[model] qlora_rank"),
        ("[training]\nnum_threads = 8", "key [training] num_threads", "[hardware] num_threads"),
        ("[training]\nqlora = 8", "key [training] qlora", "[model] qlora_rank"),
        ("[trainin]\nbatch_size = 8", "table [trainin]", "[training]"),
        ("batch_size = 8", "key batch_size (outside of any table)", "[training] batch_size"),
        ("output = 8", "key output (outside of any table)", "[training] output"),
        ("[training.batch]\nsize = 8", "key [training] batch", "[training] batch_size"),
    ],
)
def test_unknown_keys_are_refused_with_the_closest_one(text, key, closest, tmp_path):
    path = file_with(tmp_path, text)
    with pytest.raises(UserError) as refusal:
        load_config(path)
    assert str(refusal.value) == f"{path}: unknown {key}; did you mean {closest}?"


def test_an_unknown_override_is_refused():
    with pytest.raises(UserError, match=r"did you mean \[training\] batch_size"):
        load_config(None, {"training.batchsize": 1})


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("training.batch_size", 0, r"^\[training\] batch_size = 0: .*greater than or equal to 1"),
        ("training.batch_size", True, r"batch_size = true: "),
        ("training.batch_size", "8", r'batch_size = "8": '),
        ("training.batch_size", 8.0, r"batch_size = 8.0: "),
        ("training.learning_rate", math.nan, "learning_rate = nan"),
        ("training.learning_rate", math.inf, "learning_rate = inf"),
        ("training.sequence_length", 1, "sequence_length = 1"),
        ("training.total_steps", 0, "total_steps = 0"),
        ("training.held_out_fraction", 1.0, "held_out_fraction = 1.0"),
        ("training.seed", -1, "seed = -1"),
        ("training.seed", 2**63, "seed = "),
        ("model.qlora_rank", 0, r"^\[model\] qlora_rank = 0"),
        ("model.target_modules", [], r"\[model\] target_modules"),
        ("model.target_modules", ["q_proj", "w_proj"], "'q_proj', 'k_proj'"),
        ("model.target_modules", ["q_proj", "q_proj"], "named twice"),
        ("mask_annealing.initial_causal_ratio", 1.5, "initial_causal_ratio = 1.5"),
        ("mask_annealing.schedule", "square", "'linear', 'cosine', 'exponential'"),
        ("mask_annealing.schedule", "stepwise", r"\[mask_annealing\]: the schedule 'stepwise' needs steps"),
        ("mask_annealing.steps", [[0, 1.0]], "no other has them"),
        ("mask_annealing.decay", 0.0, "decay = 0.0"),
        ("noise_schedule.type", "square", "'linear', 'cosine' or 'geometric'"),
        ("training.ar_loss_share", 1.0, "ar_loss_share = 1.0"),
        ("training.distillation_weight", -0.5, "distillation_weight = -0.5"),
        ("noise_schedule.masking", "half", "'bernoulli' or 'exact'"),
        ("block_diffusion.final_size", 3, r"\[block_diffusion\]: final_size 3 is smaller"),
        ("time_embedding.dim", 7, "dim = 7: .*multiple of 2"),
        ("hardware.device", "tpu", "Input should be 'auto', 'cpu', 'metal', 'cuda' or 'vulkan'"),
    ],
)  # fmt: skip
def test_values_out_of_their_limits_are_refused_in_one_line_that_names_the_key(name, value, message):
    with pytest.raises(UserError, match=message) as refusal:
        load_config(None, {name: value})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"model.context": "frozen", "training.ar_loss_share": 0.5},
            "ar_loss_share trains the adapter on clean",
        ),
        (
            {"model.context": "frozen", "training.distillation_weight": 1.0},
            "distillation_weight needs the base",
        ),
        (
            {
                "model.context": "frozen",
                "block_diffusion.enabled": True,
                "noise_schedule.masking": "exact",
            },
            "all blocks of a sequence at once",
        ),
        ({"training.loss_weighting": "nelbo", "holes.share": 0.5}, "nelbo weighs scattered masks"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_in_a_sentence(overrides, message):
    with pytest.raises(UserError, match=message):
        load_config(overrides=overrides)


def test_blocks_that_are_no_shorter_than_the_sequences_are_refused():
    with pytest.raises(UserError, match=r"initial_size = 64 are not shorter .* sequence_length = 64"):
        load_config(
            None,
            {
                "block_diffusion.enabled": True,
                "block_diffusion.initial_size": 64,
                "training.sequence_length": 64,
            },
        )


def test_a_fault_is_laid_on_the_file_only_where_the_file_has_it(tmp_path):
    path = file_with(tmp_path, "[training]\nbatch_size = 0\n")
    with pytest.raises(UserError, match=r"conversion_config.toml: \[training\] batch_size"):
        load_config(path)
    with pytest.raises(UserError, match=r"^\[training\] batch_size = -1"):
        load_config(path, {"training.batch_size": -1})


@pytest.mark.parametrize(
    "steps, message",
    [
        ([[0, 1.0], [0, 0.5]], "rising order"),
        ([[5, 1.0], [3, 0.5]], "rising order"),
        ([[0, 1.0], [100, 0.5]], "step 100 is never reached"),
        ([[-1, 1.0]], "greater than or equal to 0"),
        ([[0, 1.5]], "less than or equal to 1"),
        ([[0]], "required"),
    ],
)
def test_steps_that_make_no_sense_are_refused(steps, message):
    with pytest.raises(UserError, match=message):
        load_config(
            None,
            {
                "mask_annealing.schedule": "stepwise",
                "mask_annealing.steps": steps,
                "mask_annealing.total_steps": 100,
            },
        )


@pytest.mark.parametrize(
    "content, message",
    [
        (b"[training\n", "not valid TOML"),
        (b"[training]\nbatch_size = 1\nbatch_size = 2\n", "not valid TOML"),
        (b"x = '\xff'", "not UTF-8"),
    ],
)
def test_files_that_are_not_toml_are_refused(content, message, tmp_path):
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as refusal:
        load_config(path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert "\n" not in str(refusal.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_config(tmp_path / "missing.toml")
    with pytest.raises(UserError, match="a folder, not a file"):
        load_config(tmp_path)


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="no preset 'desktop', only seed, laptop, demo"):
        load_config(preset="desktop")


def test_the_classes_are_used_as_in_the_seed():
    config = ConversionTrainingConfig(
        qlora=QLoraConversionConfig(
            rank=16,
            alpha=32,
            target_modules=[TargetModule.QUERY_PROJ, "v_proj"],
            mask_annealing=MaskAnnealingConfig(total_steps=10, schedule=AnnealingSchedule.LINEAR),
            time_embedding=TimeEmbeddingConfig(dim=32),
        ),
        learning_rate=1,
    )
    assert config.qlora.target_modules == (TargetModule.QUERY_PROJ, TargetModule.VALUE_PROJ)
    assert isinstance(config.learning_rate, float)


def test_an_unknown_name_is_refused_by_the_classes_too():
    with pytest.raises(ValidationError, match="learning_rat"):
        ConversionTrainingConfig(learning_rat=1e-4)


def test_settings_do_not_change_once_made():
    with pytest.raises(ValidationError, match="frozen"):
        ConversionTrainingConfig().batch_size = 3


def test_a_run_as_long_as_its_recipe_is_left_as_it_is():
    config = ConversionTrainingConfig(total_steps=20_000)
    assert scaled_to_run(config) == (config, None)


@pytest.mark.parametrize(
    "steps, annealing, warmup", [(500, 200, 10), (10, 4, 1), (1, 1, 1), (19_999, 8000, 400)]
)
def test_a_short_run_scales_annealing_and_warm_up_in_proportion_and_says_so(steps, annealing, warmup):
    config, sentence = scaled_to_run(ConversionTrainingConfig(total_steps=steps))
    assert config.qlora.mask_annealing.total_steps == annealing
    assert config.warmup_steps == warmup
    assert config.total_steps == steps
    assert sentence is not None
    for number in (steps, 20_000, 1000, annealing, warmup):
        assert str(number) in sentence


def test_a_short_run_reaches_the_final_ratio_while_it_trains():
    config, _ = scaled_to_run(ConversionTrainingConfig(total_steps=25))
    annealer = AttentionMaskAnnealer(config.qlora.mask_annealing)
    assert annealer.causal_ratio_at(0) == 1.0
    assert annealer.causal_ratio_at(24) == 0.0


def test_a_warm_up_that_is_too_long_is_scaled_without_an_annealing():
    config = ConversionTrainingConfig(
        total_steps=100, qlora=QLoraConversionConfig(mask_annealing=MaskAnnealingConfig(total_steps=0))
    )
    fitted, sentence = scaled_to_run(config)
    assert (fitted.warmup_steps, fitted.qlora.mask_annealing.total_steps) == (40, 0)
    assert sentence is not None


@pytest.mark.parametrize("run", [1, 2, 5, 40])
def test_the_steps_of_a_stepwise_schedule_are_scaled_with_it(run, tmp_path):
    annealing = MaskAnnealingConfig(
        total_steps=100, schedule="stepwise", steps=[(0, 1.0), (10, 0.8), (50, 0.4), (99, 0.1)]
    )
    config = ConversionTrainingConfig(
        total_steps=run, warmup_steps=0, qlora=QLoraConversionConfig(mask_annealing=annealing)
    )
    fitted, _ = scaled_to_run(config)
    steps = fitted.qlora.mask_annealing.steps
    assert [ratio for _, ratio in steps][-1] == 0.1
    assert load_config(file_with(tmp_path, to_toml(fitted))) == fitted  # which checks its limits once more
    if run == 40:
        assert steps == ((0, 1.0), (2, 0.8), (8, 0.4), (15, 0.1))


def test_a_long_value_is_cut_in_a_message(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(f'[training]\nwarmup_steps = "{"[" * 5000}"\n')
    with pytest.raises(UserError) as fault:
        load_config(path)
    assert "warmup_steps" in str(fault.value) and len(str(fault.value)) < 400


@pytest.mark.parametrize("text", ["total_steps = {}", "learning_rate = {}.0", "x = [{}]"])
def test_a_number_of_thousands_of_digits_is_one_line(tmp_path, text):
    """Python reads no such integer."""
    with pytest.raises(UserError) as fault:
        load_config(file_with(tmp_path, "[training]\n" + text.format("9" * 5000) + "\n"))
    assert str(fault.value).startswith(str(tmp_path)) and "\n" not in str(fault.value)
    assert len(str(fault.value)) < 400
