"use strict";
// The page of `--html`: draws data of nanoflow_jax/timeline/html.py. Times are microseconds of each plan's step, shown
// from the start of its inner layers on; every plan is seen through the same window.
const data = JSON.parse(document.getElementById("data").textContent);
const GUTTER = 84, LANE = 54, BAR = 46, AXIS = 22, RIGHT = 10, TINY = 0.005;
const view = {from: 0, to: 1};
let shown = null, kept = false;  // {panel, event} under the pointer or chosen by a key; kept: until let go
const $ = id => document.getElementById(id);

function make(tag, text, ...children) {
  const made = document.createElement(tag);
  if (text !== undefined && text !== null) made.textContent = text;
  made.append(...children);
  return made;
}
const colors = new Map();  // of the theme; forgotten before each drawing
function color(name) {
  if (!colors.has(name)) colors.set(name, getComputedStyle(document.documentElement).getPropertyValue(name).trim());
  return colors.get(name);
}
const us = value => `${value < 10 ? value.toFixed(2) : value.toFixed(1)} µs`;
function amount(value, unit, step, names) {
  let k = 0;
  while (value >= step && k < names.length - 1) { value /= step; k++; }
  return `${value < 10 && k ? value.toFixed(2) : value.toFixed(k ? 1 : 0)} ${names[k]}${unit}`;
}
const bytes = value => amount(value, "B", 1024, ["", "Ki", "Mi", "Gi", "Ti"]);
const flops = value => amount(value, "FLOP", 1000, ["", "K", "M", "G", "T", "P"]);

// What runs at the same time on other streams, with how long: the definition of `beside` in the library.
function beside(panel, one) {
  return panel.plan.events.filter(e => e.stream !== one.stream)
    .map(e => ({event: e, us: Math.min(e.end, one.end) - Math.max(e.start, one.start)})).filter(b => b.us > TINY);
}

const small = e => e.kind === "elementwise" || e.kind === "kernel";
const title = e => small(e) && e.op ? `small kernel of ${e.label}` : e.label;

function facts(pairs) {
  const list = make("dl");
  list.className = "facts";
  for (const [name, value] of pairs) list.append(make("div", null, make("dt", name), make("dd", value)));
  return list;
}

function describe(panel, e) {
  const actual = e.end - e.start, slower = e.alone > 0 ? actual / e.alone - 1 : 0;
  const pairs = [["nano-batch", e.batch ?? "none"], ["layer", e.layer ?? "outside of layers"],
    ["what", `${e.kind} on the ${e.stream} stream, bound by ${e.bound}`],
    ["bytes", bytes(e.bytes)], ...(e.flops ? [["work", flops(e.flops)]] : []),
    ["alone", us(e.alone)], ["actual", us(actual) + (slower > 0.0005 ? `, ${(100 * slower).toFixed(1)} % longer` : "")]];
  if (e.stream === "network") pairs.push(["exposed", us(e.exposed)]);
  if (e.bubble > TINY) pairs.push(["late by", us(e.bubble)]);
  const others = beside(panel, e).map(b => `${title(b.event)} (${us(b.us)})`);
  pairs.push(["beside", others.join(", ") || "nothing"], ["time from", e.source], ["instruction", e.name]);
  return [make("h3", `${title(e)}: ${panel.plan.name}`), facts(pairs)];
}

class Panel {
  constructor(plan) {
    this.plan = plan;
    this.canvas = make("canvas");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", `timeline of ${plan.name}: n and p go from op to op`);
    const head = make("h3", plan.name);
    const more = make("span", ` ${plan.about}`);
    more.className = "soft";
    more.style.fontWeight = "normal";
    head.append(more);
    const card = make("div", null, head, this.canvas);
    card.className = "card panel";
    $("panels").append(card);
    this.canvas.style.height = `${plan.lanes.length * LANE + AXIS}px`;
    this.canvas.addEventListener("pointermove", event => this.moved(event));
    this.canvas.addEventListener("pointerleave", () => { if (!kept && !this.drag) show(null); $("tip").hidden = true; });
    this.canvas.addEventListener("pointerdown", event => {
      this.drag = {x: event.clientX, from: view.from, to: view.to, far: false};
      this.canvas.setPointerCapture(event.pointerId);
    });
    this.canvas.addEventListener("pointerup", event => {
      const far = this.drag?.far;
      this.drag = null;
      if (far) return;
      const hit = this.at(event.offsetX, event.offsetY);
      kept = Boolean(hit);
      show(hit && {panel: this, event: hit});
    });
    this.canvas.addEventListener("wheel", event => {
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      zoom(Math.exp(event.deltaY * 0.002), this.time(event.offsetX));
    }, {passive: false});
  }

