"""The server from outside: a process of its own, asked over HTTP by clients kind and hostile."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyModel
from conversions import conversion, write

from ggml_diffusion.formats.model_check import read_model

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

# What the two editors send, by the sources of ggml-org/llama.vim (autoload/llama.vim at ae3cb00) and
# ggml-org/llama.vscode (src/llama-server.ts at 009e5b7): the fields and their kinds, with texts of our own.
CHUNKS = [{"text": "the mill\nthe wheel\n", "time": [4, 2], "filename": "notes.txt"}]
VIM = {
    "input_prefix": "the old mill\n",
    "input_suffix": "\nfor the village\n",
    "input_extra": CHUNKS,
    "prompt": "ground ",
    "n_predict": 128,
    "stop": [],
    "n_indent": 0,
    "top_k": 40,
    "top_p": 0.90,
    "stream": False,
    "samplers": ["top_k", "top_p", "infill"],
    "cache_prompt": True,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 250,
    "response_fields": ["content", "timings/prompt_n", "timings/predicted_ms", "truncated", "tokens_cached"],
}
VIM_WARM_UP = {
    **{"input_prefix": "", "input_suffix": "", "input_extra": CHUNKS, "prompt": "", "n_predict": 0},
    **{"temperature": 0.0, "stream": False, "samplers": [], "cache_prompt": True},
    **{"t_max_prompt_ms": 1, "t_max_predict_ms": 1, "response_fields": [""]},
}
VSCODE = {
    **{"input_prefix": "the old mill\n", "input_suffix": "\n", "input_extra": CHUNKS, "prompt": "ground "},
    **{"n_predict": 128, "top_k": 40, "top_p": 0.99, "stream": False, "cache_prompt": True},
    **{"samplers": ["top_k", "top_p", "infill"], "t_max_prompt_ms": 500, "t_max_predict_ms": 2500},
}


@dataclass
class Server:
    process: subprocess.Popen[str]
    port: int

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, str]:
        """Status and body; a body that is no bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request("GET" if body is None else "POST", path, data, headers or {})
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def json(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
        status, text = self.ask(path, body, headers)
        assert status == 200, text
        return json.loads(text)

    def events(self, path: str, body: Any) -> list[Any]:
        status, text = self.ask(path, {**body, "stream": True})
        assert status == 200, text
        data = [part.removeprefix("data: ") for part in text.split("\n\n") if part]
        return [json.loads(one) for one in data if one != "[DONE]"]


def start(base: Path, adapter: Path, *flags: str) -> Server:
    command = [sys.executable, "-m", "ggml_diffusion", "serve", str(base), str(adapter), "--port", "0"]
    command += ["--allow-other-base", "--threads", "1", *flags]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"}
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    found = re.search(r":(\d+) answers", line)
    assert found, line + process.stderr.read()
    return Server(process, int(found[1]))


@pytest.fixture(scope="module")
def base(tiny_model: TinyModel) -> Path:
    return tiny_model(L=1, C=32, H=2, G=1, F=32, type="Q4_0", context=2048)


def adapter_of(base: Path, folder: Path, context: str) -> Path:
    file = read_model(base)
    made = conversion(file)
    metadata = made.metadata.model_copy(update={"context": context, "mask_token_id": 3})
    return write(replace(made, metadata=metadata), folder / f"{context}.safetensors", file)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_of(base, tmp_path_factory.mktemp("run"), "frozen")


@pytest.fixture(scope="module")
def server(base: Path, adapter: Path) -> Iterator[Server]:
    started = start(base, adapter)
    yield started
    started.process.kill()
    started.process.communicate()


def error_of(answer: tuple[int, str]) -> tuple[int, str | None]:
    """Status and field of an error in OpenAI's form."""
    error = json.loads(answer[1])["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return answer[0], error["param"]


def test_what_a_client_asks_first(server):
    assert server.json("/health") == {"status": "ok"}
    assert server.json("/v1/models")["data"][0]["id"] == "frozen"
    assert server.json("/props")["default_generation_settings"]["n_ctx"] == 2048


def test_a_seed_gives_the_same_text_whole_and_in_pieces(server):
    body = {"prompt": "the mill", "max_tokens": 40, "seed": 5}
    whole = server.json("/v1/completions", body)
    assert whole["usage"]["completion_tokens"] <= 40 and whole["seed"] == 5
    events = server.events("/v1/completions", {**body, "stream_options": {"include_usage": True}})
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == whole["choices"][0]["text"] != ""
    assert events[-1] == {**events[-1], "choices": [], "usage": whole["usage"]}
    states = [event["denoising"] for event in events if "denoising" in event]
    masks = [state["tokens"].count(None) for state in states]
    assert masks == sorted(masks, reverse=True) and 0 < masks[0] < 40 and len(states[0]["tokens"]) == 40


def test_the_text_ends_before_a_stop_string(server):
    body = {"prompt": "the mill", "max_tokens": 40, "seed": 5}
    text = server.json("/v1/completions", body)["choices"][0]["text"]
    stop = text[len(text) // 2 :][:2]
    stopped = server.json("/v1/completions", {**body, "stop": stop})["choices"][0]
    assert stopped["text"] == text[: text.index(stop)] and stopped["finish_reason"] == "stop"
    pieces = [e["choices"][0]["text"] for e in server.events("/v1/completions", {**body, "stop": [stop]})]
    assert "".join(pieces) == stopped["text"]


def test_pieces_of_a_text_that_masks_again_are_right_too(server):
    body = {"prompt": "the", "max_tokens": 16, "seed": 1, "remasking": 0.5, "block_length": 0, "steps": 12}
    pieces = [e["choices"][0]["text"] for e in server.events("/v1/completions", body)]
    assert "".join(pieces) == server.json("/v1/completions", body)["choices"][0]["text"]


def test_a_prompt_that_is_too_long_loses_its_beginning(server):
    answer = server.json("/v1/completions", {"prompt": "the mill " * 3000, "max_tokens": 4})
    assert answer["truncated"] and answer["tokens_dropped"] > 0
    assert answer["usage"]["total_tokens"] <= 2048


def test_what_llama_vim_sends(server):
    answer = server.json("/infill", VIM)
    assert set(answer) == set(VIM["response_fields"]) and answer["truncated"] is False
    assert server.json("/infill", VIM_WARM_UP) == {}


def test_what_llama_vscode_sends(server):
    answer = server.json("/infill", VSCODE)
    assert isinstance(answer["content"], str) and answer["timings"]["predicted_n"] > 0


def test_a_suffix_is_filled_up_to_and_with_a_given_length(server):
    body = {"prompt": "the old", "suffix": " for the village", "seed": 1}
    assert server.json("/v1/completions", {**body, "max_tokens": 3})["usage"]["completion_tokens"] <= 3
    assert server.json("/v1/completions", {**body, "length": 7})["usage"]["completion_tokens"] <= 7
    assert error_of(server.ask("/v1/completions", {**body, "steps": 3})) == (400, "steps")


def test_the_page_fills_holes_and_leaves_the_rest(server):
    events = server.events("/fill", {"text": "the ___ mill <mask:2>, naïve 😀"})
    done = events[-1]["done"]
    assert done["text"] == f"the {done['holes'][0]} mill {done['holes'][1]}, naïve 😀"
    assert all(set(event["state"]["holes"]) <= {"0", "1"} for event in events[:-1]) and len(events) > 2
    assert error_of((200, json.dumps(server.events("/fill", {"text": "no hole"})[0])))[1] == "text"
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", "/")
    page = connection.getresponse()
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert not re.search(r"(?:src|href)=\"(?!/page|data:)", page.read().decode())


@pytest.mark.parametrize(
    "field, value",
    [
        *(("n", 2), ("logprobs", 1), ("echo", True), ("tools", [{}]), ("logit_bias", {"1": 2})),
        *(("temperature", -1), ("top_p", 0), ("max_tokens", 10**9), ("steps", 10**9), ("prompt", 3)),
        *(("stop", ["x"] * 17), ("seed", 2**63), ("order", "sideways"), ("max_tokens", 0)),
    ],
)
def test_what_cannot_be_done_is_refused_by_the_name_of_the_field(server, field, value):
    status, param = error_of(server.ask("/v1/completions", {"prompt": "the", field: value}))
    assert (status, param) == (400, field)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff", b'{"prompt": NaN}', b'{"temperature": 1e999}', b"[" * 100_000]
)
def test_a_body_that_is_no_request(server, body):
    assert error_of(server.ask("/v1/completions", body))[0] == 400


def test_half_of_a_surrogate_pair(server):
    assert error_of(server.ask("/v1/completions", b'{"prompt": "\\ud800"}'))[0] == 400


def test_a_huge_body_is_refused_before_it_is_read(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        client.sendall(b"POST /infill HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n")
        assert b" 413 " in client.recv(1000)
    assert server.ask("/infill", b" " * ((4 << 20) + 1))[0] == 413


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}])
def test_other_sites_are_not_answered(server, headers):
    assert error_of(server.ask("/v1/models", None, headers))[0] == 403
    assert error_of(server.ask("/infill", VIM, headers))[0] == 403


def test_no_other_path_is_opened(server):
    for path in ("/../pyproject.toml", "/page.html", "/%2e%2e/requests.py", "/requests.py"):
        assert error_of(server.ask(path))[0] == 404


def test_twenty_at_once_are_all_answered(server):
    statuses: list[int] = []

    def ask() -> None:
        statuses.append(server.ask("/infill", VSCODE)[0])

    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 20


@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_goes_makes_way_for_the_next(server, streams):
    # One at a time: the answer below would come after the long text, if that were still written.
    body = json.dumps({"prompt": "the", "max_tokens": 1900, "stream": streams, "block_length": 0}).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
            + body
        )
        time.sleep(0.3)
    server.json("/v1/completions", {"prompt": "the", "max_tokens": 1})
    assert server.process.poll() is None


