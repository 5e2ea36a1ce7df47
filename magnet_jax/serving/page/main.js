// The form, what it asks for, and what this browser remembers of it.

import { Card, ended, say, soundOf, titleOf } from "./cards.js";
import { Editor } from "./editor.js";
import { about } from "./about.js";
import { stop } from "./sound.js";
import { $, ask, h, memory, round } from "./tools.js";

const MOST = 60; // jobs that are remembered
const EVERY = 400; // milliseconds between two looks at what goes on
const EXAMPLES = [
  "A calm, gentle melody played on the harp",
  "A fast and lively fiddle tune in D major",
  "A slow, solemn piece on the church organ in G minor",
];

const model = (await told("/v1/models")).data[0];
const steps = model.decode.steps ?? null; // of each codebook; none of a model that has no steps
let entries = memory.get("history", []); // { id, kind, request, at, group, star }, the newest first
let tab = "create";
let start = null; // what loops begin with
const cards = [];
const live = new Map(); // parts of cards by the ids of their jobs

/** What the page cannot do without: where the server does not tell it, the page says so. */
async function told(path) {
  try {
    return await ask(path);
  } catch (error) {
    $("failed").textContent = `${error.message} Load the page again later.`;
    throw error;
  }
}

// --- tabs -----------------------------------------------------------------------------------------

const tabs = [...document.querySelectorAll("[role=tab]")];
const possible = {
  edit: model.makes.includes("inpaint"), loop: model.makes.includes("loop"), drafts: steps !== null,
};
for (const button of tabs) {
  button.hidden = possible[button.dataset.tab] === false;
  button.addEventListener("click", () => open(button.dataset.tab));
  button.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    const shown = tabs.filter((other) => !other.hidden);
    const next = shown.at((shown.indexOf(button) + by) % shown.length);
    open(next.dataset.tab);
    next.focus();
  });
}

function open(name) {
  if (!tabs.some((button) => button.dataset.tab === name && !button.hidden)) name = "create";
  const last = tab;
  tab = name;
  for (const button of tabs) {
    const is = button.dataset.tab === tab;
    button.setAttribute("aria-selected", is);
    button.tabIndex = is ? 0 : -1;
  }
  for (const panel of document.querySelectorAll("[data-panel]")) panel.hidden = panel.dataset.panel !== tab;
  for (const part of document.querySelectorAll("[data-only]")) part.hidden = !part.dataset.only.split(" ").includes(tab);
  for (const part of document.querySelectorAll("[data-not]")) part.hidden = part.dataset.not === tab;
  for (const id of ["common", "text-part"]) $(id).hidden = tab === "about";
  $("make").textContent = { edit: "Edit", loop: "Make a loop", drafts: "Make drafts" }[tab] ?? "Make";
  $("failed").textContent = "";
  if (tab === "about") {
    const asked = last === "about" ? "create" : last;
    $("panel-about").replaceChildren(...about(model, kindOf(asked), requestOf(asked, true)));
  }
  history.replaceState(null, "", `#${tab}`);
}

// --- the form ---------------------------------------------------------------------------------------

const number = (id) => ($(id).value.trim() === "" ? undefined : Number($(id).value));
const editor = new Editor(model, {
  failed: (error) => ($("failed").textContent = error.message),
  text: (text) => ($("input").value = text ?? ""),
});

function qualityOf() {
  const own = $("steps").value.trim();
  if (own) return { steps: own.split(",").map(Number) };
  return $("quality").value ? { preset: $("quality").value } : {};
}
$("quality").addEventListener("input", () => ($("steps").value = "")); // which would win over it

const kindOf = (which) => ({ edit: editor.kind, loop: "loop" })[which] ?? "generate";

/** The body of a request as the form says; raises what is missing, unless it is an example. */
function requestOf(which, example = false) {
  const guidance = [number("guidance0"), number("guidance1")];
  const body = {
    ...(steps ? qualityOf() : {}),
    seed: number("seed"), temperature: number("temperature"), top_p: number("top_p"),
    lufs: which === "edit" ? undefined : number("lufs") ?? null, confidence: $("confidence").checked || undefined,
    deterministic: $("deterministic").checked || undefined, async: true,
    negative_prompt: $("negative").value || undefined,
  };
  if (guidance.some((one) => one !== undefined)) {
    guidance[0] ??= model.decode.max_guidance ?? model.decode.guidance;
    body.guidance = guidance.filter((one) => one !== undefined);
  }
  const text = $("input").value;
  const later = laterOf();
  if (later.length) body.timeline = [[0, text], ...later];
  else if (text || which !== "edit") body.input = text;
  if (which === "edit") return { ...body, ...editor.request(example) };
  if (which === "loop") {
    const begun = start ? { start_job: start, start_seconds: number("start-seconds") } : {};
    return { ...body, bpm: number("bpm"), bars: number("bars"), beats_per_bar: number("beats"), ...begun };
  }
  const long = { windows: $("windows").value };
  if (which === "drafts") return { ...body, ...draft(body), seconds: number("seconds"), ...long };
  return { ...body, seconds: number("seconds"), n: number("n"), preview: steps !== null, ...long };
}

