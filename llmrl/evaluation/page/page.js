"use strict";
// The page's data come from this page alone; what a model wrote is only ever set as text, never as HTML.
const page = JSON.parse(document.getElementById("data").textContent);
const packed = [...document.querySelectorAll("script.chunk")];
const SVG = "http://www.w3.org/2000/svg";

function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key in node && key !== "list") node[key] = value; else node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
function svg(name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}
const section = (id) => document.getElementById(id);
const number = (x) => x === null || x === undefined ? "–" : Number.isInteger(x) ? x.toLocaleString("en") :
  Math.abs(x) >= 1e5 || (x !== 0 && Math.abs(x) < 1e-3) ? x.toExponential(2) : x.toPrecision(4).replace(/\.?0+$/, "");
const percent = (x) => x === null || x === undefined ? "–" : (100 * x).toFixed(1) + "%";

// ---- light or dark: the system's choice, unless the button says otherwise
document.getElementById("theme").onclick = () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
};

// ---- overview
function facts(pairs) {
  const box = el("div", { className: "facts" });
  for (const [name, value] of pairs) {
    if (value !== null && value !== undefined && value !== "") box.append(el("div", {}, el("span", {}, name + " "), el("b", {}, String(value))));
  }
  return box;
}
function intervalBar(value, [low, high]) {
  const bar = el("div", { className: "bar", title: `${percent(value)}, 95% interval ${percent(low)} to ${percent(high)}` });
  const band = el("i"), mark = el("b");
  band.style.left = percent(low); band.style.width = percent(high - low); mark.style.left = percent(value);
  bar.append(band, mark);
  return el("div", { className: "interval" }, bar, el("span", {}, `${percent(low)} to ${percent(high)}`));
}
function table(head, rows) {
  const cell = (tag, value, i) => el(tag, { className: head[i].startsWith(" ") ? "n" : "" }, value instanceof Node ? value : String(value));
  return el("div", { className: "wide" }, el("table", {},
    el("thead", {}, el("tr", {}, ...head.map((name, i) => cell("th", name.trim(), i)))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((value, i) => cell("td", value, i)))))));
}
function best(values, name) {
  if (!values) return "–";
  const k = Math.max(...Object.keys(values).map(Number));
  return k > 1 ? `${percent(values[k])} (${name}@${k})` : "–";
}
function overview() {
  const root = section("overview");
  root.append(el("p", { className: "soft" }, `made ${page.made}`));
  for (const source of page.sources) {
    const s = source.summary, card = el("div", { className: "card" }, el("h3", {}, source.name, el("span", { className: "soft" }, "  " + source.kind)));
    if (source.result) continue;
    const steps = source.metrics.step || [];
    card.append(facts([
      ["status", s.status], ["error", s.error], ["step", s.total_steps ? `${s.step} of ${s.total_steps}` : steps[steps.length - 1]],
      ["time", s.seconds ? `${(s.seconds / 60).toFixed(1)} min` : null], ["device", s.device], ["processes", s.processes],
      ["best", s.best ? `${s.best.metric} ${number(s.best.value)} at step ${s.best.step}` : null],
    ]));
    const last = source.panels.filter((p) => !p.more).flatMap((p) => p.names).filter((n) => n !== "step");
    card.append(el("h3", {}, "last values"), facts(last.slice(0, 24).map((name) => [name, number([...source.metrics[name]].reverse().find((v) => v !== null))])));
    root.append(card);
  }
  const results = page.sources.filter((s) => s.result);
  if (!results.length) return;
  const card = el("div", { className: "card" }, el("h3", {}, "Results"));
  card.append(table(
    ["benchmark", "model", " problems", " samples", " accuracy", "95% interval", " pass", " majority", " format", " cut", " mean length"],
    results.map(({ result: r, summary: m, name }) => [
      r.benchmark || name, (m.model && m.model.name) || "–", number(r.n), number(r.samples), percent(r.accuracy), intervalBar(r.accuracy, r.interval),
      best(r.pass_at_k, "pass"), best(r.maj_at_k, "maj"), percent(r.format_rate), percent(r.truncation_rate), number(r.mean_length),
    ])));
  for (const { result: r, name } of results) {
    for (const [column, values] of Object.entries(r.breakdown || {})) {
      card.append(el("details", {}, el("summary", {}, `${name} by ${column}`), table(
        [column, " problems", " accuracy", "95% interval"],
        Object.entries(values).map(([value, v]) => [value, number(v.n), percent(v.accuracy), intervalBar(v.accuracy, v.interval)]))));
    }
    const failures = Object.entries(r.failures || {});
    if (failures.length) card.append(el("p", { className: "warn" }, `${name}: without a score, counted as wrong: ${failures.map(([k, n]) => `${n} ${k}`).join(", ")}`));
    if ((r.missing || []).length) card.append(el("p", { className: "warn" }, `${name}: ${r.missing.length} problems had no prediction and count as wrong`));
  }
  root.append(card);
}

