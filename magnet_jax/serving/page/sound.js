// All that is heard: one <audio> for clips, Web Audio for loops, and the microphone.

import { $ } from "./tools.js";

let now = null; // { strip, position(), stop(), seek(t) }
let context = null;

/** The strip that plays, or null. */
export const playing = () => now?.strip ?? null;

export function stop() {
  const last = now;
  now = null;
  last?.stop();
  last?.strip.played(false);
}

function begin(voice) {
  now = voice;
  voice.strip.played(true);
  requestAnimationFrame(function tick() {
    if (now !== voice) return;
    voice.strip.at(voice.position());
    requestAnimationFrame(tick);
  });
}

/** Plays a strip's sound from some second on; within `region` again and again. */
export function play(strip, from = 0, region = null) {
  stop();
  if (strip.sound.loop && !region) return playLoop(strip, from);
  const audio = $("player");
  const url = new URL(strip.sound.url, location).href;
  if (audio.src !== url) audio.src = url;
  audio.currentTime = from;
  audio.onended = () => {
    if (now?.strip !== strip) return;
    if (region) {
      audio.currentTime = region[0];
      return audio.play();
    }
    stop();
    strip.at(0);
  };
  begin({
    strip,
    position() {
      if (region && audio.currentTime >= region[1]) audio.currentTime = region[0];
      return audio.currentTime;
    },
    seek: (t) => (audio.currentTime = t),
    stop: () => audio.pause(),
  });
  return audio.play().catch((error) => {
    if (error.name === "AbortError") return; // something else was played meanwhile
    stop();
    strip.failed("This sound cannot be played: it may have expired.");
  });
}

/** Without a gap: the samples themselves are repeated, at their own rate, and not a file. */
async function playLoop(strip, from) {
  const voice = { strip, position: () => from, seek() {}, stop() {} };
  begin(voice);
  try {
    const content = await (await fetch(strip.sound.url)).arrayBuffer();
    if (context?.sampleRate !== strip.sound.rate) {
      context?.close();
      context = new AudioContext({ sampleRate: strip.sound.rate });
    }
    const buffer = await context.decodeAudioData(content);
    if (now !== voice) return;
    let source, began;
    const start = (t) => {
      source = new AudioBufferSourceNode(context, { buffer, loop: true });
      source.connect(context.destination);
      source.start(0, t);
      began = context.currentTime - t;
    };
    await context.resume();
    start(from);
    voice.position = () => (context.currentTime - began) % buffer.duration;
    voice.seek = (t) => {
      source.stop();
      start(t);
    };
    voice.stop = () => source.stop();
    if (now !== voice) source.stop();
  } catch {
    if (now === voice) stop();
    strip.failed("This loop cannot be played: it may have expired.");
  }
}

export function toggle(strip) {
  if (now?.strip === strip) stop();
  else play(strip, strip.time < strip.seconds - 0.05 ? strip.time : 0);
}

export function seek(strip, t) {
  strip.at(t);
  if (now?.strip === strip) now.seek(t);
}

/** Records until `ended` is aborted; gives a WAV, which needs no more than what it says. */
export async function record(ended) {
  const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  const release = () => stream.getTracks().forEach((track) => track.stop());
  if (ended.aborted) { // while the browser was asking whether it may
    release();
    throw new Error("Nothing was recorded.");
  }
  const recorder = new MediaRecorder(stream);
  const parts = [];
  recorder.ondataavailable = (event) => parts.push(event.data);
  const done = new Promise((resolve) => (recorder.onstop = resolve));
  recorder.start();
  ended.addEventListener("abort", () => recorder.stop());
  await done;
  release();
  const decoder = new OfflineAudioContext(1, 1, 48000);
  const buffer = await decoder.decodeAudioData(await new Blob(parts).arrayBuffer());
  return wavOf(buffer.getChannelData(0), buffer.sampleRate);
}

function wavOf(samples, rate) {
  const size = samples.length * 2;
  const view = new DataView(new ArrayBuffer(44 + size));
  const word = (at, text) => [...text].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  word(0, "RIFF");
  view.setUint32(4, 36 + size, true);
  word(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true); // PCM
  view.setUint16(22, 1, true);
  view.setUint32(24, rate, true);
  view.setUint32(28, rate * 2, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  word(36, "data");
  view.setUint32(40, size, true);
  samples.forEach((x, i) => view.setInt16(44 + 2 * i, Math.max(-1, Math.min(1, x)) * 32767, true));
  return new Blob([view], { type: "audio/wav" });
}
