"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const documents = data.documents;
const $ = (id) => document.getElementById(id);
const has = (sign) => data.signs.includes(sign);
const storageKey = "review-" + data.key;
const work = loadWork(); // by document: {values, paths, done}, of those that were changed or accepted
const served = new Map(); // by document: the pages that the server has drawn, of the last ones looked at
let shown = [], current = -1, zoom = 100, urls = [];

// ---- What is kept ------------------------------------------------------------------------------------------------

function documentKey(one) { return JSON.stringify([one.source, one.page, one.doc_id]); }

function loadWork() {
  try { return JSON.parse(localStorage.getItem(storageKey)) || {}; } catch { return {}; }
}

function keepWork() {
  try { localStorage.setItem(storageKey, JSON.stringify(work)); } catch { say("This browser keeps nothing: save the corrections before you close the page."); }
  showProgress();
}

function workOf(one) { return work[documentKey(one)]; }

function startWork(one) {
  return work[documentKey(one)] ??= { values: structuredClone(one.values), paths: [], done: false };
}

function valuesOf(one) { return (workOf(one) || one).values; }

// ---- Paths, as in the records: $.line_items[2].amount ------------------------------------------------------------

function joinPath(path, step) {
  if (typeof step === "number") return `${path}[${step}]`;
  return /^[\p{L}_][\p{L}\p{N}_]*$/u.test(step) ? `${path}.${step}` : `${path}[${JSON.stringify(step)}]`;
}

function getAt(values, steps) { return steps.reduce((value, step) => (value == null ? null : value[step]), values) ?? null; }

function setAt(values, steps, value) {
  let holder = values;
  steps.slice(0, -1).forEach((step, index) => { holder = holder[step] ??= typeof steps[index + 1] === "number" ? [] : {}; });
  holder[steps.at(-1)] = value;
}

// ---- What is known of a value ------------------------------------------------------------------------------------

const MATCHES = { exact: ["good", "printed"], normalized: ["good", "printed"], similar: ["warn", "printed similarly"], reread: ["warn", "read twice by the model alone"], absent: ["warn", "not found on the page"], hidden: ["bad", "in hidden text only"] };
const ORDER = ["none", "good", "warn", "bad"];

// A rule about the items of a list is shown at the list: which of them is wrong it does not say.
function listMarks(one, path, dotted, isList = false) {
  const marks = [], mine = workOf(one)?.paths ?? [];
  const moved = [...mine, ...one.corrected].some((done) => path.startsWith(done + "["));
  if (mine.includes(path) || moved) return [["mine", "changed by you"]];
  if (one.corrected.includes(path)) marks.push(["mine", "corrected before"]);
  for (const error of one.errors) if (error.startsWith(path + ":")) marks.push(["bad", error.slice(path.length + 1).trim()]);
  for (const rule of one.rules) {
    const isMeant = (rule.fields || []).some((name) => name === dotted || (isList && name.startsWith(dotted + ".")));
    if ((rule.result === "broken" || rule.result === "error") && isMeant) marks.push([rule.result === "broken" ? "bad" : "warn", `rule ${rule.name}`]);
  }
  for (const found of one.evidence) if (found.path === path) {
    if (MATCHES[found.match]) marks.push(MATCHES[found.match]);
    if (found.reading) marks.push(["warn", `read again as ${found.reading}`]);
  }
  const confidence = one.confidence[path];
  if (confidence !== undefined) marks.push([confidence < 0.5 ? "bad" : confidence < 0.9 ? "warn" : "good", `${Math.round(100 * confidence)} %`]);
  return marks;
}

function findLevel(marks) {
  if (marks.some(([tone]) => tone === "mine")) return "mine";
  return marks.reduce((worst, [tone]) => (ORDER.indexOf(tone) > ORDER.indexOf(worst) ? tone : worst), "none");
}

function makeMarks(marks) {
  const holder = make("div", { className: "marks" });
  for (const [tone, text] of marks) { const mark = make("span", { className: "mark", textContent: text }); mark.dataset.tone = tone; holder.append(mark); }
  return holder;
}

// ---- The form ----------------------------------------------------------------------------------------------------

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function showForm(one) {
  const form = $("form");
  form.replaceChildren(...data.form.map((field) => makeField(one, field, [field.name], "$", field.name)));
}

