// Renders the blocks of one panel: figures (Plotly), tables to sort and mark, text. Knows nothing of ablations.
// The kernel sends {blocks}, a whole panel, or {patch}, what changed in one figure, as JSON text in which traces and layouts
// are JSON text again; the page sends what a reader does.

const CONFIG = {responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"]};
const FEW = 100; // rows of a table shown at first
const MARKS = {pinned: ["pin", "☆", "★"], hidden: ["hide", "◉", "○"], selected: ["draw", "☐", "☑"]};

const make = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  node.append(...children);
  return node;
};

class FigureBlock {
  constructor(block) {
    this.note = make("p", {class: "wb-note"});
    this.plot = make("div", {class: "wb-plot", role: "img"});
    this.node = make("figure", {"data-block": block.id}, this.plot, this.note);
  }

  show(block) {
    this.figure = {data: block.figure.data.map(text => JSON.parse(text)), layout: JSON.parse(block.figure.layout)};
    this.note.textContent = block.note;
    this.note.hidden = !block.note;
    this.plot.style.height = `${this.figure.layout.height}px`;
    this.plot.setAttribute("aria-label", block.label);
    this.draw();
  }

  patch({traces, layout}) {
    for (const [index, trace] of Object.entries(traces)) this.figure.data[index] = JSON.parse(trace);
    this.figure.data = [...this.figure.data];
    if (layout) this.figure.layout = JSON.parse(layout);
    this.draw();
  }

  draw() {
    if (!this.plot.isConnected) return; // not on the page yet: measured when it is
    const style = getComputedStyle(this.plot);
    const paper = style.getPropertyValue("--wb-paper");
    const layout = {...this.figure.layout, autosize: true};
    delete layout.width;
    layout.font = {...layout.font, color: style.color};
    layout.hoverlabel = {...layout.hoverlabel, bgcolor: paper, bordercolor: "#888", font: {color: style.color}};
    if (layout.coloraxis) layout.coloraxis = {...layout.coloraxis};
    Plotly.react(this.plot, this.figure.data, layout, CONFIG);
  }

  resized() {
    if (this.plot.isConnected && this.plot.data && this.plot.clientWidth) Plotly.Plots.resize(this.plot);
  }

  gone() {
    Plotly.purge(this.plot);
  }
}

class TextBlock {
  constructor(block) {
    this.node = make("div", {"data-block": block.id, class: "wb-text"});
  }

  show(block) {
    if (this.html === block.html) return;
    this.html = block.html;
    this.node.innerHTML = block.html; // escaped by the kernel
  }
}

class GridBlock {
  constructor(block, send) {
    this.send = send;
    this.sort = null;
    this.falling = false;
    this.wanted = "";
    this.all = false;
    this.filter = make("input", {type: "search", placeholder: "filter", "aria-label": `filter ${block.id}`});
    this.filter.addEventListener("input", () => { this.wanted = this.filter.value.toLowerCase(); this.draw(); });
    this.count = make("span", {class: "wb-note", "aria-live": "polite"});
    this.more = make("button", {type: "button"});
    this.more.addEventListener("click", () => { this.all = true; this.draw(); });
    this.scroll = make("div", {class: "wb-scroll"});
    this.node = make("div", {"data-block": block.id, class: "wb-grid"},
      make("div", {class: "wb-bar"}, this.filter, this.count), this.scroll, this.more);
  }

  show(block) {
    this.block = block;
    this.draw();
  }

  order() {
    const text = cell => (Array.isArray(cell) ? cell[0] : cell);
    const value = cell => (Array.isArray(cell) ? cell[1] : cell);
    let rows = this.block.rows;
    if (this.wanted) rows = rows.filter(([, , cells]) => cells.some(c => String(text(c)).toLowerCase().includes(this.wanted)));
    rows = [...rows];
    if (this.sort !== null) {
      const compare = ([, , a], [, , b]) => {
        const x = value(a[this.sort]), y = value(b[this.sort]);
        if (x == null || y == null) return (x == null) - (y == null); // what has no value stays last
        const less = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
        return this.falling ? -less : less;
      };
      rows.sort(compare);
    }
    const pinned = new Set(this.block.marked.pinned ?? []);
    return [...rows.filter(([key]) => pinned.has(key)), ...rows.filter(([key]) => !pinned.has(key))];
  }