  get width() { return this.canvas.clientWidth - GUTTER - RIGHT; }
  x(t) { return GUTTER + (t - this.plan.origin - view.from) / (view.to - view.from) * this.width; }
  time(x) { return view.from + (x - GUTTER) / this.width * (view.to - view.from); }  // from the plan's origin

  at(x, y) {  // the op under the pointer, or within two pixels of it
    const lane = Math.floor(y / LANE);
    let best = null, nearest = 2.01;
    for (const e of this.plan.events) {
      if (e.lane !== lane) continue;
      const far = Math.max(this.x(e.start) - x, x - this.x(e.end), 0);
      if (far < nearest && x > GUTTER) { best = e; nearest = far; }
    }
    return best;
  }

  moved(event) {
    if (this.drag) {
      const moved = event.clientX - this.drag.x;
      this.drag.far ||= Math.abs(moved) > 3;
      if (this.drag.far) {
        const shift = moved / this.width * (this.drag.to - this.drag.from);
        see(this.drag.from - shift, this.drag.to - shift);
      }
      return;
    }
    const hit = this.at(event.offsetX, event.offsetY), tip = $("tip");
    if (!kept) show(hit && {panel: this, event: hit});
    tip.hidden = !hit;
    if (!hit) return;
    tip.replaceChildren(...describe(this, hit));
    const box = tip.getBoundingClientRect(), gap = 16;
    tip.style.left = `${Math.max(4, Math.min(event.clientX + gap, innerWidth - box.width - 8))}px`;
    const below = event.clientY + gap;
    tip.style.top = `${below + box.height < innerHeight ? below : Math.max(4, event.clientY - gap - box.height)}px`;
  }

  label(ctx, e, left, right, top) {
    const room = right - left - 6, short = `${e.op} ${e.piece}`, wide = text => ctx.measureText(text).width;
    const middle = (left + right) / 2, y = top + BAR / 2;
    const ways = e.layer === null ? [[short]] : [[short, `layer ${e.layer}`], [short], [e.op, String(e.piece)]];
    const flat = ways.find(lines => lines.every(text => wide(text) <= room));
    if (flat) {
      flat.forEach((text, k) => ctx.fillText(text, middle, y + (k - (flat.length - 1) / 2) * 14));
      return;
    }
    // Upright, smaller where it must be: with its number, else without.
    const scale = text => Math.min(1, (BAR - 3) / wide(text), (right - left - 1) / 11);
    const upright = [short, e.op].find(text => scale(text) >= 0.7);
    if (!upright) return;
    ctx.save();
    ctx.translate(middle, y);
    ctx.rotate(-Math.PI / 2);
    ctx.scale(scale(upright), scale(upright));
    ctx.fillText(upright, 0, 0);
    ctx.restore();
  }

  draw() {
    const ratio = devicePixelRatio || 1, w = this.canvas.clientWidth, h = this.canvas.clientHeight;
    this.canvas.width = w * ratio;
    this.canvas.height = h * ratio;
    const ctx = this.canvas.getContext("2d"), plan = this.plan, bottom = plan.lanes.length * LANE;
    ctx.scale(ratio, ratio);
    ctx.font = '12px system-ui, "DejaVu Sans", sans-serif';
    ctx.textBaseline = "middle";
    plan.lanes.forEach((lane, k) => {
      ctx.fillStyle = color("--lane");
      ctx.fillRect(GUTTER, k * LANE, this.width, BAR);
      ctx.fillStyle = color("--ink");
      ctx.textAlign = "left";
      const words = lane.split(", ");
      words.forEach((word, i) => ctx.fillText(word, 0, k * LANE + BAR / 2 + (i - (words.length - 1) / 2) * 14));
    });
    ctx.textAlign = "center";
    const span = view.to - view.from, raw = span / Math.max(2, this.width / 110), ten = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map(k => k * ten).find(s => s >= raw);
    for (let t = Math.ceil(view.from / step) * step; t <= view.to; t += step) {
      const x = this.x(t + plan.origin);
      ctx.fillStyle = color("--grid");
      ctx.fillRect(x, 0, 1, bottom);
      ctx.fillStyle = color("--soft");
      ctx.fillText(`${+t.toFixed(3)}${Math.abs(t) < step / 2 ? " µs" : ""}`, x, bottom + 11);
    }
    ctx.save();
    ctx.beginPath();
    ctx.rect(GUTTER, 0, this.width, bottom);
    ctx.clip();
    const compute = plan.lanes.indexOf("compute");
    const near = shown && shown.panel === this ? new Set([shown.event, ...beside(this, shown.event).map(b => b.event)]) : null;
    const clip = x => Math.max(GUTTER - 50, Math.min(x, w + 50));
    for (const e of plan.events) {
      if (e.exposed > TINY) this.hatch(ctx, clip(this.x(e.end - e.exposed)), clip(this.x(e.end)), compute, "--wait", "--wait-fill");
      if (e.bubble > TINY) this.hatch(ctx, clip(this.x(e.start - e.bubble)), clip(this.x(e.start)), compute, "--bubble", "--lane");
    }
    for (const e of plan.events) {
      const left = clip(this.x(e.start)), right = Math.max(clip(this.x(e.end)), left + 1), top = e.lane * LANE;
      if (right < GUTTER || left > w) continue;
      const inner = e.layer !== null && e.layer >= plan.layers[0] && e.layer <= plan.layers[1];
      ctx.globalAlpha = (near && !near.has(e) ? 0.3 : 1) * (inner ? 1 : 0.5);
      ctx.fillStyle = e.batch === null ? color("--plain") : color(`--b${(e.batch - 1) % 6 + 1}`);
      ctx.fillRect(left, top, Math.max(right - left - (right - left > 3 ? 0.8 : 0), 0.8), BAR);
      ctx.globalAlpha = near && !near.has(e) ? 0.5 : 1;
      ctx.fillStyle = inner ? "#fff" : color("--ink");
      if (e.op && !small(e)) this.label(ctx, e, Math.max(left, GUTTER), Math.min(right, w - RIGHT), top);
      if (near?.has(e)) {
        ctx.globalAlpha = 1;
        ctx.strokeStyle = color("--outline");
        ctx.lineWidth = e === shown.event ? 2.5 : 1.2;
        ctx.strokeRect(left + 0.5, top + 0.5, right - left - 1, BAR - 1);
      }
    }
    ctx.restore();
  }

