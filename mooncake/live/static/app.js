// The page: boards, what is chosen, and when to ask again.

import { ask, filled, labelValues, remember, series, Unauthorized } from "./query.js";
import { draw, drawError, drawWarnings, element, hideTip, paragraphs, showTip } from "./panels.js";

const SPANS = [[300, "5 min"], [900, "15 min"]];
const LONGER = [[3600, "1 h"], [21600, "6 h"]]; // a Prometheus remembers that long
const EVERY = [[5, "5 s"], [10, "10 s"], [30, "30 s"], [0, "never"]];
const POINTS = 180;
const MARGIN = 200; // pixels beyond what is seen that are drawn already
const byId = (id) => document.getElementById(id);
const state = { boards: [], board: null, chosen: {}, span: 900, every: 5, skew: 0, round: 5, turn: 0, source: "memory", timer: 0, panels: [] };

function view() {
  const step = Math.max(5, Math.ceil(Math.max(state.span / POINTS, state.round) / 5) * 5);
  const end = Math.floor((Date.now() / 1000 + state.skew) / step) * step;
  return { span: state.span, step, end, round: state.round };
}

// ------------------------------------------------------------ a board

function build(board) {
  const main = byId("board");
  observer.disconnect();
  state.panels.forEach(({ body }) => body.chart?.destroy());
  state.panels = [];
  main.replaceChildren();
  let grid = null;
  let number = 0;
  const section = (title) => {
    grid = element("div", { className: "grid" });
    const made = element("section", {});
    if (title) {
      const id = `section-${number++}`;
      made.setAttribute("aria-labelledby", id);
      made.append(element("h2", { id, text: title }));
    }
    made.append(grid);
    main.append(made);
  };
  const place = (panel) => {
    if (!grid) section("");
    const { x = 0, w = 12, h = 8 } = panel.gridPos ?? {};
    const id = `panel-${panel.id}`;
    const body = element("div", { className: `body ${panel.type}` });
    const heading = element("header", {}, element("h3", { id, text: panel.title ?? "" }));
    if (panel.description) heading.append(about(panel));
    const box = element("article", { className: `panel kind-${panel.type}`, "aria-labelledby": id }, heading, body);
    box.style.setProperty("--x", String(x + 1));
    box.style.setProperty("--w", String(w));
    box.style.setProperty("--h", String(h));
    grid.append(box);
    state.panels.push({ panel, body, box, seen: false, drawn: 0 });
  };
  for (const panel of board.panels ?? []) {
    if (panel.type === "row") {
      section(panel.title);
      (panel.panels ?? []).forEach(place);
    } else place(panel);
  }
  for (const item of state.panels) {
    const { top, bottom } = item.box.getBoundingClientRect();
    item.seen = top < innerHeight + MARGIN && bottom > -MARGIN;
    observer.observe(item.box);
  }
}

function about(panel) {
  const button = element("button", { type: "button", className: "about", "aria-label": `About ${panel.title}`, "aria-describedby": "tip", text: "i" });
  const show = () => {
    const { left, bottom } = button.getBoundingClientRect();
    showTip(paragraphs(panel.description), left - 14, bottom - 8);
  };
  for (const event of ["mouseenter", "focus", "click"]) button.addEventListener(event, show);
  for (const event of ["mouseleave", "blur"]) button.addEventListener(event, hideTip);
  return button;
}

// Only what can be seen is asked for.
const observer = new IntersectionObserver((changes) => {
  for (const change of changes) {
    const found = state.panels.find(({ box }) => box === change.target);
    if (!found) continue;
    found.seen = change.isIntersecting;
    if (found.seen && found.drawn < state.turn) refreshPanel(found, view()).catch(failed);
  }
}, { rootMargin: `${MARGIN}px` });

// One at a time for each panel: who comes meanwhile waits, and what was chosen meanwhile is asked for then.
function refreshPanel(item, now) {
  item.busy ??= redrawn(item, now).finally(() => { item.busy = null; });
  return item.busy;
}

async function redrawn(item, now) {
  do {
    await drawPanel(item, now);
    now = view();
  } while (item.drawn < state.turn && item.seen && state.panels.includes(item));
}

async function drawPanel(item, now) {
  item.drawn = state.turn;
  try {
    const targets = item.panel.targets ?? [];
    const found = await Promise.all(targets.map((target) => series(filled(target.expr, state.chosen, now), now)));
    item.results = targets.map((target, i) => ({ target, found: found[i].lines }));
    item.now = now;
    draw(item.panel, item.body, item.results, now);
    drawWarnings(item.box, found.flatMap(({ warnings }) => warnings));
  } catch (error) {
    if (error instanceof Unauthorized) throw error;
    drawError(item.body, error);
    drawWarnings(item.box, []);
  } finally {
    item.box.dataset.drawn = String(item.drawn);
  }
}