// ---- curves
function ticks(low, high) {
  const span = high - low || Math.abs(high) || 1, raw = span / 4, power = 10 ** Math.floor(Math.log10(raw));
  const unit = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const out = [];
  for (let t = Math.ceil(low / unit) * unit; t <= high + unit / 1e6; t += unit) out.push(Math.abs(t) < unit / 1e6 ? 0 : t);
  return out;
}
function labels(values) {  // as short as tells them apart
  for (let digits = 5, texts = values.map(number); ; digits++) {
    if (new Set(texts).size === values.length || digits > 9) return texts;
    texts = values.map((x) => String(Number(x.toPrecision(digits))));
  }
}
function smooth(ys) {  // a running mean over a twentieth of the points, where there are many
  const width = Math.floor(ys.length / 20);
  if (width < 3) return null;
  return ys.map((_, i) => {
    const reach = Math.min(width, i, ys.length - 1 - i), near = ys.slice(i - reach, i + reach + 1);  // centred: a trend is not delayed
    return near.reduce((a, b) => a + b, 0) / near.length;
  });
}
function chart(title, series) {
  const W = 360, H = 190, left = 46, right = 8, top = 8, bottom = 20;
  const lines = series.map((s) => ({ name: s.name, points: s.xs.map((x, i) => [x, s.ys[i]]).filter((p) => p[1] !== null && p[0] !== null) })).filter((s) => s.points.length);
  if (!lines.length) return null;
  let x0 = Infinity, x1 = -Infinity, y0 = Infinity, y1 = -Infinity;
  for (const s of lines) for (const [x, y] of s.points) { x0 = Math.min(x0, x); x1 = Math.max(x1, x); y0 = Math.min(y0, y); y1 = Math.max(y1, y); }
  if (y0 === y1) { const pad = Math.abs(y0) / 10 || 1; y0 -= pad; y1 += pad; }
  if (x0 === x1) { x0 -= 1; x1 += 1; }
  const X = (x) => left + (x - x0) / (x1 - x0) * (W - left - right), Y = (y) => H - bottom - (y - y0) / (y1 - y0) * (H - top - bottom);
  const picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title });
  const marks = ticks(y0, y1), names = labels(marks);
  marks.forEach((t, i) => {
    picture.append(svg("line", { class: "axis", x1: left, x2: W - right, y1: Y(t), y2: Y(t) }), svg("text", { x: left - 5, y: Y(t) + 4, "text-anchor": "end" }, names[i]));
  });
  for (const t of ticks(x0, x1)) picture.append(svg("text", { x: X(t), y: H - 5, "text-anchor": "middle" }, number(t)));
  lines.forEach((s, i) => {
    const color = `var(--s${i % 6})`, path = (ys) => s.points.map(([x], j) => `${j ? "L" : "M"}${X(x).toFixed(1)} ${Y(ys[j]).toFixed(1)}`).join("");
    const ys = s.points.map((p) => p[1]), mean = smooth(ys);
    picture.append(svg("path", { d: path(ys), fill: "none", stroke: color, "stroke-width": mean ? 1 : 1.6, opacity: mean ? 0.35 : 1 }));
    if (mean) picture.append(svg("path", { d: path(mean), fill: "none", stroke: color, "stroke-width": 1.8 }));
    if (s.points.length < 40) for (const [x, y] of s.points) picture.append(svg("circle", { cx: X(x), cy: Y(y), r: 2, fill: color }));
  });
  const legend = el("div", { className: "legend" });
  const show = (step) => {
    legend.replaceChildren(step === null ? "" : `step ${number(step)}`);
    lines.forEach((s, i) => {
      const mark = el("i"); mark.style.background = `var(--s${i % 6})`;
      const point = step === null ? null : s.points.reduce((a, b) => Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a);
      if (lines.length > 1 || point) legend.append(mark, s.name + (point ? ` ${number(point[1])}` : ""));
    });
  };
  const cross = svg("line", { class: "cross", y1: top, y2: H - bottom, visibility: "hidden" });
  picture.append(cross);
  const xs = [...new Set(lines.flatMap((s) => s.points.map((p) => p[0])))].sort((a, b) => a - b);
  picture.onpointermove = (event) => {
    const box = picture.getBoundingClientRect(), x = x0 + ((event.clientX - box.left) / box.width * W - left) / (W - left - right) * (x1 - x0);
    const step = xs.reduce((a, b) => Math.abs(b - x) < Math.abs(a - x) ? b : a);
    cross.setAttribute("x1", X(step)); cross.setAttribute("x2", X(step)); cross.setAttribute("visibility", "visible");
    show(step);
  };
  picture.onpointerleave = () => { cross.setAttribute("visibility", "hidden"); show(null); };
  show(null);
  return el("div", { className: "card chart" }, el("h3", {}, title), picture, legend);
}
function curves() {
  const runs = page.sources.filter((s) => (s.metrics.step || []).length);
  if (!runs.length) { section("curves").remove(); return; }
  const panels = new Map();  // the same panel of several runs is one picture
  for (const run of runs) for (const panel of run.panels) {
    if (!panels.has(panel.title)) panels.set(panel.title, { more: panel.more, series: [] });
    for (const name of panel.names) panels.get(panel.title).series.push({ name: runs.length > 1 ? `${run.name}: ${name}` : name, xs: run.metrics.step, ys: run.metrics[name] });
  }
  const grid = el("div", { className: "grid" }), rest = el("div", { className: "grid" });
  let drawn = false;
  for (const [title, { more, series }] of panels) if (!more) { const c = chart(title, series); if (c) grid.append(c); }
  section("curves").append(grid);
  const others = [...panels].filter(([, p]) => p.more);
  if (!others.length) return;
  const details = el("details", {}, el("summary", {}, `${others.length} other numbers`), rest);
  details.ontoggle = () => {
    if (drawn) return;
    drawn = true;
    for (const [title, { series }] of others) { const c = chart(title, series); if (c) rest.append(c); }
  };
  section("curves").append(el("p", {}, details));
}

