// Draws one panel of a Grafana dashboard. All text goes in as text, never as HTML.

import { formatted } from "./units.js";

const COLORS = ["#4c8dff", "#f2994a", "#27ae7a", "#b575f0", "#eb5f6c", "#2fb8c6", "#d9b021", "#8b97a8", "#e275b7", "#7aa83c"];
const NAMED = { green: "--good", orange: "--warn", yellow: "--warn", red: "--bad", blue: "--info" };
const LEGEND_MAX = 40;
const SYNC = "mooncake";
const POWERS = Array.from({ length: 60 }, (_, i) => 2 ** (i - 4)); // bytes are counted so

export function element(tag, options = {}, ...children) {
  const made = document.createElement(tag);
  const { className, text, ...attributes } = options;
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function named(color) {
  return color in NAMED ? css(NAMED[color]) : color;
}

function legend(target, labels) {
  if (target.legendFormat) return target.legendFormat.replace(/\{\{\s*(\w+)\s*\}\}/g, (_, name) => labels[name] ?? "");
  const pairs = Object.entries(labels).filter(([name]) => name !== "__name__");
  return pairs.map(([name, value]) => `${name}=${value}`).join(" ");
}

// All series of a panel on the same times; null where there is no value or none that can be drawn.
export function aligned(results, view) {
  const times = [];
  for (let when = view.end - view.span; when <= view.end + 1e-6; when += view.step) times.push(Math.round(when * 1000));
  const lines = results.flatMap(({ target, found }) => found.map(({ labels, points }) => ({
    label: legend(target, labels),
    values: times.map((when) => { const v = points.get(when); return v === undefined || !Number.isFinite(v) ? null : v; }),
  })));
  lines.sort((a, b) => a.label.localeCompare(b.label, undefined, { numeric: true }));
  return { times: times.map((when) => when / 1000), lines: lines.filter(({ values }) => values.some((v) => v !== null)) };
}

function last(values) {
  for (let i = values.length - 1; i >= 0; i--) if (values[i] !== null) return values[i];
  return null;
}

// The value now: of a series that ended a while ago, none.
function current(values) {
  const recent = values.slice(-3);
  return last(recent);
}

function stepOf(thresholds, value) {
  let found = thresholds?.steps?.[0]?.color ?? "green";
  for (const { value: from, color } of thresholds?.steps ?? []) if (from !== null && from !== undefined && value >= from) found = color;
  return found;
}

function settings(panel) {
  return panel.fieldConfig?.defaults ?? {};
}

// ------------------------------------------------------------ kinds

function drawStat(panel, body, { lines }) {
  const { unit, decimals, thresholds, noValue } = settings(panel);
  const values = lines[0]?.values ?? [];
  const value = current(values);
  body.replaceChildren();
  body.closest(".panel").classList.toggle("empty", value === null);
  if (value === null) {
    body.append(element("p", { className: "stat none", text: noValue || "No data" }));
    return;
  }
  const steps = (thresholds?.steps?.length ?? 0) > 1;
  const color = named(stepOf(thresholds, value));
  const [number, ...rest] = formatted(value, unit, decimals).split(" ");
  const shown = element("p", { className: "stat" }, element("b", { text: number }));
  if (rest.length) shown.append(element("span", { className: "unit", text: ` ${rest.join(" ")}` }));
  body.closest(".panel").style.setProperty("--level", steps ? color : "transparent");
  if (steps) shown.style.setProperty("color", color);
  body.append(shown, spark(values, steps ? color : css("--info")));
}

function spark(values, color) {
  const NS = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(NS, "svg");
  svg.setAttribute("viewBox", "0 0 100 30");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  svg.classList.add("spark");
  const known = values.filter((v) => v !== null);
  const low = Math.min(0, ...known), high = Math.max(...known, low + 1e-12);
  const points = values.map((v, i) => (v === null ? null : [100 * i / Math.max(1, values.length - 1), 28 - 26 * (v - low) / (high - low)]));
  let run = [];
  const flush = () => {
    if (run.length > 1) {
      const line = run.map(([x, y]) => `${x.toFixed(2)} ${y.toFixed(2)}`).join(" L");
      for (const [d, fill] of [[`M${line} L${run.at(-1)[0].toFixed(2)} 30 L${run[0][0].toFixed(2)} 30 Z`, true], [`M${line}`, false]]) {
        const path = document.createElementNS(NS, "path");
        path.setAttribute("d", d);
        path.setAttribute("fill", fill ? color : "none");
        path.setAttribute("stroke", fill ? "none" : color);
        path.classList.add(fill ? "area" : "line");
        svg.append(path);
      }
    }
    run = [];
  };
  for (const point of points) point ? run.push(point) : flush();
  flush();
  return svg;
}

function drawBars(panel, body, { lines }) {
  const { unit, decimals, thresholds, noValue, max } = settings(panel);
  const now = lines.map(({ label, values }) => [label, current(values)]).filter(([, value]) => value !== null);
  body.replaceChildren();
  if (!now.length) return nothing(body, noValue);
  const high = max ?? Math.max(...now.map(([, value]) => value), 1e-12);
  const list = element("dl", { className: "bars" });
  for (const [label, value] of now.slice(0, LEGEND_MAX)) {
    const bar = element("i");
    bar.style.setProperty("width", `${Math.max(0.5, Math.min(100, 100 * value / high))}%`);
    bar.style.setProperty("background", named(stepOf(thresholds, value)));
    list.append(element("dt", { text: label || "all" }), element("dd", {}, element("span", { className: "track" }, bar), element("b", { text: formatted(value, unit, decimals) })));
  }
  body.append(list);
}

function drawText(panel, body) {
  body.replaceChildren(...paragraphs(panel.options?.content ?? ""));
}

function nothing(body, text) {
  body.replaceChildren(element("p", { className: "none", text: text || "No data" }));
}

// Paragraphs and **bold**, which is all that our descriptions have.
export function paragraphs(text) {
  return text.split(/\n\s*\n/).map((part) => {
    const made = element("p");
    part.split("**").forEach((piece, i) => made.append(i % 2 ? element("b", { text: piece }) : piece));
    return made;
  });
}

// ------------------------------------------------------------ time series

function stacks(lines) {
  const base = lines[0]?.values.map(() => 0) ?? [];
  return lines.map(({ values }) => values.map((v, i) => (v === null ? null : (base[i] += v))));
}

function drawLines(panel, body, data) {
  const { noValue } = settings(panel);
  const shape = `${data.lines.map(({ label }) => label).join("\n")}|${document.documentElement.dataset.theme}`;
  const chart = body.chart;
  if (!data.lines.length) {
    chart?.destroy();
    body.chart = null;
    return nothing(body, noValue);
  }
  const stacked = settings(panel).custom?.stacking?.mode === "normal";
  const drawn = stacked ? stacks(data.lines) : data.lines.map(({ values }) => values);
  if (chart && chart.shape === shape) {
    chart.mooncake = data;
    chart.setData([data.times, ...drawn], true);
  } else {
    chart?.destroy();
    const canvas = element("div", { className: "canvas", role: "img", "aria-label": `${panel.title}: a chart of the lines named below` });
    body.replaceChildren(canvas, element("table", { className: "legend" }));
    body.chart = newChart(panel, canvas, data, drawn, stacked);
    body.chart.shape = shape;
  }
  drawLegend(panel, body, data);
}

function newChart(panel, canvas, data, drawn, stacked) {
  const { unit, min, max, custom, thresholds } = settings(panel);
  const axis = { stroke: css("--muted"), grid: { stroke: css("--grid"), width: 1 }, ticks: { show: false }, font: `11px ${css("--font")}` };
  const fill = (custom?.fillOpacity ?? 0) / 100;
  const bands = stacked ? drawn.slice(1).map((_, i) => ({ series: [i + 2, i + 1], fill: tint(COLORS[(i + 1) % COLORS.length], fill) })) : [];
  const chart = new window.uPlot({
    width: Math.max(50, canvas.clientWidth), height: Math.max(60, canvas.clientHeight),
    legend: { show: false }, padding: [8, 10, 0, 0],
    cursor: { sync: { key: SYNC }, points: { size: 6 }, drag: { x: false, y: false } },
    scales: { x: { time: true }, y: { range: (_, low, high) => limits(low, high, min, max) } },
    axes: [
      { ...axis, size: 22, space: 70, values: (_, ticks) => ticks.map((at) => clock(at, data.times.at(-1) - data.times[0] <= 400)) },
      { ...axis, size: (_, values) => 14 + 6.2 * Math.max(3, ...(values ?? []).map((v) => v.length)), values: (_, ticks) => ticks.map((value) => formatted(value, unit)), ...(unit === "bytes" || unit === "binBps" ? { incrs: POWERS } : {}) },
    ],
    bands,
    series: [{}, ...data.lines.map(({ label }, i) => ({
      label, stroke: COLORS[i % COLORS.length], width: 1.6, spanGaps: false, points: { show: lonely },
      fill: stacked ? (i === 0 ? tint(COLORS[0], fill) : undefined) : tint(COLORS[i % COLORS.length], fill),
    }))],
    hooks: {
      draw: custom?.thresholdsStyle?.mode === "dashed" ? [(u) => dashes(u, thresholds)] : [],
      setCursor: [(u) => hover(u, unit)],
    },
  }, [data.times, ...drawn], canvas);
  chart.mooncake = data;
  canvas.addEventListener("mouseleave", hideTip);
  new ResizeObserver(() => {
    if (canvas.clientWidth > 50) chart.setSize({ width: canvas.clientWidth, height: Math.max(60, canvas.clientHeight) });
  }).observe(canvas);
  return chart;
}

// A value between two holes is no line: show it as a point.
function lonely(u, index) {
  const values = u.data[index];
  let count = 0;
  for (const value of values) if (value !== null) count++;
  return count <= 2;
}

function limits(low, high, min, max) {
  const bottom = min ?? (low ?? 0);
  let top = Math.max(high ?? 0, bottom);
  if (top === bottom) top = bottom + 1;
  return [bottom, max !== undefined && max !== null ? Math.max(max, top) : top + 0.08 * (top - bottom)];
}

function clock(at, seconds) {
  return new Date(at * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hour12: false, ...(seconds ? { second: "2-digit" } : {}) });
}

