"use strict";

// Completions that are added to the page at once; "Show more" adds as many again.
const COMPLETIONS_AT_ONCE = 100;
const ALL_STEPS = "all";
const STATES = {cut: "cut off", lost: "lost", masked: "masked", redrawn: "drawn again"};
const ROLES = {user: "prompt", assistant: "model"};

const elementOf = (id) => document.getElementById(id);
const formatNumber = (value) => String(Number(value.toPrecision(3)));

// Returns a new element. The texts of runs only ever become text nodes.
function makeElement(tag, className, ...children) {
  const element = document.createElement(tag);
  element.className = className;
  element.append(...children);
  return element;
}

// Returns the value that is embedded under an id, as soon as the browser has read it.
async function unpack(id) {
  if (!elementOf(id)) await documentIsRead;
  const bytes = Uint8Array.from(atob(elementOf(id).textContent), (char) => char.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

const documentIsRead = new Promise((resolve) => {
  document.addEventListener("DOMContentLoaded", resolve);
});

// Filters

function readFilters() {
  const bound = (id, fallback) => (elementOf(id).value === "" ? fallback : Number(elementOf(id).value));
  return {
    step: elementOf("step").value,
    measure: elementOf("measure").value,
    hasBounds: elementOf("low").value !== "" || elementOf("high").value !== "",
    low: bound("low", -Infinity),
    high: bound("high", Infinity),
    words: elementOf("words").value.toLowerCase().split(/\s+/).filter(Boolean),
    state: elementOf("state").value,
  };
}

// Returns the reward or the advantage of a completion; undefined if it is not known.
function measureOf(completion, name) {
  if (name === "reward" || name === "advantage") return completion[name];
  return completion.rewards?.[name.slice("reward ".length)];
}

function isShown(completion, view, filters) {
  if (filters.state && !completion[filters.state]) return false;
  if (filters.hasBounds) {
    const value = measureOf(completion, filters.measure);
    if (value === undefined || value < filters.low || value > filters.high) return false;
  }
  const turns = [{text: view.prompt}, ...view.context, ...completion.turns];
  const text = turns.map((turn) => turn.text).join("\n").toLowerCase();
  return filters.words.every((word) => text.includes(word));
}

// Yields the views with completions to show, and unpacks one step after another.
async function* findViews(index, filters, progress) {
  const isAll = filters.step === ALL_STEPS;
  const numbers = isAll ? index.steps.keys() : [Number(filters.step)];
  for (const number of numbers) {
    for (const view of await unpack(`step-${number}`)) {
      const groups = view.groups.map((group) => group && {
        ...group, completions: group.completions.filter((item) => isShown(item, view, filters)),
      });
      if (groups.some((group) => group?.completions.length)) yield {...view, groups};
    }
    progress.searched += 1;
  }
}

// Elements

// Returns a text in which the words are marked.
function markWords(text, words) {
  const element = makeElement("pre", "text");
  const lower = text.toLowerCase();
  // Some letters become longer in lower case, which would shift the marks.
  const shownWords = lower.length === text.length ? words : [];
  let start = 0;
  while (start < text.length) {
    const found = shownWords
      .map((word) => ({word, at: lower.indexOf(word, start)}))
      .filter(({at}) => at >= 0)
      .sort((one, other) => one.at - other.at)[0];
    if (!found) break;
    const end = found.at + found.word.length;
    element.append(text.slice(start, found.at), makeElement("mark", "", text.slice(found.at, end)));
    start = end;
  }
  element.append(text.slice(start));
  return element;
}

function makeTurn(turn, words) {
  const role = ROLES[turn.role] ?? turn.role;
  const known = ["prompt", "system", "model", "tool", "environment"];
  const className = known.includes(role) ? role : "prompt";
  const label = turn.name ? `${role} ${turn.name}` : role;
  return makeElement("div", `turn ${className}`, makeElement("span", "role", label), markWords(turn.text, words));
}

function makeFact(name, value, className = "") {
  const text = typeof value === "number" ? formatNumber(value) : value;
  const shown = typeof text === "string" ? text : JSON.stringify(text);
  return makeElement("div", `fact ${className}`, makeElement("span", "name", name), makeElement("span", "value", shown));
}

function makeCompletion(completion, words) {
  const facts = makeElement("div", "facts", makeElement("span", "place", `completion ${completion.place + 1}`));
  if (completion.reward !== undefined) facts.append(makeFact("reward", completion.reward, "sum"));
  for (const [name, value] of Object.entries(completion.rewards ?? {})) facts.append(makeFact(name, value));
  if (completion.advantage !== undefined) {
    const sign = completion.advantage > 0 ? "plus" : completion.advantage < 0 ? "minus" : "";
    facts.append(makeFact("advantage", completion.advantage, sign));
  }
  for (const [name, label] of Object.entries(STATES)) {
    if (completion[name]) facts.append(makeElement("span", "state", label));
  }
  for (const [name, value] of Object.entries(completion.extra ?? {})) facts.append(makeFact(name, value));
  const turns = completion.turns.map((turn) => makeTurn(turn, words));
  if (completion.lost) turns.push(makeElement("p", "reason", `lost: ${completion.lost}`));
  return makeElement("article", "completion", facts, makeElement("div", "turns", ...turns));
}

function makeView(view, index, words) {
  const steps = view.groups.flatMap((group) => (group ? [group.step] : []));
  const title = [`step ${[...new Set(steps)].join(" | ")}`];
  if (view.row) title.push(view.row);
  const section = makeElement("section", "view", makeElement("h2", "", title.join(" · ")));
  for (const turn of view.context) section.append(makeTurn(turn, words));
  section.append(makeTurn({role: "user", text: view.prompt}, words));
  const sides = makeElement("div", view.groups.length > 1 ? "sides two" : "sides");
  view.groups.forEach((group, number) => {
    const side = makeElement("div", "side");
    if (view.groups.length > 1) {
      const where = group ? `${index.runs[number]}, step ${group.step}` : index.runs[number];
      side.append(makeElement("h3", "", where));
    }
    const completions = group?.completions ?? [];
    side.append(...completions.map((completion) => makeCompletion(completion, words)));
    if (!completions.length) side.append(makeElement("p", "reason", "no completion to show"));
    sides.append(side);
  });
  section.append(sides);
  return section;
}

// The page

let newestShow = 0;

// Shows the first completions that fit the filters.
async function show(index) {
  newestShow += 1;
  const thisShow = newestShow;
  const filters = readFilters();
  const progress = {searched: 0};
  const views = findViews(index, filters, progress);
  const toSearch = filters.step === ALL_STEPS ? index.steps.length : 1;
  let shown = 0;
  elementOf("views").replaceChildren();

  async function addViews() {
    elementOf("more").hidden = true;
    let added = 0;
    let isDone = false;
    while (added < COMPLETIONS_AT_ONCE) {
      const {value: view, done} = await views.next();
      if (thisShow !== newestShow) return;
      isDone = done;
      if (done) break;
      elementOf("views").append(makeView(view, index, filters.words));
      added += view.groups.reduce((sum, group) => sum + (group?.completions.length ?? 0), 0);
      tellStatus("searching …");
    }
    shown += added;
    elementOf("more").hidden = isDone;
    tellStatus(isDone ? "no more completions" : "more below");
  }

  function tellStatus(rest) {
    const searched = toSearch > 1 ? `${progress.searched} of ${toSearch} steps searched, ` : "";
    elementOf("status").textContent = `${elementOf("views").querySelectorAll(".completion").length} completions shown, ${searched}${rest}`;
  }

  elementOf("more").onclick = addViews;
  await addViews();
}

async function main() {
  const index = await unpack("index");
  index.steps.forEach(({step, means, completions}, number) => {
    const known = means.map((mean) => (mean === null ? "unknown" : formatNumber(mean)));
    const reward = means.some((mean) => mean !== null) ? ` · reward ${known.join(" | ")}` : "";
    elementOf("step").add(new Option(`${step} · ${completions} completions${reward}`, number));
  });
  if (index.steps.length > 1) elementOf("step").add(new Option("all steps", ALL_STEPS));
  for (const name of index.rewards) elementOf("measure").add(new Option(`reward ${name}`));
  const showAgain = () => show(index);
  const move = (by) => {
    const select = elementOf("step");
    select.selectedIndex = Math.min(Math.max(select.selectedIndex + by, 0), index.steps.length - 1);
    showAgain();
  };
  elementOf("previous").onclick = () => move(-1);
  elementOf("next").onclick = () => move(1);
  elementOf("filters").addEventListener("input", showAgain);
  elementOf("filters").addEventListener("submit", (event) => event.preventDefault());
  await showAgain();
}

main();
