"""The command line from outside: what it writes, where, and with which exit code."""

import errno
import io
import json
import re
import shutil
import signal
import subprocess
import sys

import make_cli_docs
import numpy as np
import pytest
from gguf_bytes import STRING, U32, Gguf, scalar, tiny_llama, with_key, with_tensor
from gguf_changes import with_vocabulary_keys

from ggml_diffusion.app.cli import main as cli
from ggml_diffusion.app.cli.main import main
from ggml_diffusion.config.toml import load_config
from ggml_diffusion.formats.adapter_file import DiffusionCheckpoint
from ggml_diffusion.generation.denoise import GenerationConfig
from ggml_diffusion.generation.diffusion_model import DiffusionModel
from ggml_diffusion.training import run as convert

TEXT = "the old mill ground corn for the whole village and the miller told his children of it. " * 40
COMMANDS = (
    *("convert", "estimate", "evaluate", "generate", "infill", "inspect", "demo", "verify"),
    *("export adapter", "export standalone", "export peft"),
)


@pytest.fixture(scope="module")
def base(tiny_model):
    return tiny_model(L=1, C=32, H=2, G=1, F=32, type="Q4_0")


@pytest.fixture(autouse=True)
def quick_gate(request, monkeypatch):
    if "gate" not in request.node.name:
        monkeypatch.setattr(convert, "check_identity", lambda model, tokenizer: "gate")


def run(*arguments):
    """Run a command line in this process; returns its exit code."""
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    return exit_.value.code or 0


