// A sound as a strip: its wave, what plays of it, regions that are dragged, what changed, how sure
// the model is. Peaks come from the server, so that nothing long is decoded here.

import { play, playing, seek, stop, toggle } from "./sound.js";
import { h, round } from "./tools.js";

const EDGE = 7; // CSS pixels within which an edge is taken
const ROW = 11; // height of the confidence row
const AROUND = 0.3; // seconds to each side that a click in that row marks

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const canvas of document.querySelectorAll("canvas")) canvas.dispatchEvent(new Event("recolour"));
});

export class Strip {
  /**
   * marks: null, or { frameRate, changed(regions) } for one whose regions are dragged.
   * played(is): told when it begins and ends to sound. failed(text): told what goes wrong.
   */
  constructor(label, { marks = null, played = () => {}, failed = () => {} } = {}) {
    Object.assign(this, { label, marks, failed, whenPlayed: played });
    Object.assign(this, { time: 0, seconds: 0, regions: [], chosen: -1, sound: {}, drag: null, marked: true });
    this.canvas = h("canvas", { tabindex: 0, role: "slider", "aria-label": label, "aria-valuemin": 0 });
    this.element = h("div", { klass: marks ? "strip marks" : "strip" }, this.canvas);
    const on = (name, does) => this.canvas.addEventListener(name, does.bind(this));
    on("pointerdown", this.down);
    on("pointermove", this.move);
    on("pointerup", this.up);
    on("pointercancel", () => { this.drag = null; this.draw(); });
    on("dblclick", this.twice);
    on("keydown", this.key);
    new ResizeObserver(() => this.draw()).observe(this.canvas);
    on("recolour", this.draw);
  }

  /** sound: { url, peaks, seconds, rate, changed, confidence, loop } */
  show(sound) {
    this.sound = sound;
    this.seconds = sound.seconds;
    this.canvas.setAttribute("aria-valuemax", round(sound.seconds));
    this.at(Math.min(this.time, sound.seconds));
  }

  at(time) {
    this.time = time;
    this.canvas.dataset.at = time.toFixed(3);
    const now = Math.floor(time);
    if (this.canvas.getAttribute("aria-valuenow") !== `${now}`) {
      this.canvas.setAttribute("aria-valuenow", now);
      this.canvas.setAttribute("aria-valuetext", `${now} of ${round(this.seconds, 1)} seconds`);
    }
    this.draw();
  }

  played(is) {
    this.whenPlayed(is);
  }

  mark(regions, tell = true) {
    this.regions = regions;
    if (this.chosen >= regions.length) this.chosen = -1;
    this.draw();
    if (tell) this.marks.changed(regions);
  }

  // --- drawing ------------------------------------------------------------------------------------

