// The Edit tab: what is edited, which regions of it, and how.

import { soundOf, titleOf } from "./cards.js";
import { record, toggle } from "./sound.js";
import { Strip } from "./strip.js";
import { $, ask, clock, h, memory } from "./tools.js";

const FIELDS = { before: "before", after: "after", strength: "strength", variation: "variation", worst: "worst" };

export class Editor {
  /** failed(error): told what goes wrong. text(text): sets the text of the form. */
  constructor(model, { failed, text }) {
    Object.assign(this, { failed, text, limits: model.limits, source: null, last: [] }); // source: { file | job, name }
    const play = $("source-play");
    this.strip = new Strip("What is edited", {
      marks: { frameRate: model.frame_rate, changed: () => this.list() },
      played: (is) => (play.textContent = is ? "❚❚" : "▶"),
      failed: (text) => failed(new Error(text)),
    });
    this.strip.canvas.setAttribute("aria-describedby", "strip-help");
    $("source-strip").append(this.strip.element);
    play.addEventListener("click", () => toggle(this.strip));
    $("kind").addEventListener("change", () => this.choose(this.kind));
    $("upload").addEventListener("change", () => this.upload($("upload").files[0]));
    $("example").addEventListener("click", () => this.tried(async () => {
      this.upload(await (await fetch("/page/example.flac")).blob(), "an example");
    }));
    $("undo").addEventListener("click", () => this.load(this.last.pop(), false));
    $("add-region").addEventListener("click", () => this.addRegion());
    $("record").hidden = !navigator.mediaDevices;
    $("record").addEventListener("click", () => this.record());
    const drop = $("controls");
    drop.addEventListener("dragover", (event) => {
      if (!event.dataTransfer.types.includes("Files")) return;
      event.preventDefault();
      drop.classList.add("dropping");
    });
    drop.addEventListener("dragleave", () => drop.classList.remove("dropping"));
    drop.addEventListener("drop", (event) => {
      drop.classList.remove("dropping");
      const [file] = event.dataTransfer.files;
      if (!file) return; // words, which go where they are dropped
      event.preventDefault();
      $("tab-edit").click();
      this.upload(file);
    });
    this.choose("inpaint");
  }

  get kind() {
    return $("kind").value;
  }

  choose(kind) {
    $("kind").value = kind;
    for (const part of document.querySelectorAll("[data-for]")) part.hidden = !part.dataset.for.split(" ").includes(kind);
    this.strip.marked = kind === "inpaint";
    if (!this.strip.marked) this.strip.chosen = -1;
    this.strip.draw();
  }

  /** A second from where the clip is heard, or where there is room for one; those that touch would be one. */
  addRegion() {
    const { time, seconds, regions } = this.strip;
    const apart = 0.2;
    const free = (t) => t <= seconds - 0.5 && !regions.some(([first, end]) => t < end + apart && t + 0.5 + apart > first);
    const first = [time, 0, ...regions.map(([, end]) => end + apart)].find(free);
    if (first === undefined) return this.failed(new Error("There is no room for another region."));
    const next = regions.map(([begin]) => begin - apart).filter((begin) => begin > first);
    this.strip.add(first, Math.min(first + 1, seconds, ...next));
    const place = this.strip.regions.findIndex(([begin, end]) => begin <= first + 0.25 && first + 0.25 < end);
    $("regions").children[place]?.querySelector("input").focus();
  }

  /** The fields of an edit; raises what is missing, unless it is an example. */
  request(example) {
    const missing = (text) => {
      if (!example) throw new Error(text);
    };
    const { source, kind } = this;
    if (!source) missing("Take something to edit first: upload a file, or press Edit at a clip.");
    const what = source?.job ? { job: source.job } : { file: source?.file ?? "ID" };
    const number = (id) => Number($(id).value);
    if (kind === "inpaint") {
      if (!this.strip.regions.length) missing("Mark what is to be made anew: drag over the wave.");
      const regions = this.strip.regions.length ? this.strip.regions : [[1, 2]];
      return { ...what, regions, edge: $("exact").checked ? "inside" : "outside" };
    }
    if (kind === "extend") return { ...what, before: number("before"), after: number("after") };
    if (kind === "restyle") {
      if (!$("input").value) missing("Say the new style in the text.");
      return { ...what, strength: number("strength") };
    }
    if (kind === "vary") return { ...what, n: 2, variation: number("variation") };
    if (kind === "repair") return { ...what, worst: number("worst") };
    if (!$("then").value) missing("There is no clip yet to lead on to: make one first.");
    return { ...what, then_job: JSON.parse($("then").value || "null"), seconds: number("between-seconds") };
  }

