// Draws Grafana's dashboard JSON from /api/query, which answers like a Prometheus. No network but this server.
"use strict";

const COLOURS = {
  light: ["#1f6fc4", "#c8501e", "#1d8a5f", "#8a4fc0", "#b08400", "#c23b74", "#3c8ea3", "#6b7785"],
  dark: ["#62a8f5", "#f58e5c", "#4fc796", "#bb91ee", "#e0b93e", "#f07dab", "#68c3d8", "#a5b1bd"],
};
const RANGES = { "5 min": 300, "15 min": 900, "1 h": 3600, "6 h": 21600, "2 days": 172800 };
const REFRESH_MS = 5000, POINTS = 240, MOST_LEGEND = 10;
const state = { boards: [], board: null, run: "", range: 900, info: null, drawn: new Map(), busy: false, whole: false };
const $ = (id) => document.getElementById(id);

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

async function get(path, parameters) {
  const answer = await fetch(path + (parameters ? "?" + new URLSearchParams(parameters) : ""));
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error || answer.statusText);
  return body;
}

// --- figures ----------------------------------------------------------------------------------------------

function plain(value) {
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e5 || size < 1e-3) return value.toPrecision(3).replace(/\.?0+e/, "e").replace("e+", "e");
  if (size >= 100) return Math.round(value).toLocaleString("en");
  return String(+value.toPrecision(3));
}

function scaled(value, steps, names) {
  let index = 0;
  while (index < steps.length && Math.abs(value) >= steps[index]) { value /= steps[index]; index += 1; }
  return `${+value.toPrecision(3)} ${names[index]}`;
}

function format(value, unit) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (unit === "percentunit") return `${+(value * 100).toPrecision(3)} %`;
  if (unit === "bytes") return scaled(value, [1024, 1024, 1024, 1024], ["B", "KiB", "MiB", "GiB", "TiB"]);
  if (unit === "s") {
    if (value !== 0 && Math.abs(value) < 1e-3) return `${+(value * 1e6).toPrecision(3)} µs`;
    if (Math.abs(value) < 1) return `${+(value * 1e3).toPrecision(3)} ms`;
    return scaled(value, [60, 60, 24], ["s", "min", "h", "d"]);
  }
  const suffix = { none: "", reqps: " req/s", ops: " /s" }[unit] ?? unit.replace(/^suffix:\s*/, " ");
  return plain(value) + suffix;
}

// Ticks of an axis: as many digits as tell them apart, and no word behind each.
function ticks(values, unit) {
  const factor = unit === "percentunit" ? 100 : 1, present = values.filter((value) => value !== null);
  if (unit === "bytes" || (unit === "s" && Math.max(...present) >= 60)) return values.map((value) => (value === null ? "" : format(value, unit)));
  const tail = unit === "percentunit" ? " %" : unit === "s" ? " s" : "";
  const gap = Math.min(...present.slice(1).map((value, i) => Math.abs(value - present[i]))) * factor;
  let digits = 0;
  while (digits < 8 && Math.abs(gap * 10 ** digits - Math.round(gap * 10 ** digits)) > 1e-6 * 10 ** digits * gap) digits += 1;
  return values.map((value) => {
    if (value === null) return "";
    const size = Math.abs(value * factor);
    return (size !== 0 && (size >= 1e6 || digits > 5) ? (value * factor).toExponential(Math.max(0, Math.min(6, Math.floor(Math.log10(size)) + digits))).replace("e+", "e") : (value * factor).toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits })) + tail;
  });
}

// Distances of ticks that people read well.
const POWERS = Array.from({ length: 50 }, (_, i) => 2 ** i);
const SECONDS = [...[-6, -5, -4, -3, -2, -1].flatMap((e) => [1, 2, 5].map((m) => m * 10 ** e)), 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400];