  draw() {
    const {heads, marks, marked, action, empty} = this.block;
    const rows = this.order();
    const shown = this.all ? rows : rows.slice(0, FEW);
    this.count.textContent = rows.length === this.block.rows.length ? `${rows.length} rows` : `${rows.length} of ${this.block.rows.length} rows`;
    this.more.hidden = shown.length === rows.length;
    this.more.textContent = `show all ${rows.length}`;
    this.node.classList.toggle("wb-empty", !this.block.rows.length);
    if (!this.block.rows.length) {
      this.scroll.replaceChildren(make("p", {}, empty));
      return;
    }
    const focus = this.scroll.contains(document.activeElement) ? document.activeElement.dataset.focus : null;
    const head = make("tr", {}, ...marks.map(mark => make("th", {}, MARKS[mark][0])), ...heads.map(([text, number], i) => {
      const button = make("button", {type: "button", "data-focus": `head ${i}`}, text);
      button.addEventListener("click", () => {
        this.falling = this.sort === i && !this.falling;
        this.sort = i;
        this.draw();
      });
      const order = this.sort === i ? (this.falling ? "descending" : "ascending") : "none";
      return make("th", {class: number ? "number" : null, "aria-sort": order}, button);
    }), ...(action ? [make("th", {}, "")] : []));
    const body = shown.map(([key, colour, cells]) => {
      const row = make("tr", {"data-key": key});
      for (const mark of marks) {
        const on = (marked[mark] ?? []).includes(key);
        const [verb, off, sign] = MARKS[mark];
        const button = make("button", {type: "button", "aria-pressed": String(on), "aria-label": `${verb} ${key}`,
          title: verb, "data-mark": mark, "data-focus": `${mark} ${key}`}, on ? sign : off);
        button.addEventListener("click", () => this.send({event: "mark", mark, key, on: !on}));
        row.append(make("td", {class: "wb-mark"}, button));
      }
      if ((marked.hidden ?? []).includes(key)) row.classList.add("wb-hidden");
      if ((marked.pinned ?? []).includes(key)) row.classList.add("wb-pinned");
      cells.forEach((cell, i) => {
        const td = make("td", {class: heads[i][1] ? "number" : null});
        if (i === 0 && colour) td.append(make("span", {class: "wb-dot", style: `color:${colour}`, "aria-hidden": "true"}, "● "));
        td.append(String(Array.isArray(cell) ? cell[0] : cell));
        row.append(td);
      });
      if (action) {
        const button = make("button", {type: "button", "aria-label": `${action} ${key}`, "data-act": action,
          "data-focus": `act ${key}`}, action);
        button.addEventListener("click", () => this.send({event: "act", action, key}));
        row.append(make("td", {}, ...(key ? [button] : [])));
      }
      return row;
    });
    this.scroll.replaceChildren(make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)));
    if (focus) [...this.scroll.querySelectorAll("[data-focus]")].find(node => node.dataset.focus === focus)?.focus();
  }
}

const KINDS = {figure: FigureBlock, text: TextBlock, grid: GridBlock};

function render({model, el}) {
  const board = make("div", {class: "wb-board"});
  el.append(board);
  let held = new Map();
  const send = message => model.send(message);

  const showAll = blocks => {
    const next = new Map();
    for (const block of blocks) {
      const old = held.get(block.id);
      const mine = old && old instanceof KINDS[block.kind] ? old : new KINDS[block.kind](block, send);
      next.set(block.id, mine);
    }
    for (const [id, old] of held) if (next.get(id) !== old) { old.gone?.(); old.node.remove(); }
    held = next;
    blocks.forEach((block, i) => {
      const mine = held.get(block.id);
      if (board.children[i] !== mine.node) board.insertBefore(mine.node, board.children[i] ?? null);
      mine.show(block);
    });
  };
  const receive = ({text}) => {
    const message = JSON.parse(text);
    if (message.blocks) showAll(message.blocks);
    if (message.patch) held.get(message.patch.id)?.patch(message.patch);
    board.dataset.count = Number(board.dataset.count ?? 0) + 1;
  };
  model.on("msg:custom", receive);

  const redraw = () => held.forEach(block => block instanceof FigureBlock && block.draw());
  const themes = new MutationObserver(redraw);
  themes.observe(document.body, {attributes: true, attributeFilter: ["data-jp-theme-light", "data-jp-theme-name", "class"]});
  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", redraw);
  let width = 0;
  const sizes = new ResizeObserver(() => {
    if (Math.abs(board.clientWidth - width) < 2) return;
    const first = !width;
    width = board.clientWidth;
    held.forEach(block => block instanceof FigureBlock && (first ? block.draw() : block.resized()));
  });
  sizes.observe(board);
  send({event: "ready"});
  return () => {
    model.off("msg:custom", receive);
    themes.disconnect();
    sizes.disconnect();
    dark.removeEventListener("change", redraw);
    held.forEach(block => block.gone?.());
  };
}

export default {render};
