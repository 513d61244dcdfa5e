// What the page does: an image is given, and three questions are asked about it.

import { CellMap } from "./map.js";
import { $, answer, choices, element, giver, largestOf, latest, probability, row, short, signed, track } from "./parts.js";

const PANELS = ["evidence", "true", "false"];
const MOST_PROBABILITIES = 5;
const first = {}, second = {};
let told = null, panel = "evidence", target = "edges", cells = null;

const map = new CellMap($("map"), "Map: arrow keys read its cells", { onPick: read });
const donor = new CellMap($("donor"), "Cells to paste: arrow keys move, with Shift they widen", { onRectangle: choose });
const receiver = new CellMap($("receiver"), "The image that is pasted onto");

async function upload(given, file) {
  const taken = await answer("images", { method: "POST", body: file, headers: { "x-name": encodeURIComponent(file.name) } });
  Object.assign(given, taken, { file });
}

// A question about images; where the server had to drop one, it is given once more.
async function ask(path, question) {
  const post = () => answer(path, { method: "POST", body: JSON.stringify(question()), headers: { "content-type": "application/json" } });
  try {
    return await post();
  } catch (problem) {
    if (problem.status !== 410) throw problem;
    for (const given of [first, second]) if (given.file) await upload(given, given.file);
    return post();
  }
}

const class_ = id => { const { value } = $(id); return value === "" ? null : /^\d+$/.test(value) ? Number(value) : value; };
const contrast = () => ({ image: first.image, true: class_("true"), false: class_("false") });

async function giveFirst(file) {
  const before = { ...first };
  await upload(first, file);
  $("true").value = $("false").value = "";
  try {
    told = await ask("explain", contrast);
  } catch (problem) {
    Object.assign(first, before);
    throw problem;
  }
  fillClasses();
  $("strength").value = 0;
  cells = null;
  for (const id of ["explained", "lie", "compose"]) $(id).hidden = false;
  showExplained();
  lie();
  compose();
}

async function giveSecond(file) {
  await upload(second, file);
  $("composed").hidden = false;
  compose();
}

function fillClasses() {
  const options = (start) => [...start, ...told.classes.map((name, index) => [String(index), short(name)])]
    .map(([value, label]) => element("option", { value }, label));
  const few = told.classes.length === 2;
  $("true").replaceChildren(...options([["", `${short(told.predicted_name)} (predicted)`]]));
  $("false").replaceChildren(...options(few ? [["", "the other"]] : [["", "the runner-up"], ["rest", "the rest"]]));
}

const explainAgain = latest(async () => {
  $("explain-error").textContent = "";
  $("explain-result").classList.add("busy");
  try {
    told = await ask("explain", contrast);
    showExplained();
    lie();
    compose();
  } catch (problem) {
    $("explain-error").textContent = problem.message;
  }
  $("explain-result").classList.remove("busy");
});

function showExplained() {
  const { cells: { difference } } = told;
  map.show(first.picture, first.height, first.width, told.seen);
  map.grid(difference.length, difference[0].length, told.region_of);
  const names = { evidence: "Evidence", true: `Class map: ${short(told.true_name)}`, false: `Class map: ${short(told.false_name)}` };
  choices($("panels"), "panel", PANELS.map(name => [name, names[name]]), value => { panel = value; showPanel(); });
  panel = "evidence";
  showPanel();
  $("reading").textContent = "Click a cell, or focus the map and use the arrow keys, to read its logits.";
  showSum();
  showProbabilities();
  showRegions();
  showNotes();
  const asked = new URLSearchParams(Object.entries(contrast()).filter(([, value]) => value !== null));
  $("save").href = `figure.png?${asked}`;
  $("save").download = `${first.file.name.replace(/\.[^.]*$/, "")}.diffsal.png`;
}

function showPanel() {
  const layer = told.layers[panel];
  map.cover(layer.picture);
  map.opacity = $("opacity").value / 100;
  $("bar").src = layer.bar;
  const signedOnes = panel === "evidence";
  const largest = Math.max(Math.abs(layer.low), Math.abs(layer.high));
  $("low").textContent = signed(layer.low, largest) + (signedOnes ? ` against ${short(told.true_name)}` : "");
  $("high").textContent = signed(layer.high, largest) + (signedOnes ? ` for ${short(told.true_name)}` : "");
}

function read(r, c) {
  const largest = largestOf(told.cells.difference);
  const [difference, yes, no] = ["difference", "true", "false"].map(name => told.cells[name][r][c]);
  const side = difference < 0 ? "against" : "for", number = told.region_of[r][c];
  const region = number ? told.regions[number - 1] : null;
  $("reading").replaceChildren(
    element("strong", {}, `${signed(difference, largest)} logits`), ` ${side} ${short(told.true_name)} `,
    `in row ${r + 1}, column ${c + 1}: ${signed(yes, largest)} on the map of ${short(told.true_name)}, `
    + `${signed(no, largest)} on that of ${short(told.false_name)}.`
    + (region ? ` Region ${number} has ${part(region)}.` : ""));
  pressed(number);
}