function makeField(one, field, steps, parent, dotted) {
  const path = joinPath(parent, steps.at(-1));
  if (field.kind === "list") return makeList(one, field, steps, path, dotted);
  if (field.kind === "object") {
    const group = make("fieldset", {}, make("legend", { textContent: field.title }));
    group.append(...field.fields.map((inner) => makeField(one, inner, [...steps, inner.name], path, `${dotted}.${inner.name}`)));
    return group;
  }
  const id = "value " + path, input = makeInput(one, field, steps, path);
  input.id = id;
  const marks = listMarks(one, path, dotted);
  const holder = make("div", { className: "field" }, make("label", { htmlFor: id, textContent: field.title, title: field.help }), input, makeMarks(marks));
  holder.dataset.level = findLevel(marks);
  return holder;
}

function makeList(one, field, steps, path, dotted) {
  const item = field.fields[0], items = getAt(valuesOf(one), steps) ?? [];
  const group = make("fieldset", {}, make("legend", { textContent: `${field.title} (${items.length})`, title: field.help }));
  const marks = listMarks(one, path, dotted, true);
  group.dataset.level = findLevel(marks);
  if (marks.length) group.append(makeMarks(marks));
  const isFlat = item.kind === "object" && item.fields.every((inner) => inner.kind !== "list" && inner.kind !== "object");
  const add = make("button", { type: "button", textContent: "Add a row" });
  add.onclick = () => changeRows(one, steps, path, (rows) => rows.push(makeEmpty(item)), items.length);
  if (isFlat) {
    const table = make("table", {}, make("thead", {}, make("tr", {}, ...item.fields.map((inner) => make("th", { scope: "col", textContent: inner.title, title: inner.help })), make("th"))));
    const body = table.appendChild(make("tbody"));
    items.forEach((_, row) => body.append(makeRow(one, item, [...steps, row], joinPath(path, row), dotted, row)));
    group.append(make("div", { className: "rows" }, table));
  } else {
    items.forEach((_, row) => {
      const inner = item.kind === "object" || item.kind === "list" ? makeField(one, { ...item, title: `${item.title || field.title} ${row + 1}` }, [...steps, row], path, "") : makeField(one, { ...item, title: `${row + 1}` }, [...steps, row], path, "");
      inner.append(makeRemoveButton(one, [...steps, row], path, row));
      group.append(inner);
    });
  }
  group.append(add);
  return group;
}

function makeRow(one, item, steps, path, dotted, row) {
  const line = make("tr");
  for (const field of item.fields) {
    const inner = joinPath(path, field.name), input = makeInput(one, field, [...steps, field.name], inner);
    input.id = "value " + inner;
    input.setAttribute("aria-label", `${field.title}, row ${row + 1}`);
    const marks = listMarks(one, inner, "");
    const cell = make("td", {}, input, makeMarks(marks));
    cell.dataset.level = findLevel(marks);
    line.append(cell);
  }
  line.append(make("td", {}, makeRemoveButton(one, steps, path.slice(0, path.lastIndexOf("[")), row)));
  return line;
}

function makeRemoveButton(one, steps, path, row) {
  const button = make("button", { type: "button", textContent: "×" });
  button.setAttribute("aria-label", `Remove row ${row + 1}`);
  button.onclick = () => changeRows(one, steps.slice(0, -1), path, (rows) => rows.splice(row, 1), row);
  return button;
}

function makeEmpty(field) {
  if (field.kind === "object") return Object.fromEntries(field.fields.map((inner) => [inner.name, makeEmpty(inner)]));
  return field.kind === "list" ? [] : null;
}

function changeRows(one, steps, path, change, row) {
  const kept = startWork(one), rows = getAt(kept.values, steps) ?? [];
  change(rows);
  setAt(kept.values, steps, rows);
  addPath(kept, path);
  keepWork();
  showForm(one);
  showQueueItem(current);
  const inputs = [...$("form").querySelectorAll("input, select, textarea")].filter((input) => input.dataset.path?.startsWith(`${path}[${row}]`));
  (inputs[0] ?? $("record")).focus();
}

function addPath(kept, path) {
  kept.paths = kept.paths.filter((other) => !other.startsWith(path + "[") && !other.startsWith(path + "."));
  if (!kept.paths.some((other) => other === path || path.startsWith(other + "["))) kept.paths.push(path);
  kept.done = false;
}

