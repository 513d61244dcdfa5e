// An image with a map over it, whose cells can be chosen by pointer and by keyboard.

import { element } from "./parts.js";

const SVG = "http://www.w3.org/2000/svg";

export class CellMap {
  // onPick(row, column) for one cell; onRectangle({top, left, bottom, right}) where cells are dragged over.
  constructor(root, label, { onPick = null, onRectangle = null } = {}) {
    this.rows = this.columns = 1;
    this.at = null;
    this.rectangle = null;
    this.onPick = onPick;
    this.onRectangle = onRectangle;
    this.root = root;
    root.className = "map" + (onRectangle ? " choosing" : "");
    if (onPick || onRectangle) Object.assign(root, { tabIndex: 0 });
    root.setAttribute("role", onPick || onRectangle ? "application" : "img");
    root.setAttribute("aria-label", label);
    this.under = element("img", { alt: "" });
    this.over = element("img", { alt: "", className: "over" });
    this.over.hidden = true;
    this.svg = document.createElementNS(SVG, "svg");
    this.svg.setAttribute("preserveAspectRatio", "none");
    this.numbers = element("div", { className: "numbers" });
    root.replaceChildren(this.under, this.over, this.svg, this.numbers);
    if (onPick || onRectangle) this.listen();
  }

  show(picture, height, width, seen) {
    this.under.src = picture;
    this.root.style.setProperty("--ratio", width / height);
    this.seen = seen;
    const names = ["left", "top", "width", "height"];
    for (const one of [this.svg, this.numbers]) {
      names.forEach((name, index) => { one.style[name] = `${100 * seen[index]}%`; });
    }
  }

  cover(picture) {
    this.over.hidden = !picture;
    if (picture) this.over.src = picture;
  }

  set opacity(share) { this.over.style.opacity = share; }

  // regions: (h, w) numbers from 1 on, 0 for none; draws the grid and the regions' outlines.
  grid(rows, columns, regions = null) {
    Object.assign(this, { rows, columns, regions });
    this.at = this.rectangle = null;
    this.svg.setAttribute("viewBox", `0 0 ${columns} ${rows}`);
    const lines = [];
    for (let x = 0; x <= columns; x++) lines.push(`M${x} 0V${rows}`);
    for (let y = 0; y <= rows; y++) lines.push(`M0 ${y}H${columns}`);
    this.svg.replaceChildren();
    this.path(lines.join(""), "grid");
    this.numbers.replaceChildren();
    if (regions) {
      this.outline(outlineOf((r, c) => regions[r]?.[c] ?? 0), "");
      this.count(regions);
    }
  }

  // Each region's number, in the first of its cells.
  count(regions) {
    const most = Math.max(...regions.flat());
    for (let number = 1; number <= most; number++) {
      const row = regions.findIndex(line => line.includes(number)), column = regions[row].indexOf(number);
      const label = element("b", {}, String(number));
      label.style.left = `${100 * column / this.columns}%`;
      label.style.top = `${100 * row / this.rows}%`;
      this.numbers.append(label);
    }
  }

  path(data, kind) {
    const made = document.createElementNS(SVG, "path");
    made.setAttribute("d", data);
    made.setAttribute("class", kind);
    this.svg.append(made);
  }

  outline(within, kind) {
    const data = within(this.rows, this.columns);
    for (const part of ["halo", "line"]) this.path(data, `${kind} ${part}`);
  }

  // Marks what inside(row, column) tells, in place of what was marked.
  mark(inside) {
    this.svg.querySelectorAll(".mark, .chosen").forEach(one => one.remove());
    if (inside) this.outline(outlineOf((r, c) => (inside(r, c) ? 1 : 0)), "mark");
  }

  choose(rectangle) {
    this.rectangle = rectangle;
    const { top, left, bottom, right } = rectangle;
    this.mark((r, c) => r >= top && r < bottom && c >= left && c < right);
    this.path(`M${left} ${top}H${right}V${bottom}H${left}Z`, "chosen fill");
  }

  cellAt(event) {
    const box = this.svg.getBoundingClientRect();
    const within = (x, count) => Math.min(count - 1, Math.max(0, Math.floor(x * count)));
    return [within((event.clientY - box.top) / box.height, this.rows),
      within((event.clientX - box.left) / box.width, this.columns)];
  }

  listen() {
    let start = null;
    this.root.addEventListener("pointerdown", event => {
      start = this.cellAt(event);
      if (this.onRectangle) {
        this.root.setPointerCapture(event.pointerId);
        this.spread(start, start);
      }
    });
    this.root.addEventListener("pointermove", event => {
      if (start && this.onRectangle) this.spread(start, this.cellAt(event));
    });
    this.root.addEventListener("pointerup", event => {
      if (!start) return;
      if (this.onRectangle) this.onRectangle(this.rectangle, true);
      else this.pick(...this.cellAt(event));
      start = null;
    });
    this.root.addEventListener("pointercancel", () => { start = null; });
    this.root.addEventListener("keydown", event => this.key(event));
    this.root.addEventListener("focus", () => {
      if (this.onPick && !this.at && this.root.matches(":focus-visible")) this.pick(this.rows >> 1, this.columns >> 1);
    });
  }

  spread([r0, c0], [r1, c1]) {
    const chosen = { top: Math.min(r0, r1), left: Math.min(c0, c1), bottom: Math.max(r0, r1) + 1, right: Math.max(c0, c1) + 1 };
    this.choose(chosen);
    this.onRectangle(chosen, false);
  }

  pick(row, column) {
    this.at = [row, column];
    this.mark((r, c) => r === row && c === column);
    this.onPick(row, column);
  }

  key(event) {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    if (this.onPick) {
      const [r, c] = this.at ?? [this.rows >> 1, this.columns >> 1];
      const bound = (x, count) => Math.min(count - 1, Math.max(0, x));
      this.pick(bound(r + step[0], this.rows), bound(c + step[1], this.columns));
    } else {
      this.onRectangle(this.moved(step, event.shiftKey), true);
    }
  }

  // Moved by a cell; or, with Shift, its lower right corner is.
  moved([down, right], widen) {
    const { top, left, bottom, right: end } = this.rectangle;
    const chosen = {
      top: widen ? top : top + down, left: widen ? left : left + right, bottom: bottom + down, right: end + right,
    };
    const fits = chosen.top >= 0 && chosen.left >= 0 && chosen.bottom <= this.rows && chosen.right <= this.columns
      && chosen.bottom > chosen.top && chosen.right > chosen.left;
    if (fits) this.choose(chosen);
    return this.rectangle;
  }
}

// The border lines between cells of different numbers.
function outlineOf(number) {
  return (rows, columns) => {
    const of = (r, c) => (r < 0 || c < 0 || r >= rows || c >= columns ? 0 : number(r, c));
    const lines = [];
    for (let r = 0; r <= rows; r++) {
      for (let c = 0; c <= columns; c++) {
        if (c < columns && of(r - 1, c) !== of(r, c)) lines.push(`M${c} ${r}h1`);
        if (r < rows && of(r, c - 1) !== of(r, c)) lines.push(`M${c} ${r}v1`);
      }
    }
    return lines.join("");
  };
}