function clock(values) {
  const isShort = values.length > 1 && values[1] - values[0] < 60;
  return values.map((value) => new Date(value * 1000).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit", second: isShort ? "2-digit" : undefined }));
}

// As wide as the longest label.
function axisSize(plot, values, index, cycle) {
  const axis = plot.axes[index];
  if (cycle > 2) return axis._size;
  const longest = (values ?? []).reduce((a, b) => (b.length > a.length ? b : a), "");
  plot.ctx.font = axis.font[0];
  return Math.ceil(plot.ctx.measureText(longest).width / devicePixelRatio) + 18;
}

// --- panels -----------------------------------------------------------------------------------------------

function label(target, metric, oneRun) {
  let text = target.legendFormat;
  if (oneRun) text = text.replace("{{run}}", "").trim();
  text = text.replace(/\{\{\s*(\w+)\s*\}\}/g, (_, name) => metric[name] ?? "");
  return text.trim() || metric.run || "value";
}

async function load(panel, span) {
  const found = [];
  let isAnswered = false;
  for (const target of panel.targets) {
    const result = await get("api/query", { query: target.expr, run: state.run, ...span });
    if (result === null) continue;
    isAnswered = true;
    for (const series of result) found.push({ target, ...series });
  }
  const curvesOf = found.filter((series) => series.values.some(([, value]) => Number.isFinite(Number(value))));
  const oneRun = new Set(curvesOf.map((series) => series.metric.run)).size <= 1;
  const curves = curvesOf.map((series) => ({
    label: label(series.target, series.metric, oneRun),
    points: new Map(series.values.map(([time, value]) => [time, Number(value)])),
    order: panel.targets.indexOf(series.target),
  }));
  curves.sort((a, b) => a.order - b.order || a.label.localeCompare(b.label, "en", { numeric: true }));
  return { curves, isAnswered };
}

function table(curves) {
  const times = [...new Set(curves.flatMap((curve) => [...curve.points.keys()]))].sort((a, b) => a - b);
  const rows = curves.map((curve) => times.map((time) => {
    const value = curve.points.get(time);
    return Number.isFinite(value) ? value : null;
  }));
  return { times, rows };
}

// Sums from below; a curve that adds nothing is left out, or its line would cover the one below it.
function stacked(rows) {
  const sums = new Array(rows.length ? rows[0].length : 0).fill(0);
  return rows.map((row) => (row.some((value) => value) ? row.map((value, i) => (sums[i] += value ?? 0)) : row.map(() => null)));
}

function drawMarks(plot, marks, colour) {
  const context = plot.ctx;
  context.save();
  context.strokeStyle = colour;
  context.setLineDash([4, 4]);
  context.lineWidth = devicePixelRatio;
  for (const mark of marks) {
    const x = plot.valToPos(mark.time, "x", true);
    if (x < plot.bbox.left || x > plot.bbox.left + plot.bbox.width) continue;
    context.beginPath();
    context.moveTo(x, plot.bbox.top);
    context.lineTo(x, plot.bbox.top + plot.bbox.height);
    context.stroke();
    context.fillStyle = colour;
    context.font = `${11 * devicePixelRatio}px sans-serif`;
    context.fillText(mark.text, x + 3 * devicePixelRatio, plot.bbox.top + 11 * devicePixelRatio);
  }
  context.restore();
}

function bands(shown, colours) {
  const present = shown.flatMap((row, i) => (row.some((value) => value !== null) ? [i] : []));
  return present.slice(1).map((upper, i) => ({ series: [upper + 1, present[i] + 1], fill: colours[upper % colours.length] + "55" }));
}

function draw(card, panel, curves, span, marks) {
  const unit = panel.fieldConfig.defaults.unit, custom = panel.fieldConfig.defaults.custom ?? {};
  const isStacked = custom.stacking?.mode === "normal", isLog = custom.scaleDistribution?.type === "log";
  const style = getComputedStyle(document.documentElement);
  const [soft, line, alarm] = ["--soft", "--line", "--alarm"].map((name) => style.getPropertyValue(name).trim());
  const colours = COLOURS[document.documentElement.dataset.theme];
  const { times, rows } = table(curves);
  const shown = isStacked ? stacked(rows) : rows;
  const place = card.querySelector(".plot"), legend = card.querySelector(".legend");
  const values = curves.map((curve, i) => {
    const entry = element("span");
    const swatch = element("i");
    swatch.style.background = colours[i % colours.length];
    entry.append(swatch, element("span", curve.label), element("b"));
    if (i < MOST_LEGEND) legend.append(entry);
    return entry.lastChild;
  });
  if (curves.length > MOST_LEGEND) legend.append(element("span", `and ${curves.length - MOST_LEGEND} more`));
  const last = (row) => row.reduce((seen, value) => value ?? seen, null);
  const tell = (index) => values.forEach((node, i) => {
    node.textContent = format(index === null || index === undefined ? last(rows[i]) : rows[i][index], unit);
  });
  const axis = { stroke: soft, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 } };
  const top = panel.fieldConfig.defaults.max;
  const range = (_, low, high) => {
    if (low === null || (low === 0 && high === 0)) return [0, 1];
    if (top !== undefined && top !== null) return [0, top];
    const pad = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
    return [low >= 0 && (isStacked || low < high * 0.5) ? 0 : low - pad, high + pad];
  };
  const plot = new uPlot({
    width: place.clientWidth, height: place.clientHeight,
    cursor: { sync: { key: "sparseray" }, y: false, points: { size: 6 } },
    legend: { show: false },
    scales: { x: { time: true, min: span.start, max: span.end, range: () => [Number(span.start), Number(span.end)] }, y: isLog ? { distr: 3 } : { range } },
    axes: [{ ...axis, space: 80, size: 30, values: (_, values) => clock(values) }, { ...axis, size: axisSize, incrs: unit === "bytes" ? POWERS : unit === "s" ? SECONDS : undefined, values: (_, values) => (isLog ? values.map((v) => (v === null ? "" : plain(v))) : ticks(values, unit)) }],
    series: [{}, ...curves.map((curve, i) => ({
      label: curve.label, stroke: colours[i % colours.length], width: 1.6, spanGaps: true,
      points: { show: times.length < 3 }, fill: isStacked && i === shown.findIndex((row) => row[0] !== null) ? colours[i % colours.length] + "55" : undefined,
    }))],
    bands: isStacked ? bands(shown, colours) : [],
    hooks: { draw: [(self) => drawMarks(self, marks, alarm)], setCursor: [(self) => tell(self.cursor.idx)] },
  }, [times, ...shown], place);
  tell(null);
  return plot;
}

