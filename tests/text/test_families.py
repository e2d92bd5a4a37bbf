"""Each family's vocabulary and chat template: prompts, answers and their ends, BOS, control and mask tokens.

The texts are written out by hand, as the families document their formats; their tokens are those that
llama.cpp gives such a text, with the names of control tokens read as these.
"""

import json
from functools import cache

import llama_cpp
import pytest
from tiny_vocabularies import FAMILIES

from ggml_diffusion.errors import UserError
from ggml_diffusion.formats.model_file import read_gguf
from ggml_diffusion.text.chat import Chat
from ggml_diffusion.text.examples import ExampleReader
from ggml_diffusion.text.loader import TextDataLoader
from ggml_diffusion.text.special_tokens import choose_mask_token
from ggml_diffusion.text.tokenizer import Tokenizer

SYSTEM = "<|im_start|>system\nYou help.<|im_end|>\n"
DATE = "<|start_of_role|>system<|end_of_role|>Date: July 26, 2024.<|end_of_text|>\n"
LLAMA_HEAD = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul 2024<|eot_id|>"

# For messages (user "in the sand", assistant "on the sea", user "and?", assistant " So it is. "): the prompt,
# the answer up to where it ends, and the mask token.
EXPECTED = {
    "qwen2.5": (
        SYSTEM + "<|im_start|>user\nin the sand<|im_end|>\n<|im_start|>assistant\non the sea<|im_end|>\n"
        "<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n",
        " So it is. <|im_end|>",
        "[PAD0]",
    ),
    "qwen3": (
        "<|im_start|>user\nin the sand<|im_end|>\n<|im_start|>assistant\non the sea<|im_end|>\n"
        "<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n",
        "<think>\n\n</think>\n\n So it is. <|im_end|>",
        "[PAD0]",
    ),
    "gemma3": (
        "<bos><start_of_turn>user\nin the sand<end_of_turn>\n<start_of_turn>model\non the sea<end_of_turn>\n"
        "<start_of_turn>user\nand?<end_of_turn>\n<start_of_turn>model\n",
        "So it is.<end_of_turn><eos>",
        "<unused0>",
    ),
    "phi3": (
        "<|user|>\nin the sand<|end|>\n<|assistant|>\non the sea<|end|>\n"
        "<|user|>\nand?<|end|>\n<|assistant|>\n",
        " So it is. <|end|><|endoftext|>",
        "<|placeholder1|>",
    ),
    "phi4": (
        "<|im_start|>user<|im_sep|>in the sand<|im_end|><|im_start|>assistant<|im_sep|>on the sea<|im_end|>"
        "<|im_start|>user<|im_sep|>and?<|im_end|><|im_start|>assistant<|im_sep|>",
        " So it is. <|im_end|>",
        "<|dummy_1|>",
    ),
    "granite3": (
        DATE + "<|start_of_role|>user<|end_of_role|>in the sand<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>on the sea<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>and?<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
        " So it is. <|end_of_text|>",
        "<gh_stars>",
    ),
    "smollm3": (
        "<|im_start|>system\nToday: 26 July 2024<|im_end|>\n<|im_start|>user\nin the sand<|im_end|>\n"
        "<|im_start|>assistant\non the sea<|im_end|>\n"
        "<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n",
        " So it is. <|im_end|>",
        "<|reserved_special_token_0|>",
    ),
    "llama3": (
        LLAMA_HEAD + "<|start_header_id|>user<|end_header_id|>\n\nin the sand<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\non the sea<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nand?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "So it is.<|eot_id|>",
        "<|reserved_special_token_0|>",
    ),
    "mistral": (
        "<s>[INST] in the sand [/INST] on the sea</s>[INST] and? [/INST]",
        "  So it is. </s>",
        "[control_8]",
    ),
    "olmo2": (
        "<|endoftext|><|user|>\nin the sand\n<|assistant|>\non the sea\n<|user|>\nand?\n<|assistant|>\n",
        " So it is. <|endoftext|>",
        "<|extra_id_0|>",
    ),
}
START = {"gemma3": "<bos>", "llama3": "<|begin_of_text|>", "mistral": "<s>"}
TALK = (("user", "in the sand"), ("assistant", "on the sea"), ("user", "and?"), ("assistant", " So it is. "))


def messages(*turns):
    return [{"role": role, "content": content} for role, content in turns]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def path(family, tiny_model):
    return tiny_model(tokenizer=family, V=512, L=1)


@pytest.fixture(scope="module")
def tokenizer(path) -> Tokenizer:
    return Tokenizer.from_gguf(path)


@cache
def llama_of(path) -> llama_cpp.Llama:
    return llama_cpp.Llama(str(path), vocab_only=True, verbose=False)


def tokens_of_llama_cpp(path, text: str, *, add_bos: bool = False, special: bool = True) -> list[int]:
    return llama_of(path).tokenize(text.encode(), add_bos=add_bos, special=special)


