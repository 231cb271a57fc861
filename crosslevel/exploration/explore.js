"use strict";
const $ = (id) => document.getElementById(id);
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
const points = new Float32Array(bytes(DATA.points)), similar = new Int32Array(bytes(DATA.similar));
const N = DATA.paths.length;
const columns = {};
for (const [name, column] of Object.entries(DATA.columns)) {
  const numbers = column.kind === "numbers";
  columns[name] = { names: column.names, numbers, values: numbers ? new Float32Array(bytes(column.values)) : new Uint16Array(bytes(column.values)) };
}
// Filters of every column stay as they are when another one colours.
const state = { colour: "", hidden: {}, ranges: {}, text: "", shown: new Uint8Array(N).fill(1), circled: new Set(), chosen: -1, lasso: null, scale: 1, x: .5, y: .5 };

const HUES = [[0, 114, 178], [213, 94, 0], [0, 158, 115], [194, 96, 154], [201, 133, 0], [63, 163, 220], [125, 116, 18], [106, 111, 120],
  [200, 45, 75], [128, 90, 205], [110, 155, 25], [150, 85, 50], [185, 60, 190], [0, 140, 160]];
function hue(i) {
  if (i < HUES.length) return HUES[i];
  const h = (i * 0.618034) % 1 * 6, x = 1 - Math.abs(h % 2 - 1), k = [[1, x, 0], [x, 1, 0], [0, 1, x], [0, x, 1], [x, 0, 1], [1, 0, x]][Math.floor(h)];
  return k.map((v) => Math.round(60 + 140 * v));
}
function ramp(t) {
  const at = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], p = Math.min(3.999, Math.max(0, t) * 4), i = Math.floor(p);
  return at[i].map((v, j) => Math.round(v + (at[i + 1][j] - v) * (p - i)));
}
function extent(values) {
  let low = Infinity, high = -Infinity;
  for (const v of values) if (!Number.isNaN(v)) { if (v < low) low = v; if (v > high) high = v; }
  return [low, high];
}