/** Texts from some second on, which follow the first one. */
const laterOf = () => [...$("later").children].map((row) => {
  const [from, text] = row.querySelectorAll("input");
  return [Number(from.value), text.value];
}).sort((a, b) => a[0] - b[0]);

function addLater(from, text) {
  const row = h("li", {}, "From",
    h("input", { type: "number", min: 0.1, step: "any", required: true, klass: "short", "aria-label": "Seconds from which on it says", value: from }),
    "s:", h("input", { type: "text", required: true, "aria-label": "Text from there on", value: text }),
    h("button", { type: "button", "aria-label": "Remove this text", onclick: () => row.remove() }, "✕"));
  $("later").append(row);
  return row;
}
$("add-later").addEventListener("click", () => {
  const last = laterOf().at(-1)?.[0] ?? 0;
  addLater(round(last + Math.min(5, number("seconds") / 2)), "").querySelector("[type=text]").focus();
});

/** The same first codebook as that of the chosen quality, and a step for each other one. */
function draft({ preset, steps: own }) {
  const [first] = own ?? model.presets[preset] ?? steps;
  return { preset: undefined, steps: steps.map((_, k) => (k ? 1 : first)) };
}

async function submit(kind, request, more = {}) {
  const body = JSON.parse(JSON.stringify(request)); // without what is undefined
  const view = await ask(`/v1/audio/${kind}`, { method: "POST", body });
  return [{ id: view.id, kind, request: { ...body, seed: view.request.seed }, at: Date.now(), ...more }, view];
}

async function make(kind, request) {
  add([await submit(kind, request)]);
}

/** Drafts are jobs of their own, with seeds that follow each other: each is made again by its seed. */
async function makeDrafts() {
  const group = crypto.randomUUID?.() ?? `${Date.now()}`;
  const first = number("seed") ?? Math.floor(Math.random() * 2 ** 30);
  const chosen = qualityOf();
  const quality = chosen.preset === "draft" ? { preset: "balanced" } : chosen; // a draft is refined to more
  const made = [];
  try {
    for (let i = 0; i < number("drafts"); i++) {
      made.push(await submit("generate", { ...requestOf("drafts"), seed: first + i }, { group, quality }));
    }
  } finally {
    if (made.length) add(made);
  }
}

$("form").noValidate = true; // what is hidden is not asked for
$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  for (const field of $("form").elements) {
    if (field.closest("[hidden]") || field.checkValidity()) continue;
    const inner = field.closest("details");
    if (inner) inner.open = true;
    field.reportValidity();
    return;
  }
  $("failed").textContent = "";
  $("make").disabled = true;
  try {
    if (tab === "drafts") await makeDrafts();
    else await make(kindOf(tab), requestOf(tab));
    keepSettings();
  } catch (error) {
    $("failed").textContent = error.message;
  }
  $("make").disabled = false;
});

$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit($("make"));
});

// --- what was made ----------------------------------------------------------------------------------

const actions = {
  edits: possible.edit,
  edit(clip) {
    open("edit");
    editor.take(clip);
    $("controls").scrollIntoView({ block: "start" });
  },
  vary(clip) {
    actions.edit(clip);
    editor.choose("vary");
  },
  loop(clip) {
    open("loop");
    $("input").value = clip.request.input ?? "";
    begin(clip.job, clip.name, round(Math.min(clip.seconds, model.seconds) / 4, 1));
    $("controls").scrollIntoView({ block: "start" });
  },
  again: (entry) => tried(() => make(entry.kind, entry.request)),
  same,
  cancel: (card) => card.parts.filter((part) => !part.over).forEach(({ entry }) => cancel(entry.id)),
  remove(card) {
    actions.cancel(card);
    stop();
    const gone = card.parts.map((part) => part.entry);
    entries = entries.filter((entry) => !gone.includes(entry));
    gone.forEach(({ id }) => live.delete(id));
    cards.splice(cards.indexOf(card), 1);
    card.element.remove();
    remember();
  },
  star: remember,
  async refine(card) {
    for (const { entry } of card.parts.filter((part) => part.entry.star && part.over)) {
      const { steps: _, ...request } = entry.request;
      await tried(() => make("generate", { ...request, ...entry.quality }));
    }
  },
};

