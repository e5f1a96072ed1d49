// The page at `/`: sends what is typed to the HTTP interface and draws the answers.
// Texts and names reach the document as text nodes only, never as markup.

const NUM_BARS = 5;
const NUM_COLOURS = 8;
const KEY_NAME = "multitask-ray key";
const TIMES = ["tokenization", "queue", "inference", "total"];
const EXAMPLES = {
  "a sentence": ["The staff at the Grand Hotel in Lisbon were wonderful."],
  "another": ["🙂 Zoë waited two hours in São Paulo and the phone was broken."],
  "several sentences": [
    "The staff at the Grand Hotel in Lisbon were wonderful.",
    "The meal was delicious.",
    "The train to Berlin was late.",
    "We waited two hours for the train.",
  ],
};

const $ = (id) => document.getElementById(id);
const percent = new Intl.NumberFormat("en", { style: "percent", minimumFractionDigits: 1 });
const typeColours = new Map();
let key = stored();
let info = null;
let running = null;

// --- talking to the server ---------------------------------------------------------------------

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function call(path, body, signal) {
  const headers = { Accept: "application/json" };
  if (body) headers["Content-Type"] = "application/json";
  if (key) headers.Authorization = `Bearer ${key}`;
  const began = performance.now();
  const options = { headers, signal, method: body ? "POST" : "GET", body: body && JSON.stringify(body) };
  const response = await fetch(path, options);
  const content = await response.text();
  const times = { roundTrip: performance.now() - began };
  for (const name of TIMES) {
    const value = response.headers.get(`x-${name}-time`);
    if (value !== null && value !== "") times[name] = Number(value);
  }
  if (!response.ok) throw new Refused(response.status, reason(response, content));
  return { body: JSON.parse(content), times };
}

function reason(response, content) {
  let message = `The server answered ${response.status}.`;
  try {
    message = JSON.parse(content).error ?? message;
  } catch { /* a proxy's error page says no more than its status */ }
  const wait = response.headers.get("Retry-After");
  if (!/^\d+$/.test(wait ?? "")) return message;
  return message.replace(/(\.|; try again( later)?)?$/, `; try again in ${wait} s.`);
}

async function describeModel(signal) {
  info = (await call("info", null, signal)).body;
  const tasks = Object.entries(info.tasks ?? {});
  tasks.forEach(([, task]) => {
    if (task.kind === "token_classification") (task.labels ?? []).forEach(colourOf);
  });
  const names = tasks.map(([name, task]) => `${name} (${task.labels?.length ?? 0})`).join(", ");
  const limit = info.max_input_length ? ` Up to ${info.max_input_length} sub-words a sentence.` : "";
  $("model").textContent = `Model ${info.model_id}: ${names || "embeddings"}.${limit}`;
}

// Only the newest counts: what came before is aborted, and says nothing any more.
async function newest(work) {
  running?.abort();
  const mine = (running = new AbortController());
  $("error").textContent = "";
  try {
    await work(mine.signal);
  } catch (error) {
    if (mine.signal.aborted) return;
    mine.abort();
    report(error);
  } finally {
    if (mine === running) $("results").ariaBusy = "false";
  }
}

async function run() {
  const inputs = $("text").value.split("\n").filter((line) => line.trim());
  if (!inputs.length) {
    running?.abort();
    return fail("Type a sentence first.", $("text"));
  }
  $("results").ariaBusy = "true";
  $("status").textContent = "Running …";
  await newest(async (signal) => {
    const body = { inputs, return_scores: true, return_embeddings: inputs.length > 1, truncate: true };
    const [predicted] = await Promise.all([
      call("v1/predict", body, signal),
      // Each time: a server may have another model by now. Answers do without, but for the key.
      describeModel(signal).catch((error) => {
        if (isLocked(error)) throw error;
      }),
    ]);
    if (!signal.aborted) show(inputs, predicted);
  });
}

function isLocked(error) {
  return error instanceof Refused && error.status === 401;
}

function report(error) {
  $("results").replaceChildren();
  if (isLocked(error)) {
    const message = key ? error.message : "This server asks for an API key.";
    remember(null);
    $("unlock").hidden = false;
    return fail(message, $("key"));
  }
  fail(said(error));
}

function said(error) {
  return error instanceof Refused ? error.message : `No answer from the server: ${error.message}`;
}

function fail(message, focus) {
  $("status").textContent = "";
  $("error").textContent = message;
  focus?.focus();
}

// --- the key: of this tab, never written elsewhere ---------------------------------------------

function stored() {
  try {
    return sessionStorage.getItem(KEY_NAME);
  } catch {
    return null; // storage is blocked: the variable alone keeps it
  }
}