const canvas = document.querySelector("canvas"), context = canvas.getContext("2d");
let colours = new Uint32Array(N), order = null, drawing = false;
const packed = ([r, g, b]) => (255 << 24 | b << 16 | g << 8 | r) >>> 0;
function colour() {
  const column = columns[state.colour];
  if (!column) { colours.fill(packed(HUES[0])); return; }
  if (column.numbers) {
    const [low, high] = extent(column.values);
    for (let i = 0; i < N; i++) { const v = column.values[i]; colours[i] = packed(Number.isNaN(v) ? [128, 128, 128] : ramp((v - low) / (high - low || 1))); }
    return;
  }
  const table = column.names.map((_, c) => packed(hue(c)));
  for (let i = 0; i < N; i++) colours[i] = table[column.values[i]];
}
function filter() {
  const text = state.text.toLowerCase();
  for (let i = 0; i < N; i++) state.shown[i] = !text || DATA.paths[i].toLowerCase().includes(text) ? 1 : 0;
  for (const [name, hidden] of Object.entries(state.hidden)) {
    if (!hidden.size) continue;
    const values = columns[name].values;
    for (let i = 0; i < N; i++) if (hidden.has(values[i])) state.shown[i] = 0;
  }
  for (const [name, [low, high]] of Object.entries(state.ranges)) {
    const values = columns[name].values;
    for (let i = 0; i < N; i++) if (!(values[i] >= low && values[i] <= high)) state.shown[i] = 0;
  }
  let shown = 0;
  for (let i = 0; i < N; i++) shown += state.shown[i];
  const part = DATA.all > N ? `, drawn from ${DATA.all.toLocaleString("en")}` : "";
  $("count").textContent = `${shown.toLocaleString("en")} of ${N.toLocaleString("en")} images${part}`;
  $("count").dataset.shown = shown;
  draw();
}
// From the map's unit square to the canvas's pixels.
function place() {
  const ratio = devicePixelRatio || 1, side = Math.min(canvas.width, canvas.height) * state.scale;
  return { ratio, side, left: canvas.width / 2 - state.x * side, top: canvas.height / 2 - state.y * side };
}
function draw() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => { drawing = false; paint(); });
}
function paint() {
  const { ratio, side, left, top } = place(), w = canvas.width, h = canvas.height;
  const image = context.createImageData(w, h), pixels = new Uint32Array(image.data.buffer);
  const size = Math.max(2, Math.round(ratio * Math.min(9, (N > 20000 ? 2 : N > 3000 ? 3.5 : N > 500 ? 5 : 7) * Math.sqrt(state.scale))));
  const dim = state.circled.size > 0;
  for (let pass = dim ? 0 : 1; pass < 2; pass++) {
    for (let i = 0; i < N; i++) {
      if (!state.shown[i]) continue;
      const bright = !dim || state.circled.has(i);
      if (bright !== (pass === 1)) continue;
      const x = Math.round(left + points[2 * i] * side - size / 2), y = Math.round(top + points[2 * i + 1] * side - size / 2);
      if (x < 0 || y < 0 || x + size >= w || y + size >= h) continue;
      const c = bright ? colours[i] : (colours[i] & 0xffffff | 60 << 24) >>> 0;
      for (let v = 0; v < size; v++) for (let u = 0; u < size; u++) {
        if ((u + .5 - size / 2) ** 2 + (v + .5 - size / 2) ** 2 > size * size / 4) continue;
        pixels[(y + v) * w + x + u] = c;
      }
    }
  }
  context.putImageData(image, 0, 0);
  if (state.chosen >= 0) {
    context.strokeStyle = getComputedStyle(document.body).color;
    context.lineWidth = 2 * ratio;
    context.beginPath();
    context.arc(left + points[2 * state.chosen] * side, top + points[2 * state.chosen + 1] * side, size + 3 * ratio, 0, 7);
    context.stroke();
  }
  if (state.lasso) {
    context.strokeStyle = getComputedStyle(document.body).color;
    context.lineWidth = 1.5 * ratio;
    context.beginPath();
    for (const [x, y] of state.lasso) context.lineTo(left + x * side, top + y * side);
    context.closePath();
    context.stroke();
  }
}
function at(event) {
  const box = canvas.getBoundingClientRect(), { ratio, side, left, top } = place();
  const x = (event.clientX - box.left) * ratio, y = (event.clientY - box.top) * ratio;
  return { x: (x - left) / side, y: (y - top) / side, reach: 10 * ratio / side };
}
function nearest({ x, y, reach }) {
  let found = -1, least = reach * reach;
  for (let i = 0; i < N; i++) {
    if (!state.shown[i]) continue;
    const d = (points[2 * i] - x) ** 2 + (points[2 * i + 1] - y) ** 2;
    if (d < least) { least = d; found = i; }
  }
  return found;
}
const source = (i) => `images/${Math.floor(i / 1000)}/${i}.jpg`;
function values(i) {
  return Object.entries(columns).map(([name, c]) => `${name}: ${c.numbers ? (Number.isNaN(c.values[i]) ? "–" : c.values[i].toPrecision(4)) : c.names[c.values[i]]}`);
}
function tip(event, i) {
  const box = $("tip");
  box.hidden = i < 0;
  if (i < 0) { box.dataset.point = ""; return; }
  if (box.dataset.point !== String(i)) {
    box.dataset.point = i;
    box.querySelector("img").src = source(i);
    const column = columns[state.colour];
    const told = !column ? "" : column.numbers ? String(column.values[i]) : column.names[column.values[i]];
    box.querySelector("span").textContent = told ? `${DATA.paths[i]} · ${told}` : DATA.paths[i];
  }
  const stage = $("stage").getBoundingClientRect(), x = event.clientX - stage.left, y = event.clientY - stage.top;
  box.style.left = `${Math.max(0, x + 18 + box.offsetWidth > stage.width ? x - 18 - box.offsetWidth : x + 18)}px`;
  box.style.top = `${Math.max(0, Math.min(y + 14, stage.height - box.offsetHeight))}px`;
}
function choose(i) {
  state.chosen = i;
  $("chosen").hidden = i < 0;
  if (i >= 0) {
    $("chosen").dataset.point = i;
    $("chosen").querySelector("img").src = source(i);
    $("path").textContent = DATA.paths[i];
    $("about").textContent = values(i).join(" · ");
    $("similar").replaceChildren(...Array.from({ length: DATA.each }, (_, j) => {
      const other = similar[i * DATA.each + j], button = document.createElement("button"), image = document.createElement("img");
      button.type = "button";
      button.title = DATA.paths[other];
      button.dataset.point = other;
      image.src = source(other);
      image.alt = DATA.paths[other];
      button.append(image);
      button.addEventListener("click", () => choose(other));
      return button;
    }));
    $("chosen").scrollIntoView({ block: "nearest" });
  }
  draw();
}
function inside(x, y, line) {
  let odd = false;
  for (let i = 0, j = line.length - 1; i < line.length; j = i++) {
    const [ax, ay] = line[i], [bx, by] = line[j];
    if (ay > y !== by > y && x < (bx - ax) * (y - ay) / (by - ay) + ax) odd = !odd;
  }
  return odd;
}
function circle(line) {
  state.circled = new Set();
  if (line.length > 2) for (let i = 0; i < N; i++) if (state.shown[i] && inside(points[2 * i], points[2 * i + 1], line)) state.circled.add(i);
  const count = state.circled.size;
  $("circled").textContent = count ? `${count.toLocaleString("en")} images` : "Nothing: press Circle and draw around images.";
  $("circled").dataset.count = count;
  $("save").disabled = count < 2;
  draw();
}
let held = null;
canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  const here = at(event), drawn = event.shiftKey || $("lasso").getAttribute("aria-pressed") === "true";
  held = { x: event.clientX, y: event.clientY, cx: state.x, cy: state.y, moved: false, drawn };
  if (drawn) state.lasso = [[here.x, here.y]];
});
canvas.addEventListener("pointermove", (event) => {
  const here = at(event);
  if (!held) { tip(event, nearest(here)); return; }
  tip(event, -1);
  held.moved ||= Math.hypot(event.clientX - held.x, event.clientY - held.y) > 4;
  if (held.drawn) state.lasso.push([here.x, here.y]);
  else {
    const { ratio, side } = place();
    state.x = held.cx - (event.clientX - held.x) * ratio / side;
    state.y = held.cy - (event.clientY - held.y) * ratio / side;
  }
  draw();
});
canvas.addEventListener("pointerup", (event) => {
  if (!held) return;
  if (held.drawn) { circle(state.lasso); state.lasso = null; $("lasso").setAttribute("aria-pressed", "false"); }
  else if (!held.moved) choose(nearest(at(event)));
  held = null;
  draw();
});
canvas.addEventListener("pointercancel", () => { held = null; state.lasso = null; draw(); });
canvas.addEventListener("pointerleave", (event) => tip(event, -1));
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  const before = at(event);
  state.scale = Math.min(400, Math.max(.5, state.scale * Math.exp(-event.deltaY / 400)));
  const after = at(event);
  state.x += before.x - after.x;
  state.y += before.y - after.y;
  draw();
}, { passive: false });
$("lasso").addEventListener("click", () => $("lasso").setAttribute("aria-pressed", String($("lasso").getAttribute("aria-pressed") !== "true")));
$("whole").addEventListener("click", () => { Object.assign(state, { scale: 1, x: .5, y: .5 }); draw(); });