function tint(color, share) {
  return color + Math.round(255 * Math.min(1, Math.max(0, share))).toString(16).padStart(2, "0");
}

function dashes(u, thresholds) {
  const { ctx } = u;
  const { left, top, width, height } = u.bbox;
  ctx.save();
  ctx.setLineDash([6, 6]);
  ctx.lineWidth = 1.5;
  for (const { value, color } of thresholds?.steps ?? []) {
    if (value === null || value === undefined) continue;
    const y = u.valToPos(value, "y", true);
    if (y < top || y > top + height) continue;
    ctx.strokeStyle = named(color);
    ctx.beginPath();
    ctx.moveTo(left, y);
    ctx.lineTo(left + width, y);
    ctx.stroke();
  }
  ctx.restore();
}

function drawLegend(panel, body, { lines }) {
  const { unit, decimals } = settings(panel);
  const table = body.querySelector(".legend");
  const head = element("tr", {}, element("th", { scope: "col", text: "" }), element("th", { scope: "col", text: "now" }), element("th", { scope: "col", text: "max" }));
  const rows = lines.slice(0, LEGEND_MAX).map(({ label, values }, i) => {
    const mark = element("i", { className: "mark" });
    mark.style.setProperty("background", COLORS[i % COLORS.length]);
    const highest = Math.max(...values.filter((v) => v !== null));
    return element("tr", {}, element("th", { scope: "row", title: label }, mark, label || "all"),
      element("td", { text: formatted(current(values), unit, decimals) }), element("td", { text: formatted(highest, unit, decimals) }));
  });
  table.replaceChildren(element("thead", {}, head), element("tbody", {}, ...rows));
}

