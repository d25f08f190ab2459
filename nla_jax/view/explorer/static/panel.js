// Make the right column: explanations by each bundle, and the comparison of two tokens.

import * as draw from "./draw.js";

const { el } = draw;

// Return the names of the open bundles, and a sentence about their FVE.
export function banner(facts) {
  const sides = Object.values(facts.sides), f = sides[0], fve = f.figures.fve, mean = f.figures.fve_mean_direction;
  const span = ([v, low, high]) => (low === null ? draw.number(v) : `${draw.number(v)} (${draw.number(low)} to ${draw.number(high)})`);
  const frozen = sides.filter((s) => s.ar_kind === "frozen").map((s) => s.name);
  const reader = frozen.length ? ` AR of ${frozen.join(" and of ")} is the frozen target, which was not trained.` : "";
  return [`${sides.map((s) => s.name).join(" against ")} · ${f.target} · block ${f.layer} of ${f.blocks}`, (fve
    ? `On ${f.note ? "in-distribution" : "held-out"} text this bundle's FVE is ${span(fve)}; the mean direction scores ${mean ? draw.number(mean[0]) : "an unknown value"}, an exact reconstruction 1.`
    : "The FVE of this bundle on held-out text is not known: there is no evaluation next to it.") + (f.note ? ` (${f.note})` : "") + reader];
}

// Return the heading: the token, and its position in the text and in a chat.
export function heading(state, i) {
  if (i === null) return [el("p", { class: "faint" }, "Click a token, or choose one with the arrow keys and press Enter.")];
  const n = state.turns.findIndex((t) => t.start <= i && i < t.end), turn = state.turns[n];
  const place = turn ? `, ${i - turn.start + 1} of ${turn.end - turn.start} in turn ${n + 1} (${turn.role})`
    : state.turns.length ? ", written by the template" : "";
  return [el("b", {}, JSON.stringify(state.tokens[i])), el("span", { class: "faint" },
    `  token ${i} of ${state.tokens.length}${place}, after block ${state.facts.sides.a.layer}`)];
}

// The growing text comes last, because elements below it would otherwise move.
export function column(state, i, side, list, does) {
  const facts = state.facts.sides[side], first = list[0], key = `${i}${side}`;
  const box = el("div", { class: "side" }, el("h2", {}, facts.name, el("small", {},
    ` ${facts.stage === "rl" ? "after RL" : facts.stage.replaceAll("_", " ")}${facts.ar_kind === "frozen" ? ", AR: the frozen target" : ""}`)),
  el("div", { class: "row" },
    state.facts.texts ? null : el("button", { type: "button", class: "edit-open", disabled: !first?.done?.ok || key in state.edits, "data-key": `open${side}`,
      onclick: () => {
        state.edits[key] = { words: first.done.words, done: null };
        does.show();
        document.getElementById(`edit-${key}`).focus();
      } }, "Edit the words"),
    el("button", { type: "button", "data-key": `more${side}`, onclick: does.more,
      disabled: !first?.done || list.length > (state.facts.samples ?? Infinity) }, "Another sample")));
  list.forEach((row, n) => {
    const place = el("div", { class: "sample" });
    row.redraw = () => place.replaceChildren(
      el("h3", {}, n ? `sample ${n}, temperature 1` : "greedy explanation"),
      draw.scores(row.done), draw.words(row.written, row.done, row.busy, row.recurs, (t) => `${JSON.stringify(state.tokens[t])} (${t})`, row.trust),
      ...(row.done?.ok ? [draw.next(row.next)] : []));
    row.redraw();
    box.append(place);
    if (n === 0 && key in state.edits) box.append(editor(state, i, side, does));
  });
  return box;
}

function editor(state, i, side, does) {
  const key = `${i}${side}`, now = state.edits[key];
  const field = el("textarea", { id: `edit-${key}`, "data-key": `edit${side}`, rows: 4, maxlength: 4000, "aria-label": "Other words for AR",
    onkeydown: (e) => { if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) does.edit(side, field.value); },
    oninput: () => { now.words = field.value; } });
  field.value = now.words;
  const box = el("div", { class: "edit" }, field, el("div", { class: "row" },
    el("button", { type: "button", class: "main", "data-key": `ask${side}`, onclick: () => does.edit(side, field.value) },
      "Reconstruct with AR"),
    el("button", { type: "button", onclick: () => { delete state.edits[key]; does.show(); } }, "Close")));
  if (now.done) {
    box.append(el("p", {}, "Cosine of the new direction with the old one: ", el("b", {}, draw.number(now.done.cos_before, 3))),
      draw.scores(now.done), draw.words("", now.done), ...(now.done.ok ? [draw.next(now.next)] : []), steering(state, i, side, now, does));
  }
  return box;
}

// Show the target's continuations with the difference of AR's two directions added to h.
function steering(state, i, side, now, does) {
  const strength = now.strength ?? 1;
  const says = el("output", { class: "faint" }, ` ${draw.number(strength, 1)}`);
  const slider = el("input", { type: "range", min: -4, max: 4, step: 0.5, value: strength, id: `steer-${i}${side}`,
    "data-key": `steer${side}`, oninput: () => { says.textContent = ` ${draw.number(Number(slider.value), 1)}`; },
    onchange: () => does.steer(side, Number(slider.value)) });
  const lines = el("dl", { class: "goes-on" });
  now.redraw = () => lines.replaceChildren(
    el("dt", {}, "plain"), el("dd", {}, now.goesOn?.[0] ?? " "), el("dt", {}, "steered"), el("dd", {}, now.goesOn?.[1] ?? " "));
  now.redraw();
  return el("div", { class: "steer" }, el("label", { for: slider.id },
    "Steer the target: the new direction minus the old one is added to h at this token. Strength", says), slider, lines);
}

export function comparison(state, c) {
  const [i, j] = c.tokens, name = (t) => `${JSON.stringify(state.tokens[t])} (${t})`;
  const row = (...cells) => el("tr", {}, ...cells.map((x, n) => el("td", { class: n ? "n" : "" }, x)));
  return el("div", {}, el("h2", {}, `${name(i)} and ${name(j)}`),
    el("p", {}, `Cosine of the activations ${draw.number(c.cos_h, 3)}, of AR's reconstructions ${draw.number(c.cos_words, 3)}.`),
    el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, "words"), el("th", {}, `FVE at ${name(i)}`), el("th", {}, `FVE at ${name(j)}`))),
      el("tbody", {}, row(c.words[0] || "(unreadable)", draw.number(c.own[0].fve), draw.number(c.crossed[1].fve)),
        row(c.words[1] || "(unreadable)", draw.number(c.crossed[0].fve), draw.number(c.own[1].fve)))));
}
