// Control the page: its state, and the order of requests. Only one request runs at a time. A click on a token
// interrupts the colouring, which continues after the token's explanation.

import { about, ask } from "./api.js";
import { editor, parsed } from "./chat.js";
import * as draw from "./draw.js";
import * as links from "./links.js";
import { banner, column, comparison, heading } from "./panel.js";

const $ = (id) => document.getElementById(id);
const state = { facts: null, source: {}, text: "", tokens: [], turns: [], chosen: null, other: null, cursor: 0, heat: {}, samples: {}, edits: {},
  compared: null, telling: null, colouring: false };
let turns = null; // the editor of a chat
let under = null; // the AbortController of the current request

const sides = () => Object.keys(state.facts.sides);

function say(words, bad = false) {
  $("status").textContent = words;
  $("status").classList.toggle("bad", bad);
}

// Abort the current request, run `work`, and show its status. Returns whether it was completed.
async function asked(work, words) {
  under?.abort();
  const mine = (under = new AbortController());
  $("stop").classList.remove("off");
  say(words);
  try {
    await work((what, fields, hear) => ask(what, fields, (event) => {
      if (event.place > 1) say(`${words}: ${event.place} before you`);
      else if (event.place === 0) say(words);
      if (mine === under) hear(event);
    }, mine.signal));
    if (mine === under) say("");
    return mine === under;
  } catch (e) {
    if (mine === under) say(e.name === "AbortError" ? "stopped" : e.message, e.name !== "AbortError");
    return false;
  } finally {
    if (mine === under) {
      under = null;
      $("stop").classList.add("off");
    }
  }
}

// --- reading a text ---------------------------------------------------------------------------

// `source` is { text } or { messages, opens }.
async function read(source, then = {}) {
  let found = null;
  const ended = await asked((q) => q(source.messages ? "chat" : "read", source, (e) => { found = e.done ?? found; }), "reading");
  if (!ended || !found) return;
  Object.assign(state, { source, text: found.text ?? source.text, tokens: found.tokens, turns: found.turns ?? [],
    colouring: false, chosen: null, other: null, cursor: found.tokens.length - 1, samples: {}, edits: {}, compared: null, telling: null,
    heat: Object.fromEntries(sides().map((s) => [s, new Map()])) });
  draw.tokens($("tokens"), state.tokens, state.turns, click);
  $("heat").disabled = $("telling").disabled = $("export").disabled = false;
  show();
  if (then.token !== undefined && then.token < state.tokens.length) {
    if (!(await choose(then.token))) return;
    if (then.with !== undefined && then.with < state.tokens.length && !(await compare(then.with))) return;
  } else link();
  await colourAll(state.tokens.length <= 48);
}

async function colourAll(wanted = true) {
  state.colouring = state.colouring || wanted;
  if (!state.colouring) return;
  for (const side of sides()) {
    const known = state.heat[side];
    let start = 0;
    while (known.has(start)) start += 1;
    if (start === state.tokens.length) continue;
    const ended = await asked((q) => q("heat", { text: state.text, side, start }, (e) => {
      for (const h of e.heat ?? []) known.set(h.token, h);
      if (e.heat) {
        say(`colouring: ${known.size} of ${state.tokens.length}`);
        paint();
      }
    }), "colouring");
    if (!ended) return;
  }
  state.colouring = false;
}

function paint() {
  const heat = state.heat[sides()[0]];
  state.tokens.forEach((_, i) => {
    const node = $(`t${i}`);
    draw.colour(node, heat.get(i)?.fve);
    node.classList.toggle("chosen", i === state.chosen);
    node.classList.toggle("other", i === state.other);
    node.classList.toggle("cursor", i === state.cursor);
    node.setAttribute("aria-selected", String(i === state.chosen));
    const told = state.telling?.tokens.indexOf(i) ?? -1;
    node.classList.toggle("telling", told >= 0);
    node.title = [told < 0 ? "" : `unsure what follows: ${draw.number(state.telling.nats[told])} nats`,
      heat.has(i) ? `FVE ${draw.number(heat.get(i).fve)}: ${heat.get(i).words}` : ""].filter(Boolean).join("\n");
  });
  if (state.tokens.length) $("tokens").setAttribute("aria-activedescendant", `t${state.cursor}`);
  draw.map($("map"), state.tokens, state.heat,
    Object.fromEntries(sides().map((s) => [s, state.facts.sides[s].name])), click);
}

// --- explanations -----------------------------------------------------------------------------

// Continue the colouring once `work` is completed, unless another request has replaced it.
async function thenColour(work) {
  if (await work) await colourAll(false);
}

function click(i, shift) {
  state.cursor = i;
  return thenColour(shift && state.chosen !== null && i !== state.chosen ? compare(i) : choose(i));
}

// Mark the telling tokens, and explain the next one after the chosen token.
async function tell() {
  let found = state.telling;
  if (!found) {
    const ended = await asked((q) => q("telling", { text: state.text }, (e) => { found = e.done ?? found; }),
      "finding the telling tokens");
    if (!ended || !found) return ended;
    state.telling = found;
  }
  const { tokens } = found, next = tokens.find((t) => t > (state.chosen ?? -1)) ?? tokens[0];
  move(next);
  return choose(next);
}

