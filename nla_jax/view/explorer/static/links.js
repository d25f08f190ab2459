// Save the state of the page as a link and as a JSON file.

import { parsed } from "./chat.js";
import { el } from "./draw.js";

const sides = (state) => Object.keys(state.facts.sides);

// Return the fragment of the address ("#…") that reproduces the page.
export function written(state) {
  const { text, messages, opens } = state.source;
  const p = new URLSearchParams(messages ? { chat: JSON.stringify(messages), ...(opens ? {} : { opens: "no" }) } : { text });
  if (state.chosen !== null) p.set("token", state.chosen);
  if (state.other !== null) p.set("with", state.other);
  return `#${p}`;
}

// Parse a fragment: { source: { text } or { messages, opens } or null, then: the chosen tokens }.
export function read(hash) {
  const p = new URLSearchParams(hash.slice(1)), text = (p.get("text") ?? "").slice(0, 8000);
  const whole = (k) => (/^\d{1,6}$/.test(p.get(k) ?? "") ? Number(p.get(k)) : undefined);
  const messages = parsed(p.get("chat") ?? "");
  return { source: messages ? { messages, opens: p.get("opens") !== "no" } : text ? { text } : null,
    then: { token: whole("token"), with: whole("with") } };
}

function all(state) {
  const rows = (s) => Object.fromEntries(sides(state).map((side) =>
    [side, (s[side] ?? []).filter((r) => r.done).map((r) => ({ ...r.done, recurs: r.recurs, next: r.next }))]));
  return {
    bundles: state.facts.sides, messages: state.source.messages, text: state.text, tokens: state.tokens, turns: state.turns,
    heat: Object.fromEntries(sides(state).map((s) => [s, [...state.heat[s].values()].sort((a, b) => a.token - b.token)])),
    explanations: Object.fromEntries(Object.entries(state.samples).map(([i, s]) => [i, rows(s)])),
    edits: state.edits, compared: state.compared, telling: state.telling,
  };
}

export function save(state) {
  const url = URL.createObjectURL(new Blob([JSON.stringify(all(state), null, 1)], { type: "application/json" }));
  el("a", { href: url, download: "nla.json" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
