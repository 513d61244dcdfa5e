// Small pieces of the page: elements, numbers in words, requests.

export const $ = id => document.getElementById(id);

// An element; what users and files named goes in as text, never as markup.
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in made && name !== "list") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// At least two decimals, and three digits of the largest of the numbers that stand together.
export function signed(value, largest = Math.abs(value)) {
  const exponent = largest > 1e-9 ? Math.floor(Math.log10(largest)) : 0;
  const decimals = Math.min(8, Math.max(2, 2 - exponent));
  const text = exponent > 5 ? Math.abs(value).toExponential(2) : Math.abs(value).toFixed(decimals);
  const zero = Number(text) === 0;
  return (value < 0 && !zero ? "−" : "+") + text;
}

export const probability = p => (p > 0.9995 ? "> 0.999" : p < 0.0005 ? "< 0.001" : p.toFixed(3));

export const largestOf = rows => Math.max(...rows.flat().map(Math.abs));

export const short = name => (name.length <= 24 ? name : name.slice(0, 23).trimEnd() + "…");

export function row(label, middle, number, kind = "") {
  return element("div", { className: `row ${kind}` }, element("span", {}, label), middle, element("span", {}, number));
}

// A bar from zero to a value, or a dot at it, on a scale that holds all values.
export function track(value, values, kind, dot = false) {
  const low = Math.min(0, ...values), span = Math.max(0, ...values) - low || 1;
  const at = x => 100 * (x - low) / span;
  const zero = element("i", { className: "zero" });
  zero.style.left = `${at(0)}%`;
  const bar = element("i", { className: kind });
  bar.style.left = `${at(dot ? value : Math.min(0, value))}%`;
  if (!dot) bar.style.width = `${Math.max(100 * Math.abs(value) / span, 0.4)}%`;
  const made = element("span", { className: "track" }, zero, bar);
  made.setAttribute("aria-hidden", "true");
  return made;
}

// What the server says, or an error in one line.
export async function answer(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("no answer: is diffsal serve still running?");
  }
  const told = await response.json().catch(() => ({ error: "the answer cannot be read" }));
  if (!response.ok) throw Object.assign(new Error(told.error), { status: response.status });
  return told;
}

// Runs the latest call only: what is asked while another runs waits, and the last one wins.
export function latest(work) {
  let waiting = null, running = false;
  return async function ask(...given) {
    waiting = given;
    if (running) return;
    running = true;
    while (waiting) {
      const now = waiting;
      waiting = null;
      await work(...now);
    }
    running = false;
  };
}

// Radio buttons in a fieldset that is there already.
export function choices(fieldset, name, options, onChange) {
  fieldset.querySelectorAll("label").forEach(one => one.remove());
  options.forEach(([value, label], index) => {
    const input = element("input", { type: "radio", name, value, checked: index === 0 });
    input.addEventListener("change", () => onChange(value));
    fieldset.append(element("label", {}, input, element("span", {}, label)));
  });
}

// A place to drop an image on, or to choose one; the error of a bad file stands below it.
export function giver(root, words, about, onFile) {
  const input = element("input", { type: "file" });
  const drop = element("label", { className: "drop" }, input, element("b", {}, words),
    element("span", { className: "quiet" }, `PNG, JPEG, TIFF, BMP, WebP or DICOM, up to ${about.largest_file >> 20} MB`));
  const error = element("p", { className: "error", role: "alert" });
  const give = async file => {
    error.textContent = "";
    if (!file) return;
    try {
      if (file.size > about.largest_file) {
        throw new Error(`${file.name}: the file is larger than ${about.largest_file >> 20} MB: reduce the image`);
      }
      root.classList.add("busy");
      await onFile(file);
      root.classList.add("given");
      drop.querySelector("b").textContent = "Another image";
    } catch (problem) {
      error.textContent = problem.message;
    } finally {
      root.classList.remove("busy");
    }
  };
  input.addEventListener("change", () => { give(input.files[0]); input.value = ""; });
  for (const kind of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(kind, event => {
      event.preventDefault();
      event.stopPropagation();
      drop.classList.toggle("over", kind === "dragover");
      if (kind === "drop") give(event.dataTransfer.files[0]);
    });
  }
  root.append(drop, error);
  if (about.examples.length) root.append(examples(about.examples, give));
  return give;
}

function examples(names, give) {
  const row = element("div", { className: "examples" }, "or try");
  names.forEach((name, number) => {
    const button = element("button", { type: "button", title: name }, element("img", { src: `examples/${number}`, alt: name }));
    button.addEventListener("click", async () => {
      const content = await (await fetch(`examples/${number}`)).blob();
      give(new File([content], name));
    });
    row.append(button);
  });
  return row;
}
