// Answer the page's requests from files beside it. A static copy has this module in place of api.js.

const data = window.nlaData; // data/index.js has set it; data/text-N.js adds a text

export async function about() {
  return data.index;
}

const loading = new Map();

// Load a text's file with a script element, because a page from disk may not fetch.
function open(n) {
  if (!loading.has(n)) loading.set(n, new Promise((done, fail) => {
    const script = document.createElement("script");
    script.src = `data/text-${n}.js`;
    script.onload = () => done(data.texts[n]);
    script.onerror = () => {
      loading.delete(n);
      fail(new Error(`${script.src} cannot be loaded: copy the whole folder`));
    };
    document.head.append(script);
  }));
  return loading.get(n);
}

const rowOf = (text, { side, token, words }) => text.sides[side][token].find((r) => r.done.words === words);
const known = (value, what) => {
  if (value === undefined || value === null) throw new Error(`this copy has no ${what}; nla serve computes it`);
  return value;
};

const answers = {
  read: (text) => ({ done: { tokens: text.tokens, turns: text.turns } }),
  heat: (text, { side, start }) => ({
    heat: text.sides[side].slice(start).map(([{ done }], i) => ({ token: start + i, ...done })) }),
  telling: (text) => ({ done: known(text.telling, "telling tokens") }),
  explain: (text, { token, side, sample }) => ({ done: known(text.sides[side][token][sample], "further sample").done }),
  recur: (text, fields) => ({ done: known(rowOf(text, fields)?.recurs, "such words") }),
  predict: (text, fields) => ({ done: known(rowOf(text, fields)?.next, "such words") }),
  trust: (text, fields) => ({ done: { claims: known(rowOf(text, fields)?.trust, "such words") } }),
  compare: (text, { tokens: [i, j], side }) => {
    const { cos_h, cos_words, crossed, variance, ok } = known(text.pairs[side], "comparison");
    const score = (h, words) => {
      const cos = ok[words] ? crossed[h][words] : 0;
      return { fve: 1 - (2 - 2 * cos) / variance[h], cos, ok: ok[words] };
    };
    return { done: { cos_h: cos_h[i][j], cos_words: cos_words[i][j],
      own: [score(i, i), score(j, j)], crossed: [score(i, j), score(j, i)] } };
  },
};

export async function ask(what, fields, hear, signal) {
  const n = data.index.texts.findIndex((t) => t.text === fields.text);
  if (!(what in answers) || n < 0) throw new Error("this copy has no model: choose one of its texts, or use nla serve");
  const text = await open(n);
  if (signal.aborted) throw new DOMException("stopped", "AbortError");
  hear(answers[what](text, fields));
}