const samplesOf = (i, side) => ((state.samples[i] ??= {})[side] ??= []);

// This and the following functions return whether they were completed.
async function choose(i) {
  Object.assign(state, { chosen: i, cursor: i, other: null, compared: null });
  link();
  show();
  return explainAll(i, 0);
}

async function explainAll(i, n) {
  for (const side of sides()) if (!(await explain(i, side, n))) return false;
  for (const side of sides()) if (!(await recur(i, side, n))) return false;
  for (const side of sides()) {
    const row = samplesOf(i, side)[n];
    if (!(await predict(i, side, row))) return false;
    row.redraw?.();
  }
  for (const side of sides()) if (!(await trust(i, side, samplesOf(i, side)[n]))) return false;
  return true;
}

// Stream sample n of token i into its row.
async function explain(i, side, n) {
  const list = samplesOf(i, side);
  if (list[n]?.done) return true;
  const row = (list[n] = { written: "", done: null, busy: true });
  show();
  const ended = await asked((q) => q("explain", { text: state.text, token: i, side, sample: n }, (e) => {
    if (e.written !== undefined) row.written = e.written;
    if (e.done) row.done = e.done;
    row.redraw?.();
  }), "explaining");
  row.busy = false;
  if (!row.done && list[n] === row) list.length = n; // stopped, so that it can be requested again
  if (row.done && n === 0) state.heat[side].set(i, { token: i, ...row.done });
  show();
  return ended && row.done !== null;
}

// Find which of its claims recur at the preceding tokens.
async function recur(i, side, n) {
  const row = samplesOf(i, side)[n];
  if (row.recurs || !row.done.ok || i === 0) return true;
  const ended = await asked((q) => q("recur", { text: state.text, token: i, side, words: row.done.words },
    (e) => { row.recurs = e.done ?? row.recurs; }), "explaining the preceding tokens");
  row.redraw?.();
  return ended;
}

// Predict the target's next token after the text and after the row's words alone.
async function predict(i, side, row) {
  if (row.next || !row.done.ok) return true;
  return asked((q) => q("predict", { text: state.text, token: i, side, words: row.done.words },
    (e) => { row.next = e.done ?? row.next; }), "predicting the next token");
}

// Estimate how likely each claim is true, if the bundle has a trust model.
async function trust(i, side, row) {
  if (!state.facts.sides[side].trust || row.trust || !row.done.ok) return true;
  const ended = await asked((q) => q("trust", { text: state.text, token: i, side, words: row.done.words },
    (e) => { row.trust = e.done?.claims ?? row.trust; }), "explaining the tokens around it");
  row.redraw?.();
  return ended;
}

async function more() {
  const i = state.chosen;
  return i !== null && explainAll(i, Math.min(...sides().map((side) => samplesOf(i, side).length)));
}

async function edit(side, words) {
  const i = state.chosen, first = samplesOf(i, side)[0];
  if (!first?.done) return false;
  let found = null;
  const ended = await asked((q) => q("edit", { text: state.text, token: i, side, words, before: first.done.words },
    (e) => { found = e.done ?? found; }), "reconstructing");
  if (!found) return ended;
  const row = (state.edits[`${i}${side}`] = { ...state.edits[`${i}${side}`], words, done: found, next: null });
  show();
  const told = await predict(i, side, row);
  show();
  return told;
}

async function steer(side, strength) {
  const i = state.chosen, now = state.edits[`${i}${side}`], first = samplesOf(i, side)[0];
  if (!now?.done || !first?.done) return false;
  Object.assign(now, { strength, goesOn: null });
  return asked((q) => q("steer", { text: state.text, token: i, side, words: now.done.words, before: first.done.words, strength },
    (e) => {
      now.goesOn = e.goes_on ?? e.done?.goes_on ?? now.goesOn;
      now.redraw();
    }), "steering the target");
}

async function compare(j) {
  const i = state.chosen, side = sides()[0];
  state.other = j;
  link();
  paint();
  if (!(await explain(i, side, 0)) || !(await explain(j, side, 0))) return false;
  const words = [i, j].map((t) => samplesOf(t, side)[0].done.words);
  let found = null;
  const ended = await asked((q) => q("compare", { text: state.text, tokens: [i, j], words, side }, (e) => { found = e.done ?? found; }),
    "comparing");
  if (found) state.compared = { tokens: [i, j], words, ...found };
  show();
  return ended;
}

// --- the right column -------------------------------------------------------------------------

const does = { show, tell: () => thenColour(tell()), more: () => thenColour(more()), edit: (side, words) => thenColour(edit(side, words)),
  steer: (side, strength) => thenColour(steer(side, strength)) };

