// Asks this process: the same questions and answers as Prometheus' HTTP API.

const TOKEN = "mooncake-admin-token";
const DEADLINE_MS = 15000;

export class Unauthorized extends Error {}

export function remember(token) {
  sessionStorage.setItem(TOKEN, token);
}

export async function ask(path, values = {}) {
  const token = sessionStorage.getItem(TOKEN);
  const reply = await fetch(`/dashboard/api/${path}?${new URLSearchParams(values)}`, {
    headers: token ? { Authorization: `Bearer ${token}` } : {},
    signal: AbortSignal.timeout(DEADLINE_MS),
  });
  if (reply.status === 401) throw new Unauthorized(token ? "this token is not the one" : "");
  const text = await reply.text();
  let answer;
  try {
    answer = JSON.parse(text);
  } catch {
    throw new Error(text.slice(0, 300) || `HTTP ${reply.status}`);
  }
  if (!reply.ok) throw new Error(answer.error || `HTTP ${reply.status}`);
  return answer;
}

// What Grafana puts in place of $name, ${name} and its macros. A chosen value becomes a literal pattern.
export function filled(text, chosen, view) {
  const macros = {
    __rate_interval: `${Math.ceil(Math.max(view.step + view.round, 4 * view.round))}s`,
    __interval: `${view.step}s`,
    __range: `${view.span}s`,
  };
  return text.replace(/\$(?:\{(\w+)(?::\w+)?\}|(\w+))/g, (whole, braced, bare) => {
    const name = braced || bare;
    if (name in macros) return macros[name];
    if (name in chosen && chosen[name] !== null) return pattern(chosen[name]);
    return ".*";
  });
}

function pattern(value) {
  const literal = value.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  return literal.replace(/\\/g, "\\\\").replace(/"/g, '\\"'); // it stands in a PromQL string
}

export async function series(expression, view) {
  const answer = await ask("query_range", {
    query: expression, start: view.end - view.span, end: view.end, step: view.step,
  });
  const lines = answer.data.result.map(({ metric, values }) => ({
    labels: metric,
    points: new Map(values.map(([when, value]) => [Math.round(when * 1000), Number(value.replace("Inf", "Infinity"))])),
  }));
  return { lines, warnings: answer.warnings ?? [] };
}

export async function labelValues(query, chosen, view) {
  const found = /^label_values\((?:(.+),\s*)?(\w+)\)$/.exec(query.trim());
  if (!found) return [];
  const match = found[1] ? { "match[]": filled(found[1], chosen, view) } : {};
  const answer = await ask(`label/${found[2]}/values`, { ...match, start: view.end - view.span, end: view.end });
  return answer.data;
}