async function tried(does) {
  try {
    await does();
  } catch (error) {
    $("failed").textContent = error.message;
    $("failed").scrollIntoView({ block: "center" });
  }
}

const cancel = (id) => tried(async () => live.get(id)?.show(await ask(`/v1/jobs/${id}`, { method: "DELETE" })));

function remember() {
  entries = entries.slice(0, MOST);
  memory.set("history", entries);
  $("empty").hidden = entries.length > 0;
  $("forget").hidden = entries.length < 2;
  editor.targets(cards.flatMap(({ parts }) => parts).filter((part) => part.view?.state === "done"));
}

/** A card at the top for jobs that were sent just now. */
function add(made) {
  const card = put(made.map(([entry]) => entry), true);
  entries = [...card.parts.map((part) => part.entry), ...entries];
  card.parts.forEach((part, i) => {
    live.set(part.entry.id, part);
    part.show(made[i][1]);
  });
  remember();
  say(`sent: ${titleOf(card.parts[0].entry.request)}`);
  if (matchMedia("(max-width: 56rem)").matches) card.element.scrollIntoView({ block: "nearest" });
  look();
}

function put(group, first = false) {
  const card = new Card(group, actions);
  cards[first ? "unshift" : "push"](card);
  $("cards")[first ? "prepend" : "append"](card.element);
  return card;
}

let looking = null;
let lost = false;

/** Looks how far jobs are, until all have ended. */
function look() {
  $("stop").hidden = !live.size;
  if (!live.size || looking) return;
  looking = setTimeout(async () => {
    for (const [id, part] of [...live]) {
      try {
        const view = await ask(`/v1/jobs/${id}`);
        if (!live.has(id)) continue;
        part.show(view);
        if (ended(view)) over(id, view);
        if (lost) ready();
      } catch (error) {
        if (error.status === 404) {
          part.gone();
          live.delete(id);
        } else server((lost = true) && `${error.message} It is asked again.`);
      }
    }
    looking = null;
    look();
  }, lost ? 5 * EVERY : EVERY);
}

function over(id, view) {
  live.delete(id);
  say(`${view.state}: ${titleOf(view.request)}`);
  remember();
}

$("stop").addEventListener("click", () => [...live.keys()].forEach(cancel));
$("forget").addEventListener("click", () => {
  if (confirm("Forget all clips of this list? What is being made is cancelled.")) [...cards].forEach(actions.remove);
});

// --- settings ---------------------------------------------------------------------------------------

const fields = () => [...$("form").elements].filter((field) => field.id && "value" in field && !["file", "submit", "button"].includes(field.type));

function keepSettings() {
  const values = Object.fromEntries(fields().map((f) => [f.id, f.type === "checkbox" ? f.checked : f.value]));
  memory.set("settings", { ...values, later: laterOf() });
}
addEventListener("pagehide", keepSettings);
document.addEventListener("visibilitychange", () => document.hidden && keepSettings());

function setFields(values) {
  for (const field of fields()) {
    if (!(field.id in values)) continue;
    const value = values[field.id] ?? "";
    if (field.type === "checkbox") field.checked = Boolean(value);
    else if (field.tagName !== "SELECT" || [...field.options].some((o) => o.value === `${value}`)) field.value = value;
    const hidden = $("advanced").contains(field) && (field.type === "checkbox" ? field.checked !== field.defaultChecked : field.value !== plain[field.id]);
    if (hidden) $("advanced").open = true; // nothing steers unseen
  }
  showLength();
}

