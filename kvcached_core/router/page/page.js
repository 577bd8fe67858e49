// SPDX-License-Identifier: Apache-2.0
// Asks the router once a second and shows the answer. Text is only ever set as text: names come
// from whoever started an engine.
"use strict";

const PERIOD_MS = 1000;
const POLICIES = ["limit", "guarantee", "cache_limit", "weight", "priority"];

const byId = (id) => document.getElementById(id);

function make(tag, options = {}, ...children) {
  const { text, className, on, ...rest } = options;
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  if (on) for (const [event, handler] of Object.entries(on)) made.addEventListener(event, handler);
  for (const [name, value] of Object.entries(rest)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function bytes(value) {
  if (value === null || value === undefined) return "none";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) { value /= 1024; unit += 1; }
  return `${value >= 100 || unit === 0 ? Math.round(value) : value.toFixed(1)} ${units[unit]}`;
}

function duration(seconds) {
  if (seconds < 60) return `${Math.round(seconds)} s`;
  if (seconds < 3600) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

function say(text, bad = false) {
  const notice = byId("notice");
  notice.textContent = text;
  notice.className = bad ? "bad" : "";
  notice.hidden = !text;
}

async function ask(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  const answer = await fetch(path, { ...options, headers, cache: "no-store" });
  if (answer.status === 401) byId("login").hidden = false;
  const data = await answer.json();
  if (!answer.ok) throw new Error(data.error ? data.error.message : data.message || answer.status);
  return data;
}

async function act(button, path, order) {
  button.disabled = true;
  try {
    const done = await ask(path, { method: "POST", body: order ? JSON.stringify(order) : undefined });
    say(done.message);
  } catch (error) {
    say(error.message, true);
  }
  button.disabled = false;
  await refresh();
}

// Rows stay the same elements from one answer to the next, so that nothing is lost that is being
// typed or pressed.
function rows(container, items, keyOf, create, update) {
  const known = new Map([...container.children].map((row) => [row.dataset.key, row]));
  for (const item of items) {
    const key = keyOf(item);
    let row = known.get(key);
    if (!row) {
      row = create(item);
      row.dataset.key = key;
    }
    known.delete(key);
    update(row, item);
    container.append(row);
  }
  for (const row of known.values()) row.remove();
}

function fill(row, values) {
  values.forEach((value, index) => {
    if (value instanceof Node) row.cells[index].replaceChildren(value);
    else if (value !== undefined && row.cells[index].textContent !== String(value)) {
      row.cells[index].textContent = value;
    }
  });
}

function row(...kinds) {
  return make("tr", {}, ...kinds.map((kind) => make("td", { className: kind })));
}

// -- models ---------------------------------------------------------------------------------------

function engines(model) {
  const cell = make("span");
  for (const replica of model.replicas) {
    const run = replica.process;
    const state = run ? run.phase + (run.pid ? `, process ${run.pid}` : "") : replica.healthy ? "healthy" : "left out";
    const line = make("span", { text: replica.url });
    const problem = replica.healthy || model.state === "asleep" ? "" : replica.problem;
    line.append(make("small", { text: problem ? `${state}: ${problem}` : state }));
    cell.append(line);
  }
  return cell;
}

function modelRow(model) {
  const made = row("", "", "", "n", "n", "n", "n", "");
  const path = encodeURIComponent(model.name).replaceAll("%2F", "/");
  for (const [text, action] of [["Sleep", "sleep"], ["Wake", "wakeup"]]) {
    const button = make("button", { text, on: { click: () => act(button, `action/${action}/${path}`) } });
    made.cells[7].append(button, " ");
  }
  return made;
}

function showModel(made, model) {
  const state = make("span", { text: model.state, className: `state ${model.state}` });
  fill(made, [model.name, state, engines(model), model.pending - model.waiting, model.waiting,
    model.rate.toFixed(1), model.idle ? duration(model.idle) : "–"]);
  const [sleep, wake] = made.querySelectorAll("button");
  sleep.hidden = ["asleep", "sleeping", "waking"].includes(model.state);
  wake.hidden = !["asleep", "failed"].includes(model.state);
}

// -- memory ---------------------------------------------------------------------------------------

function ledgerBlock() {
  const heads = ["Member", "Leased", "In use", "Cached", "Guarantee", "Limit", "Weight", "Priority", ""];
  const head = make("tr", {}, ...heads.map((text, i) => make("th", { text, className: i > 0 && i < 8 ? "n" : "" })));
  return make("div", {}, make("h3"), make("div", { className: "bar", role: "img" }),
    make("table", {}, make("thead", {}, head), make("tbody")));
}

function memberRow(ledger, member) {
  const made = row("", "n", "n", "n", "n", "n", "n", "n", "");
  const order = (what, value) => ({ ledger: ledger.key, member: `#${member.slot}`, do: what, value });
  const select = make("select", { "aria-label": "setting" }, ...POLICIES.map((text) =>
    make("option", { value: text, text: text.replace("_", " ") })));
  const input = make("input", { "aria-label": "value", placeholder: "2GiB, 25%, none" });
  const set = make("button", { text: "Set" });
  const form = make("form", {}, select, input, set);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    act(set, "action/memory", order(select.value, input.value.trim()));
  });
  made.cells[8].append(form);
  for (const [text, what] of [["Trim", "trim"], ["Trim cache", "trim_cached"]]) {
    const button = make("button", { text, on: { click: () => act(button, "action/memory", order(what, "")) } });
    made.cells[8].append(button, " ");
  }
  return made;
}