function makeInput(one, field, steps, path) {
  const value = getAt(valuesOf(one), steps);
  let input;
  if (field.kind === "boolean" || field.kind === "choice") {
    const choices = field.kind === "boolean" ? [["true", "yes"], ["false", "no"]] : field.choices.map((choice) => [choice, choice]);
    if (value !== null && !choices.some(([choice]) => choice === String(value))) choices.push([String(value), String(value)]);
    input = make("select", {}, make("option", { value: "", textContent: "–" }), ...choices.map(([choice, text]) => make("option", { value: choice, textContent: text })));
  } else {
    const isLong = field.kind === "json" || (field.kind === "text" && String(value ?? "").length > 60);
    input = make(isLong ? "textarea" : "input", { spellcheck: false });
    if (isLong) input.rows = 2;
    if (["number", "integer"].includes(field.kind)) input.inputMode = "decimal";
    input.placeholder = { date: "YYYY-MM-DD", date_time: "YYYY-MM-DDTHH:MM:SS" }[field.kind] ?? "";
  }
  input.value = formatValue(field, value);
  input.title = field.help;
  input.dataset.path = path;
  input.onfocus = () => chooseBoxes(path);
  input.onchange = () => takeValue(one, field, steps, path, input);
  input.revert = () => { input.value = formatValue(field, getAt(valuesOf(one), steps)); showProblem(input, ""); };
  return input;
}

function formatValue(field, value) {
  if (value === null || value === undefined) return "";
  return field.kind === "json" ? JSON.stringify(value) : String(value);
}

function takeValue(one, field, steps, path, input) {
  const before = getAt(valuesOf(one), steps);
  let value;
  try { value = readValue(field, input.value); } catch (error) { showProblem(input, error.message); return false; }
  showProblem(input, "");
  if (JSON.stringify(value) === JSON.stringify(before)) return true;
  const kept = startWork(one);
  setAt(kept.values, steps, value);
  addPath(kept, path);
  if (JSON.stringify(kept.values) === JSON.stringify(one.values)) kept.paths = [];
  keepWork();
  const cell = input.closest("td, .field"), marks = listMarks(one, path, "");
  cell.dataset.level = findLevel(marks);
  cell.querySelector(".marks").replaceWith(makeMarks(marks));
  showQueueItem(current);
  return true;
}

function readValue(field, text) {
  const trimmed = text.trim();
  if (trimmed === "") return null;
  switch (field.kind) {
    case "boolean": return trimmed === "true";
    case "integer":
      if (!/^-?\d+$/.test(trimmed)) throw new Error("a whole number, such as 12");
      return trimmed.replace(/^(-?)0+(?=\d)/, "$1");
    case "number": {
      const found = /^(-?)0*(\d+)(?:\.(\d+))?$/.exec(trimmed);
      if (!found) throw new Error("a number with a point and no spaces, such as 1234.50");
      if (field.decimals !== undefined && (found[3] ?? "").replace(/0+$/, "").length > field.decimals) throw new Error(`at most ${field.decimals} decimals`);
      return found[1] + found[2] + (found[3] ? "." + found[3] : "");
    }
    case "date":
      if (!isDay(trimmed)) throw new Error("a day as YYYY-MM-DD, such as 2024-05-31");
      return trimmed;
    case "date_time":
      if (!/^\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d/.test(trimmed) || !isDay(trimmed.slice(0, 10))) throw new Error("a day and time, such as 2024-05-31T14:05:00");
      return trimmed;
    case "json":
      try { return JSON.parse(trimmed); } catch { throw new Error("JSON, such as {\"a\": 1}"); }
    default: return text;
  }
}

function isDay(text) {
  const day = /^\d{4}-\d\d-\d\d$/.test(text) ? new Date(text + "T00:00:00Z") : new Date(NaN);
  return !Number.isNaN(day.getTime()) && day.toISOString().slice(0, 10) === text;
}

function showProblem(input, text) {
  input.parentElement.querySelector(".problem")?.remove();
  input.toggleAttribute("aria-invalid", false);
  if (!text) return;
  const problem = make("div", { className: "problem", textContent: "Wanted: " + text, id: "problem " + input.dataset.path });
  input.setAttribute("aria-invalid", "true");
  input.setAttribute("aria-describedby", problem.id);
  input.after(problem);
}

// ---- Pages and boxes ---------------------------------------------------------------------------------------------

// Of a file: from an element of its own. Of a server: asked for once, the next document's ahead of time.
async function fetchPages(number) {
  if (!data.is_served || number === undefined || served.has(number)) return;
  if (served.size > 30) served.delete(served.keys().next().value);
  served.set(number, []);
  try {
    served.set(number, await (await fetch(`pages/${number}`)).json());
  } catch {
    served.delete(number);
    if (number === current) say("The server does not answer: is pipeline review still running?");
    return;
  }
  documents[number].images = served.get(number);
  if (number === current) showPages(number);
}

