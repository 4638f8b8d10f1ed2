"use strict";
// Draws the page's charts according to its controls. A chart's plotly data are in a script element inside it, with x in steps;
// drawing.py documents a trace's `meta`.
const facts = JSON.parse(document.getElementById("facts").textContent);
const AXES = {
  steps: { title: "steps", unit: 1 },
  tokens: { title: "tokens", unit: 1 },
  flops: { title: "FLOPs of the model, forward and backward (petaFLOPs)", unit: 1e-15 },
  seconds: { title: "time (minutes)", unit: 1 / 60 },
};
// No button that uploads data.
const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["sendChartToCloud", "select2d", "lasso2d", "autoScale2d"] };
const figures = [...document.querySelectorAll(".chart")].map((div) => {
  const figure = JSON.parse(div.querySelector("script").textContent);
  div.replaceChildren();
  return { div, ...figure };
});

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

// Exponential moving average with bias correction.
function smoothed(values, weight) {
  let sum = 0, total = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return sum / total;
  });
}

function shown(trace, state) {
  const { run, clock, smooth, layer } = trace.meta ?? {};
  const result = { ...trace };
  if (layer !== undefined) result.visible = state.layer === "all" ? layer !== "mean" : layer === state.layer;
  if (clock && state.axis !== "steps") {
    if (hasAxis(run, state.axis)) result.x = trace.x.map((step) => convert(run, state.axis, step));
    else result.visible = false;
  }
  if (smooth) result.y = smoothed(trace.y, state.smoothing);
  return result;
}

// The legend shows a name once, with its first visible trace.
function withLegend(traces) {
  const names = new Set();
  return traces.map((trace) => {
    if (trace.meta?.layer === undefined) return trace;
    const first = trace.visible !== false && !names.has(trace.name);
    if (first) names.add(trace.name);
    return { ...trace, showlegend: first };
  });
}

function draw() {
  const state = {
    axis: document.querySelector("input[name=axis]:checked").value,
    smoothing: Number(document.getElementById("smoothing").value),
    layer: document.getElementById("layer")?.value,
  };
  for (const { div, data, layout } of figures) {
    const clocked = Object.fromEntries(
      (layout.meta?.clock ?? []).map((name) => [name, { ...layout[name], title: { text: AXES[state.axis].title, standoff: 4 } }]),
    );
    Plotly.react(div, withLegend(data.map((trace) => shown(trace, state))), { ...layout, ...clocked, uirevision: state.axis }, config);
  }
  const without = facts.names.filter((_, run) => state.axis !== "steps" && !hasAxis(run, state.axis));
  document.getElementById("hidden").value = without.length ? `not logged by ${without.join(", ")}, whose curves are hidden` : "";
}

const start = document.querySelector(`input[value=${facts.names.every((_, run) => hasAxis(run, "tokens")) ? "tokens" : "steps"}]`);
start.checked = true;
document.getElementById("controls").addEventListener("input", draw);
document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());
draw();
