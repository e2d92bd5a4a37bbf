"""Tokens with a role: which ids are none, and the mask token of every family's vocabulary."""

import numpy as np
import pytest

from ggml_diffusion.errors import UserError
from ggml_diffusion.formats.model_file import read_gguf
from ggml_diffusion.text.special_tokens import choose_mask_token, special_ids, token_id
from ggml_diffusion.text.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
NO_TOKEN = 2**32 - 1  # what converters write for none


def vocabulary(*tokens: tuple[str, int], **special: int) -> dict[str, object]:
    return {
        "tokenizer.ggml.tokens": [text for text, _ in tokens],
        "tokenizer.ggml.token_type": np.array([kind for _, kind in tokens], dtype=np.int32),
        **{f"tokenizer.ggml.{name}": token for name, token in special.items()},
    }


BYTES = [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
LLAMA2 = vocabulary(
    ("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL), *BYTES, ("▁the", NORMAL),
    unknown_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


@pytest.mark.parametrize(
    "metadata, expected, reason",
    [
        (vocabulary(("<reserved>", CONTROL), ("<mask>", CONTROL), mask_token_id=1), 1, "own mask"),
        (vocabulary(("<|end_of_text|>", CONTROL), ("<|reserved_special_token_0|>", CONTROL)), 1, "reserved"),
        (vocabulary(("<unused0>", UNUSED), ("[control_8]", CONTROL)), 1, "reserved"),
        (vocabulary(("<reserved_0>", CONTROL), ("<reserved_1>", CONTROL), eot_token_id=0), 1, "reserved"),
        (vocabulary(("reserved", NORMAL), ("<bos>", CONTROL), ("<x>", UNUSED)), 2, "unused"),
        (vocabulary(("<pad>", UNUSED), ("<x>", UNUSED), padding_token_id=0), 1, "unused"),
        (LLAMA2, 0, "unknown token '<unk>'"),
    ],
    ids=["own", "llama3", "mistral", "in use", "unused", "unused in use", "llama2"],
)  # fmt: skip
def test_the_mask_token_is_chosen_in_the_stated_order(metadata, expected, reason):
    token, why = choose_mask_token(None, metadata)
    assert token == expected
    assert reason in why


def test_the_configs_mask_token_comes_first():
    assert choose_mask_token(259, LLAMA2) == (259, "set in the config")
    assert choose_mask_token(0, LLAMA2) == (0, "set in the config")
    own = vocabulary(("a", NORMAL), ("<mask>", CONTROL), mask_token_id=1)
    assert choose_mask_token(0, own)[0] == 0


@pytest.mark.parametrize("requested", [-1, 260, 2**40])
def test_a_mask_token_outside_of_the_vocabulary_is_refused(requested):
    with pytest.raises(UserError, match=f"mask_token_id {requested} is outside of the vocabulary of 260"):
        choose_mask_token(requested, LLAMA2)


@pytest.mark.parametrize(
    "metadata",
    [
        vocabulary(("<bos>", CONTROL), ("<eos>", CONTROL), ("a", NORMAL), bos_token_id=0, eos_token_id=1),
        vocabulary(("<unk>", UNKNOWN), ("a", NORMAL), unknown_token_id=0),
        {"tokenizer.ggml.tokens": ["a", "b"]},
    ],
    ids=["only special ones", "unknown without bytes", "no types"],
)
def test_a_vocabulary_without_a_free_token_is_refused_with_what_to_do(metadata):
    with pytest.raises(UserError, match="set mask_token_id"):
        choose_mask_token(None, metadata)


def test_a_model_without_a_vocabulary_has_no_mask_token():
    with pytest.raises(UserError, match="no vocabulary"):
        choose_mask_token(None, {})


def test_smollm2_gets_its_first_untrained_token(smollm2_path):
    token, why = choose_mask_token(None, read_gguf(smollm2_path).metadata)
    assert token == 7
    assert "<gh_stars>" in why


@pytest.mark.parametrize("kind, expected", [("bpe", 3), ("spm", 3)])
def test_tiny_models_get_a_reserved_token_that_text_does_not_contain(tiny_model, kind, expected):
    path = tiny_model(tokenizer=kind)
    token, _ = choose_mask_token(None, read_gguf(path).metadata)
    assert token == expected
    tokenizer = Tokenizer.from_gguf(path)
    assert token not in tokenizer.encode(tokenizer.token_text(token))


# -- ids that name no token ------------------------------------------------------------------------


def test_a_bos_that_is_the_end_of_text_too_is_none_of_its_own():
    metadata = vocabulary(("<end>", CONTROL), ("<start>", CONTROL), bos_token_id=0, eos_token_id=0)
    assert special_ids(metadata) == (None, 0)
    assert special_ids({**metadata, "tokenizer.ggml.bos_token_id": 1}) == (1, 0)
    assert special_ids(vocabulary(("a", NORMAL))) == (None, None)


@pytest.mark.parametrize("value", [2, NO_TOKEN, -1, True, "0"])
def test_an_id_outside_of_the_vocabulary_names_no_token(value):
    metadata = vocabulary(("a", NORMAL), ("b", NORMAL), padding_token_id=value, eos_token_id=value)
    assert token_id(metadata, "padding") is None
    assert special_ids(metadata) == (None, None)


def test_sentencepiece_has_the_default_ids_of_llama_cpp():
    metadata = {**LLAMA2, "tokenizer.ggml.model": "llama", "tokenizer.ggml.eos_token_id": NO_TOKEN}
    del metadata["tokenizer.ggml.bos_token_id"]
    assert special_ids(metadata) == (1, 2)
    assert token_id(metadata, "padding") is None


# -- the mask token of each family -----------------------------------------------------------------

PADS = [(f"[PAD{number}]", UNUSED) for number in range(2)]
QWEN_NAMES = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|image_pad|>",
]  # fmt: skip
QWEN = [("a", NORMAL), *((name, CONTROL) for name in QWEN_NAMES), ("<tool_call>", USER_DEFINED)]
QWEN_CODE = [("<|fim_prefix|>", CONTROL), ("<|fim_pad|>", CONTROL)]
QWEN_IDS = {"bos_token_id": 1, "eos_token_id": 3, "padding_token_id": 1}
GEMMA = [("<pad>", CONTROL), ("<eos>", CONTROL), ("<bos>", CONTROL), ("<unk>", UNKNOWN), ("<mask>", CONTROL)]
GEMMA_IDS = {"eos_token_id": 1, "bos_token_id": 2, "unknown_token_id": 3, "padding_token_id": 0}
PHI3 = [
    ("<unk>", CONTROL), ("<s>", CONTROL), ("</s>", USER_DEFINED), *BYTES,
    ("<|endoftext|>", CONTROL), ("<|assistant|>", CONTROL), ("<|placeholder1|>", CONTROL),
]  # fmt: skip
GRANITE = [
    ("<|end_of_text|>", CONTROL), ("<fim_prefix>", CONTROL), ("<filename>", CONTROL), ("<gh_stars>", CONTROL),
    ("<reponame>", CONTROL), ("<|start_of_role|>", CONTROL), ("<|tool_call|>", CONTROL),
]  # fmt: skip
LLAMA3 = [
    ("<|begin_of_text|>", CONTROL),
    ("<|end_of_text|>", CONTROL),
    ("<|reserved_special_token_0|>", CONTROL),
]
OLMO2 = [
    ("<|endoftext|>", CONTROL), ("<|fim_prefix|>", CONTROL), ("|||EMAIL_ADDRESS|||", USER_DEFINED),
    ("<|im_start|>", CONTROL), ("<|extra_id_0|>", CONTROL),
]  # fmt: skip
TEKKEN = [
    ("<unk>", CONTROL),
    ("<s>", CONTROL),
    ("</s>", CONTROL),
    ("[INST]", CONTROL),
    ("<SPECIAL_20>", CONTROL),
]
PHI4 = [
    ("<|dummy_0|>", CONTROL),
    ("<|endoftext|>", CONTROL),
    ("<|im_start|>", CONTROL),
    ("<|dummy_1|>", CONTROL),
]


@pytest.mark.parametrize(
    "metadata, name",
    [
        (vocabulary(*QWEN, *QWEN_CODE, *PADS, **QWEN_IDS), "[PAD0]"),
        (vocabulary(*QWEN, *QWEN_CODE, **QWEN_IDS), "<|object_ref_start|>"),
        (vocabulary(*QWEN[:4], *QWEN_CODE, **QWEN_IDS), "<|fim_prefix|>"),
        (vocabulary(*QWEN[:4], *QWEN_CODE, fim_pre_token_id=4, **QWEN_IDS), "<|fim_prefix|>"),
        (vocabulary(*GEMMA, ("<unused0>", CONTROL), **GEMMA_IDS), "<unused0>"),
        (vocabulary(*GEMMA, ("<unused0>", UNUSED), **GEMMA_IDS), "<unused0>"),
        (vocabulary(*GEMMA, ("<unused0>", USER_DEFINED), **GEMMA_IDS), "<unused0>"),
        (vocabulary(*GEMMA, ("an <unused0>", NORMAL), ("<unused0>", NORMAL), **GEMMA_IDS), "<unused0>"),
        (vocabulary(*PHI3, eos_token_id=259, bos_token_id=1, unknown_token_id=0), "<|placeholder1|>"),
        (vocabulary(*PHI4, eos_token_id=1, bos_token_id=1, padding_token_id=0), "<|dummy_1|>"),
        (vocabulary(*GRANITE, eos_token_id=0, bos_token_id=0, unknown_token_id=0), "<gh_stars>"),
        (vocabulary(*LLAMA3, eos_token_id=1, bos_token_id=0), "<|reserved_special_token_0|>"),
        (vocabulary(*OLMO2, eos_token_id=0, bos_token_id=0), "<|extra_id_0|>"),
        (vocabulary(*TEKKEN, eos_token_id=2, bos_token_id=1, unknown_token_id=0), "<SPECIAL_20>"),
        (LLAMA2, "<unk>"),
    ],
    ids=[
        "qwen", "qwen without padding", "qwen with code alone", "qwen with a code role", "gemma control",
        "gemma unused", "gemma user-defined", "gemma normal", "phi3", "phi4", "granite", "llama3 and smollm3",
        "olmo2", "mistral tekken", "llama2",
    ],
)  # fmt: skip
def test_every_family_has_a_mask_token(metadata, name):
    token, reason = choose_mask_token(None, metadata)
    assert metadata["tokenizer.ggml.tokens"][token] == name
    assert name in reason


def test_a_token_that_the_chat_template_writes_is_no_mask():
    tokens = (("<|reserved_0|>", CONTROL), ("<|reserved_1|>", CONTROL))
    metadata = {**vocabulary(*tokens), "tokenizer.chat_template": "{{ '<|reserved_0|>' }}"}
    assert choose_mask_token(None, metadata)[0] == 1


def test_an_own_mask_token_that_is_none_or_ends_texts_is_passed_over():
    for own in (0, NO_TOKEN):
        metadata = vocabulary(("<eos>", CONTROL), ("<pad>", UNUSED), mask_token_id=own, eos_token_id=0)
        assert choose_mask_token(None, metadata)[0] == 1


@pytest.mark.parametrize(
    "requested, use", [(1, "the token that starts a text"), (2, "the end-of-text token")]
)
def test_a_mask_token_that_texts_need_is_refused_with_one_that_would_do(requested, use):
    with pytest.raises(
        UserError, match=rf"mask_token_id {requested}, '</?s>', is {use}: take 0, the unknown"
    ):
        choose_mask_token(requested, LLAMA2)


def test_a_mark_of_the_chat_template_is_refused_too():
    metadata = {
        **vocabulary(*TEKKEN, eos_token_id=2, bos_token_id=1),
        "tokenizer.chat_template": "{{ '[INST]' + messages[0].content }}",
    }
    with pytest.raises(UserError, match=r"'\[INST\]', is a mark of the chat template: take 4, the reserved"):
        choose_mask_token(3, metadata)


def test_a_refusal_says_what_to_do_where_the_vocabulary_has_no_free_token():
    metadata = vocabulary(("<eos>", CONTROL), ("a", NORMAL), eos_token_id=0)
    with pytest.raises(UserError, match="take one that your text does not contain"):
        choose_mask_token(0, metadata)
    assert choose_mask_token(1, metadata) == (1, "set in the config")
