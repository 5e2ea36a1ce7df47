// The About tab: what the model is, how to ask it without this page, and keys.

import { clock, h } from "./tools.js";

const KEYS = [
  ["Ctrl + Enter", "in the text: make"],
  ["Space", "on a wave: play, pause"],
  ["← →", "on a wave: 0.1 s; with Shift 1 s; of a chosen region: a frame"],
  ["[ ]", "on the wave that is edited: begin and end of a region"],
  ["Delete", "takes the chosen region away"],
  ["Shift + click", "plays a region again and again"],
  ["← →", "on the tabs: another tab"],
];

/** What the tab shows; the last request that the form says is its example. */
export function about(model, kind, request) {
  const facts = {
    Model: `${model.id}, a ${model.kind}`,
    Sound: `${model.sample_rate} Hz, ${model.channels} channel${model.channels > 1 ? "s" : ""}, ${model.frame_rate} frames a second`,
    "Hears at once": clock(model.seconds),
    Makes: model.makes.join(", "),
    "At most": `${model.limits.clips} clips at a time, ${clock(model.limits.seconds)} each; files of ${model.limits.upload_mb} MB`,
    "Kept for": `${clock(model.limits.keep_seconds)} on the server; this browser keeps the settings`,
  };
  const { async: _, ...fields } = JSON.parse(JSON.stringify(request));
  const said = Object.entries(fields).map(([name, value]) => `"${name}": ${JSON.stringify(value)}`);
  const body = `{${said.join(", ")}}`;
  const url = `${location.origin}/v1/audio/${kind}`;
  const name = fields.n > 1 ? "clips.zip" : "clip.wav";
  const curl = `curl --fail-with-body -o ${name} ${url} \\\n  -H 'Content-Type: application/json' \\\n  -d '${body.replaceAll("'", "'\\''")}'`;
  const python = `import json, urllib.request\n\nbody = json.loads(${JSON.stringify(body)})\n`
    + `request = urllib.request.Request("${url}", json.dumps(body).encode(), {"Content-Type": "application/json"})\n`
    + `open("${name}", "wb").write(urllib.request.urlopen(request).read())`;
  return [
    h("h2", {}, "The model"),
    h("dl", {}, Object.entries(facts).flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
    h("p", { klass: "hint" }, "A clip depends on its text, settings, seed and number alone. It is one mix: there are no stems. Who may use the model's weights and clips, and how, is for its own card to say."),
    h("h2", {}, "The same by curl"), h("pre", { tabindex: 0 }, curl),
    h("h2", {}, "By Python"), h("pre", { tabindex: 0 }, python),
    h("p", { klass: "hint" }, "A server with keys needs one more header of every request, Authorization: Bearer KEY."),
    h("p", {}, h("a", { href: "/openapi.json" }, "All of the API")),
    h("h2", {}, "Keys"),
    h("dl", {}, KEYS.flatMap(([key, does]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, does)])),
  ];
}
