"use strict";
// Draws the page's panels according to its controls. A panel's plotly data are in a script element inside it, with x in steps;
// drawing.py documents a trace's `meta`.
const facts = JSON.parse(document.getElementById("facts").textContent);
const AXES = {
  steps: { title: "steps", unit: 1 },
  tokens: { title: "tokens", unit: 1 },
  flops: { title: "FLOPs of the model, forward and backward", unit: 1 },
  seconds: { title: "time (minutes)", unit: 1 / 60 },
};
const STYLE = {
  font: { family: "system-ui, sans-serif", size: 12, color: "#1F2933" }, margin: { l: 48, r: 12, t: 26, b: 44 }, showlegend: false,
  hoverlabel: { namelength: -1 },
};
const GRID = { gridcolor: "#E4E7EB", zeroline: false, automargin: true };
// The only button saves an image; it stands above the panel.
const config = { responsive: true, displaylogo: false, modeBarButtons: [["toImage"]] };
const charts = [...document.querySelectorAll("article")].map((article) => ({
  legend: article.querySelector(".legend"),
  panels: [...article.querySelectorAll(".plot")].map((div) => {
    const figure = JSON.parse(div.querySelector("script").textContent);
    div.replaceChildren();
    return { div, ...figure };
  }),
}));
const control = (id) => document.getElementById(id)?.value;
const hidden = new Set(); // names that the reader has clicked on in a legend

function hasAxis(run, axis) {
  return axis in facts.clocks[run] && facts.clocks[run].steps.length > 1;
}

// Convert a step of a run to another axis, by linear interpolation and extrapolation.
function convert(run, axis, step) {
  const { steps, [axis]: values } = facts.clocks[run];
  let low = 0, high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle; else high = middle;
  }
  const share = (step - steps[low]) / (steps[high] - steps[low]);
  return (values[low] + share * (values[high] - values[low])) * AXES[axis].unit;
}

// A centred mean, which does not lag: over a share of the points on either side, fewer near the ends.
function smoothed(values, share) {
  const half = Math.round(share * values.length);
  return values.map((value, i) => {
    const width = Math.min(half, i, values.length - 1 - i);
    const near = values.slice(i - width, i + width + 1).filter((y) => y !== null);
    return value === null ? null : near.reduce((sum, y) => sum + y, 0) / near.length;
  });
}

// Return a trace as the controls have it; null if it is not of what they select.
function selected(trace, axis) {
  const { run, clock, smooth, layer, curves } = trace.meta ?? {};
  if (layer !== undefined && !(control("layer") === "all" ? layer !== "mean" : layer === control("layer"))) return null;
  if (curves && curves !== control("curves")) return null;
  const result = { ...trace, visible: !hidden.has(trace.name) };
  if (clock && axis !== "steps") {
    if (!hasAxis(run, axis)) return null;
    result.x = trace.x.map((step) => convert(run, axis, step));
  }
  if (smooth) result.y = smoothed(trace.y, Number(control("smoothing")));
  return result;
}

// An HTML legend wraps at any width. A click hides or shows a name in all charts.
function drawLegend(legend, traces) {
  const colours = new Map(traces.filter((trace) => trace.name).map(({ name, line, marker }) => [name, line?.color ?? marker.color]));
  legend.replaceChildren(...(colours.size > 1 ? [...colours] : []).map(([name, colour]) => {
    const button = document.createElement("button");
    button.textContent = name;
    button.className = hidden.has(name) ? "run off" : "run";
    button.style.setProperty("--colour", colour);
    button.onclick = () => { hidden.delete(name) || hidden.add(name); draw(); };
    return button;
  }));
}

function draw() {
  const axis = document.querySelector("input[name=axis]:checked").value;
  for (const { legend, panels } of charts) {
    const shown = panels.map(({ data }) => data.map((trace) => selected(trace, axis)).filter((trace) => trace));
    drawLegend(legend, shown.flat());
    panels.forEach(({ div, data, layout }, i) => {
      const clocked = data.some((trace) => trace.meta?.clock) ? { title: { text: AXES[axis].title, standoff: 4 }, exponentformat: "SI" } : {};
      const axes = { xaxis: { ...GRID, ...layout.xaxis, ...clocked }, yaxis: { ...GRID, ...layout.yaxis } };
      Plotly.react(div, shown[i], { ...STYLE, ...layout, ...axes, uirevision: axis }, config);
    });
  }
  const without = Object.keys(facts.names).filter((run) => axis !== "steps" && !hasAxis(run, axis)).map((run) => facts.names[run]);
  document.getElementById("hidden").value = without.length ? `not logged by ${without.join(", ")}, whose curves are hidden` : "";
}

const reference = document.getElementById("reference");
function compare() {
  document.querySelectorAll(".reference").forEach((table, i) => { table.hidden = i !== reference.selectedIndex; });
}
if (reference) {
  reference.addEventListener("input", compare);
  compare();
}
document.querySelector(`input[value=${Object.keys(facts.names).every((run) => hasAxis(run, "tokens")) ? "tokens" : "steps"}]`).checked = true;
document.getElementById("controls").addEventListener("input", draw);
document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());
draw();