def test_a_key_is_asked_for(base, adapter):
    server = start(base, adapter, "--api-key", "sesame")
    try:
        assert error_of(server.ask("/v1/models"))[0] == 401
        assert error_of(server.ask("/v1/models", None, {"Authorization": "Bearer sesam"}))[0] == 401
        assert server.ask("/v1/models", None, {"Authorization": "Bearer sesame"})[0] == 200
        assert server.ask("/health")[0] == 200
    finally:
        server.process.kill()
        server.process.communicate()


def test_an_interrupt_ends_it_while_a_text_is_written(base, adapter):
    server = start(base, adapter)
    asked = threading.Thread(
        target=server.ask, args=("/v1/completions", {"prompt": "the", "max_tokens": 1900, "block_length": 0})
    )
    asked.start()
    time.sleep(0.5)
    server.process.send_signal(signal.SIGINT)
    _, said = server.process.communicate(timeout=20)
    asked.join()
    assert (server.process.returncode, said) == (130, "")


def test_an_interrupt_ends_it_while_a_body_is_awaited(base, adapter):
    server = start(base, adapter)
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        client.sendall(b"POST /infill HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
        server.json("/health")
        server.process.send_signal(signal.SIGINT)
        _, said = server.process.communicate(timeout=20)
    assert (server.process.returncode, said) == (130, "")


def test_a_port_in_use_is_one_line(server, base, adapter):
    command = [sys.executable, "-m", "ggml_diffusion", "serve", str(base), str(adapter)]
    run = subprocess.run([*command, "--port", str(server.port)], capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "--port" in run.stderr
    run = subprocess.run([*command, "--host", "0.0.0.0"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and "--api-key" in run.stderr


def test_without_the_extra_it_says_what_to_install(base, adapter):
    program = (
        "import importlib.util, sys; found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'uvicorn' else found(name, *a)\n"
        "from ggml_diffusion.app.cli.main import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, "serve", str(base), str(adapter)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert run.stderr == "error: uvicorn missing: pip install 'ggml-diffusion[server]'\n"


def test_the_openai_package(server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)
    body = {"model": "any", "prompt": "the mill", "max_tokens": 12, "seed": 3}
    whole = client.completions.create(**body)
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**body, stream=True)]
    assert "".join(pieces) == whole.choices[0].text
    assert [model.id for model in client.models.list()] == ["frozen"]
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**body, n=2)
    assert refused.value.param == "n"


def test_chat_with_smollm2(smollm2_path, tmp_path):
    server = start(smollm2_path, adapter_of(smollm2_path, tmp_path, "frozen"))
    try:
        messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Say é."}]
        body = {"messages": messages, "max_tokens": 8, "seed": 2}
        whole = server.json("/v1/chat/completions", body)
        pieces = [e["choices"][0]["delta"]["content"] for e in server.events("/v1/chat/completions", body)]
        assert "".join(pieces) == whole["choices"][0]["message"]["content"]
        too_long = {**body, "messages": [{"role": "user", "content": "word " * 9000}]}
        assert error_of(server.ask("/v1/chat/completions", too_long))[0] == 400
        assert error_of(server.ask("/v1/chat/completions", {**body, "tools": [{}]})) == (400, "tools")
    finally:
        server.process.kill()
        server.process.communicate()


def test_the_examples_of_the_documentation(server):
    text = (Path(__file__).parents[2] / "docs" / "server.md").read_text(encoding="utf-8")
    commands = re.search(r"```bash\n(.*?)```", text, re.DOTALL)[1].splitlines()
    assert len(commands) == 5
    for command in commands:
        path, body = re.fullmatch(r"curl -sN? http://127\.0\.0\.1:8012(\S+) -d '(.*)'", command).groups()
        status, answer = server.ask(path, body.encode())
        assert status == 200 and '"error"' not in answer, answer