def convert_arguments(base, folder, *more):
    (folder / "text.txt").write_text(TEXT)
    return (
        "convert", base, "--data", folder / "text.txt", "--output", folder / "run", "--steps", 3,
        "--batch-size", 2, "--gradient-accumulation", 1, "--sequence-length", 16, "--rank", 2,
        "--threads", 1, *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished_run(base, tmp_path_factory):
    """An output folder; made through the command line once."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "check_identity", lambda model, tokenizer: "gate")
        assert run(*convert_arguments(base, folder, "--evaluate", 2)) == 0
    return folder / "run"


# -- what it does ---------------------------------------------------------------------------------------


def test_convert_with_its_gate_writes_plain_lines_where_there_is_no_terminal(base, tmp_path, capsys):
    assert run(*convert_arguments(base, tmp_path, "--evaluate", 2)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    assert "identity gate passed" in out
    assert "step 3/3  loss" in out
    assert "future-context gain" in out
    assert f"written: {tmp_path / 'run' / 'adapter.safetensors'}" in out
    assert f"written: {tmp_path / 'run' / 'adapter.gguf'}" in out


def test_a_conversion_with_a_frozen_context_is_trained_measured_inspected_and_writes(base, tmp_path, capsys):
    more = ("--context", "frozen", "--holes", 0.5, "--evaluate", 2)
    assert run(*convert_arguments(base, tmp_path, *more)) == 0
    for name in ("adapter.safetensors", "adapter.gguf"):
        assert DiffusionCheckpoint.load(tmp_path / "run" / name).metadata.context == "frozen"
        assert run("inspect", tmp_path / "run" / name) == 0
        assert "frozen" in capsys.readouterr().out
    settings = ("--length", 9, "--temperature", 0)
    assert run("generate", base, tmp_path / "run", "--prompt", "the ", "--suffix", " mill", *settings) == 0
    out = capsys.readouterr().out
    assert out.startswith("the ") and out.endswith(" mill\n")
    prompt = ("--prompt", "the ", "--length", 9, "--temperature", 0)
    assert run("generate", base, tmp_path / "run", *prompt, "--verify") == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("the ") and "tokens accepted" in shown.err
    assert run("generate", base, tmp_path / "run", *prompt, "--verify", "--suffix", "x") == 2
    assert "leave out --suffix" in capsys.readouterr().err
    few = ("--sequences", 2, "--seeds", 1, "--one-by-one", 2, "--samples", 1, "--candidates", 1)
    assert run("evaluate", base, tmp_path / "run", *few, "--output", tmp_path / "measured") == 0
    figures = json.loads((tmp_path / "measured" / "evaluation.json").read_text())
    assert figures["masked"][0]["arms"]["converted"]["cross_entropy"]["value"] > 0


def test_flags_override_the_file_which_overrides_the_preset(base, tmp_path):
    (tmp_path / "config.toml").write_text(
        "[model]\nqlora_rank = 3\n[training]\nlearning_rate = 0.25\ntotal_steps = 2\n"
    )
    arguments = convert_arguments(base, tmp_path, "--preset", "laptop", "--config", tmp_path / "config.toml")
    assert run(*arguments) == 0
    config = load_config(tmp_path / "run" / "config.toml")
    assert config.learning_rate == 0.25  # the file's, not the preset's
    assert config.total_steps == 3  # the flag's
    assert config.qlora.rank == 2
    assert config.noise_schedule.type == load_config(preset="laptop").noise_schedule.type


def files_below(folder):
    return sorted(folder.rglob("*"))


def test_estimate_tells_what_convert_tells_and_writes_nothing(base, tmp_path, capsys):
    assert run(*convert_arguments(base, tmp_path)) == 0
    converted = capsys.readouterr().out.splitlines()
    before = files_below(tmp_path)
    assert run("estimate", *convert_arguments(base, tmp_path)[1:]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert files_below(tmp_path) == before
    estimated = out.splitlines()

    def without_what_is_free(lines):
        return [
            re.sub(r"of .*? (available|free):", "", line) for line in lines if line[:5] in ("memor", "disk:")
        ]

    assert without_what_is_free(estimated) == without_what_is_free(converted)
    assert len(without_what_is_free(estimated)) == 2
    (time_line,) = (line for line in estimated if line.startswith("time: "))
    assert ", 3 steps in 0:0" in time_line
    assert any(line.startswith("smaller: --rank 1 takes") for line in estimated)
    assert any(line.startswith("faster: --steps 1") for line in estimated)


def test_estimate_needs_no_output_and_says_what_is_missing(base, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    assert run("estimate", base, "--data", tmp_path / "text.txt", "--steps", 1, "--sequence-length", 16) == 0
    capsys.readouterr()
    assert run("estimate", base, "--steps", 1) == 2
    assert "which text?" in capsys.readouterr().err


def test_estimate_of_what_would_be_refused_tells_the_figures_and_why(base, tmp_path, capsys):
    arguments = convert_arguments(base, tmp_path, "--rank", 10_000_000)[1:]
    assert run("estimate", *arguments) == 2
    out, err = capsys.readouterr()
    assert "memory: " in out and "disk: " in out
    assert err.startswith("error: not enough memory: the run needs ")
    assert len(err.splitlines()) == 1


def test_estimate_takes_the_settings_of_convert():
    commands = cli.click_group().commands
    flags = {name: {option.opts[0] for option in commands[name].params} for name in ("convert", "estimate")}
    assert flags["convert"] - flags["estimate"] == {"--evaluate", "--fresh"}
    assert flags["estimate"] <= flags["convert"]


@pytest.mark.parametrize(
    "arguments",
    [("--rank", 10_000_000), ("--batch-size", 1_000_000_000), ("--memory-mib", 1, "--sequence-length", 200)],
)
def test_too_little_memory_is_one_line(base, tmp_path, capsys, arguments):
    assert run(*convert_arguments(base, tmp_path, *arguments)) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert re.search(r"needs \d+", err)


def test_what_is_found_too_large_for_memory_later_is_one_line_too(base, finished_run, capsys, monkeypatch):
    def allocate(*_, **__):
        raise MemoryError("Unable to allocate 60. GiB for an array")

    monkeypatch.setattr(DiffusionModel, "load", allocate)
    assert run("generate", base, finished_run) == 2
    assert capsys.readouterr().err == "error: not enough memory: Unable to allocate 60. GiB for an array\n"


@pytest.mark.parametrize("flag", ["--seeds", "--candidates"])
def test_an_evaluation_of_a_billion_repetitions_is_refused(base, finished_run, capsys, flag):
    assert run("evaluate", base, finished_run, flag, 1_000_000_000) == 2
    assert "less than or equal to 10000" in capsys.readouterr().err


def test_more_tokens_than_a_context_holds_are_refused_before_they_are_made(base, finished_run, capsys):
    assert run("generate", base, finished_run, "--prompt", "the", "--length", 1_000_000_000) == 2
    assert "more than the model's context" in capsys.readouterr().err


def test_a_context_that_memory_does_not_hold_is_refused_in_training_and_writing(tiny_model, tmp_path, capsys):
    """A file may claim a context of two billion tokens; its positions cost nothing until they are used."""
    base = tiny_model(L=1, C=32, H=2, G=1, F=32, type="Q4_0", context=2_000_000_000)
    assert run(*convert_arguments(base, tmp_path, "--sequence-length", 2_000_000_000)) == 2
    assert "not enough memory" in capsys.readouterr().err
    assert run(*convert_arguments(base, tmp_path)) == 0
    capsys.readouterr()
    assert run("generate", base, tmp_path / "run", "--prompt", "the", "--length", 1_900_000_000) == 2
    assert "not enough memory: 19" in capsys.readouterr().err


def test_target_modules_are_separated_by_commas(base, tmp_path):
    assert run(*convert_arguments(base, tmp_path, "--target-modules", "q_proj,down_proj")) == 0
    tensors = DiffusionCheckpoint.load(tmp_path / "run" / "adapter.safetensors").tensors
    assert "blk.0.ffn_down.weight.lora_a" in tensors
    assert "blk.0.attn_k.weight.lora_a" not in tensors


@pytest.mark.parametrize("adapter", ["", "adapter.safetensors", "adapter.gguf"])
def test_generate_prints_prompt_text_and_suffix_and_nothing_else(base, finished_run, adapter, capsys):
    arguments = ("generate", base, finished_run / adapter, "--length", 5, "--steps", 2, "--threads", 1)
    assert run(*arguments, "--prompt", "the mill ", "--suffix", " of corn") == 0
    out, err = capsys.readouterr()
    assert out.startswith("the mill ")
    assert out.endswith(" of corn\n")
    assert err == ""


def test_llama_cpp_writes_on_demand(base, finished_run, capsys):
    arguments = ("generate", base, finished_run, "--prompt", "the mill", "--length", 8, "--threads", 1)
    assert run(*arguments, "--runtime", "llama.cpp") == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("the mill") and shown.err == ""
    on_device = ("--runtime", "llama.cpp", "--device", "cuda")
    for wrong in (("--gpu-layers", 1), on_device):
        assert run(*arguments, *wrong) == 2
        err = capsys.readouterr().err
        assert "--runtime" in err and len(err.strip().splitlines()) == 1


def test_chat_without_a_template_is_one_line(base, finished_run, capsys):
    assert run("generate", base, finished_run, "--prompt", "the", "--chat") == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].endswith("give the prompt as it is")


def test_the_same_seed_writes_the_same_text(base, finished_run, capsys):
    texts = []
    for seed in (1, 1, 2):
        assert run("generate", base, finished_run, "--prompt", "the", "--seed", seed, "--length", 20) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


@pytest.mark.parametrize("target", ["copy.safetensors", "copy.gguf"])
@pytest.mark.parametrize("source", ["", "adapter.safetensors", "adapter.gguf"])
def test_export_writes_the_conversion_elsewhere(finished_run, tmp_path, source, target):
    assert run("export", "adapter", finished_run / source, tmp_path / target) == 0
    original = DiffusionCheckpoint.load(finished_run / "adapter.safetensors")
    copy = DiffusionCheckpoint.load(tmp_path / target)
    assert copy.metadata == original.metadata
    for name, array in original.tensors.items():
        assert (copy.tensors[name] == array).all()


def test_export_standalone_writes_a_model_and_measures_what_it_cost(base, finished_run, tmp_path, capsys):
    assert run("export", "standalone", base, finished_run, tmp_path / "out.gguf", "--type", "f16") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert re.search(r"written: .*out\.gguf \(llada, .* KiB, time 0\.\d+ folded in\)", out)
    kl = re.search(r"KL from base \+ adapter: (\S+) nats in llama\.cpp, mean over 60 tokens", out)
    assert float(kl[1]) < 1e-3
    assert run("inspect", tmp_path / "out.gguf") == 0
    assert "llada" in capsys.readouterr().out


def test_export_peft_writes_a_folder(base, finished_run, tmp_path, capsys):
    assert run("export", "peft", base, finished_run, tmp_path / "out") == 0
    assert f"written: {tmp_path / 'out'}" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "embeddings.safetensors"),
        *("diffusion_config.json", "denoise.py", "README.md"),
    }


def test_verify_shows_every_export_and_exits_with_1_if_one_differs(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("PATH", str(tmp_path))
    base = tiny_model(L=1, C=32, H=2, G=1, F=32, tied=True)
    assert run(*convert_arguments(base, tmp_path)) == 0
    folder = tmp_path / "run"
    assert run("export", "standalone", base, folder, folder / "standalone.gguf") == 0
    capsys.readouterr()
    assert run("verify", base, folder) == 0
    out = capsys.readouterr().out
    assert re.search(r"adapter\.gguf .* llama-cpp-python .* ok .* KL \S+, likeliest token", out)
    assert re.search(r"standalone\.gguf .* llama-cpp-python .* ok", out)
    assert re.search(r"standalone\.gguf .* llama-diffusion-cli .* skipped", out)
    other = DiffusionCheckpoint.load(folder / "adapter.safetensors")
    for name in other.tensors:
        other.tensors[name] += np.float32(0.1)
    other.save(folder / "adapter.safetensors")
    assert run("verify", base, folder) == 1
    assert re.search(r"adapter\.gguf .* failed", capsys.readouterr().out)


def test_verify_of_no_run_is_one_line(base, tmp_path, capsys):
    assert "is no folder" in refused(capsys, "verify", base, tmp_path / "nowhere")
    assert "holds neither" in refused(capsys, "verify", base, tmp_path)


def test_export_standalone_of_another_base_or_to_another_kind_of_file_is_one_line(
    tiny_model, base, finished_run, tmp_path, capsys
):
    other = tiny_model(L=1, C=32, H=2, G=1, F=32, type="Q4_0", seed=5)
    command = ("export", "standalone")
    assert "another base model" in refused(capsys, *command, other, finished_run, tmp_path / "o.gguf")
    assert "must end in .gguf" in refused(capsys, *command, base, finished_run, tmp_path / "o.bin")
    assert list(tmp_path.iterdir()) == []


def test_export_of_an_unfinished_run_gives_its_last_checkpoint(base, finished_run, tmp_path):
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (finished_run / "checkpoints").rename(unfinished / "checkpoints")
    try:
        assert run("export", "adapter", unfinished, tmp_path / "last.safetensors") == 0
        assert DiffusionCheckpoint.load(tmp_path / "last.safetensors").metadata.conversion_steps == 3
    finally:
        (unfinished / "checkpoints").rename(finished_run / "checkpoints")


def test_inspect_shows_models_and_adapters(base, finished_run, capsys):
    for path in (base, finished_run / "adapter.safetensors", finished_run / "adapter.gguf"):
        assert run("inspect", path) == 0
        assert path.name in capsys.readouterr().out.replace("\n", "")


QUICK = ("--threads", 1, "--sequences", 3, "--seeds", 1, "--one-by-one", 2, "--spans", 0, "--samples", 0)


@pytest.mark.parametrize("adapter", ["", "adapter.gguf"])
def test_evaluate_shows_tables_and_writes_json_and_a_page(base, finished_run, tmp_path, adapter, capsys):
    pytest.importorskip("matplotlib")
    output = tmp_path / "evaluation"
    assert run("evaluate", base, finished_run / adapter, "--output", output, *QUICK) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "tokens are to go through the model" in out
    assert "converted, NELBO" in out
    assert "Future-context gain" in out
    assert f"written: {output / 'evaluation.json'}" in out
    assert f"written: {output / 'evaluation.png'}" in out
    assert json.loads((output / "evaluation.json").read_text())["about"]["n_sequences"] == 3


def test_evaluate_prints_json_alone_if_asked_to_and_its_progress_elsewhere(base, finished_run, capsys):
    assert run("evaluate", base, finished_run, "--json", "--control", finished_run, *QUICK) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["about"]["settings"]["one_by_one"] == 2
    assert document["masked"][0]["gain"].keys() == {"a", "b", "c"}
    assert "tokens are to go through the model" in err


# -- inputs as people have them ---------------------------------------------------------------------------

SMALL = (
    "--steps", 2, "--batch-size", 1, "--gradient-accumulation", 1, "--sequence-length", 16, "--rank", 2,
    "--threads", 1,
)  # fmt: skip


def test_a_run_in_the_folder_of_its_text_is_resumed_and_evaluated(base, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "._a.txt").write_bytes(bytes(range(128, 256)))
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run("convert", base, "--data", ".", "--output", "run", *SMALL) == 0
    assert "all 2 steps are done" in capsys.readouterr().out
    assert run("evaluate", base, "run", *QUICK) == 0
    for _ in range(2):
        assert run("convert", base, "--data", ".", "--output", ".", *SMALL) == 0


def test_what_is_left_out_is_said_and_strict_stops_at_it(base, tmp_path, capsys):
    lines = [json.dumps({"text": TEXT[:200]})] * 30 + ['{"txt": 1}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    arguments = ("convert", base, "--data", tmp_path / "a.jsonl", "--output", tmp_path / "run", *SMALL)
    assert run(*arguments) == 0
    out = capsys.readouterr().out
    assert "warning: 1 of 31 documents cannot be used and are left out, the first ones:" in out
    assert f"{tmp_path / 'a.jsonl'}, line 31: not an object" in out
    assert "a.jsonl, line 31: not an object" in refused(capsys, *arguments, "--strict")


def test_other_files_of_a_folder_are_included_by_their_names_also_in_an_evaluation(base, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.py").write_text(TEXT)
    (data / "b.html").write_text(TEXT)
    arguments = ("convert", base, "--data", data, "--output", tmp_path / "run", *SMALL)
    assert "the folder holds no text" in refused(capsys, *arguments)
    assert run(*arguments, "--include", "*.py", "--include", "*.htm*") == 0
    assert "data: 2 documents" in capsys.readouterr().out
    assert run("evaluate", base, tmp_path / "run", *QUICK) == 0


def test_standard_input_is_trained_on_resumed_and_not_evaluated_on(base, tmp_path, monkeypatch, capsys):
    arguments = ("convert", base, "--data", "-", "--output", tmp_path / "run", *SMALL)
    for _ in range(2):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
        assert run(*arguments) == 0
    assert "all 2 steps are done" in capsys.readouterr().out
    assert run("evaluate", base, tmp_path / "run", *QUICK) == 2
    assert "which text? give --data" in capsys.readouterr().err


def test_a_split_of_its_own_is_measured_on(base, tmp_path):
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"{name} {TEXT}"}) + "\n")
    config = tmp_path / "config.toml"
    config.write_text("[training]\nheld_out_fraction = 0.0\n")
    arguments = ("convert", base, "--data", tmp_path, "--output", tmp_path / "run", "--config", config)
    assert run(*arguments, *SMALL, "--evaluate", 2) == 0
    assert run("evaluate", base, tmp_path / "run", *QUICK) == 0


def test_a_text_of_which_nothing_can_be_learned_is_refused(tiny_model, tmp_path, capsys):
    """The first token of every document is read from nothing, and here there is no second one."""
    base = with_vocabulary_keys(tiny_model(L=1), tmp_path / "no_end.gguf", {"eos_token_id": 2**32 - 1})
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 100)
    arguments = ("convert", base, "--data", tmp_path / "a.jsonl", "--output", tmp_path / "run", *SMALL)
    assert "there is nothing to learn in this text" in refused(capsys, *arguments)


@pytest.mark.parametrize("value", ["yesterday", "1.5", "99999999999999", "-99999999999999"])
def test_a_time_in_the_environment_that_is_none_is_refused_before_the_first_step(
    base, tmp_path, monkeypatch, value, capsys
):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", value)
    assert "SOURCE_DATE_EPOCH" in refused(capsys, *convert_arguments(base, tmp_path))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_empty_time_in_the_environment_is_none(base, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "")
    assert run(*convert_arguments(base, tmp_path)) == 0


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_warned_of(base, tmp_path, monkeypatch, number, capsys):
    def refuse(*_: object) -> None:
        raise OSError(number, "no locks here")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert run(*convert_arguments(base, tmp_path)) == 0
    assert f"warning: {tmp_path / 'run'}: its file system has no locks" in capsys.readouterr().out


def test_what_is_piped_is_the_text_and_nothing_else(base, finished_run, capsys, monkeypatch):
    monkeypatch.setattr(DiffusionModel, "generate", lambda *_, **__: "\tb\x07 " + "long " * 50)
    assert run("generate", base, finished_run, "--prompt", "a\t[bold]", "--suffix", "\tc ") == 0
    assert capsys.readouterr().out == "a\t[bold]\tb\x07 " + "long " * 50 + "\tc \n"


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_an_interrupted_run_is_read_from_its_last_checkpoint(base, finished_run, tmp_path, command, capsys):
    shutil.copytree(finished_run / "checkpoints", tmp_path / "run" / "checkpoints")
    more = ("--length", 3) if command == "generate" else QUICK
    assert run(command, base, tmp_path / "run", *more) == 0
    assert "its checkpoint of step 3" in "".join(capsys.readouterr())
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert "holds neither adapter" in refused(capsys, command, base, tmp_path / "run")


# -- help -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, capsys):
    assert run(*command.split(), "--help") == 0
    assert f"ggml-diffusion {command}" in " ".join(capsys.readouterr().out.split())


def test_every_flag_has_a_help_text_and_settings_have_the_settings_own():
    commands = cli.click_group().commands
    for name, command in commands.items():
        for one in [command, *getattr(command, "commands", {}).values()]:
            for parameter in one.params:
                assert getattr(parameter, "help", None), f"{name} {parameter.name}"
    by_flag = {flag: parameter for parameter in commands["generate"].params for flag in parameter.opts}
    for field, flag in (("steps", "--steps"), ("top_p", "--top-p"), ("remasking", "--remasking")):
        assert by_flag[flag].help.startswith(GenerationConfig.model_fields[field].description)


def test_the_list_of_commands_says_what_each_says_of_itself(capsys):
    assert run("--help") == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, command in cli.click_group().commands.items():
        assert f"{name} {' '.join(command.help.split()).split('. ')[0].rstrip('.')}." in shown


@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "--help"]])
def test_a_command_imports_only_what_it_needs(arguments):
    code = f"import sys; from ggml_diffusion.app.cli import main; main._app({arguments[:-1]})"
    code += "; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"numpy", "pydantic", "gguf", "llama_cpp"} & set(loaded.stdout.split())


def test_convert_has_the_flags_of_its_settings():
    flags = {flag for parameter in cli.click_group().commands["convert"].params for flag in parameter.opts}
    assert {
        "--config", "--data", "--output", "--preset", "--steps", "--batch-size", "--sequence-length",
        "--learning-rate", "--rank", "--target-modules", "--seed", "--threads", "--fresh",
    } <= flags  # fmt: skip


def test_the_page_of_the_command_line_is_up_to_date():
    assert make_cli_docs.TARGET.read_text() == make_cli_docs.cli_docs(), "run python tools/make_cli_docs.py"


# -- what the user can correct ------------------------------------------------------------------------------


def refused(capsys, *arguments):
    """Exit code 2, one line on stderr, no traceback; returns the line."""
    assert run(*arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def gguf_files(folder):
    """Bad models by what is wrong with them -> (file, words of the message)."""

    def write(name, data):
        (folder / name).write_bytes(data)
        return folder / name

    whole = tiny_llama().build()
    uneven = with_tensor("blk.0.attn_q.weight", dims=(24, 32), type_id=2)
    return {
        "missing": (folder / "nothing.gguf", "no such file"),
        "not a GGUF": (write("text.gguf", b"hello, I am a text" * 9), "GGUF"),
        "empty": (write("empty.gguf", b""), "empty.gguf"),
        "truncated": (write("short.gguf", whole[: len(whole) // 2]), "short.gguf"),
        "architecture": (
            write("arch.gguf", with_key("general.architecture", scalar(STRING, "gpt2")).build()),
            "'gpt2' is not supported; supported: llama",
        ),
        "type": (write("type.gguf", integer_model().build()), "I32, which is not supported; supported: F32"),
        "block size": (write("uneven.gguf", uneven.build()), "blk.0.attn_q.weight"),
        "count": (write("layers.gguf", with_key("llama.block_count", scalar(U32, 0)).build()), "block_count"),
    }


def integer_model() -> Gguf:
    """The tiny model with a matrix of integers, which ggml knows."""
    return with_tensor("blk.0.attn_q.weight", type_id=26, data=bytes(32 * 32 * 4))


@pytest.mark.parametrize(
    "fault",
    ["missing", "not a GGUF", "empty", "truncated", "architecture", "type", "block size", "count"],
)
def test_a_bad_model_is_one_line(tmp_path, fault, capsys):
    path, words = gguf_files(tmp_path)[fault]
    assert words in refused(capsys, *convert_arguments(path, tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("text.txt", b"", "no text"),
        ("text.txt", b"good\n\xff\xfe bad", "line 2: not UTF-8"),
        ("rows.jsonl", b'{"text": "good"}\n{"text": 7}\n', "rows.jsonl, line 2"),
        ("rows.jsonl", b'{"text": "good"}\nnonsense\n', "rows.jsonl, line 2: not valid JSON"),
        ("text.pdf", b"%PDF\n\xe2\xe3", "text.pdf, line 2: not UTF-8"),
        ("text.txt.gz", b"no gzip", "text.txt.gz: cannot be unpacked"),
        ("rows.jsonl", b'{"prompt": "say", "completion": ""}\n' * 40, "line 1: the response is empty"),
    ],
)
def test_bad_data_is_one_line_that_names_the_place(base, tmp_path, name, content, words, capsys):
    (tmp_path / name).write_bytes(content)
    arguments = ("convert", base, "--data", tmp_path / name, "--output", tmp_path / "run")
    assert words in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--sequence-length", 4000), "longer than the context"),
        (("--mask-token-id", 99999), "mask_token_id 99999 is outside of the vocabulary"),
        (("--preset", "phone"), "no preset 'phone'"),
        (("--learning-rate", -1), "learning_rate"),
        (("--target-modules", "q_proj,z_proj"), "target_modules"),
        (("--rank", 0), "qlora_rank"),
        (("--threads", 0), "num_threads"),
        (("--config", "/nowhere/config.toml"), "/nowhere/config.toml"),
    ],
)
def test_a_bad_setting_is_one_line(base, tmp_path, more, words, capsys):
    assert words in refused(capsys, *convert_arguments(base, tmp_path, *more))


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("[training]\nlearing_rate = 1.0\n", "learning_rate"),
        ('[hardware]\ndevice = "tpu"\n', "Input should be 'auto', 'cpu', 'metal', 'cuda' or 'vulkan'"),
        ("[training\n", "not valid TOML"),
    ],
)
def test_a_bad_config_file_is_one_line(base, tmp_path, toml, words, capsys):
    (tmp_path / "config.toml").write_text(toml)
    arguments = convert_arguments(base, tmp_path, "--config", tmp_path / "config.toml")
    assert words in refused(capsys, *arguments)


def test_an_adapter_of_another_base_is_refused_unless_allowed(tiny_model, finished_run, capsys):
    other = tiny_model(L=1, C=32, H=2, G=1, F=32, type="Q4_0", seed=5)
    arguments = ("generate", other, finished_run, "--prompt", "the", "--length", 3)
    assert "another base model" in refused(capsys, *arguments)
    assert run(*arguments, "--allow-other-base") == 0
    capsys.readouterr()
    assert "another base model" in refused(
        capsys, "export", "adapter", finished_run, finished_run.parent / "other.gguf", "--base", other
    )


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--steps", 0), "--steps 0"),
        (("--temperature", -1), "--temperature"),
        (("--order", "backwards"), "--order backwards"),
        (("--top-p", 2), "--top-p"),
        (("--length", 100_000), "context"),
    ],
)
def test_a_bad_setting_of_generate_is_one_line(base, finished_run, more, words, capsys):
    assert words in refused(capsys, "generate", base, finished_run, "--prompt", "the", *more)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--sequences", 0), "--sequences 0"),
        (("--top-p", 2), "--top-p"),
        (("--order", "backwards"), "--order backwards"),
        (("--held-out-fraction", 0), "held nothing out"),
        (("--sequence-length", 1), "sequence_length must be at least 2"),
        (("--data", "/nowhere.txt"), "/nowhere.txt: no such file"),
        (("--control", "/nowhere.gguf"), "/nowhere.gguf"),
    ],
)
def test_a_bad_setting_of_evaluate_is_one_line(base, finished_run, more, words, capsys):
    assert words in refused(capsys, "evaluate", base, finished_run, "--threads", 1, *more)


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "BASE", "/nowhere/adapter.safetensors"),
        ("evaluate", "BASE", "/nowhere/adapter.safetensors"),
        ("generate", "/nowhere/model.gguf", "RUN"),
        ("generate", "BASE", "BASE"),
        ("export", "adapter", "/nowhere", "x.gguf"),
        ("export", "adapter", "RUN", "x.bin"),
        ("export", "adapter", "RUN", "/nowhere/at/all/x.gguf"),
        ("export", "adapter", "EMPTY", "x.gguf"),
        ("inspect", "/nowhere/model.gguf"),
        ("inspect", "EMPTY"),
        ("convert",),
        ("convert", "BASE"),
    ],
)
def test_files_that_are_not_there_or_of_another_kind_are_one_line(
    base, finished_run, tmp_path, arguments, capsys
):
    places = {"BASE": base, "RUN": finished_run, "EMPTY": tmp_path}
    refused(capsys, *(places.get(argument, argument) for argument in arguments))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("convert", "--nonsense"),
            "No such option: --nonsense (Possible options: --seed); see ggml-diffusion convert --help",
        ),
        (("convert", "m.gguf", "--steps", "many"), "Invalid value for '--steps': Input should be a valid"),
        (("nonsense",), "No such command 'nonsense'; see ggml-diffusion --help"),
        (("export",), "Missing command; see ggml-diffusion export --help"),
        (("generate",), "Missing argument 'MODEL.gguf'; see ggml-diffusion generate --help"),
    ],
)
def test_usage_errors_are_a_line_that_names_the_help(arguments, said, capsys):
    assert refused(capsys, *arguments).startswith(f"error: {said}")


def test_without_a_command_there_is_the_help(capsys):
    assert run() == 0
    assert "COMMAND" in capsys.readouterr().out


# -- signals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_a_run_with_its_gate_saves_it_and_says_how_to_go_on(base, tmp_path, number, code):
    command = [sys.executable, "-m", "ggml_diffusion"]
    command += [str(argument) for argument in convert_arguments(base, tmp_path, "--steps", 100_000)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stdout:  # the first step is shown as soon as it is taken
            if line.startswith("step "):
                break
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == code
    assert err == ""
    assert "stopped and saved after step" in out
    assert "the same command resumes it" in out
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == list(np.arange(len(steps)) + 1)
    assert list((tmp_path / "run" / "checkpoints").glob(f"step-{steps[-1]:08d}"))


def test_names_of_files_do_nothing_to_a_terminal(base, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    name = "\x1b]0;owned\x07\nb.txt"
    (folder / name).write_bytes(b"\xff\xfe\x00")
    (folder / "good.txt").write_text("the old mill ground corn. " * 50)
    arguments = convert_arguments(base, tmp_path)
    place = arguments.index("--data") + 1
    for data in (folder, folder / name, f"{tmp_path}/none\x1b[31m\n.txt"):
        run(*arguments[:place], data, *arguments[place + 1 :], "--fresh")
        shown = capsys.readouterr()
        assert "\x1b" not in shown.out + shown.err
        assert len(shown.err.strip().splitlines()) <= 1
    assert run("inspect", f"{tmp_path}/none\x1b[31m\n.gguf") == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/none\\x1b[31m\\n.gguf: no such file\n"