  draw() {
    const { canvas, sound } = this;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (!width || !sound.peaks) return;
    const scale = devicePixelRatio || 1;
    if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(height * scale);
    }
    const pen = canvas.getContext("2d");
    const style = getComputedStyle(canvas);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    const tall = sound.confidence ? height - ROW : height;
    this.drawWave(pen, width, tall, colour("wave"), colour("played"));
    this.drawBars(pen, tall, colour("dim"));
    for (const range of sound.changed ?? []) this.hatch(pen, range, tall, colour("mark"));
    if (this.marked || this.drag) {
      this.regions.forEach((range, i) => this.drawRegion(pen, range, tall, colour("mark"), i === this.chosen));
    }
    if (sound.confidence) this.drawSure(pen, width, tall, colour("sure"), colour("unsure"));
    pen.fillStyle = colour("ink");
    pen.fillRect(Math.min(this.x(this.time), width - 2), 0, 2, height);
  }

  drawWave(pen, width, tall, wave, played) {
    const { peaks } = this.sound;
    const pieces = peaks.length / 2;
    const middle = tall / 2;
    for (let x = 0; x < width; x++) {
      const first = Math.floor((x / width) * pieces);
      const end = Math.max(first + 1, Math.floor(((x + 1) / width) * pieces));
      let [low, high] = [0, 0];
      for (let i = first; i < Math.min(end, pieces); i++) {
        low = Math.min(low, peaks[2 * i]);
        high = Math.max(high, peaks[2 * i + 1]);
      }
      pen.fillStyle = x < this.x(this.time) ? played : wave;
      const top = middle - (high / 127) * middle * 0.95;
      pen.fillRect(x, top, 1, Math.max(1, middle - (low / 127) * middle * 0.95 - top));
    }
  }

  drawBars(pen, tall, line) {
    const { loop } = this.sound;
    if (!loop?.bars) return;
    pen.fillStyle = line;
    const beats = loop.bars * loop.beats_per_bar;
    for (let i = 1; i < beats; i++) {
      const bar = i % loop.beats_per_bar === 0;
      pen.fillRect(this.x((i / beats) * this.seconds), bar ? 0 : tall * 0.85, bar ? 2 : 1, tall);
    }
  }

  hatch(pen, [first, end], tall, mark) {
    const [left, right] = [this.x(first), this.x(end)];
    pen.save();
    pen.beginPath();
    pen.rect(left, 0, right - left, tall);
    pen.clip();
    pen.strokeStyle = mark;
    pen.lineWidth = 1.5;
    for (let x = left - tall; x < right; x += 7) {
      pen.beginPath();
      pen.moveTo(x, tall);
      pen.lineTo(x + tall, 0);
      pen.stroke();
    }
    pen.restore();
  }

  drawRegion(pen, [first, end], tall, mark, chosen) {
    const [left, right] = [this.x(Math.min(first, end)), this.x(Math.max(first, end))];
    pen.save();
    pen.fillStyle = mark;
    pen.globalAlpha = chosen ? 0.4 : 0.25;
    pen.fillRect(left, 0, right - left, tall);
    pen.globalAlpha = 1;
    for (const x of [left, right - 2]) pen.fillRect(x, 0, 2, tall);
    pen.restore();
  }

  /** By rank within the clip: the palest frames are those of which the model is surest. */
  drawSure(pen, width, tall, sure, unsure) {
    const { confidence } = this.sound;
    const sorted = [...confidence].sort((a, b) => a - b);
    pen.save();
    pen.fillStyle = sure;
    pen.fillRect(0, tall, width, ROW);
    pen.fillStyle = unsure;
    const step = width / confidence.length;
    confidence.forEach((value, i) => {
      let [low, high] = [0, sorted.length];
      while (low < high) {
        const half = (low + high) >> 1;
        if (sorted[half] < value) low = half + 1;
        else high = half;
      }
      pen.globalAlpha = (1 - low / sorted.length) ** 2;
      pen.fillRect(i * step, tall + 2, Math.ceil(step), ROW - 2);
    });
    pen.restore();
  }

  // --- pointer and keys ---------------------------------------------------------------------------

  x(time) {
    return (time / this.seconds) * this.canvas.clientWidth;
  }

  t(event) {
    const { left, width } = this.canvas.getBoundingClientRect();
    return Math.max(0, Math.min(1, (event.clientX - left) / width)) * this.seconds;
  }

  snapped(time) {
    const rate = this.marks.frameRate;
    return Math.max(0, Math.min(round(Math.round(time * rate) / rate, 4), this.seconds));
  }

  /** How far a region can be moved of `by`, so that it stays as long as it is. */
  within([first, end], by) {
    return Math.max(-first, Math.min(by, this.seconds - end));
  }

  /** The region at a time and which edge of it is near: 0, 1, or -1 for none. */
  hit(time) {
    if (!this.marked) return null;
    const near = (EDGE / this.canvas.clientWidth) * this.seconds;
    for (const [i, range] of this.regions.entries()) {
      const edge = range.findIndex((end) => Math.abs(end - time) < near);
      if (edge >= 0 || (range[0] < time && time < range[1])) return { i, edge };
    }
    return null;
  }

  down(event) {
    if (event.button !== 0 || !this.sound.peaks) return;
    this.canvas.setPointerCapture(event.pointerId);
    const time = this.t(event);
    this.drag = { from: time, x: event.clientX, moved: false };
    if (!this.marks) return;
    const found = this.hit(time);
    this.drag.hit = found;
    this.drag.was = found ? [...this.regions[found.i]] : null;
    this.chosen = found ? found.i : -1;
    this.draw();
  }

  move(event) {
    const { drag } = this;
    if (!drag) {
      if (!this.marks) return;
      const found = this.hit(this.t(event));
      this.canvas.classList.toggle("edge", Boolean(found && found.edge >= 0));
      return;
    }
    if (Math.abs(event.clientX - drag.x) > 3) drag.moved = true;
    if (!drag.moved) return;
    const time = this.t(event);
    if (!this.marks) return seek(this, time);
    if (!drag.hit) {
      this.mark([...this.regions, [this.snapped(drag.from), this.snapped(time)]], false);
      this.chosen = this.regions.length - 1;
      drag.hit = { i: this.chosen, edge: 1 };
      drag.was = [...this.regions[this.chosen]];
    }
    const region = this.regions[drag.hit.i];
    if (drag.hit.edge >= 0) region[drag.hit.edge] = this.snapped(time);
    else {
      const by = this.within(drag.was, time - drag.from);
      region.splice(0, 2, ...drag.was.map((end) => this.snapped(end + by)));
    }
    this.draw();
  }

  up(event) {
    const { drag } = this;
    this.drag = null;
    if (!drag) return;
    if (drag.moved && this.marks) return this.tidy();
    if (drag.moved) return;
    const { top, height } = this.canvas.getBoundingClientRect();
    if (this.marks && this.sound.confidence && event.clientY > top + height - ROW) {
      return this.add(drag.from - AROUND, drag.from + AROUND);
    }
    if (event.shiftKey && drag.hit) return play(this, drag.was[0], drag.was);
    if (this.marks || playing() === this) seek(this, drag.from);
    else play(this, drag.from);
  }

  twice(event) {
    const found = this.marks && this.hit(this.t(event));
    if (found) this.mark(this.regions.filter((_, i) => i !== found.i));
  }

  add(first, end) {
    this.mark([...this.regions, [this.snapped(first), this.snapped(end)]], false);
    this.chosen = this.regions.length - 1;
    this.tidy();
  }

  /** Begins before ends, nothing twice, in order. */
  tidy() {
    const tidy = [];
    const chosen = this.regions[this.chosen];
    for (const range of this.regions.map((r) => [...r].sort((a, b) => a - b)).sort((a, b) => a[0] - b[0])) {
      const last = tidy.at(-1);
      if (range[1] - range[0] < 1e-6) continue;
      if (last && range[0] <= last[1]) last[1] = Math.max(last[1], range[1]);
      else tidy.push(range);
    }
    this.chosen = chosen ? tidy.findIndex((r) => r[0] <= Math.min(...chosen) && Math.max(...chosen) <= r[1]) : -1;
    this.mark(tidy);
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const marked = this.marks && this.regions[this.chosen];
    const side = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === " ") toggle(this);
    else if (side && marked) {
      const by = this.within(marked, side / this.marks.frameRate);
      this.mark(this.regions.with(this.chosen, marked.map((end) => this.snapped(end + by))));
    } else if (side) seek(this, Math.max(0, Math.min(this.time + side * (event.shiftKey ? 1 : 0.1), this.seconds)));
    else if (event.key === "Home") seek(this, 0);
    else if (event.key === "End") seek(this, this.seconds);
    else if (event.key === "Escape") {
      this.chosen = -1;
      if (playing() === this) stop();
      this.draw();
    } else if (this.marks && event.key === "[") this.opened = this.time;
    else if (this.marks && event.key === "]") {
      this.add(Math.min(this.opened ?? 0, this.time), Math.max(this.opened ?? 0, this.time));
      this.opened = undefined;
    } else if (marked && (event.key === "Delete" || event.key === "Backspace")) {
      this.mark(this.regions.filter((_, i) => i !== this.chosen));
    } else return;
    event.preventDefault();
  }
}