  hatch(ctx, left, right, lane, ink, ground) {
    if (right <= GUTTER || left >= this.canvas.clientWidth || right - left < 0.5) return;
    ctx.save();
    ctx.beginPath();
    ctx.rect(left, lane * LANE, right - left, BAR);
    ctx.fillStyle = color(ground);
    ctx.fill();
    ctx.clip();
    ctx.strokeStyle = color(ink);
    ctx.lineWidth = 1;
    ctx.beginPath();
    for (let x = Math.floor((left - BAR) / 7) * 7; x < right; x += 7) {
      ctx.moveTo(x, lane * LANE + BAR);
      ctx.lineTo(x + BAR, lane * LANE);
    }
    ctx.stroke();
    ctx.strokeRect(left + 0.5, lane * LANE + 0.5, right - left - 1, BAR - 1);
    ctx.restore();
  }
}

let asked = 0;
function redraw() {
  cancelAnimationFrame(asked);
  asked = requestAnimationFrame(() => {
    colors.clear();
    panels.forEach(panel => panel.draw());
  });
}
function see(from, to) {
  const [least, most] = data.extent, span = Math.min(Math.max(to - from, 0.5), most - least);
  view.from = Math.min(Math.max(from, least), most - span);
  view.to = view.from + span;
  redraw();
}
function zoom(factor, around = (view.from + view.to) / 2) {
  see(around - (around - view.from) * factor, around + (view.to - around) * factor);
}
function show(next) {
  if (next?.event !== shown?.event) redraw();
  shown = next;
  tell();
}
function tell() {
  const hint = make("p", "Point at an op for its bytes, its time alone and actual, and what runs beside it; with a click, or the keys n and p, that stays here.");
  hint.className = "soft";
  $("picked").replaceChildren(...(shown && kept ? describe(shown.panel, shown.event) : [hint]));
}
function walk(step) {  // through the named ops of the plan in focus, by their start
  const panel = panels.find(p => p.canvas === document.activeElement) || shown?.panel || panels[0];
  const ops = panel.plan.events.filter(e => e.op && !small(e)).sort((a, b) => a.start - b.start);
  const now = shown?.panel === panel ? ops.indexOf(shown.event) : -1;
  const inner = ops.findIndex(e => e.start >= panel.plan.origin - TINY);
  const next = ops[now < 0 ? Math.max(inner, 0) : (now + step + ops.length) % ops.length];
  kept = true;
  const start = next.start - panel.plan.origin, end = next.end - panel.plan.origin, span = view.to - view.from;
  if (start < view.from || end > view.to) see(start - span / 3, start + span * 2 / 3);
  show({panel, event: next});
}
const KEYS = {"+": () => zoom(0.7), "=": () => zoom(0.7), "-": () => zoom(1 / 0.7), "0": () => see(...data.window),
  w: () => see(...data.extent), n: () => walk(1), p: () => walk(-1), Escape: () => { kept = false; show(null); },
  ArrowLeft: () => zoomless(-0.15), ArrowRight: () => zoomless(0.15)};