function remember(value) {
  key = value;
  $("forget").hidden = !value;
  try {
    if (value) sessionStorage.setItem(KEY_NAME, value);
    else sessionStorage.removeItem(KEY_NAME);
  } catch { /* as above */ }
}

// --- drawing -----------------------------------------------------------------------------------

function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) node.setAttribute(attribute, value);
  node.append(...children);
  return node;
}

function show(inputs, { body, times }) {
  const { results, embeddings, errors = {}, truncated = [], usage } = body;
  const many = inputs.length > 1;
  const articles = results.map((answers, i) => article(inputs[i], answers, many && i + 1, truncated.includes(i)));
  $("results").replaceChildren(
    el("h2", {}, many ? "Answers" : "Answer"),
    el("div", { class: "answers" }, ...articles),
    ...(embeddings ? [el("h2", {}, "Similarity"), heatmap(inputs, cosines(embeddings))] : []),
    el("h2", {}, "Timings"),
    timings(times),
    details(inputs, body),
  );
  const what = many ? `${inputs.length} sentences answered and compared` : summary(results[0]);
  const tokens = usage?.tokens ? `${usage.tokens} tokens` : "";
  const parts = [what, tokens, `${Math.round(times.roundTrip)} ms`];
  $("status").textContent = `${parts.filter(Boolean).join(", ")}.`;
  $("error").textContent = Object.values(errors).map(({ error }) => `${error}.`).join(" ");
}

// As `/v1/similarity` answers; the vectors are of unit length.
function cosines(vectors) {
  const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
  return vectors.map((a) => vectors.map((b) => Math.min(Math.max(dot(a, b), -1), 1)));
}

function summary(answers) {
  const said = Object.entries(answers).map(([task, answer]) => {
    const found = Array.isArray(answer)
      ? answer.map((entity) => `${entity.word} (${entity.entity_group})`)
      : (answer.labels ?? [answer.label]);
    const few = found.length > NUM_BARS ? `${found.length} found` : found.join(", ");
    return `${task}: ${few || "none"}`;
  });
  return said.join("; ");
}

function article(text, answers, number, isCut) {
  const parts = Object.entries(answers);
  const marked = parts.filter(([, answer]) => Array.isArray(answer));
  const labelled = parts.filter(([, answer]) => !Array.isArray(answer));
  const node = el("article", { "aria-label": number ? `Sentence ${number}` : "Sentence" });
  if (number) node.append(el("h3", {}, `Sentence ${number}`));
  if (isCut) node.append(el("p", { class: "quiet" }, cutNotice(labelled.length)));
  if (!marked.length) node.append(el("p", { class: "sentence", dir: "auto" }, text));
  const heading = number ? "h4" : "h3";
  for (const [task, entities] of marked) {
    node.append(el(heading, {}, task), highlighted(text, entities));
    if (!entities.length) node.append(el("p", { class: "quiet" }, `No ${task} found.`));
  }
  if (labelled.length) {
    const bars = labelled.map(([task, answer]) => barsOf(task, answer, heading));
    node.append(el("div", { class: "tasks" }, ...bars));
  }
  return node;
}

function cutNotice(hasLabels) {
  const limit = info?.max_input_length ? `the ${info.max_input_length} sub-words` : "what";
  const what = hasLabels ? "labels and similarity are those" : "similarity is that";
  return `Longer than ${limit} the model reads at once: ${what} of its beginning.`;
}

function highlighted(text, entities) {
  const points = Array.from(text); // offsets count code points, JavaScript strings UTF-16 units
  const line = el("p", { class: "sentence", dir: "auto" });
  let end = 0;
  for (const entity of [...entities].sort((a, b) => a.start - b.start)) {
    if (entity.start < end) continue;
    line.append(points.slice(end, entity.start).join(""));
    end = entity.end;
    const word = el("span", { class: "word" }, points.slice(entity.start, end).join(""));
    const name = `${entity.entity_group}\u00a0${percent.format(entity.score)}`;
    // The space is the sentence's, so that it parts them whichever way the words around run.
    const type = el("span", { class: "type" }, "\u00a0", el("bdi", {}, hidden("("), name, hidden(") ")));
    line.append(el("mark", { class: `type-${colourOf(entity.entity_group)}` }, word, type));
  }
  line.append(points.slice(end).join(""));
  return line;
}

function colourOf(type) {
  if (!typeColours.has(type)) typeColours.set(type, typeColours.size % NUM_COLOURS);
  return typeColours.get(type);
}