// ---- samples
const unpacked = new Map();
function texts(chunk) {  // unpacked once, when first looked at
  if (!unpacked.has(chunk)) {
    unpacked.set(chunk, (async () => {
      const bytes = Uint8Array.from(atob(packed[chunk].textContent), (c) => c.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      return JSON.parse(await new Response(stream).text());
    })());
  }
  return unpacked.get(chunk);
}
const sampleOf = async (i) => (await texts(Math.floor(i / page.chunk)))[i % page.chunk];
const plain = (prompt) => typeof prompt === "string" ? prompt : Array.isArray(prompt) ? prompt.map((m) => `${m.role}: ${typeof m.content === "string" ? m.content : JSON.stringify(m.content)}`).join("\n\n") : "";

function samples() {
  const all = page.samples, total = all.id.length, root = section("samples");
  if (!total) { root.remove(); return; }
  const hidden = page.sources.reduce((sum, s) => sum + s.left_out, 0), per = 25;
  let found = [], at = 0, latest = 0;
  const least = (id, label) => el("label", {}, label + " ", el("input", { id: id + "-min", type: "number", step: "any", placeholder: "min" }), " ", el("input", { id: id + "-max", type: "number", step: "any", placeholder: "max" }));
  const choice = (id, label, values) => el("label", {}, label + " ", el("select", { id }, el("option", { value: "" }, "all"), ...values.map(([v, t]) => el("option", { value: v }, t))));
  const outcomes = [...new Set(all.outcome)].sort(), order = [["", "in order"], ["reward-down", "reward, highest first"], ["reward-up", "reward, lowest first"], ["length-down", "longest first"], ["length-up", "shortest first"]];
  const filters = el("div", { className: "filters card" },
    least("reward", "reward"), least("length", "length"),
    all.step.some((s) => s !== null) ? least("step", "step") : null,
    choice("outcome", "outcome", outcomes.map((o) => [o, o])),
    page.sources.length > 1 ? choice("source", "from", page.sources.map((s, i) => [i, s.name])) : null,
    el("label", {}, "id ", el("input", { id: "id", type: "search", placeholder: "part of an id" })),
    el("label", {}, "text ", el("input", { id: "text", type: "search", placeholder: "in prompt or completion" })),
    el("select", { id: "order" }, ...order.map(([v, t]) => el("option", { value: v }, t))));
  const count = el("span", { id: "count", className: "soft" }), list = el("div", { id: "list" });
  const back = el("button", { type: "button", onclick: () => turn(at - per) }, "‹ before"), next = el("button", { type: "button", onclick: () => turn(at + per) }, "next ›");
  root.append(filters, el("p", { className: "pager" }, back, " ", next, " ", count), list);
  if (hidden) root.append(el("p", { className: "soft" }, `${number(hidden)} more samples were left out of this page (--max-samples).`));

  const value = (id) => { const node = document.getElementById(id); return node ? node.value.trim() : ""; };
  const within = (id, column, i) => {
    const low = value(id + "-min"), high = value(id + "-max"), x = all[column][i];
    return (low === "" && high === "") || (x !== null && (low === "" || x >= Number(low)) && (high === "" || x <= Number(high)));
  };
  async function filter() {
    const turnNumber = ++latest, outcome = value("outcome"), source = value("source"), id = value("id").toLowerCase(), text = value("text").toLowerCase();
    let kept = [];
    for (let i = 0; i < total; i++) {
      if ((!outcome || all.outcome[i] === outcome) && (!source || all.source[i] === Number(source)) && (!id || all.id[i].toLowerCase().includes(id)) &&
          within("reward", "reward", i) && within("length", "length", i) && within("step", "step", i)) kept.push(i);
    }
    if (text) {
      const hits = [];
      for (const i of kept) {
        const row = await sampleOf(i);
        if (turnNumber !== latest) return;  // the filter was changed meanwhile
        if (`${plain(row.prompt)}\n${row.completion}`.toLowerCase().includes(text)) hits.push(i);
        if (i % 500 === 0) count.textContent = `searching … ${number(hits.length)} found`;
      }
      kept = hits;
    }
    const [column, way] = value("order").split("-");
    if (column) kept.sort((a, b) => ((all[column][a] ?? -Infinity) - (all[column][b] ?? -Infinity)) * (way === "down" ? -1 : 1) || a - b);
    found = kept;
    await turn(0);
  }
  async function turn(start) {
    at = Math.max(0, Math.min(start, Math.max(0, found.length - 1)));
    const shown = found.slice(at, at + per), rows = await Promise.all(shown.map(sampleOf));
    list.replaceChildren(...rows.map((row, j) => card(shown[j], row)));
    count.textContent = `${number(found.length)} of ${number(total)} samples` + (shown.length ? `, ${at + 1} to ${at + shown.length}` : "");
    back.disabled = at === 0; next.disabled = at + per >= found.length;
  }
  function card(i, row) {
    const reward = all.reward[i], outcome = all.outcome[i];
    const tone = reward === null ? "warn" : reward > 0 ? "good" : "bad";
    const head = el("summary", {},
      el("span", { className: "tag " + tone }, reward === null ? outcome : number(reward)),
      all.step[i] === null ? null : el("span", { className: "tag soft" }, `step ${all.step[i]}`),
      el("span", { className: "tag" }, all.id[i]),
      el("span", { className: "first" }, String(row.completion).slice(0, 200)),
      el("span", { className: "tag soft" }, all.length[i] === null ? "" : `${all.length[i]} tokens`),
      row.finish_reason === "length" ? el("span", { className: "tag warn" }, "cut") : null);
    const box = el("details", { className: "card sample" }, head);
    box.ontoggle = () => { if (box.open && box.childElementCount === 1) box.append(...inside(row)); };
    return box;
  }
  function inside(row) {
    const out = [], part = (name, text) => { if (text !== undefined && text !== null && text !== "") out.push(el("h3", {}, name), el("pre", {}, String(text))); };
    part("prompt", plain(row.prompt));
    part("completion", row.completion);
    part("reference", row.gold);
    part("read as", row.answer);
    const names = Object.keys(row.parts || row.notes || {}), pick = (key, name) => (row[key] || {})[name];
    if (names.length) {
      out.push(el("h3", {}, "reward"), table(["part", " value", "outcome", " ms", "note"], names.map((name) => [
        name, row.parts ? number(pick("parts", name)) : number(row.reward), pick("outcomes", name) || "", pick("milliseconds", name) === undefined ? "" : number(pick("milliseconds", name)), pick("notes", name) || "",
      ])));
    }
    out.push(facts([["advantage", row.advantage === undefined ? null : number(row.advantage)], ["finish", row.finish_reason], ["weights of step", row.version],
      ...Object.entries(row.meta || {}).map(([k, v]) => [k, typeof v === "object" ? JSON.stringify(v) : v])]));
    if (row.extra) part("logged by rewards", JSON.stringify(row.extra, null, 1));
    return out;
  }
  let waiting;
  filters.oninput = () => { clearTimeout(waiting); waiting = setTimeout(filter, 120); };
  filter();
}

// ---- recipe, environment
function recipe() {
  const having = page.sources.filter((s) => s.recipe);
  if (!having.length) { section("recipe").remove(); return; }
  for (const s of having) section("recipe").append(el("details", { className: "card", open: having.length === 1 }, el("summary", {}, s.name), el("pre", { className: "recipe" }, s.recipe)));
}
function environment() {
  const flat = (value, prefix = "") => Object.entries(value || {}).flatMap(([k, v]) => v && typeof v === "object" && !Array.isArray(v) ? flat(v, `${prefix}${k}.`) : [[prefix + k, Array.isArray(v) ? v.join(", ") : v]]);
  for (const s of page.sources) {
    const rows = flat(s.summary).filter(([, v]) => v !== null && v !== "").map(([k, v]) => [k, String(v)]);
    if (rows.length) section("environment").append(el("div", { className: "card" }, el("h3", {}, s.name), table(["", "value"], rows)));
  }
}

overview(); curves(); samples(); recipe(); environment();
for (const part of document.querySelectorAll("main > section")) document.getElementById("nav").append(el("a", { href: "#" + part.id }, part.querySelector("h2").textContent));
document.documentElement.dataset.ready = "true";