const part = region => `${signed(region.logits, Math.abs(region.of))} of ${signed(region.of)}`;

function pressed(number) {
  [...$("regions").children].forEach((one, index) => one.setAttribute("aria-pressed", index + 1 === number));
}

function showSum() {
  const { margin, evidence_for: above, evidence_against: below, residual } = told;
  const predicted = told.probabilities[told.predicted_class];
  const largest = Math.max(...[margin, above, below, residual].map(Math.abs));
  $("verdict").replaceChildren(
    element("strong", {}, told.true_name), ` over ${told.false_name} by `, element("strong", {}, signed(margin, largest)), " logits",
    element("small", {}, `Predicted: ${told.predicted_name}, p ${probability(predicted).replace(/^(?=\d)/, "= ")}`));
  const terms = [[`red cells: for ${short(told.true_name)}`, above, "for"], [`blue cells: against ${short(told.true_name)}`, below, "against"],
    ["bias and rest, not on the map", residual, ""]];
  const values = [...terms.map(one => one[1]), margin];
  $("sum").replaceChildren(
    ...terms.map(([label, value, kind]) => row(label, track(value, values, kind), signed(value, largest))),
    row("margin, in logits", track(margin, values, margin < 0 ? "against" : "for"), signed(margin, largest), "total"));
}

function showProbabilities() {
  const order = told.probabilities.map((p, index) => [p, index]).sort((a, b) => b[0] - a[0]);
  const shown = new Set([...order.slice(0, MOST_PROBABILITIES).map(one => one[1]), told.true_class, told.false_class]);
  $("probabilities").replaceChildren(...order.filter(([, index]) => shown.has(index))
    .map(([p, index]) => row(told.classes[index], track(p, [0, 1], ""), probability(p))));
}

function showRegions() {
  $("regions-part").hidden = !told.regions.length;
  $("regions").replaceChildren(...told.regions.map((one, index) => {
    const words = `${index + 1}: ${part(one)}`;
    const button = element("button", { type: "button", "aria-pressed": "false" }, words);
    button.addEventListener("click", () => {
      map.mark((r, c) => told.region_of[r]?.[c] === index + 1);
      $("reading").replaceChildren(element("strong", {}, `${signed(one.logits, Math.abs(one.of))} logits`),
        ` in region ${index + 1}, of ${signed(one.of)} ${one.logits < 0 ? "against" : "for"} ${short(told.true_name)}: ${one.cells} cells.`);
      pressed(index + 1);
    });
    return button;
  }));
}

function showNotes() {
  const share = told.common_mode_share;
  const notes = told.caveats.map(text => element("li", { className: "caveat" }, text));
  if (!["logits", "log-softmax"].includes(told.outputs_are)) {
    notes.push(element("li", {}, `The model ends in a ${told.outputs_are}: maps are of the logits before it.`));
  }
  notes.push(element("li", {}, told.one_output
    ? "Common-mode share: not applicable, the model has one output."
    : share === null ? "Common-mode share: undefined, both class maps are constant."
      : `Common-mode share ${Math.round(100 * share)} %: so much of the class maps' variance is common to both classes, `
        + `and softmax between the two cannot see it${told.classes.length > 2 ? "; against a third class it can matter" : ""}. `
        + "A low share does not prove a map faithful."));
  $("notes").replaceChildren(...notes);
}

const lie = latest(async () => {
  const strength = $("strength").value / 100;
  $("strength-told").textContent = `${$("strength").value} %`;
  $("lie-error").textContent = "";
  const fitted = first.fitted ??= new Set();
  if (strength && !fitted.has(target + first.image)) $("lie-status").textContent = "Fitting the vector to this image …";
  try {
    showLie(await ask("lie", () => ({ ...contrast(), strength, target })));
    if (strength) fitted.add(target + first.image);
  } catch (problem) {
    $("lie-error").textContent = problem.message;
  }
  $("lie-status").textContent = "";
});

