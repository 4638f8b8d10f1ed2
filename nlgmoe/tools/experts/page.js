"use strict";
const facts = JSON.parse(document.getElementById("facts").textContent);
const by = (id) => document.getElementById(id);
const state = { layer: 0, order: "first_order", domain: 0, expert: null };

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

// Neighbouring numbers get distant hues.
const hue = (expert) => (expert * 137.508) % 360;
const colour = (expert) => `hsl(${hue(expert)} 75% ${expert % 2 ? 78 : 86}%)`;
const percent = (value) => (value === null || value === undefined ? "-" : `${(100 * value).toFixed(1)}%`);
const signed = (value) => (value === null || value === undefined ? "-" : (value >= 0 ? "+" : "") + value.toFixed(4));
const visible = (text) => JSON.stringify(text).slice(1, -1);

function options(select, entries, chosen, change) {
  select.replaceChildren(...entries.map(([value, text]) => {
    const option = element("option", text);
    option.value = value;
    option.selected = value === chosen;
    return option;
  }));
  select.onchange = () => { change(select.value); draw(); };
}

function choose(expert) {
  state.expert = state.expert === expert ? null : expert;
  draw();
}

function drawText() {
  const { tokens, experts } = facts.texts[state.domain];
  by("text").replaceChildren(...tokens.map((token, place) => {
    const chosen = experts[state.layer][place];
    const span = element("span", token);
    const shown = state.expert === null ? chosen[0] : chosen.includes(state.expert) ? state.expert : null;
    if (shown !== null) span.style.background = colour(shown);
    span.title = `${visible(token)}: expert ${chosen.join(", ")}`;
    span.onclick = () => choose(chosen[0]);
    return span;
  }));
}

function bar(name, share, mark, width, expert) {
  const row = element("div", undefined, "row");
  const drawn = element("div", undefined, "bar");
  drawn.style.setProperty("--colour", `hsl(${hue(expert)} 60% 55%)`);
  const filled = element("i");
  filled.style.width = `${Math.min(100, 100 * (share || 0) / width)}%`;
  const line = element("b");
  line.style.left = `${Math.min(100, 100 * mark / width)}%`;
  drawn.append(filled, line);
  row.append(element("span", name), drawn, element("span", percent(share)));
  return row;
}

function change(name, card, key) {
  if (card[key] === undefined || card[key] === null) return [];
  const half = card[`${key}_half`];
  const parts = [element("div", `${name}: ${signed(card[key])}${half === null ? "" : ` ± ${half.toFixed(4)}`}`)];
  const domains = facts.domains.filter((domain) => card[`${key}/${domain}`] !== undefined);
  if (domains.length) {
    const text = domains.map((domain) => `${domain} ${signed(card[`${key}/${domain}`])}`).join(", ");
    parts.push(element("div", text, "dim"));
  }
  return parts;
}

function words(name, list) {
  if (!list.length) return [];
  const made = element("div", undefined, "words");
  made.append(element("b", `${name} `), ...list.slice(0, 8).map((word) => {
    const span = element("span", visible(word.text));
    span.title = `${percent(word.share)} of ${word.tokens} tokens; shuffled ${percent(word.shuffled)}`;
    return span;
  }));
  return [made];
}

function drawCard(card, width) {
  const made = element("div", undefined, `card${state.expert === card.expert ? " chosen" : ""}`);
  made.style.borderLeftColor = colour(card.expert);
  made.style.setProperty("--colour", colour(card.expert));
  made.onclick = () => choose(card.expert);
  made.append(element("h3", `Expert ${card.expert}`), bar("all text", card.use, card.use_uniform, width, card.expert));
  if (facts.domains.length > 1) {
    made.append(...facts.domains.map((domain) => bar(domain, card[`use/${domain}`], card.use_uniform, width, card.expert)));
  }
  made.append(...change("loss without it, to first order", card, "first_order"));
  made.append(...change("exact, its output 0", card, "contribution"));
  made.append(...change("exact, routed around", card, "route_around"));
  made.append(...words("read", card.input), ...words("next", card.next));
  for (const [before, at, after] of card.contexts) {
    const context = element("div", undefined, "context");
    context.append(visible(before), element("mark", visible(at)), visible(after));
    made.append(context);
  }
  if (card.together.length) {
    made.append(element("div", `often with ${card.together.map((pair) => `${pair.other} (${percent(pair.share)})`).join(", ")}`, "dim"));
  }
  return made;
}

function drawCards() {
  const cards = [...facts.cards[state.layer]];
  const width = Math.max(...cards.flatMap((card) => [card.use, ...facts.domains.map((domain) => card[`use/${domain}`] || 0)]));
  if (state.order !== "expert") cards.sort((a, b) => (b[state.order] ?? Infinity) - (a[state.order] ?? Infinity));
  const shown = state.expert === null ? cards : cards.filter((card) => card.expert === state.expert);
  by("cards").replaceChildren(...shown.map((card) => drawCard(card, width)));
}

function drawAnalyses() {
  const table = element("table");
  const head = element("tr");
  head.append(...["analysis", "value", "shuffled", "uniform"].map((name) => element("th", name)));
  table.append(head);
  for (const row of facts.analyses.filter((row) => row.layer === state.layer)) {
    const line = element("tr");
    line.append(element("th", row.analysis), ...["value", "shuffled", "uniform"].map((name) => element("td", row[name] === null ? "-" : row[name].toFixed(3))));
    table.append(line);
  }
  by("analyses").replaceChildren(table);
}

function draw() {
  by("clear").hidden = state.expert === null;
  drawText();
  drawCards();
  drawAnalyses();
}

options(by("layer"), facts.layers.map((layer, index) => [String(index), `${index} (block ${layer.block}, ${layer.experts} experts)`]), "0",
  (value) => { state.layer = Number(value); state.expert = null; });
options(by("order"), [["first_order", "loss without it"], ...(facts.routed_around ? [["route_around", "exact loss without it"]] : []), ["use", "use"], ["expert", "number"]],
  state.order, (value) => { state.order = value; });
options(by("domain"), facts.domains.map((name, index) => [String(index), name]), "0", (value) => { state.domain = Number(value); });
by("clear").onclick = () => choose(state.expert);
draw();