function showMember(made, member, index) {
  const name = make("span", {}, make("span", { className: `key c${index % 6}` }), member.name);
  if (member.waiting) name.append(make("small", { text: `waits for ${bytes(member.demand_bytes)}` }));
  fill(made, [name, bytes(member.leased_bytes),
    bytes(member.leased_bytes - member.parked_bytes - member.cached_bytes), bytes(member.cached_bytes),
    bytes(member.guarantee_bytes), bytes(member.limit_bytes), member.weight, member.priority]);
}

function showLedger(block, ledger) {
  const [title, bar, table] = block.children;
  const members = ledger.members.filter((member) => member.alive);
  title.textContent = ledger.error ? `${ledger.key}: ${ledger.error}`
    : `${ledger.key}: ${bytes(ledger.leased_bytes)} leased, ${bytes(ledger.available_bytes)} free of ${bytes(ledger.capacity_bytes)}`;
  bar.setAttribute("aria-label", title.textContent);
  const parts = members.map((member, i) => [member.leased_bytes, `c${i % 6}`, member.name]);
  parts.push([Math.max(ledger.external_bytes, 0), "other", "weights, graphs and other processes"]);
  bar.replaceChildren(...parts.map(([size, className, name]) => {
    const part = make("span", { className, title: `${name}: ${bytes(size)}` });
    part.style.width = `${(100 * size) / Math.max(ledger.capacity_bytes, 1)}%`;
    return part;
  }));
  rows(table.tBodies[0], members.map((member, index) => ({ ...member, index })),
    (member) => `${member.slot}.${member.generation}`,
    (member) => memberRow(ledger, member), (made, member) => showMember(made, member, member.index));
}

// -- all ------------------------------------------------------------------------------------------

async function refresh() {
  try {
    const [state, memory] = await Promise.all([ask("state"), ask("memory")]);
    rows(byId("models").tBodies[0], state.models, (model) => model.name, modelRow, showModel);
    rows(byId("queues").tBodies[0], state.queues, (queue) => queue.name,
      () => row("", "", "n", "n", "n"),
      (made, queue) => fill(made, [queue.name, queue.order, queue.running, queue.max_running, queue.waiting]));
    rows(byId("memory"), memory.ledgers, (ledger) => ledger.key, ledgerBlock, showLedger);
    if (!memory.ledgers.length) byId("memory").replaceChildren(make("p", { text: `No ledger in ${memory.ledger_dir}` }));
    byId("connection").textContent = `up for ${duration(state.uptime_seconds)}`;
  } catch (error) {
    byId("connection").textContent = `no answer: ${error.message}`;
  }
}

byId("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", byId("key").value);
  byId("login").hidden = true;
  refresh();
});

(async () => {
  for (;;) {
    if (!document.hidden) await refresh();
    await new Promise((done) => setTimeout(done, PERIOD_MS));
  }
})();