def read(tokenizer, *turns):
    with ExampleReader(tokenizer) as reader:
        return reader.read({"messages": messages(*turns)})


def test_the_mask_token_is_one_that_no_text_contains(family, path, tokenizer):
    token, _ = choose_mask_token(None, read_gguf(path).metadata)
    name = tokenizer.token_text(token) or f"[PAD{token - 278}]"  # llama.cpp writes unused tokens as nothing
    assert name == EXPECTED[family][2]
    assert token not in tokenizer.encode(EXPECTED[family][2])


def test_messages_have_the_tokens_that_llama_cpp_gives_the_familys_text(family, path, tokenizer):
    prompt, answer, _ = EXPECTED[family]
    example = read(tokenizer, *TALK)
    whole = tokens_of_llama_cpp(path, prompt + answer)
    assert [*example.prompt, *example.response] == whole
    assert example.prompt.tolist() == tokens_of_llama_cpp(path, prompt)
    assert example.response[-1] == tokenizer.eos_id


def test_a_prompt_to_be_answered_is_the_one_that_was_trained(family, tokenizer):
    with Chat(tokenizer.open_chat_template(), tokenizer) as chat:
        opening = chat.opening(messages(*TALK[:3]))
    assert opening.tolist() == read(tokenizer, *TALK).prompt.tolist()


def test_names_of_control_tokens_in_messages_are_plain_text(family, tokenizer):
    """Every token of such a text is one of plain text, and the template's own are as many as without."""
    names = [*tokenizer.control_tokens, *(name + name[1:] for name in tokenizer.control_tokens)]
    assert len(names) > 8
    talk = (*TALK[:2], ("user", "a" + "b".join(names) + "c"), ("assistant", "d" + "e".join(names) + "f"))
    example, plain = read(tokenizer, *talk), read(tokenizer, *TALK)
    for part, of_plain in ((example.prompt, plain.prompt), (example.response, plain.response)):
        assert [t for t in part if tokenizer.is_control(int(t))] == [
            t for t in of_plain if tokenizer.is_control(int(t))
        ]
    assert "b".join(names) in tokenizer.decode(example.prompt)
    assert "e".join(names) in tokenizer.decode(example.response)


def test_a_name_that_is_plain_text_changes_no_other_token(family, path, tokenizer):
    """The way around such names cuts the rest of the text as llama.cpp does, blanks included."""
    prompt, answer, _ = EXPECTED[family]
    mark = "\U000f0000"
    text = f"{prompt} {answer} {answer}  x"
    marked = tokenizer.encode(text + mark, special=True, mark=mark)
    assert marked.tolist() == tokens_of_llama_cpp(path, text)


def test_documents_and_prompts_begin_as_the_base_wants_it(family, path, tokenizer, tmp_path):
    start = [] if family not in START else [tokenizer.control_tokens[START[family]]]
    assert tokenizer.start_id == (start[0] if start else None)
    documents = ["in the sand", "on the sea and on"]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    loader = TextDataLoader(file, tokenizer, 256, 1)
    expected = [
        [*tokens_of_llama_cpp(path, text, add_bos=True, special=False), tokenizer.eos_id]
        for text in documents
    ]
    assert [expected[0][0]] == start or not start
    assert loader.sequences[0].tolist() == expected[0] + expected[1]
    file.write_text(json.dumps({"prompt": "in the s", "completion": "and"}) + "\n")
    loader = TextDataLoader(file, tokenizer, 256, 1)
    assert loader.sequences[0].tolist() == expected[0]


def test_an_answers_text_comes_back(family, tokenizer):
    example = read(tokenizer, *TALK)
    continued = tokenizer.is_text(int(example.prompt[-1]))
    text = tokenizer.decode(example.response, continued=continued)
    assert text.removeprefix("<think>\n\n</think>\n\n").strip() == "So it is."


def test_gemma_refuses_two_turns_of_one_role_and_folds_the_system_into_the_first(tiny_model):
    tokenizer = Tokenizer.from_gguf(tiny_model(tokenizer="gemma3", V=512, L=1))
    with pytest.raises(UserError, match="Roles must alternate"):
        read(tokenizer, ("user", "a"), ("user", "b"), ("assistant", "c"))
    example = read(tokenizer, ("system", "Be short."), ("user", "in"), ("assistant", "on"))
    text = tokenizer.decode(example.prompt, special=True)
    assert text == "<bos><start_of_turn>user\nBe short.\n\nin<end_of_turn>\n<start_of_turn>model\n"


def test_qwen3_keeps_the_thoughts_of_the_last_answer_only(tiny_model):
    tokenizer = Tokenizer.from_gguf(tiny_model(tokenizer="qwen3", V=512, L=1))
    thought = "<think>\nhm\n</think>\n\n"
    example = read(
        tokenizer, ("user", "in"), ("assistant", thought + "on"), ("user", "a"), ("assistant", thought + "b")
    )
    assert "hm" not in tokenizer.decode(example.prompt)
    assert tokenizer.decode(example.response) == thought + "b"