function nothing(panel, isAnswered) {
  if (!isAnswered && state.info.kind === "records") return "Not in the run's records; a Prometheus shows it.";
  return "Nothing of this in the chosen time.";
}

function makeCard(panel) {
  const card = element("section", undefined, "card");
  card.append(element("h3", panel.title), element("p", panel.description, "what"));
  card.append(element("div", undefined, panel.type === "stat" ? "stat" : "plot"), element("div", undefined, "legend"));
  return card;
}

function show(card, panel, { curves, isAnswered }, span, marks) {
  const before = state.drawn.get(panel.id);
  if (before) before.destroy();
  state.drawn.delete(panel.id);
  const place = card.querySelector(".plot, .stat");
  place.replaceChildren();
  card.querySelector(".legend").replaceChildren();
  const hasValues = curves.some((curve) => [...curve.points.values()].some(Number.isFinite));
  card.dataset.state = hasValues ? "drawn" : isAnswered ? "empty" : "unrecorded";
  if (panel.type === "stat") {
    const unit = panel.fieldConfig.defaults.unit;
    for (const curve of curves.slice(0, 4)) {
      const value = [...curve.points.entries()].sort((a, b) => a[0] - b[0]).map((p) => p[1]).filter(Number.isFinite).pop();
      const line = element("div", format(value, unit));
      if (curves.length > 1) line.append(element("small", curve.label));
      place.append(line);
    }
    if (!hasValues) place.replaceChildren(element("small", nothing(panel, isAnswered)));
  } else if (hasValues) {
    state.drawn.set(panel.id, draw(card, panel, curves, span, marks));
  } else {
    place.append(element("div", nothing(panel, isAnswered), "none"));
  }
}

// --- the board --------------------------------------------------------------------------------------------