function findImage(number, image) { return image.jpeg ?? $(`image-${number}-${image.page}`)?.textContent; }

function showPages(number) {
  const one = documents[number];
  urls.forEach((url) => URL.revokeObjectURL(url));
  urls = [];
  const sheets = one.images.map((image) => {
    const sheet = make("div", { className: "sheet" });
    const stored = findImage(number, image);
    if (!stored) { sheet.append(make("p", { textContent: `Page ${image.page} is not shown: ${image.problem ?? "no image"}` })); return sheet; }
    const bytes = Uint8Array.from(atob(stored), (letter) => letter.charCodeAt(0));
    urls.push(URL.createObjectURL(new Blob([bytes], { type: "image/jpeg" })));
    sheet.append(make("img", { src: urls.at(-1), alt: `Page ${image.page} of ${one.source}` }));
    for (const found of one.evidence) if (found.page === image.page && found.box) sheet.append(makeBox(one, found, image));
    return sheet;
  });
  if (!sheets.length) sheets.push(make("div", { className: "sheet" }, make("p", { textContent: !one.doc_id ? "This document could not be read." : data.is_served ? "The pages are being drawn." : "The pages of this document are not in this file." })));
  $("sheets").replaceChildren(...sheets);
  setZoom(zoom);
}

function makeBox(one, found, image) {
  const [x0, y0, x1, y1] = found.box, box = make("button", { type: "button", className: "box", tabIndex: -1, title: `${found.path.replace(/^\$\./, "")}: ${found.words ?? ""}` });
  box.setAttribute("aria-label", `Value ${found.path}`);
  Object.assign(box.style, { left: `${(100 * x0) / image.width}%`, top: `${(100 * y0) / image.height}%`, width: `${(100 * (x1 - x0)) / image.width}%`, height: `${(100 * (y1 - y0)) / image.height}%` });
  box.dataset.path = found.path;
  box.dataset.level = MATCHES[found.match]?.[0] ?? "none";
  box.onclick = () => { const input = $("value " + found.path); input?.focus(); input?.scrollIntoView({ block: "center" }); };
  return box;
}

function chooseBoxes(path) {
  for (const box of document.querySelectorAll(".box")) {
    const isChosen = box.dataset.path === path;
    box.classList.toggle("chosen", isChosen);
    if (isChosen) box.scrollIntoView({ block: "nearest", inline: "nearest" });
  }
}

function setZoom(percent) {
  zoom = Math.min(400, Math.max(40, percent));
  $("sheets").style.width = `${zoom}%`;
}

// ---- The queue ---------------------------------------------------------------------------------------------------

const broken = (one) => one.rules.some((rule) => rule.result === "broken" || rule.result === "error");
const FILTERS = [
  ["all", "all", () => true, true],
  ["open", "to review", (one) => !workOf(one)?.done, true],
  ["done", "accepted", (one) => Boolean(workOf(one)?.done), true],
  ["changed", "changed by me", (one) => Boolean(workOf(one)?.paths.length), true],
  ["invalid", "invalid", (one) => one.status === "invalid", true],
  ["failed", "failed", (one) => one.status === "failed", true],
  ["rules", "broken rules", broken, has("_rules")],
  ["alerts", "alerts", (one) => one.alerts.length > 0, has("_alerts")],
  ["below", "low confidence", (one) => one.least !== null && one.least < Number($("below").value), has("_confidence")],
];

function showQueue() {
  const [name, , matches] = FILTERS.find(([key]) => key === $("filter").value), words = $("search").value.toLowerCase();
  $("below-label").hidden = name !== "below";
  shown = [];
  documents.forEach((one, number) => { if (matches(one) && (!words || searchText(one).includes(words))) shown.push(number); });
  const list = document.createDocumentFragment();
  for (const number of shown) list.append(makeQueueItem(number));
  $("queue").replaceChildren(list);
  say(shown.length ? "" : "No document is left under this filter.");
}

function searchText(one) { return (one.source + " " + JSON.stringify(valuesOf(one))).toLowerCase(); }

function makeQueueItem(number) {
  const one = documents[number], button = make("button", { type: "button" });
  button.append(one.source.split("/").at(-1) + (one.page ? `, page ${one.page}` : ""), make("small", {}, ...describeQueueItem(one)));
  button.title = one.source;
  button.onclick = () => open(number);
  if (number === current) button.setAttribute("aria-current", "true");
  const item = make("li", {}, button);
  item.dataset.number = number;
  return item;
}