function barsOf(task, answer, heading) {
  const chosen = new Set(answer.labels ?? [answer.label]);
  const scores = Object.entries(answer.scores ?? { [answer.label]: answer.score });
  scores.sort((a, b) => b[1] - a[1]);
  const few = Math.max(NUM_BARS, chosen.size);
  const list = el("ul", { class: "bars", role: "list", "aria-label": task });
  const draw = (count) => {
    list.replaceChildren(...scores.slice(0, count).map(([name, p]) => bar(name, p, chosen.has(name))));
  };
  draw(few);
  const node = el("section", {}, el(heading, {}, task), list);
  if (scores.length > few) {
    const more = el("button", { type: "button", class: "link", "aria-expanded": "false" });
    const caption = (open) => (open ? `Show ${few} of ${task}` : `Show all ${scores.length} of ${task}`);
    more.textContent = caption(false);
    more.addEventListener("click", () => {
      const open = more.ariaExpanded === "false";
      more.ariaExpanded = String(open);
      more.textContent = caption(open);
      draw(open ? scores.length : few);
    });
    node.append(more);
  }
  return node;
}

function bar(name, score, chosen) {
  const fill = el("div");
  fill.style.setProperty("--share", Math.min(Math.max(score, 0), 1));
  const label = el("span", { class: "name" }, name);
  if (chosen) label.append(el("span", { "aria-hidden": "true" }, " ✓"), hidden(" (chosen)"));
  const number = el("span", { class: "number" }, percent.format(score));
  const track = el("div", { class: "bar", "aria-hidden": "true" }, fill);
  return el("li", chosen ? { class: "chosen" } : {}, label, " ", number, track);
}

function hidden(text) {
  return el("span", { class: "hidden-text" }, text);
}

function heatmap(texts, matrix) {
  const numbers = texts.map((_, i) => el("th", { scope: "col" }, String(i + 1)));
  const rows = matrix.map((values, i) => {
    const name = el("th", { scope: "row" }, `${i + 1} `, el("bdi", {}, texts[i]));
    return el("tr", {}, name, ...values.map(heatCell));
  });
  const caption = "Cosine similarity of each pair of sentences: 1 is the same direction.";
  const head = el("thead", {}, el("tr", {}, el("td", {}), ...numbers));
  return tableCard("heat", caption, head, el("tbody", {}, ...rows));
}

function heatCell(value) {
  const cell = el("td", {}, value.toFixed(2).replace(/^-(0\.00)$/, "$1"));
  cell.style.setProperty("--share", Math.min(Math.max(value, 0), 1));
  return cell;
}

function timings(times) {
  const columns = [...TIMES, "roundTrip"].filter((name) => name in times);
  const captions = { total: "server total", roundTrip: "round trip" };
  const head = columns.map((name) => el("th", { scope: "col" }, captions[name] ?? name));
  const cells = columns.map((name) => el("td", { class: "number" }, times[name].toFixed(1)));
  const caption = "Milliseconds in the server, and as this browser saw them.";
  return tableCard("times", caption, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, el("tr", {}, ...cells)));
}

// A table that scrolls by itself where it is wider than the screen; its caption stays in view.
function tableCard(kind, caption, ...parts) {
  const id = `${kind}-caption`;
  const table = el("table", { class: kind, "aria-labelledby": id }, ...parts);
  const scroll = el("div", { class: "scroll", role: "region", "aria-labelledby": id, tabindex: "0" }, table);
  return el("div", { class: "card" }, el("p", { class: "quiet", id }, caption), scroll);
}

// Without the vectors, a screenful each.
function details(inputs, { embeddings, ...answer }) {
  const body = { inputs, return_scores: true, ...(answer.truncated && { truncate: true }) };
  const quoted = JSON.stringify(body).replaceAll("'", "'\\''");
  const url = new URL("v1/predict", document.baseURI);
  const header = key ? " -H 'Authorization: Bearer KEY'" : "";
  const curl = `curl ${url}${header} -H 'Content-Type: application/json' -d '${quoted}'`;
  const code = el("pre", { tabindex: "0" }, `${curl}\n\n${JSON.stringify(answer, null, 2)}`);
  return el("details", { class: "card" }, el("summary", {}, "As curl and JSON"), code);
}

// --- wiring ------------------------------------------------------------------------------------

for (const [name, lines] of Object.entries(EXAMPLES)) {
  const button = el("button", { type: "button" }, name);
  button.addEventListener("click", () => {
    $("text").value = lines.join("\n");
    run();
  });
  $("examples").append(button);
}
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
$("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  run();
});
$("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  const value = $("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(value)) return fail("That is no key: keys are ASCII without spaces.", $("key"));
  remember(value);
  $("key").value = "";
  $("unlock").hidden = true;
  $("text").focus();
  if ($("text").value.trim()) run();
  else newest(describeModel);
});
$("forget").addEventListener("click", () => {
  remember(null);
  $("text").focus();
  $("status").textContent = "The key is forgotten.";
});

$("forget").hidden = !key;
newest(describeModel);