function showLie(found) {
  const { layers, probabilities, margin, changed } = found;
  const names = [["true", `Class map: ${short(told.true_name)}`], ["false", `Class map: ${short(told.false_name)}`], ["difference", "Difference"]];
  if (!$("lie-result").children.length) {
    $("lie-result").append(...names.map(() => element("figure", {}, element("figcaption"), element("img"))));
  }
  names.forEach(([name, label], index) => {
    const [caption, image] = $("lie-result").children[index].children;
    caption.textContent = label;
    image.src = layers[name].picture;
    image.alt = `${label}, of the model that is shifted by ${Math.round(100 * found.strength)} %`;
  });
  const line = (label, before, now, change, moved = false) => element("div", { className: "row" }, element("span", {}, label),
    element("span", {}, before), element("span", {}, now), element("span", { className: moved ? "moved" : "" }, change));
  const small = x => (x === 0 ? "unchanged" : `changed by ${x < 1e-3 ? x.toExponential(0).replace("e-", " · 10⁻").replace(/\d$/, d => "⁰¹²³⁴⁵⁶⁷⁸⁹"[d]) : x.toFixed(3)}`);
  const share = value => (value === null ? "–" : `${Math.round(100 * value)} %`);
  const [t, before, now] = [told.true_class, probabilities.before, probabilities.now];
  const head = line("", "honest", "shifted", "");
  head.classList.add("head");
  $("compared").replaceChildren(head,
    line(`Probability of ${short(told.true_name)}`, before[t].toFixed(6), now[t].toFixed(6), small(changed.probability)),
    line("Margin, in logits", signed(margin.before), signed(margin.now), small(Math.abs(margin.now - margin.before))),
    line("Difference map", "", "", small(changed.difference)),
    line(`Class map of ${short(told.true_name)}`, "", "", small(changed.true), changed.true > 1e-3),
    line("Common-mode share", share(found.common_mode_share.before), share(found.common_mode_share.now), ""));
  $("lie-note").textContent = `Every position of the slider runs the shifted model; nothing is drawn by hand. Of maps, the cell that changed most counts, in logits. The vector is fitted to ${found.views} `
    + "views of this image, moved and mirrored. Class maps are on their own scale, lowest blue and highest red; the difference is on the honest model's.";
}

function choose(chosen, done) {
  cells = chosen;
  receiver.choose(chosen);
  if (done) paste();
}

function compose() {
  if (!second.image || !told) return;
  const { difference } = told.cells, rows = difference.length, columns = difference[0].length;
  // What the model sees of the other image is only known of this one; where both fit, it is the same.
  receiver.show(first.picture, first.height, first.width, told.seen);
  receiver.grid(rows, columns);
  donor.show(second.picture, second.height, second.width, second.seen);
  donor.grid(rows, columns);
  cells = cells && cells.bottom <= rows && cells.right <= columns ? cells : begin(rows, columns);
  donor.choose(cells);
  receiver.choose(cells);
  paste();
}

// At first: the box round the weightiest region, if that is a part; else the left half.
function begin(rows, columns) {
  const inside = told.region_of.flatMap((line, r) => line.flatMap((number, c) => (number === 1 ? [[r, c]] : [])));
  if (inside.length) {
    const [r, c] = [0, 1].map(axis => inside.map(one => one[axis]));
    const box = { top: Math.min(...r), left: Math.min(...c), bottom: Math.max(...r) + 1, right: Math.max(...c) + 1 };
    if ((box.bottom - box.top) * (box.right - box.left) <= 0.75 * rows * columns) return box;
  }
  return { top: 0, left: 0, bottom: rows, right: Math.max(1, columns >> 1) };
}

const paste = latest(async () => {
  $("compose-error").textContent = "";
  const { top, left, bottom, right } = cells;
  try {
    showComposite(await ask("compose", () => ({ ...contrast(), donor: second.image, cells: [top, left, bottom, right] })));
  } catch (problem) {
    $("compose-error").textContent = problem.message;
  }
});

function showComposite(found) {
  $("composite").src = found.picture;
  const names = [["this image", "receiver", ""], ["the other image", "donor", ""], ["uniform guess", "uniform", ""],
    ["the map foretells", "predicted", "strong"], ["the model says", "actual", "strong"]];
  const values = names.map(one => found[one[1]]), largest = Math.max(...values.map(Math.abs));
  $("margins").replaceChildren(element("h2", {}, `Margin of ${short(found.true_name)} over ${short(found.false_name)}, in logits`),
    ...names.map(([label, name, kind]) => row(label, track(found[name], values, "", true), signed(found[name], largest), kind)));
  const off = Math.abs(found.predicted - found.actual), guess = Math.abs(found.uniform - found.actual);
  $("pasted").textContent = `${Math.round(100 * found.share)} % of the cells are pasted. The map is off by ${signed(off, largest).slice(1)} logits, `
    + `the uniform guess by ${signed(guess, largest).slice(1)}.`;
}

async function start() {
  const about = await answer("model");
  $("model").textContent = about.title;
  document.title = `${about.title} · diffsal`;
  $("where").textContent = `diffsal ${about.version}. ` + (about.local
    ? "Images stay in this machine's memory; nothing is sent elsewhere, and nothing is fetched."
    : "Images are kept in the server's memory alone, and are dropped when it needs the room.");
  const give = giver($("first"), "Drop an image here, or choose one", about, giveFirst);
  giver($("second"), "Drop another image to paste from, or choose one", about, giveSecond);
  for (const kind of ["dragover", "drop"]) {
    addEventListener(kind, event => { event.preventDefault(); if (kind === "drop") give(event.dataTransfer.files[0]); });
  }
  choices($("targets"), "target", about.targets.map(name => [name, name]), value => { target = value; lie(); });
  $("true").addEventListener("change", explainAgain);
  $("false").addEventListener("change", explainAgain);
  $("opacity").addEventListener("input", () => { map.opacity = $("opacity").value / 100; });
  $("strength").addEventListener("input", lie);
}

start();
