// What all other files use: elements, requests, short words for numbers.

export const $ = (id) => document.getElementById(id);

/** An element with properties, listeners (onclick: ...) and children; text is never read as HTML. */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else element.setAttribute(name === "klass" ? "class" : name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** Asks the API; what goes wrong is thrown as an Error with the server's own line. */
export async function ask(path, { method = "GET", body, form } = {}) {
  const how = { method, headers: {} };
  if (body) {
    how.headers["Content-Type"] = "application/json";
    how.body = JSON.stringify(body);
  } else if (form) how.body = form;
  let answer;
  try {
    answer = await fetch(path, how);
  } catch {
    throw Object.assign(new Error("The server does not answer."), { offline: true });
  }
  const told = await answer.json().catch(() => ({}));
  if (!answer.ok) {
    const error = new Error(told.error?.message || `The server says ${answer.status}.`);
    throw Object.assign(error, { status: answer.status, param: told.error?.param });
  }
  return told;
}

export const round = (x, digits = 2) => Number(x.toFixed(digits));

export function clock(seconds) {
  if (seconds < 59.95) return `${round(seconds, 1)} s`;
  const [minutes, rest] = [Math.floor(Math.round(seconds) / 60), Math.round(seconds) % 60];
  return `${minutes} min${rest ? ` ${rest} s` : ""}`;
}

/** What this browser remembers; nothing where it remembers nothing. */
export const memory = {
  get(name, otherwise) {
    try {
      return JSON.parse(localStorage.getItem(`magnet_jax.${name}`)) ?? otherwise;
    } catch {
      return otherwise;
    }
  },
  set(name, value) {
    try {
      localStorage.setItem(`magnet_jax.${name}`, JSON.stringify(value));
    } catch { /* full, or forbidden: the page works on, and forgets */ }
  },
};