  /** Takes a clip of a card. */
  take({ job, name, request, extra }) {
    this.taken = request.input ?? "";
    this.text(this.taken);
    return this.load({ job, name, confidence: extra.confidence, loop: extra.loop });
  }

  async load(source, keep = true) {
    await this.tried(async () => {
      const sound = await soundOf(source);
      if (keep && this.source) this.last.push(this.source);
      this.source = source;
      this.strip.show({ ...sound, confidence: source.confidence, loop: source.loop });
      this.strip.at(0);
      this.strip.mark([]);
      $("source").hidden = false;
      $("no-source").hidden = true;
      $("undo").hidden = !this.last.length;
      $("source-name").textContent = `${source.name}, ${clock(sound.seconds)}`;
      memory.set("source", source);
    });
  }

  async upload(file, name = file?.name) {
    if (!file) return;
    await this.tried(async () => {
      const most = this.limits.upload_mb;
      if (file.size > most * 1e6) throw new Error(`${name} is larger than ${most} MB.`);
      const form = new FormData();
      form.append("file", file, "sound");
      $("no-source").hidden = false;
      $("no-source").textContent = `Reading ${name} …`;
      try {
        const { id } = await ask("/v1/files", { method: "POST", form });
        if ($("input").value === this.taken) this.text(""); // another clip's; what was typed stays
        await this.load({ file: id, name });
      } finally {
        $("no-source").textContent = "Upload or drop a file, or press Edit at a clip.";
        $("upload").value = "";
      }
    });
  }

  async record() {
    const button = $("record");
    if (this.recording) return this.recording.abort();
    this.recording = new AbortController();
    await this.tried(async () => {
      button.setAttribute("aria-pressed", "true");
      button.textContent = "End the recording";
      const sound = await record(this.recording.signal);
      this.upload(sound, "a recording");
    });
    this.recording = null;
    button.setAttribute("aria-pressed", "false");
    button.textContent = "Record";
  }

  async tried(does) {
    try {
      await does();
    } catch (error) {
      this.failed(error);
    }
  }

  /** Regions as numbers, for who does not drag. */
  list() {
    const { regions } = this.strip;
    if (regions.length && this.kind !== "inpaint") this.choose("inpaint"); // they were dragged just now
    memory.set("regions", regions);
    const focused = document.activeElement?.getAttribute("aria-label");
    $("regions").replaceChildren(...this.strip.regions.map((range, i) => {
      const field = (end, name) => {
        const input = h("input", {
          type: "number", min: 0, max: this.strip.seconds, step: "any", value: range[end], klass: "short",
          "aria-label": `Region ${i + 1}, ${name}, in seconds`,
        });
        input.addEventListener("change", () => {
          if (!input.checkValidity() || input.value === "") return;
          range[end] = this.strip.snapped(Number(input.value));
          this.strip.tidy();
        });
        return input;
      };
      return h("li", {}, field(0, "begin"), "to", field(1, "end"), "s", h("button", {
        type: "button", "aria-label": `Remove region ${i + 1}`,
        onclick: () => this.strip.mark(this.strip.regions.filter((other) => other !== range)),
      }, "✕"));
    }));
    if (focused) [...$("regions").querySelectorAll("input")].find((input) => input.getAttribute("aria-label") === focused)?.focus();
  }

  /** Clips that a clip can be led on to. */
  targets(parts) {
    const chosen = $("then").value;
    $("then").replaceChildren(...parts.flatMap(({ view }) => view.results.map((result) => h(
      "option", { value: JSON.stringify({ id: view.id, index: result.index }) },
      `${titleOf(view.request)}, seed ${result.seed}`))));
    if (chosen) $("then").value = chosen;
  }

  /** What an edit was made of, and how. */
  async same(kind, request) {
    this.choose(kind);
    const { file, job } = request;
    await this.load(job ? { job, name: "a clip" } : { file, name: "a file" });
    for (const [id, name] of Object.entries(FIELDS)) if (name in request) $(id).value = request[name];
    if (request.then_job) $("then").value = JSON.stringify(request.then_job);
    if (kind === "between") $("between-seconds").value = request.seconds;
    if (kind !== "inpaint") return;
    $("exact").checked = request.edge === "inside";
    this.strip.mark(request.regions.map(([first, end]) => [first, end ?? this.strip.seconds]));
  }

  /** What was edited before a refresh, if the server still has it. */
  async restore() {
    const source = memory.get("source", null);
    const regions = memory.get("regions", []);
    if (!source) return;
    try {
      await soundOf(source);
      await this.load(source);
      const { kind } = this;
      this.strip.mark(regions);
      this.choose(kind);
    } catch (error) {
      if (error.status === 404) memory.set("source", null); // else it may be there once more
      else this.failed(error);
    }
  }
}
