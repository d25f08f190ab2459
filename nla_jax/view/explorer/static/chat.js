// Edit the turns of a chat, one by one or pasted as JSON.

import { el } from "./draw.js";

const ROLES = ["system", "user", "assistant"];
const MOST = 64;

const isTurn = (m) => ROLES.includes(m?.role) && typeof m.content === "string";

// Parse [{ role, content }, …] from JSON text; null if it is not such a list.
export function parsed(text) {
  try {
    const found = JSON.parse(text), list = found?.messages ?? found;
    return Array.isArray(list) && list.length > 0 && list.length <= MOST && list.every(isTurn)
      ? list.map(({ role, content }) => ({ role, content })) : null;
  } catch {
    return null;
  }
}

// Make fields for the turns in `box`. Ctrl Enter calls `send`.
export function editor(box, send) {
  function row({ role, content }) {
    const whose = el("select", { "aria-label": "Role of this turn" }, ...ROLES.map((r) => el("option", { value: r }, r)));
    whose.value = role;
    const words = el("textarea", { rows: 2, maxlength: 8000, spellcheck: "false", "aria-label": "Words of this turn",
      onkeydown: (e) => { if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) { e.preventDefault(); send(); } } });
    words.value = content;
    const made = el("li", {}, whose, words,
      el("button", { type: "button", "aria-label": "Remove this turn", onclick: () => { made.remove(); box.querySelector("textarea")?.focus(); } }, "×"));
    return made;
  }
  return {
    get: () => [...box.children].map((li) => ({ role: li.querySelector("select").value, content: li.querySelector("textarea").value })),
    set: (turns) => box.replaceChildren(...turns.map(row)),
    add() {
      if (box.children.length === MOST) return;
      const last = box.lastElementChild?.querySelector("select").value;
      box.append(row({ role: last === "user" ? "assistant" : "user", content: "" }));
      box.lastElementChild.querySelector("textarea").focus();
    },
  };
}