async function refresh() {
  clearTimeout(state.timer);
  const mine = ++state.turn;
  try {
    await tellStatus();
    const now = view();
    await Promise.all(state.panels.filter(({ seen }) => seen).map((item) => refreshPanel(item, now)));
    byId("board").setAttribute("aria-busy", "false");
  } catch (error) {
    failed(error);
  }
  if (mine === state.turn && state.every && !document.hidden) state.timer = setTimeout(refresh, state.every * 1000);
}

async function tellStatus() {
  const status = await ask("status");
  state.skew = status.now_s - Date.now() / 1000;
  state.source = status.source;
  state.round = status.round_s;
  const minutes = status.span_s < 90 ? `${Math.round(status.span_s)} s` : `${Math.round(status.span_s / 60)} min`;
  const parts = status.source === "prometheus" ? ["from Prometheus"] : [`from memory: the last ${minutes}, ${status.series} series`];
  if (status.dropped) parts.push(`${status.dropped} series are too many and not kept`);
  byId("status").classList.remove("bad");
  byId("status").textContent = parts.join("; ");
}

function failed(error) {
  if (error instanceof Unauthorized) return login(error);
  byId("status").classList.add("bad");
  byId("status").textContent = `This process does not answer (${error.message}). What you see is old.`;
}

// ------------------------------------------------------------ controls

function options(select, pairs, chosen) {
  select.replaceChildren(...pairs.map(([value, text]) => element("option", { value: String(value), text })));
  select.value = String(chosen);
}

async function variables(board) {
  const place = byId("variables");
  place.replaceChildren();
  const now = view();
  for (const variable of board.templating?.list ?? []) {
    if (variable.type !== "query") continue;
    const query = typeof variable.query === "string" ? variable.query : variable.query?.query ?? "";
    let values = [];
    try {
      values = await labelValues(query, state.chosen, now);
    } catch (error) {
      if (error instanceof Unauthorized) throw error;
    }
    const { name } = variable;
    if (!values.includes(state.chosen[name])) state.chosen[name] = null;
    if (values.length < 2) continue; // nothing to choose
    const select = element("select", { "aria-label": variable.label || name, "data-variable": name });
    options(select, [["", "All"], ...values.map((value) => [value, value])], state.chosen[name] ?? "");
    select.addEventListener("change", () => {
      state.chosen[name] = select.value || null;
      address();
      refresh();
    });
    place.append(element("label", {}, element("span", { className: "name", text: variable.label || name }), select));
  }
}

async function open(uid) {
  const known = state.boards.find((board) => board.uid === uid) ?? state.boards[0];
  const board = await ask(`boards/${known.uid}`);
  state.board = known.uid;
  document.title = board.title.replace(" / ", ": ");
  for (const link of byId("boards").children) {
    const here = link.dataset.uid === known.uid;
    here ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
    if (here) link.scrollIntoView({ block: "nearest", inline: "center" });
  }
  await variables(board);
  build(board);
  address();
  await refresh();
}

function address() {
  const values = new URLSearchParams({ board: state.board, span: state.span });
  for (const [name, value] of Object.entries(state.chosen)) if (value) values.set(`var-${name}`, value);
  history.replaceState(null, "", `#${values}`);
}

function fromAddress() {
  const values = new URLSearchParams(location.hash.slice(1));
  for (const [name, value] of values) if (name.startsWith("var-")) state.chosen[name.slice(4)] = value;
  const span = Number(values.get("span"));
  if ([...SPANS, ...LONGER].some(([known]) => known === span)) state.span = span;
  return values.get("board");
}

function theme(wanted) {
  document.documentElement.dataset.theme = wanted;
  localStorage.setItem("mooncake-theme", wanted);
}

function login(error) {
  const dialog = byId("login");
  byId("login-error").textContent = error.message;
  if (!dialog.open) dialog.showModal();
}

async function start() {
  const wanted = fromAddress();
  await tellStatus();
  options(byId("span"), state.source === "prometheus" ? [...SPANS, ...LONGER] : SPANS, state.span);
  state.boards = await ask("boards");
  byId("boards").replaceChildren(...state.boards.map(({ uid, title }) => {
    const link = element("a", { href: `#board=${encodeURIComponent(uid)}`, "data-uid": uid, text: title.replace(/^Mooncake \/ /, "") });
    link.addEventListener("click", (event) => {
      event.preventDefault();
      open(uid).catch(failed);
    });
    return link;
  }));
  await open(wanted);
}

theme(localStorage.getItem("mooncake-theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
options(byId("span"), SPANS, state.span);
options(byId("every"), EVERY, state.every);
byId("span").addEventListener("change", (event) => { state.span = Number(event.target.value); address(); refresh(); });
byId("every").addEventListener("change", (event) => { state.every = Number(event.target.value); refresh(); });
byId("theme").addEventListener("click", () => {
  theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  for (const { panel, body, results, now } of state.panels) if (results) draw(panel, body, results, now); // canvases know no CSS
});
byId("login").addEventListener("close", () => { remember(byId("token").value); byId("token").value = ""; start().catch(failed); });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
document.addEventListener("scroll", hideTip, { passive: true });
document.addEventListener("visibilitychange", () => { document.hidden ? clearTimeout(state.timer) : refresh(); });
start().catch(failed);