function show() {
  const held = document.activeElement, key = held?.dataset?.key, at = [held?.selectionStart, held?.selectionEnd];
  paint();
  const i = state.chosen;
  $("chosen").replaceChildren(...heading(state, i));
  $("sides").replaceChildren(...(i === null ? [] : sides().map((side) => column(state, i, side, samplesOf(i, side), does))));
  const c = state.compared;
  $("compared").hidden = !c;
  if (c) $("compared").replaceChildren(comparison(state, c));
  const again = key && document.querySelector(`[data-key="${CSS.escape(key)}"]`);
  if (again) { // restore the focus and the selection
    again.focus({ preventScroll: true });
    if (again.setSelectionRange) again.setSelectionRange(...at);
  }
}

// --- links, export, keys ----------------------------------------------------------------------

const link = () => history.replaceState(null, "", links.written(state));

function fromLink() {
  const { source, then } = links.read(location.hash), given = state.facts.texts;
  if (given) {
    if (!source) return submit();
    $("texts").value = Math.max(given.findIndex(({ text }) => text === source.text), 0);
    return read(source, then);
  }
  if (!source) return;
  if (source.messages) {
    $("opens").checked = source.opens;
    showChat(source.messages);
    if (!state.facts.chat) return;
  } else {
    $("kind-text").checked = true;
    $("text").value = source.text;
    showKind();
  }
  read(source, then);
}

function showKind() {
  const chat = $("kind-chat").checked;
  $("text").hidden = chat;
  $("chat").hidden = !chat;
  $("submit").disabled = chat && !state.facts.chat;
}

function showChat(messages) {
  turns.set(messages);
  $("kind-chat").checked = true;
  showKind();
}

// Show the texts of a static copy, which has no model for others.
function give(texts, note) {
  for (const node of document.querySelectorAll("[data-live]")) node.hidden = true;
  $("given").hidden = false;
  $("given-note").textContent = note;
  $("texts").replaceChildren(...texts.map(({ text }, i) => draw.el("option", { value: i }, text.replace(/\s+/g, " ").trim().slice(0, 120))));
  $("texts").addEventListener("change", submit);
}

function submit() {
  if (state.facts.texts) return read({ text: state.facts.texts[$("texts").value].text });
  if ($("kind-chat").checked) {
    if (state.facts.chat) read({ messages: turns.get(), opens: $("opens").checked });
  } else if ($("text").value) read({ text: $("text").value });
}

function move(to) {
  state.cursor = Math.max(0, Math.min(state.tokens.length - 1, to));
  paint();
  $(`t${state.cursor}`)?.scrollIntoView({ block: "nearest" });
}

function stop() {
  state.colouring = false;
  under?.abort();
}

function key(e) {
  if (!state.tokens.length || e.ctrlKey || e.metaKey || e.altKey) return;
  const typing = ["TEXTAREA", "INPUT", "SELECT"].includes(document.activeElement.tagName);
  if (e.key === "Escape") return stop();
  if (typing || $("help").open) return;
  const at = document.activeElement === $("tokens");
  const arrows = {
    ArrowLeft: () => move(state.cursor - 1), ArrowRight: () => move(state.cursor + 1),
    Home: () => move(0), End: () => move(state.tokens.length - 1),
    Enter: () => click(state.cursor, e.shiftKey),
  };
  const letters = { m: does.more, t: does.tell, h: () => colourAll(), e: () => document.querySelector(".edit-open:enabled")?.click() };
  const work = (at && arrows[e.key]) || letters[e.key];
  if (work) {
    e.preventDefault();
    work();
  }
}

async function start() {
  try {
    state.facts = await about();
  } catch (e) {
    $("what").textContent = e.message;
    return say(e.message, true);
  } finally {
    document.body.classList.add("known"); // the page is shown from now on, because it would otherwise move when the facts arrive
  }
  [$("what").textContent, $("banner-fve").textContent] = banner(state.facts);
  $("map").style.minHeight = `${46 * sides().length + 24}px`; // reserves the height, because the page would otherwise move
  turns = editor($("turns"), submit);
  turns.set([{ role: "user", content: "" }]);
  $("no-chat").hidden = state.facts.chat;
  if (state.facts.texts) give(state.facts.texts, state.facts.given);
  $("add-turn").addEventListener("click", turns.add);
  for (const kind of ["kind-text", "kind-chat"]) $(kind).addEventListener("change", showKind);
  $("text").addEventListener("paste", (e) => {
    const messages = parsed(e.clipboardData.getData("text"));
    if (!messages || !state.facts.chat) return;
    e.preventDefault();
    showChat(messages);
  });
  $("form").addEventListener("submit", (e) => { e.preventDefault(); submit(); });
  $("text").addEventListener("keydown", (e) => { if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) { e.preventDefault(); submit(); } });
  $("heat").addEventListener("click", () => colourAll());
  $("telling").addEventListener("click", does.tell);
  $("stop").addEventListener("click", stop);
  $("export").addEventListener("click", () => links.save(state));
  $("help-open").addEventListener("click", () => $("help").showModal());
  document.addEventListener("keydown", key);
  window.addEventListener("hashchange", fromLink);
  fromLink();
}

start();