// ------------------------------------------------------------ the tip

const tip = document.getElementById("tip");

export function hideTip() {
  tip.hidden = true;
}

export function showTip(children, x, y) {
  tip.replaceChildren(...children);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.setProperty("left", `${Math.max(8, Math.min(x + 14, innerWidth - width - 8))}px`);
  tip.style.setProperty("top", `${Math.max(8, Math.min(y + 14, innerHeight - height - 8))}px`);
}

function hover(u, unit) {
  const { idx, left, top } = u.cursor;
  if (!u.root.matches(":hover")) return; // another chart's cursor, shown here too
  if (idx === null || idx === undefined || left < 0) return hideTip();
  const { times, lines } = u.mooncake;
  const now = lines.map(({ label, values }, i) => ({ label, value: values[idx], color: COLORS[i % COLORS.length] }));
  const known = now.filter(({ value }) => value !== null).sort((a, b) => b.value - a.value).slice(0, 12);
  const rows = known.map(({ label, value, color }) => {
    const mark = element("i", { className: "mark" });
    mark.style.setProperty("background", color);
    return element("div", { className: "row" }, mark, element("span", { text: label || "all" }), element("b", { text: formatted(value, unit) }));
  });
  const box = u.over.getBoundingClientRect();
  showTip([element("time", { text: clock(times[idx], true) }), ...rows], box.left + left, box.top + top);
}

// ------------------------------------------------------------ all

const KINDS = { stat: drawStat, gauge: drawStat, bargauge: drawBars, timeseries: drawLines, graph: drawLines };

export function draw(panel, body, results, view) {
  if (panel.type === "text") return drawText(panel, body);
  const kind = KINDS[panel.type];
  if (!kind) return nothing(body, `panels of type ${panel.type} are drawn by Grafana only`);
  kind(panel, body, aligned(results, view));
}

export function drawError(body, error) {
  body.chart?.destroy();
  body.chart = null;
  body.replaceChildren(element("p", { className: "error", role: "alert", text: error.message || String(error) }));
}

// What an answer leaves out, below what it shows.
export function drawWarnings(box, texts) {
  box.querySelector(".warnings")?.remove();
  if (texts.length) box.append(element("p", { className: "warnings", role: "note", text: [...new Set(texts)].join("; ") }));
}