function legend() {
  const column = columns[state.colour], list = $("names");
  const numbers = Boolean(column && column.numbers);
  $("range").hidden = !numbers;
  $("all").hidden = $("none").hidden = !column || numbers;
  list.replaceChildren();
  if (!column) return;
  if (numbers) {
    const [low, high] = state.ranges[state.colour] || extent(column.values);
    $("low").value = low;
    $("high").value = high;
    return;
  }
  const hidden = state.hidden[state.colour] ||= new Set(), counts = new Uint32Array(column.names.length);
  for (const value of column.values) counts[value]++;
  column.names.forEach((name, c) => {
    if (!counts[c]) return;
    const item = document.createElement("li"), label = document.createElement("label"), box = document.createElement("input");
    const dot = document.createElement("span"), text = document.createElement("span"), count = document.createElement("span");
    box.type = "checkbox";
    box.checked = !hidden.has(c);
    box.dataset.name = name;
    box.addEventListener("change", () => { if (box.checked) hidden.delete(c); else hidden.add(c); filter(); });
    dot.className = "dot";
    dot.style.background = `rgb(${hue(c)})`;
    text.textContent = name;
    text.title = name;
    count.className = "soft";
    count.textContent = counts[c].toLocaleString("en");
    label.append(box, dot, text, count);
    item.append(label);
    list.append(item);
  });
}
for (const [id, hide] of [["all", false], ["none", true]]) $(id).addEventListener("click", () => {
  state.hidden[state.colour] = new Set(hide ? columns[state.colour].names.keys() : []);
  legend();
  filter();
});
for (const id of ["low", "high"]) $(id).addEventListener("change", () => { state.ranges[state.colour] = [Number($("low").value), Number($("high").value)]; filter(); });
$("find").addEventListener("input", () => { state.text = $("find").value; filter(); });
$("colour").addEventListener("change", () => { state.colour = $("colour").value; legend(); colour(); draw(); });

