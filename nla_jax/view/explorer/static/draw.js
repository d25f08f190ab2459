// Draw the page's elements. Text is inserted through textContent only.

const SVG = "http://www.w3.org/2000/svg";

export function el(name, about = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(about)) {
    if (key === "class") made.className = value;
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children.filter((c) => c !== null && c !== undefined));
  return made;
}

function shape(name, about, title) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(about)) made.setAttribute(key, value);
  if (title) {
    const t = document.createElementNS(SVG, "title");
    t.textContent = title;
    made.append(t);
  }
  return made;
}

export const number = (x, digits = 2) => (x === undefined || x === null ? "–" : x.toFixed(digits).replace("-", "−"));

// Set a node's colour by FVE: one hue from 0 to 1, the other from 0 to −1.
export function colour(node, fve) {
  node.classList.toggle("above", fve !== undefined && fve >= 0);
  node.classList.toggle("below", fve !== undefined && fve < 0);
  node.style.setProperty("--v", fve === undefined ? 0 : Math.min(Math.abs(fve), 1).toFixed(3));
}

// Make white space visible.
const seen = (token) => token.replace(/\n/g, "⏎\n").replace(/^ +$/, (s) => "␣".repeat(s.length)).replace(/\t/g, "⇥");

// Draw the tokens; those of a turn's words are grouped under its role.
export function tokens(box, names, turns, choose) {
  const nodes = names.map((name, i) => {
    const made = el("span", { class: "token", role: "option", id: `t${i}`, "aria-selected": "false",
      onclick: (e) => choose(i, e.shiftKey) });
    made.textContent = seen(name);
    return made;
  });
  box.classList.toggle("in-turns", turns.length > 0);
  box.replaceChildren();
  let at = 0;
  for (const { role, start, end } of turns) {
    box.append(...nodes.slice(at, start), el("span", { class: "turn", role: "group", "aria-label": role },
      el("span", { class: "role", "aria-hidden": "true" }, role), ...nodes.slice(start, end)));
    at = end;
  }
  box.append(...nodes.slice(at));
}

export function map(box, names, heats, called, choose) {
  const width = Math.max(names.length * 12, 240), rows = Object.entries(heats);
  const height = 46 * rows.length;
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": `FVE of ${names.length} tokens` });
  rows.forEach(([side, heat], r) => {
    const zero = 46 * r + 24;
    svg.append(shape("line", { x1: 0, x2: width, y1: zero, y2: zero, class: "axis" }));
    names.forEach((name, i) => {
      const h = heat.get(i);
      const size = h ? Math.max(Math.min(Math.abs(h.fve), 1) * 21, 1) : 0;
      const bar = shape("rect", { x: i * 12 + 1.5, y: h && h.fve >= 0 ? zero - size : zero, width: 9, height: size,
        class: h && h.fve >= 0 ? "up" : "down" });
      const all = shape("rect", { x: i * 12, y: 46 * r, width: 12, height: 46, class: "hit" },
        `${i}  ${name}  ${side.toUpperCase()}: ${h ? number(h.fve) : "not yet"}`);
      all.addEventListener("click", (e) => choose(i, e.shiftKey));
      svg.append(bar, all);
    });
  });
  const about = rows.map(([side]) => called[side]).join(" above, ") + (rows.length > 1 ? " below" : "");
  box.replaceChildren(svg, el("p", { class: "faint" }, rows.length ? `FVE over positions: ${about}` : ""));
}

// Draw the explanation's FVE by AR and by the frozen target, with the mean direction and other texts' explanations.
export function scale(score, controls) {
  const low = -1, x = (v) => 8 + ((Math.max(Math.min(v, 1), low) - low) / (1 - low)) * 284;
  const svg = shape("svg", { viewBox: "0 0 300 34", class: "scale", role: "img",
    "aria-label": score ? `FVE ${number(score.fve)}` : "FVE not known yet" });
  svg.append(shape("line", { x1: x(-1), x2: x(1), y1: 12, y2: 12, class: "axis" }));
  for (const v of [-1, 0, 1]) {
    const t = shape("text", { x: x(v), y: 31, class: v === -1 ? "tick first" : "tick" });
    t.textContent = v === -1 ? "≤ −1" : String(v);
    svg.append(shape("line", { x1: x(v), x2: x(v), y1: 8, y2: 16, class: "axis" }), t);
  }
  if (score) {
    if (controls.mean !== undefined)
      svg.append(shape("rect", { x: x(controls.mean) - 1.5, y: 3, width: 3, height: 18, class: "mean" },
        `the mean direction, the same for every h: ${number(controls.mean)}`));
    svg.append(shape("circle", { cx: x(controls.shuffled), cy: 12, r: 4.5, class: "shuffled" },
      `explanations of other texts: ${number(controls.shuffled)}`));
    svg.append(shape("circle", { cx: x(score.fve), cy: 12, r: 5.5, class: "this" },
      `this explanation, read by AR: ${number(score.fve)}`));
    svg.append(shape("circle", { cx: x(score.frozen.fve), cy: 12, r: 4.5, class: "frozen" },
      `this explanation, read by the frozen target: ${number(score.frozen.fve)}`));
  }
  return svg;
}