function build() {
  for (const plot of state.drawn.values()) plot.destroy();
  state.drawn.clear();
  const board = $("board");
  board.replaceChildren();
  let grid = null;
  for (const panel of state.board.panels) {
    if (panel.type === "row") {
      board.append(element("h2", panel.title));
      grid = element("div", undefined, "grid");
      board.append(grid);
      continue;
    }
    if (panel.type === "stat") grid.classList.add("small");
    const card = makeCard(panel);
    card.id = `panel-${panel.id}`;
    grid.append(card);
  }
  $("meaning").textContent = state.board.description;
  for (const link of $("tabs").children) {
    if (link.hash === `#${state.board.uid}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

async function findMarks(span) {
  const marks = [];
  for (const query of state.board.annotations.list) {
    for (const series of (await get("api/query", { query: query.expr, run: state.run, ...span })) ?? []) {
      let seen = -Infinity;
      for (const [time] of series.values) {
        // The expression stays above zero for a minute after an event; its first point is the event.
        if (time - seen > 60) marks.push({ time, text: series.metric.kind ?? "" });
        seen = time;
      }
    }
  }
  return marks;
}

function spanNow() {
  let end = Date.now() / 1000, start = end - state.range;
  if (state.whole && state.info.span) [start, end] = state.info.span;
  if (end - start < 10) start = end - 10;
  const step = Math.max(1, Math.ceil((end - start) / POINTS));
  // Whole steps, so that the same points are asked for again and curves do not tremble.
  const aligned = Math.floor(end / step) * step;
  return { start: String(Math.floor(start / step) * step), end: String(state.whole ? aligned + step : aligned), step: String(step) };
}

async function refresh() {
  if (state.busy || document.hidden) return;
  state.busy = true;
  try {
    state.info = await get("api/state");
    chooseRuns();
    const span = spanNow(), board = state.board;
    const marks = await findMarks(span);
    await Promise.all(board.panels.filter((panel) => panel.type !== "row").map(async (panel) => {
      const figures = await load(panel, span);
      if (state.board === board) show($(`panel-${panel.id}`), panel, figures, span, marks);
    }));
    $("trouble").hidden = true;
    $("hint").hidden = state.info.kind !== "records";
    $("source").textContent = `Figures ${state.info.what}. Drawn ${new Date().toLocaleTimeString()}.`;
    document.body.dataset.drawn = board.uid;
  } catch (error) {
    $("trouble").textContent = error instanceof TypeError ? "This page's server does not answer; start it again." : error.message;
    $("trouble").hidden = false;
  } finally {
    state.busy = false;
  }
}

function chooseRuns() {
  const select = $("run"), wanted = ["", ...state.info.runs];
  if ([...select.options].map((option) => option.value).join("\n") === wanted.join("\n") && select.options.length) return;
  select.replaceChildren(...wanted.map((run) => new Option(run || "All runs", run)));
  select.value = wanted.includes(state.run) ? state.run : "";
  state.run = select.value;
}

function chooseBoard() {
  const uid = location.hash.slice(1);
  state.board = state.boards.find((board) => board.uid === uid) ?? state.boards[0];
  build();
  state.busy = false;
  return refresh();
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = theme === "dark" ? "Light" : "Dark";
  try { localStorage.setItem("theme", theme); } catch { /* a browser that stores nothing */ }
}

async function start() {
  const asked = new URLSearchParams(location.search).get("theme");
  let stored = null;
  try { stored = localStorage.getItem("theme"); } catch { /* a browser that stores nothing */ }
  setTheme(asked ?? stored ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
  $("theme").onclick = () => { setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"); refresh(); };
  state.boards = await get("api/dashboards");
  state.info = await get("api/state");
  for (const board of state.boards) {
    const link = element("a", board.title.replace(/^sparseray:\s*/, ""));
    link.href = `#${board.uid}`;
    $("tabs").append(link);
  }
  for (const [name, seconds] of Object.entries(RANGES)) $("range").append(new Option(name, seconds));
  if (state.info.span) $("range").prepend(new Option("whole run", "whole"));
  state.whole = Boolean(state.info.span);
  const askedRange = Number(new URLSearchParams(location.search).get("range"));
  if (Object.values(RANGES).includes(askedRange)) [state.range, state.whole] = [askedRange, false];
  $("range").value = state.whole ? "whole" : String(state.range);
  $("range").onchange = (event) => {
    state.whole = event.target.value === "whole";
    if (!state.whole) state.range = Number(event.target.value);
    refresh();
  };
  $("run").onchange = (event) => { state.run = event.target.value; refresh(); };
  addEventListener("hashchange", chooseBoard);
  addEventListener("resize", () => {
    clearTimeout(state.resized);
    state.resized = setTimeout(refresh, 200);
  });
  await chooseBoard();
  setInterval(refresh, REFRESH_MS);
}

start().catch((error) => {
  $("trouble").textContent = error.message;
  $("trouble").hidden = false;
});