function describeQueueItem(one) {
  const kept = workOf(one), parts = [];
  const chip = (tone, text) => { const made = make("span", { className: "chip", textContent: text }); made.dataset.tone = tone; parts.push(made, " "); };
  if (kept?.done) chip("good", "accepted");
  if (kept?.paths.length) chip("mine", `${kept.paths.length} changed`);
  else if (one.corrected.length) chip("mine", "corrected");
  if (one.status !== "extracted") chip("bad", one.status);
  if (one.alerts.length) chip("bad", "alert");
  if (broken(one)) chip("warn", "rules");
  if (one.least !== null) chip(one.least < 0.5 ? "bad" : one.least < 0.9 ? "warn" : "good", `${Math.round(100 * one.least)} %`);
  return parts;
}

function showQueueItem(number) { $("queue").querySelector(`[data-number="${number}"]`)?.replaceWith(makeQueueItem(number)); }

// ---- One document ------------------------------------------------------------------------------------------------

function open(number) {
  const before = current, one = documents[number];
  current = number;
  showQueueItem(before);
  showQueueItem(number);
  $("queue").querySelector("[aria-current]")?.scrollIntoView({ block: "nearest" });
  $("record-title").textContent = one.source + (one.page ? `, page ${one.page}` : "");
  showNotes(one);
  showPages(number);
  showForm(one);
  $("pages").scrollTop = 0;
  $("record").scrollTop = 0;
  $("record").focus({ preventScroll: true });
  fetchPages(number).then(() => fetchPages(shown[shown.indexOf(number) + 1]));
}

function showNotes(one) {
  const lines = [];
  const add = (tone, text) => { const line = make("li", { textContent: text }); line.dataset.tone = tone; lines.push(line); };
  if (one.failure) add("bad", one.failure);
  one.alerts.forEach((alert) => add("bad", `Alert: ${alert}`));
  one.errors.forEach((error) => { if (error !== one.failure?.split(": ").slice(1).join(": ")) add("bad", error.replace(/^\$\.?/, "")); });
  one.rules.forEach((rule) => { if (rule.result === "broken") add("warn", rule.message); else if (rule.result === "error") add("warn", `Rule ${rule.name}: ${rule.message}`); });
  one.disagreements.forEach((found) => add("warn", `${found.path.replace(/^\$\./, "")}: page ${found.kept_page} has ${found.kept}, page ${found.other_page} has ${found.other}`));
  $("notes").replaceChildren(...(lines.length ? [make("ul", {}, ...lines)] : []));
}

function move(step) {
  const place = shown.indexOf(current), next = place < 0 ? shown.find((number) => (step > 0 ? number > current : false)) ?? shown[0] : shown[place + step];
  if (next === undefined) { say(step > 0 ? "This is the last document." : "This is the first document."); return; }
  open(next);
}

function accept() {
  const one = documents[current];
  if (!one) return;
  const wrong = $("form").querySelector("[aria-invalid=true]");
  if (wrong) { wrong.focus(); say("One value is not of its type yet."); return; }
  startWork(one).done = true;
  keepWork();
  showQueueItem(current);
  const place = shown.indexOf(current), later = shown.slice(place + 1).concat(shown.slice(0, Math.max(place, 0)));
  const next = later.find((number) => !workOf(documents[number])?.done);
  if (next === undefined) { say("All documents here are accepted. Save the corrections."); $("record").focus(); } else open(next);
}

function undo() {
  delete work[documentKey(documents[current])];
  keepWork();
  open(current);
}

function showProgress() {
  const done = documents.filter((one) => workOf(one)?.done).length;
  $("progress").max = Math.max(1, documents.length);
  $("progress").value = done;
  $("progress-text").textContent = `${done} of ${documents.length} accepted`;
}

function say(text) { $("message").textContent = text; }

// ---- Corrections as JSON lines -----------------------------------------------------------------------------------

function toJson(field, value) {
  if (value === null || value === undefined) return "null";
  if (field.kind === "object") return `{${field.fields.map((inner) => `${JSON.stringify(inner.name)}:${toJson(inner, value[inner.name])}`).join(",")}}`;
  if (field.kind === "list") return `[${value.map((item) => toJson(field.fields[0], item)).join(",")}]`;
  return ["number", "integer"].includes(field.kind) ? String(value) : JSON.stringify(value);
}