export function scores(done) {
  const controls = done?.controls ?? {}, frozen = done?.frozen;
  return el("div", { class: "scores" },
    el("p", { class: "frozen" }, el("span", { class: "dot frozen" }), el("b", {}, number(frozen?.fve)), " FVE by the frozen target",
      el("span", { class: "faint" }, ` · cosine ${number(frozen?.cos)}`)),
    el("p", { class: "faint note" }, "The target was not trained to understand AV: it reads these words as any text. ",
      `Other texts' words score ${number(frozen?.shuffled)}.`),
    el("p", { class: "figure" }, el("span", { class: "dot this" }), el("b", {}, number(done?.fve)), " FVE by AR",
      el("span", { class: "faint" }, ` · cosine ${number(done?.cos)}`)),
    scale(done, controls),
    el("p", { class: "faint controls" }, el("span", { class: "dot mean" }), `mean direction ${number(controls.mean)} `,
      el("span", { class: "dot shuffled" }), `other texts' words ${number(controls.shuffled)}`));
}

// Draw the explanation. Once it is scored, each claim has its contribution; once the preceding tokens are
// explained, whether it recurs. `recurs`: { before: tokens, at: for each claim some of them, or null }, or null.
// `trust`: the claims of the explanation with their spans, or null; each is shaded by its trust.
export function words(text, done, busy, recurs, nameOf, trust) {
  const box = el("div", { class: busy ? "said busy" : "said" });
  if (done && !done.ok) {
    box.append(el("p", { class: "faint" }, "AV’s answer has no readable explanation. Its score is that of a vector orthogonal to h."));
    return box;
  }
  const { claims, end } = done ?? parts(text);
  let at = 0; // where the next part begins in the explanation
  const said = (part) => {
    at = done ? Math.max(done.words.indexOf(part, at), 0) : 0;
    const nodes = shaded(part, at, trust ?? []);
    at += part.length;
    return nodes;
  };
  claims.forEach((claim, i) => {
    const where = recurs?.at[i] ?? [];
    const part = el("p", { class: where.length ? "claim recurs" : "claim" }, adds(claim, "claim"), ...said(claim.words));
    if (where.length) part.append(again(where, recurs.before.length, nameOf));
    colour(part, claim.adds === undefined ? undefined : claim.adds * 3);
    box.append(part);
  });
  if (end) {
    const part = el("div", { class: "end" }, adds(end, "line"), el("p", { class: "faint" }, "the text ends, as the model holds it"),
      el("blockquote", {}, ...said(end.words)));
    colour(part, end.adds === undefined ? undefined : end.adds * 3);
    box.append(part);
  }
  if (done && !claims.length && !end) box.append(el("p", {}, done.words));
  return box;
}

// Split the words at the claims inside them. A claim is fainter the less it is trusted.
function shaded(part, start, trust) {
  const nodes = [];
  let from = 0;
  for (const claim of trust) {
    const a = claim.start - start, b = claim.end - start;
    if (a < from || b > part.length) continue;
    const percent = Math.round(claim.trust * 100);
    const marked = el("span", { class: "trust", title: `true with probability ${percent} % (${claim.kind})` }, part.slice(a, b));
    marked.style.setProperty("--p", `${percent}%`);
    nodes.push(part.slice(from, a), marked);
    from = b;
  }
  nodes.push(part.slice(from));
  return nodes;
}

// Split an unfinished explanation into parts. The ending line comes last and begins with its mark.
function parts(text) {
  const lines = text.split("\n").filter((line) => line.trim()), mark = "…";
  const last = lines.at(-1)?.startsWith(mark) ? lines.pop() : null;
  return { claims: lines.map((words) => ({ words })), end: last === null ? null : { words: last.slice(mark.length).trim() } };
}

const adds = (part, what) => el("span", { class: "adds", title: `FVE with this ${what}, minus FVE without it` },
  part.adds === undefined ? "" : (part.adds >= 0 ? "+" : "") + number(part.adds));

// Draw the target's next tokens after the text and after the words alone; dashes until the answer arrives.
export function next(found) {
  const list = (about, rows) => el("div", {}, el("h5", {}, about), el("ol", {},
    ...(rows ?? Array(5).fill({ token: null })).map(({ token, p }) => el("li", {},
      el("span", { class: "next-token" }, token === null ? "–" : JSON.stringify(token)), el("span", { class: "next-p" }, number(p))))));
  return el("div", { class: "next" }, el("h4", {}, "What the target would say next"),
    el("div", { class: "next-lists" }, list("after the text up to this token", found?.after_text),
      list("after these words alone", found?.after_words)),
    el("p", { class: "faint" }, "KL from the first to the second: ", el("b", {}, number(found?.kl)), " nats"));
}

function again(at, of, nameOf) {
  const where = `recurs at ${at.length} of ${of} preceding tokens: ${at.map(nameOf).join(", ")}`;
  return el("span", { class: "again", title: where },
    el("span", { "aria-hidden": "true" }, `↺${at.length}`), el("span", { class: "unseen" }, ` (${where})`));
}
