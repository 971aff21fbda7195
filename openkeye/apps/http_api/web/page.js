// The page at /: a video from this machine, a question, and the answer as it comes.

import { EvidenceTimeline } from "/web/evidence.js";
import { splitTimes } from "/web/times.js";

const byId = (id) => document.getElementById(id);
const player = byId("player");
const evidence = new EvidenceTimeline(player, jumpTo);

let model = null; // what /v1/models says
let video = null; // {name, dataUrl}
let running = null; // AbortController of the answer under way

function tell(text, isWrong = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("wrong", isWrong);
}

function headers() {
  const key = byId("key").value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function reasonOf(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `status ${response.status}`;
  }
}

async function loadModel() {
  if (model) return;
  const response = await fetch("/v1/models", { headers: headers() });
  if (response.status === 401) {
    byId("key").closest("details").open = true;
    throw new Error("This server asks for an API key: give it under Settings.");
  }
  if (!response.ok) throw new Error(await reasonOf(response));
  model = (await response.json()).data[0];
  byId("model").textContent = `Ask ${model.id} about a video.`;
}

function readAsDataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}

async function takeFile(file) {
  byId("file-name").textContent = file.name;
  byId("drop").classList.add("has-video");
  evidence.hide();
  if (player.src) URL.revokeObjectURL(player.src);
  player.src = URL.createObjectURL(file);
  player.hidden = false;
  byId("player-note").hidden = true;
  video = null;
  const url = player.src;
  const dataUrl = await readAsDataUrl(file);
  // (the last of several that were chosen in a hurry)
  if (player.src === url) video = { name: file.name, dataUrl };
}

async function takeSample() {
  const response = await fetch("/web/demo.mp4");
  if (!response.ok) throw new Error(await reasonOf(response));
  await takeFile(new File([await response.blob()], "demo.mp4", { type: "video/mp4" }));
  if (!byId("question").value) byId("question").value = byId("question").placeholder;
}

function jumpTo(seconds) {
  player.currentTime = seconds;
  player.scrollIntoView({ block: "nearest" });
}

function showAnswer(text) {
  const nodes = splitTimes(text).map((piece) => {
    if (piece.seconds === null || !video) return document.createTextNode(piece.text);
    const button = document.createElement("button");
    button.type = "button";
    button.className = "time";
    button.textContent = piece.text;
    button.setAttribute("aria-label", `${piece.text}: show this moment`);
    button.addEventListener("click", () => jumpTo(piece.seconds));
    return button;
  });
  byId("answer").replaceChildren(...nodes);
}

function requestBody() {
  const number = (id) => (byId(id).value === "" ? undefined : Number(byId(id).value));
  const parts = [{ type: "text", text: byId("question").value.trim() }];
  if (video) {
    const url = video.dataUrl.startsWith("data:video/") ? video.dataUrl : video.dataUrl.replace(/^data:[^;,]*/, "data:video/mp4");
    parts.unshift({ type: "video_url", video_url: { url, start: number("start"), end: number("end"), fps: number("fps") } });
  }
  const options = { stream: true, stream_options: { include_usage: true }, max_tokens: number("max-tokens"), evidence: Boolean(video) };
  return JSON.stringify({ model: model.id, messages: [{ role: "user", content: parts }], ...options });
}

/** The data of each server-sent event of a response, parsed, up to [DONE]. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

/** What grows or goes above the answer must not move it away from who reads it (browsers that do this by themselves are told not to). */
function keepAnswerInPlace(change) {
  const place = () => byId("reply").getBoundingClientRect().top;
  const before = place();
  change();
  scrollBy({ top: place() - before, behavior: "instant" });
}

function showEvidence(chunk) {
  const url = player.error ? null : player.src;
  keepAnswerInPlace(() => evidence.show(chunk.evidence[0], chunk.openkeye.intervals_seconds, url));
}

async function readAnswer(response, asked) {
  let answer = "";
  let reasoning = "";
  let note = "";
  for await (const chunk of eventsOf(response)) {
    if (chunk.error) throw new Error(chunk.error.message);
    const choice = chunk.choices[0];
    if (choice?.delta.reasoning_content) {
      reasoning += choice.delta.reasoning_content;
      byId("reasoning").hidden = false;
      byId("reasoning-text").textContent = reasoning;
    }
    if (choice?.delta.content) {
      if (!answer) byId("reply").scrollIntoView({ block: "nearest" });
      answer += choice.delta.content;
      showAnswer(answer);
    }
    if (chunk.openkeye) {
      const { num_frames: frames, notes, finish_reason: reason } = chunk.openkeye;
      const cut = reason === "stop" ? [] : ["the answer was cut"];
      // (another video may have been chosen since)
      if (chunk.evidence?.length && video === asked) showEvidence(chunk);
      note = [...(frames ? [`${frames} frames looked at`] : []), ...cut, ...notes].join("; ");
    }
    if (chunk.usage) tell([note, `${chunk.usage.prompt_tokens} tokens read, ${chunk.usage.completion_tokens} written`].filter(Boolean).join("; "));
  }
}

async function ask() {
  if (running) return;
  running = new AbortController();
  byId("ask").disabled = true;
  byId("stop").disabled = false;
  byId("answer").replaceChildren();
  byId("reply").setAttribute("aria-busy", "true");
  byId("reasoning").hidden = true;
  keepAnswerInPlace(() => evidence.hide());
  try {
    if (player.src && !video) throw new Error("The video is still being read; ask again in a moment.");
    tell(video ? "Looking at the video…" : "Thinking…");
    await loadModel();
    const asked = video;
    const body = requestBody();
    if (body.length > model.max_body_bytes) {
      throw new Error(`The video is too large to send: this server takes ${Math.floor(model.max_body_bytes / 1.4e6)} MB.`);
    }
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { ...headers(), "Content-Type": "application/json" },
      body,
      signal: running.signal,
    });
    if (!response.ok) throw new Error(await reasonOf(response));
    await readAnswer(response, asked);
  } catch (error) {
    if (error.name === "AbortError") tell("Stopped.");
    else tell(error.message, true);
  } finally {
    running = null;
    byId("reply").setAttribute("aria-busy", "false");
    byId("ask").disabled = false;
    byId("stop").disabled = true;
  }
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
byId("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("form").requestSubmit();
  }
});
byId("stop").addEventListener("click", () => running?.abort());
byId("key").addEventListener("change", () => loadModel().then(() => tell(""), (error) => tell(error.message, true)));
byId("file").addEventListener("change", () => {
  const [file] = byId("file").files;
  if (file) takeFile(file).catch((error) => tell(error.message, true));
});
byId("sample").addEventListener("click", () => takeSample().catch((error) => tell(error.message, true)));
player.addEventListener("error", () => {
  byId("player-note").hidden = false;
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  // On the whole page: a video dropped beside the box would otherwise replace the page.
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    byId("drop").classList.toggle("over", kind === "dragover");
    const [file] = kind === "drop" ? event.dataTransfer.files : [];
    if (file) {
      byId("file").files = event.dataTransfer.files;
      takeFile(file).catch((error) => tell(error.message, true));
    }
  });
}
loadModel().catch((error) => tell(error.message, true));
