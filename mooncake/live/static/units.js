// Numbers as people read them, by the ids of Grafana's units.

const SI = [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "K"]];
const BINARY = [[2 ** 50, "Pi"], [2 ** 40, "Ti"], [2 ** 30, "Gi"], [2 ** 20, "Mi"], [2 ** 10, "Ki"]];

function digits(value, decimals) {
  if (decimals !== undefined && decimals !== null) return value.toFixed(decimals);
  const size = Math.abs(value);
  if (size >= 100 || Number.isInteger(value)) return String(Math.round(value));
  if (size >= 10) return trimmed(value.toFixed(1));
  if (size >= 1) return trimmed(value.toFixed(2));
  return trimmed(value.toPrecision(2));
}

function trimmed(text) {
  return text.includes(".") && !text.includes("e") ? text.replace(/\.?0+$/, "") : text;
}

function scaled(value, steps, unit, decimals) {
  for (const [size, prefix] of steps) {
    if (Math.abs(value) >= size) return `${digits(value / size, decimals)} ${prefix}${unit}`;
  }
  return `${digits(value, decimals)} ${unit}`.trim();
}

function seconds(value, decimals) {
  const size = Math.abs(value);
  if (size === 0) return "0 s";
  if (size < 1e-6) return `${digits(value * 1e9, decimals)} ns`;
  if (size < 1e-3) return `${digits(value * 1e6, decimals)} µs`;
  if (size < 1) return `${digits(value * 1e3, decimals)} ms`;
  if (size < 120) return `${digits(value, decimals)} s`;
  if (size < 7200) return `${digits(value / 60, decimals)} min`;
  if (size < 172800) return `${digits(value / 3600, decimals)} h`;
  return `${digits(value / 86400, decimals)} d`;
}

const PER_SECOND = { reqps: "req/s", ops: "ops/s", rps: "/s", wps: "/s", cps: "/s", eps: "/s" };

export function formatted(value, unit, decimals) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "-∞";
  switch (unit) {
    case "s": return seconds(value, decimals);
    case "ms": return seconds(value / 1000, decimals);
    case "percentunit": return `${digits(value * 100, decimals)} %`;
    case "percent": return `${digits(value, decimals)} %`;
    case "bytes": return scaled(value, BINARY, "B", decimals);
    case "decbytes": return scaled(value, SI, "B", decimals);
    case "binBps": return scaled(value, BINARY, "B/s", decimals);
    case "Bps": return scaled(value, SI, "B/s", decimals);
    case "none": return digits(value, decimals);
  }
  if (unit?.startsWith("si:")) return scaled(value, SI, unit.slice(3), decimals);
  if (unit in PER_SECOND) return scaled(value, SI, PER_SECOND[unit], decimals);
  return scaled(value, SI, "", decimals);
}
