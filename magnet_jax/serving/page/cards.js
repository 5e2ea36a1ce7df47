// What was made, or is being made: a card for each request, one for all drafts of a text.

import { play, playing, stop, toggle } from "./sound.js";
import { Strip } from "./strip.js";
import { $, ask, clock, h, round } from "./tools.js";

const WORDS = {
  generate: "made", loop: "loop", inpaint: "regions anew", extend: "longer", between: "led on",
  restyle: "restyled", vary: "varied", repair: "repaired",
};
const ENDED = ["done", "failed", "cancelled"];
const ROUGH = "Hear a rough version";
const SHORT = "This region is too short to change no sample outside it. Mark a longer one, or untick that.";

export const ended = (view) => ENDED.includes(view.state);
export const say = (text) => ($("said").textContent = text);

/** What a strip shows of a clip that a job made, or of an upload. */
export async function soundOf({ file, job }) {
  if (file) {
    const about = await ask(`/v1/files/${file}`);
    return { ...about, url: about.audio, rate: about.sample_rate };
  }
  const index = job.index ?? 0;
  const about = await ask(`/v1/jobs/${job.id}/peaks/${index}.json`);
  return { ...about, url: `/v1/jobs/${job.id}/audio/${index}`, rate: about.sample_rate };
}

const said = (words) => (Array.isArray(words) ? words.map(([text]) => text).join(" and ") : words);

/** Its text; texts that follow each other, or are blended, as one. */
export const titleOf = ({ input, timeline, blend }) => input || timeline?.map(([, words]) => said(words)).join(" → ")
  || said(blend) || "without text";

/** actions: edit, vary, loop, again, same, cancel, remove, refine, star. */
export class Card {
  constructor(entries, actions) {
    this.actions = actions;
    const { kind, request, group, at } = entries[0];
    const drafts = Boolean(group);
    this.parts = entries.map((entry) => new Part(entry, this, drafts));
    this.cancel = h("button", { onclick: () => actions.cancel(this) }, "Cancel");
    this.refine = h("button", { klass: "main", onclick: () => actions.refine(this) }, "Refine starred");
    const steps = request.preset ?? (request.steps ? `steps ${request.steps.join(", ")}` : "");
    const words = [
      drafts ? `${entries.length} drafts` : WORDS[kind], steps,
      new Date(at).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" }),
    ];
    this.about = h("p", { klass: "about" }, words.filter(Boolean).join(" · "));
    this.element = h("article", { klass: "card", "aria-label": titleOf(request) },
      h("div", { klass: "head" },
        h("div", {}, h("h3", {}, titleOf(request)), this.about),
        h("div", { klass: "row" },
          drafts ? this.refine : null, this.cancel,
          h("button", { onclick: () => actions.same(this.parts[0].latest) }, "Same settings"),
          h("button", { "aria-label": `Remove ${titleOf(request)}`, title: "Remove", onclick: () => actions.remove(this) }, "✕"))),
      h("div", { klass: drafts ? "drafts" : "" }, this.parts.map((part) => part.element)));
    this.changed();
  }

  changed() {
    this.cancel.hidden = this.parts.every((part) => part.over);
    this.refine.hidden = !this.parts.some((part) => part.entry.star && part.over);
  }
}

/** One job of a card. */
class Part {
  constructor(entry, card, draft) {
    Object.assign(this, { entry, card, draft, over: false, latest: entry });
    this.words = h("span", {}, "sent");
    this.bar = h("progress", { "aria-label": "progress" });
    this.hear = h("button", { hidden: true, onclick: () => this.preview() }, ROUGH);
    this.status = h("div", {}, this.bar, h("p", { klass: "about" }, this.words, " ", this.hear));
    this.clips = h("div", {});
    this.element = h("div", { "data-job": entry.id }, this.status, this.clips);
  }

  /** Shows a job as the server tells of it. */
  show(view) {
    if (this.over) return;
    this.view = view;
    this.latest = { ...this.entry, request: view.request };
    if (view.state === "done") this.done(view);
    else if (ended(view)) this.end(view.state === "failed" ? view.error.message : "cancelled", view.state === "failed");
    else this.going(view);
  }

  going({ state, position, eta_seconds: eta, progress, preview }) {
    const left = eta === null ? "" : `, about ${clock(eta)} left`;
    const { done, total, stage } = progress;
    if (stage === "compiling") this.words.textContent = "compiling, once for a length of clip: this takes a while";
    else if (state === "queued") {
      const before = { 0: "next", 1: "one job before it" }[position] ?? `${position} jobs before it`;
      this.words.textContent = `waiting, ${before}${left}`;
    } else this.words.textContent = `${stage || "begun"}${total ? `: ${done} of ${total}` : ""}${left}`;
    if (total && state === "running") {
      this.bar.max = total;
      this.bar.value = done;
    } else this.bar.removeAttribute("value");
    this.hear.hidden = !preview;
  }

  preview() {
    if (this.rough && playing() === this.rough) return stop();
    const still = () => {};
    const played = (is) => (this.hear.textContent = is ? "Stop" : ROUGH);
    this.rough = { sound: { url: this.view.preview }, time: 0, seconds: 1e9, at: still, played, failed: still };
    play(this.rough);
  }

  /** Nothing more comes of the job: its rough version, whose button goes, is not heard on. */
  leave() {
    this.over = true;
    if (this.rough && playing() === this.rough) stop();
  }