/** Fills the form with what a clip was made with. */
function same({ kind, request, group, quality }) {
  open(group ? "drafts" : { generate: "create", loop: "loop" }[kind] ?? "edit");
  const { preset, steps: own } = quality ?? request;
  const [first, ...later] = request.timeline ?? [[0, request.input]];
  $("later").replaceChildren();
  later.forEach(([from, text]) => addLater(from, text));
  setFields({
    input: first[1], negative: request.negative_prompt, seed: request.seed, temperature: request.temperature, top_p: request.top_p,
    guidance0: request.guidance?.[0], guidance1: request.guidance?.[1],
    confidence: request.confidence, deterministic: request.deterministic,
    quality: preset ?? "", steps: own?.join(", "), windows: request.windows,
    seconds: request.seconds, bpm: request.bpm, bars: request.bars,
    beats: request.beats_per_bar,
    ...("lufs" in request ? { lufs: request.lufs, n: request.n } : {}), // of new clips alone
  });
  if (kind === "loop") begin(request.start_job ?? null, "a clip", request.start_seconds);
  else if (kind !== "generate") editor.same(kind, request);
  $("controls").scrollIntoView({ block: "start" });
}

function begin(job, name, seconds) {
  start = job;
  $("start").hidden = !job;
  $("start-name").textContent = `Begins with ${name},`;
  $("start-seconds").value = seconds ?? "";
}
$("no-start").addEventListener("click", () => begin(null, ""));

function showLength() {
  const [bpm, bars, beats] = [number("bpm"), number("bars"), number("beats")];
  const seconds = (60 * bars * beats) / bpm;
  const most = model.seconds;
  const most_bars = Math.floor((most * bpm) / 60 / beats);
  const long = seconds > most;
  $("bars").setCustomValidity(long ? `This model makes ${round(most)} s at most: ${most_bars} bars at this tempo.` : "");
  $("loop-length").textContent = Number.isFinite(seconds)
    ? `${round(seconds, 3)} s${long ? `, and the model makes ${round(most)} s at most` : ""}. The tempo is that of the length; the model is not told it.`
    : "";
}
["bpm", "bars", "beats"].forEach((id) => $(id).addEventListener("input", showLength));

// --- begin ------------------------------------------------------------------------------------------

const server = (text) => ($("server").textContent = text);

async function ready() {
  try {
    const { ready: is, queued } = await ask("/v1/stats");
    lost = false;
    if (is) return server(`${model.id}: ready${queued ? `, ${queued} waiting` : ""}`);
    server(`${model.id}: warming up; programs are compiled, once`);
  } catch (error) {
    server(error.message);
  }
  setTimeout(ready, 2000);
}

function fill() {
  const { limits } = model;
  const limit = (id, most) => ($(id).max = most);
  limit("n", limits.clips);
  limit("seconds", limits.seconds);
  $("seconds").value = Math.min(5, model.seconds);
  limit("drafts", Math.min(16, limits.queue_per_client));
  $("input").maxLength = limits.text;
  $("bars").value = [4, 2, 1].find((bars) => bars * 2 <= model.seconds) ?? 1;
  const names = { draft: "draft, in about half the time", paper: "paper, the most steps" };
  const presets = Object.keys(model.presets).filter((name) => name !== "paper-30s" || model.seconds > 15);
  $("quality").append(
    ...["draft", "balanced", "paper", "paper-30s"].filter((name) => presets.includes(name))
      .map((name) => h("option", { value: name }, names[name] ?? name)),
    h("option", { value: "" }, "the model's own"));
  if (presets.length) $("quality").value = "balanced";
  if (steps) $("steps").placeholder = steps.join(", ");
  for (const id of ["quality", "steps", "windows", "guidance1"]) $(id).closest("label").hidden = !steps;
  for (const text of EXAMPLES) {
    $("examples").append(h("button", { type: "button", klass: "link", onclick: () => ($("input").value = text) }, text));
  }
}

async function restore() {
  const known = new Map((await told("/v1/jobs")).data.map((view) => [view.id, view]));
  const groups = new Map();
  for (const entry of entries) {
    const key = entry.group ?? entry.id;
    groups.set(key, [...(groups.get(key) ?? []), entry]);
  }
  for (const group of groups.values()) {
    for (const part of put(group).parts) {
      const view = known.get(part.entry.id);
      if (!view) part.gone();
      else {
        part.show(view);
        if (!ended(view)) live.set(view.id, part);
      }
    }
  }
}

fill();
const plain = Object.fromEntries(fields().map((field) => [field.id, field.value]));
const kept = memory.get("settings", {});
setFields(kept);
(kept.later ?? []).forEach(([from, text]) => addLater(from, text));
editor.choose(editor.kind);
open(location.hash.slice(1));
await restore();
await editor.restore();
remember();
look();
ready();
