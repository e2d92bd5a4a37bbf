"use strict";
// Sends the text, and shows each hole as it is denoised. Everything is put in as text, never as HTML.
const byId = (id) => document.getElementById(id);
const marker = /_{3,}|\[\[(?:\.\.\.|\u2026)\]\]|<mask:[0-9]{1,18}>/g;
const announceEveryMs = 2000;
let running = null;
let filled = "";

function say(text, isError = false) {
  const status = byId("status");
  status.classList.toggle("error", isError);
  status.textContent = text;
}

function drawHole(element, tokens) {
  const before = element.children.length;
  element.replaceChildren(...tokens.map((token, index) => {
    const span = document.createElement("span");
    span.className = token === null ? "mask" : "token";
    span.textContent = token === null ? "\u2591\u2591" : token;
    if (index < before) span.style.animation = "none";
    return span;
  }));
}

function lay(text) {
  const result = byId("result");
  const holes = [];
  result.replaceChildren();
  let at = 0;
  for (const found of text.matchAll(marker)) {
    result.append(text.slice(at, found.index));
    const hole = document.createElement("span");
    hole.className = "hole";
    drawHole(hole, [null]);
    result.append(hole);
    holes.push(hole);
    at = found.index + found[0].length;
  }
  result.append(text.slice(at));
  return holes;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part.slice("data: ".length));
  }
}

async function refusal(response) {
  const body = await response.json().catch(() => null);
  return body && body.error ? body.error.message : `the server answered ${response.status}`;
}

async function fill() {
  if (running) return;
  running = new AbortController();
  // Not disabled: a button that has the focus would lose it.
  byId("fill").setAttribute("aria-disabled", "true");
  byId("copy").disabled = true;
  byId("stop").disabled = false;
  filled = "";
  const text = byId("text").value;
  const holes = lay(text);
  say("Filling\u2026");
  let announced = performance.now();
  let isDone = false;
  try {
    const headers = { "Content-Type": "application/json" };
    if (byId("key").value) headers.Authorization = `Bearer ${byId("key").value}`;
    const body = JSON.stringify({ text });
    const response = await fetch("/fill", { method: "POST", headers, body, signal: running.signal });
    if (!response.ok) {
      if (response.status === 401) byId("keyrow").hidden = false;
      throw new Error(await refusal(response));
    }
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.state) {
        for (const [index, tokens] of Object.entries(event.state.holes)) drawHole(holes[index], tokens);
        if (performance.now() - announced > announceEveryMs) {
          announced = performance.now();
          say(`Filling: ${event.state.done} of ${event.state.of} holes are done.`);
        }
      }
      if (event.done) {
        isDone = true;
        filled = event.done.text;
        event.done.holes.forEach((hole, index) => { holes[index].textContent = hole; });
        say(holes.length === 1 ? "Done: 1 hole is filled." : `Done: ${holes.length} holes are filled.`);
      }
    }
    if (!isDone) throw new Error("the server has gone");
  } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else say(`Not filled: ${error.message}`, true);
  } finally {
    running = null;
    byId("fill").removeAttribute("aria-disabled");
    if (document.activeElement === byId("stop")) byId("fill").focus();
    byId("stop").disabled = true;
    byId("copy").disabled = filled === "";
  }
}

async function copy() {
  try {
    await navigator.clipboard.writeText(filled);
    say("Copied.");
  } catch {
    const range = document.createRange();
    range.selectNodeContents(byId("result"));
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    say("Selected: copy it with Ctrl+C.");
  }
}

byId("form").addEventListener("submit", (event) => { event.preventDefault(); fill(); });
byId("stop").addEventListener("click", () => { if (running) running.abort(); });
byId("copy").addEventListener("click", copy);
byId("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); fill(); }
});