function zoomless(part) {
  const shift = part * (view.to - view.from);
  see(view.from + shift, view.to + shift);
}
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || !KEYS[event.key]) return;
  event.preventDefault();
  $("tip").hidden = true;
  KEYS[event.key]();
});

function table() {
  const columns = [...new Set(data.plans.flatMap(plan => Object.keys(plan.figures)))];
  const head = make("tr", null, ...["plan", ...columns, "where an inner layer's time goes"].map(name => make("th", name)));
  const longest = Math.max(...data.plans.map(plan => plan.parts.reduce((sum, part) => sum + part, 0)));
  const rows = data.plans.map(plan => {
    const bar = make("div"), cell = make("td", null, bar);
    bar.className = "bar";
    cell.className = "parts";
    const looks = [["kernels", "background:var(--kernels)"], ["lost beside others", "background:var(--lost)"],
      ["waits for the network", "", "hatched"], ["other waits", "", "bubbles"]];
    plan.parts.forEach((part, k) => {
      const piece = make("i"), [name, style, look] = looks[k];
      piece.style = `${style};width:${100 * Math.max(part, 0) / longest}%`;
      if (part < 0.05) piece.style.display = "none";
      piece.className = look || "";
      piece.title = `${name}: ${us(part)}`;
      bar.append(piece);
    });
    return make("tr", null, make("td", plan.name), ...columns.map(name => make("td", plan.figures[name] ?? "")), cell);
  });
  $("plans").append(make("thead", null, head), make("tbody", null, ...rows));
}

function cards() {
  for (const plan of data.plans) {
    const card = make("div", null, make("h3", plan.name));
    card.className = "card";
    if (plan.findings === null) card.append(make("p", "Findings: a simulation reads no program; nanoflow inspect compiles one."));
    else if (!plan.findings.length) card.append(make("p", "Findings: none"));
    else {
      const list = make("ul");
      for (const f of plan.findings) {
        const where = f.layers.length ? ` in layer${f.layers.length > 1 ? "s" : ""} ${f.layers.join(", ")}` : "";
        list.append(make("li", `${f.op ? `${f.op}: ` : ""}${f.kind.replaceAll("_", " ")} × ${f.count}${where}: ${f.detail}`));
      }
      const total = plan.findings.reduce((sum, f) => sum + f.count, 0);
      card.append(make("p", `Findings in the program compiled, its ends included: ${total}`), list);
    }
    if (plan.memory.length) {
      const whole = plan.memory.reduce((sum, [, size]) => sum + Math.max(size, 0), 0), bar = make("div");
      bar.className = "bar";
      plan.memory.forEach(([name, size], k) => {
        const piece = make("i");
        piece.style = `background:var(--${["b1", "b2", "b3", "plain"][k % 4]});width:${100 * Math.max(size, 0) / whole}%`;
        piece.title = `${name}: ${bytes(size)}`;
        bar.append(piece);
      });
      const key = make("div");
      key.className = "key";
      plan.memory.forEach(([name, size], k) => {
        const dot = make("i");
        dot.style = `background:var(--${["b1", "b2", "b3", "plain"][k % 4]})`;
        key.append(make("span", null, dot, `${name} ${bytes(size)}`));
      });
      card.append(make("p", "Memory of one GPU"), bar, key);
    }
    for (const [name, lines] of Object.entries(plan.more)) {
      card.append(make("details", null, make("summary", name), make("pre", lines.join("\n"))));
    }
    $("cards").append(card);
  }
}

$("about").textContent = data.about;
table();
cards();
const panels = data.plans.map(plan => new Panel(plan));
const batches = [...new Set(data.plans.flatMap(plan => plan.events.map(e => e.batch)))].filter(b => b !== null).sort();
for (const batch of batches) {
  const dot = make("i");
  dot.style.background = `var(--b${(batch - 1) % 6 + 1})`;
  $("key").append(make("span", null, dot, `nano-batch ${batch}`));
}
const wait = make("i"), bubble = make("i");
wait.className = "hatched";
bubble.className = "bubbles";
$("key").append(make("span", null, wait, "compute waits for the network"), make("span", null, bubble, "compute waits for another reason"),
  make("span", "pale: other layers, and the step's ends; µs from the start of the inner layers"));
$("in").onclick = KEYS["+"];
$("out").onclick = KEYS["-"];
$("inner").onclick = KEYS["0"];
$("whole").onclick = KEYS.w;
addEventListener("resize", redraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
tell();
see(...data.window);