// As Crosslevel writes a path in a list: on one line, with a label that says there is none.
const escaped = (path) => path.replaceAll("\\", "\\\\").replaceAll("\n", "\\n").replaceAll("\r", "\\r").replaceAll("\t", "\\t");
$("save").addEventListener("click", async () => {
  const name = $("name").value.trim() || "circled", chosen = [...state.circled].sort((a, b) => a - b);
  if (!DATA.served) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([chosen.map((i) => `${escaped(DATA.paths[i])}\t-1\n`).join("")], { type: "text/plain" }));
    link.download = `${name.replace(/\.txt$/, "")}.txt`;
    link.click();
    URL.revokeObjectURL(link.href);
    $("saved").textContent = `${chosen.length.toLocaleString("en")} images in ${link.download}: IMAGES@list=${link.download}`;
    return;
  }
  try {
    const told = await (await fetch("list", { method: "POST", body: JSON.stringify({ name, points: chosen }) })).json();
    $("saved").textContent = told.error || `${told.count} images in ${told.file}. Use it: ${told.use}`;
  } catch {
    $("saved").textContent = "The command has ended: start crosslevel explore again.";
  }
});

$("title").textContent = document.title = DATA.title;
for (const name of ["", ...Object.keys(columns)]) {
  const option = document.createElement("option");
  option.value = name;
  option.textContent = name || "nothing";
  $("colour").append(option);
}
state.colour = ["label", "group"].find((name) => name in columns) || "";
$("colour").value = state.colour;
new ResizeObserver(() => {
  const ratio = devicePixelRatio || 1, box = $("stage").getBoundingClientRect();
  canvas.width = Math.max(1, Math.round(box.width * ratio));
  canvas.height = Math.max(1, Math.round(box.height * ratio));
  paint();
}).observe($("stage"));
// For whoever drives the page: where a point is on the screen.
window.whereIs = (i) => {
  const { ratio, side, left, top } = place(), box = canvas.getBoundingClientRect();
  return [box.left + (left + points[2 * i] * side) / ratio, box.top + (top + points[2 * i + 1] * side) / ratio];
};
colour();
legend();
filter();
