"""What the parameters of a run are before its first step: drawn, or LoRA pairs that someone trained before.

Pairs come from a PEFT folder or an adapter file. Only they do: mask and time embeddings begin as ever. What a
run started from is part of its identity by the pairs' content (`sha256`), so that the file may move.

Deliberately not here: reading the files (formats/), when a run starts again (trainer.py).
Source: the draw is PEFT's (formats/lora.py). Letters: R rank.
"""

import hashlib
from pathlib import Path

import numpy as np

from ggml_diffusion.config.groups import QLoraConversionConfig
from ggml_diffusion.config.settings import ConversionTrainingConfig
from ggml_diffusion.errors import UserError
from ggml_diffusion.formats.adapter_file import load_adapter
from ggml_diffusion.formats.lora import LoraAdapter, ParameterStore, TargetModule, init_lora, lora_ranks
from ggml_diffusion.formats.model_file import ModelFile
from ggml_diffusion.formats.peft_folder import read_peft_folder
from ggml_diffusion.randomness import Stream, generator_of


class StartValues:
    """The start of one run.

    Attributes:
        sha256: of the pairs that it starts from; "" where all is drawn.

    """

    def __init__(self, config: ConversionTrainingConfig, base: ModelFile) -> None:
        """Read the pairs, if the config names some.

        Raises:
            UserError: they cannot be read, do not fit the base, or are not what the run trains.

        """
        self._seed = config.seed
        self._pairs: LoraAdapter | None = None
        self.sha256 = ""
        if config.qlora.start_from is not None:
            path = Path(config.qlora.start_from)
            self._pairs = read_peft_folder(path, base) if path.is_dir() else load_adapter(path, base.arch)
            _check(path, self._pairs, base, config.qlora)
            self.sha256 = _digest(self._pairs)

    def fill(self, parameters: ParameterStore) -> None:
        """Give everything its start value, in place."""
        parameters.flat[...] = 0.0
        init_lora(parameters.views, generator_of(self._seed, 0, Stream.START_VALUES))
        for name, array in self._pairs.tensors.items() if self._pairs else ():
            parameters.views[name][...] = array


def _check(path: Path, pairs: LoraAdapter, base: ModelFile, qlora: QLoraConversionConfig) -> None:
    """Refuse pairs that are not those of the run, in a line that says which flag would make them so."""
    try:
        pairs.check(base)
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix('adapter: ')}") from None
    ranks = lora_ranks(pairs.tensors)
    if not ranks:
        raise UserError(f"{path}: holds no LoRA pairs")
    found = {TargetModule(module) for module in TargetModule if _adapts(ranks, module)}
    if missing := [module.value for module in TargetModule if module in found - set(qlora.target_modules)]:
        wanted = [one.value for one in TargetModule if one in found | set(qlora.target_modules)]
        raise UserError(
            f"{path}: adapts {', '.join(missing)} too, which the run does not train: "
            f"--target-modules {','.join(wanted)}"
        )
    if different := sorted(set(ranks.values()) - {qlora.rank}):
        hint = f": --rank {different[0]}" if len(set(ranks.values())) == 1 else ", and all must have one"
        raise UserError(f"{path}: has pairs of rank {different[0]}, and the run of {qlora.rank}{hint}")
    if np.float32(pairs.alpha) != np.float32(qlora.alpha):
        raise UserError(
            f"{path}: has alpha {pairs.alpha:g}, and the run {qlora.alpha:g}: --alpha {pairs.alpha:g}"
        )


def _adapts(ranks: dict[str, int], module: TargetModule) -> bool:
    return any(weight.split(".")[2] == module.gguf_name for weight in ranks)


def _digest(pairs: LoraAdapter) -> str:
    digest = hashlib.sha256()
    for name in sorted(pairs.tensors):
        digest.update(name.encode() + b"\0" + pairs.tensors[name].tobytes())
    return digest.hexdigest()