  end(text, bad = false) {
    this.leave();
    if (text.includes("edge='inside'")) text = SHORT;
    this.status.replaceChildren(h("p", { klass: bad ? "about bad" : "about" }, text));
    this.card.changed();
  }

  /** The server does not know it any more. */
  gone() {
    this.end("No longer on the server.");
    this.status.append(h("button", { onclick: () => this.card.actions.again(this.entry) }, "Make it again"));
  }

  done(view) {
    this.leave();
    this.status.remove();
    const several = view.results.length > 1;
    this.clips.append(...view.results.map((result) => this.clip(view, result, several)));
    if (several) {
      const zip = h("a", { href: `/v1/jobs/${view.id}/zip`, download: "", klass: "button" }, "All as ZIP");
      this.clips.append(h("p", { klass: "row" }, zip));
    }
    this.card.changed();
  }

  clip(view, result, several) {
    const { actions } = this.card;
    const { request } = view;
    const name = `${titleOf(request)}, clip ${result.index + 1}`;
    const job = { id: view.id, index: result.index };
    const button = h("button", { "aria-label": `Play ${name}`, onclick: () => toggle(strip) }, "▶");
    const note = h("span", { klass: "hint" }, this.facts(result));
    const strip = new Strip(name, {
      played: (is) => {
        button.textContent = is ? "❚❚" : "▶";
        button.setAttribute("aria-label", `${is ? "Pause" : "Play"} ${name}`);
      },
      failed: (text) => (note.textContent = text),
    });
    const extra = { changed: result.changed, confidence: result.confidence, loop: result.loop };
    const rate = result.loop && Math.round(result.loop.samples / result.seconds);
    strip.show({ url: result.audio, seconds: result.seconds, rate, ...extra }); // heard before it is drawn
    whenSeen(strip.element, async () => {
      try {
        strip.show({ ...(await soundOf({ job })), ...extra });
      } catch (error) {
        note.textContent = error.message;
      }
    });
    const about = { name, request, job, extra, seconds: result.seconds };
    const tools = this.draft ? [this.star()] : [
      result.changed ? this.before(strip, request, note) : null,
      actions.edits && h("button", { onclick: () => actions.edit(about) }, "Edit"),
      actions.edits && h("button", { onclick: () => actions.vary(about) }, "Vary"),
      actions.edits && !result.loop && h("button", { onclick: () => actions.loop(about) }, "Loop it"),
    ];
    const row = [button, ...tools, this.downloads(result), note].filter(Boolean);
    return h("div", { klass: "clip" }, strip.element, h("div", { klass: "row" }, row));
  }

  facts({ seed, number, seconds, loop }) {
    const bars = loop?.bars ? `${round(loop.bpm)} bpm, ${loop.bars} bars, ` : "";
    return `${bars}${clock(seconds)}, seed ${seed}${number ? `, number ${number}` : ""}`;
  }

  /** A switch between what there was and what there is now, at the same place. */
  before(strip, request, note) {
    let [other, now] = [null, null];
    const switched = async () => {
      const back = button.getAttribute("aria-pressed") === "true";
      try {
        other ??= await soundOf(request);
      } catch (error) {
        note.textContent = error.message;
        return;
      }
      if (!back) now = strip.sound;
      const by = request.before ?? 0;
      const time = Math.max(0, strip.time + (back ? by : -by));
      const on = playing() === strip;
      if (on) stop();
      button.setAttribute("aria-pressed", !back);
      strip.show(back ? now : other);
      strip.at(Math.min(time, strip.seconds));
      if (on) play(strip, strip.time);
    };
    const button = h("button", { "aria-pressed": "false", title: "What there was, at the same place", onclick: switched }, "Before");
    return button;
  }

  star() {
    const { entry, card } = this;
    const box = h("input", { type: "checkbox", "aria-label": `Star draft of seed ${entry.request.seed}`, onchange: () => {
      entry.star = box.checked;
      mark.textContent = box.checked ? "★" : "☆";
      card.changed();
      card.actions.star();
    } });
    box.checked = Boolean(entry.star);
    const mark = h("span", { "aria-hidden": "true" }, entry.star ? "★" : "☆");
    return h("label", { klass: "star" }, box, mark);
  }

  downloads(result) {
    const link = (text, href) => h("a", { href, download: "" }, text);
    const wav = link(result.loop ? "WAV with tempo and bars" : "WAV", result.audio);
    wav.addEventListener("dragstart", (event) => { // into a DAW, from Chromium
      event.dataTransfer.setData("DownloadURL", `audio/wav:clip.wav:${wav.href}`);
    });
    const formats = result.loop ? ["flac"] : ["flac", "mp3"];
    return h("details", { name: "menu" },
      h("summary", { klass: "button" }, "Download"),
      h("div", { klass: "menu" }, wav,
        formats.map((format) => link(format.toUpperCase(), `${result.audio}?format=${format}`)),
        result.tokens ? link("Tokens", result.tokens) : null,
        link("Settings", result.settings)));
  }
}

function whenSeen(element, does) {
  const watch = new IntersectionObserver((seen) => {
    if (!seen.some((one) => one.isIntersecting)) return;
    watch.disconnect();
    does();
  }, { rootMargin: "200px" });
  watch.observe(element);
}

document.addEventListener("click", (event) => {
  for (const menu of document.querySelectorAll("details[name=menu][open]")) {
    if (!menu.contains(event.target) || event.target.closest("a")) menu.open = false;
  }
});