function writeCorrections() {
  const lines = [];
  for (const one of documents) {
    const kept = workOf(one);
    if (!kept?.done) continue;
    const about = { _source: one.source, _page: one.page, _doc_id: one.doc_id, _corrected: [...new Set([...one.corrected, ...kept.paths])] };
    const values = data.form.map((field) => `${JSON.stringify(field.name)}:${toJson(field, kept.values[field.name])}`);
    lines.push(`${JSON.stringify(about).slice(0, -1)},${values.join(",")}}\n`);
  }
  return lines;
}

function download() {
  const lines = writeCorrections(), open = Object.values(work).filter((kept) => kept.paths.length && !kept.done).length;
  if (!lines.length) { say("Nothing is accepted yet: Enter accepts the document that is shown."); return; }
  const url = URL.createObjectURL(new Blob(lines, { type: "application/x-ndjson" }));
  make("a", { href: url, download: `${data.job}-corrections.jsonl` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
  say(`${lines.length} accepted documents are saved.` + (open ? ` ${open} with changes are not accepted yet and left out.` : ""));
}

async function loadCorrections(file) {
  const places = new Map(documents.map((one) => [documentKey(one), one]));
  let taken = 0, left = 0;
  for (const line of (await file.text()).split("\n")) {
    if (!line.trim()) continue;
    let given;
    try { given = JSON.parse(line, (_, value, context) => (typeof value === "number" ? context?.source ?? String(value) : value)); } catch { left += 1; continue; }
    const one = places.get(JSON.stringify([given._source, given._page ?? null, given._doc_id ?? null]));
    if (!one) { left += 1; continue; }
    const values = Object.fromEntries(data.form.map((field) => [field.name, given[field.name] ?? null]));
    work[documentKey(one)] = { values, paths: (given._corrected ?? []).filter((path) => !one.corrected.includes(path)), done: true };
    taken += 1;
  }
  keepWork();
  showQueue();
  open(Math.max(current, 0));
  say(`${taken} documents taken over` + (left ? `, ${left} lines are about none of these documents.` : "."));
}

// ---- Keys and buttons --------------------------------------------------------------------------------------------

function editDoubtful() {
  const inputs = [...$("form").querySelectorAll("input, select, textarea")];
  const has = (input, level) => input.closest(".field, td")?.dataset.level === level || input.closest("fieldset")?.dataset.level === level;
  const chosen = inputs.find((input) => has(input, "bad")) ?? inputs.find((input) => has(input, "warn")) ?? inputs[0];
  chosen?.focus();
  chosen?.select?.();
}

const KEYS = {
  j: () => move(1), k: () => move(-1), e: editDoubtful, Enter: accept, "+": () => setZoom(zoom * 1.25), "-": () => setZoom(zoom / 1.25), 0: () => setZoom(100),
  "/": () => $("search").focus(), d: download, "?": () => $("help").showModal(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  const target = event.target;
  if (target.matches("input, select, textarea")) {
    if (event.key === "Escape") { target.revert?.(); $("record").focus(); event.preventDefault(); }
    if (event.key === "Enter" && !(target.tagName === "TEXTAREA" && event.shiftKey)) {
      event.preventDefault();
      if (target.dataset.path) target.dispatchEvent(new Event("change"));
      if (!target.hasAttribute("aria-invalid")) $("record").focus();
    }
    return;
  }
  if (target.matches("button, a, summary") && (event.key === "Enter" || event.key === " ")) return;
  if (KEYS[event.key]) { event.preventDefault(); KEYS[event.key](); }
});

$("form").onsubmit = (event) => event.preventDefault();
$("accept").onclick = accept;
$("undo").onclick = undo;
$("download").onclick = download;
$("load").onclick = () => $("load-file").click();
$("load-file").onchange = (event) => { if (event.target.files[0]) loadCorrections(event.target.files[0]); event.target.value = ""; };
$("help-button").onclick = () => $("help").showModal();
$("zoom-in").onclick = KEYS["+"];
$("zoom-out").onclick = KEYS["-"];
$("zoom-fit").onclick = KEYS[0];
$("filter").append(...FILTERS.filter(([, , , isOffered]) => isOffered).map(([value, text]) => make("option", { value, textContent: text })));
$("filter").onchange = $("below").onchange = $("search").oninput = showQueue;
showQueue();
showProgress();
if (documents.length) open(0);
})();
