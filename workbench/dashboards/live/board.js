// Renders the blocks of one panel: figures (Plotly), tables to sort and mark, text. Knows nothing of ablations.
// The kernel sends {blocks}, a whole panel, or {patch}, the changes of one figure, as JSON in which traces and layouts are
// encoded once more; the page sends what the reader does.

// Plotly.js of this dashboard, isolated from other versions on the page; its source arrives with the model
let source = "";
let loaded = null;
const loadPlotly = () => {
  const module = {exports: {}};
  new Function("module", "exports", "define", source)(module, module.exports, undefined);
  return module.exports;
};
const plotly = () => (loaded ??= loadPlotly());

const CONFIG = {responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"], plotlyServerURL: ""};
const FIRST_ROWS = 100; // of a table, until all are asked for
const FILTER_ROWS = 8; // a shorter table has no filter
const MARKS = {pinned: ["pin", "☆", "★"], hidden: ["hide", "◉", "○"], selected: ["draw", "☐", "☑"]};

// a cell is text, or [text, value to sort by, CSS class]
const textOf = cell => String(Array.isArray(cell) ? cell[0] : cell);
const valueOf = cell => (Array.isArray(cell) ? cell[1] : cell);
const toneOf = cell => (Array.isArray(cell) ? cell[2] : "");

const dot = colour => make("span", {class: "wb-dot", style: `color:${colour}`, "aria-hidden": "true"}, "● ");

const title = text => {
  const node = make("h3", {}, text);
  node.hidden = !text;
  return node;
};

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
    if (!this.plot.isConnected) return; // not on the page yet: drawn when its size is known
    const style = getComputedStyle(this.plot);
    const paper = style.getPropertyValue("--wb-paper");
    const layout = {...this.figure.layout, autosize: true};
    delete layout.width;
    layout.font = {...layout.font, color: style.color};
    layout.hoverlabel = {...layout.hoverlabel, bgcolor: paper, bordercolor: "#888", font: {color: style.color}};
    if (layout.coloraxis) layout.coloraxis = {...layout.coloraxis};
    plotly().react(this.plot, this.figure.data, layout, CONFIG);
  }

  resize() {
    if (this.plot.isConnected && this.plot.data && this.plot.clientWidth) plotly().Plots.resize(this.plot);
  }

  remove() {
    if (this.plot.data) plotly().purge(this.plot);
  }
}

class TextBlock {
  constructor(block) {
    this.content = make("div");
    this.content.addEventListener("click", ({target}) => {
      if (target.dataset.copy) navigator.clipboard?.writeText(target.dataset.copy).then(() => { target.textContent = "Copied"; });
    });
    this.title = title(block.title);
    this.node = make("div", {"data-block": block.id, class: "wb-text"}, this.title, this.content);
  }

  show(block) {
    this.title.textContent = block.title;
    this.title.hidden = !block.title;
    if (this.html === block.html) return;
    this.html = block.html;
    this.content.innerHTML = block.html; // escaped by the kernel
  }
}

class GridBlock {
  constructor(block, send) {
    this.send = send;
    this.sort = null;
    this.descending = false;
    this.query = "";
    this.all = false;
    this.filter = make("input", {type: "search", placeholder: "filter", "aria-label": `filter ${block.id}`});
    this.filter.addEventListener("input", () => { this.query = this.filter.value.toLowerCase(); this.draw(); });
    this.count = make("span", {class: "wb-note", "aria-live": "polite"});
    this.more = make("button", {type: "button"});
    this.more.addEventListener("click", () => { this.all = true; this.draw(); });
    this.scroll = make("div", {class: "wb-scroll"});
    this.node = make("div", {"data-block": block.id, class: "wb-grid"},
      title(block.title), make("div", {class: "wb-bar"}, this.filter, this.count), this.scroll, this.more);
  }

  show(block) {
    this.block = block;
    this.draw();
  }

  order() {
    let rows = this.block.rows;
    if (this.query) rows = rows.filter(([, , cells]) => cells.some(cell => textOf(cell).toLowerCase().includes(this.query)));
    rows = [...rows];
    if (this.sort !== null) {
      const compare = ([, , a], [, , b]) => {
        const x = valueOf(a[this.sort]), y = valueOf(b[this.sort]);
        if (x == null || y == null) return (x == null) - (y == null); // missing values stay last
        const less = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
        return this.descending ? -less : less;
      };
      rows.sort(compare);
    }
    const pinned = new Set(this.block.marked.pinned ?? []);
    return [...rows.filter(([key]) => pinned.has(key)), ...rows.filter(([key]) => !pinned.has(key))];
  }

  draw() {
    const {columns, marks, marked, action, empty, sortable} = this.block;
    const rows = this.order();
    const shown = this.all ? rows : rows.slice(0, FIRST_ROWS);
    this.count.textContent = rows.length === this.block.rows.length ? `${rows.length} rows` : `${rows.length} of ${this.block.rows.length} rows`;
    this.more.hidden = shown.length === rows.length;
    this.more.textContent = `show all ${rows.length}`;
    this.node.classList.toggle("wb-short", !sortable || this.block.rows.length < FILTER_ROWS);
    if (!this.block.rows.length) {
      this.scroll.replaceChildren(make("p", {}, empty));
      return;
    }
    const focus = this.scroll.contains(document.activeElement) ? document.activeElement.dataset.focus : null;
    const head = make("tr", {}, ...marks.map(mark => make("th", {}, MARKS[mark][0])), ...columns.map(([text, numeric, colour], i) => {
      const kind = numeric ? "number" : null;
      if (!sortable) return make("th", {class: kind}, ...(colour ? [dot(colour)] : []), text);
      const button = make("button", {type: "button", "data-focus": `head ${i}`}, text);
      button.addEventListener("click", () => {
        this.descending = this.sort === i && !this.descending;
        this.sort = i;
        this.draw();
      });
      const order = this.sort === i ? (this.descending ? "descending" : "ascending") : "none";
      return make("th", {class: kind, "aria-sort": order}, button);
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
        const td = make("td", {class: `${columns[i][1] ? "number" : ""} ${toneOf(cell)}`.trim() || null});
        if (i === 0 && colour) td.append(dot(colour));
        td.append(textOf(cell));
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
  source = model.get("plotly_js");
  const board = make("div", {class: "wb-board"});
  el.append(board);
  let shown = new Map();
  const send = message => model.send(message);

  const showAll = blocks => {
    const next = new Map();
    for (const block of blocks) {
      const old = shown.get(block.id);
      const reused = old && old instanceof KINDS[block.kind];
      next.set(block.id, reused ? old : new KINDS[block.kind](block, send));
    }
    for (const [id, old] of shown) if (next.get(id) !== old) { old.remove?.(); old.node.remove(); }
    shown = next;
    blocks.forEach((block, i) => {
      const view = shown.get(block.id);
      if (board.children[i] !== view.node) board.insertBefore(view.node, board.children[i] ?? null);
      view.show(block);
    });
  };
  const receive = ({text}) => {
    const message = JSON.parse(text);
    if (message.blocks) showAll(message.blocks);
    if (message.patch) {
      const block = shown.get(message.patch.id);
      if (block) block.patch(message.patch);
      else send({event: "ready"}); // the message with this block was missed
    }
    board.dataset.count = Number(board.dataset.count ?? 0) + 1;
  };
  model.on("msg:custom", receive);

  const redraw = () => shown.forEach(block => block instanceof FigureBlock && block.draw());
  const themes = new MutationObserver(redraw);
  themes.observe(document.body, {attributes: true, attributeFilter: ["data-jp-theme-light", "data-jp-theme-name", "class"]});
  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", redraw);
  let width = 0;
  const sizes = new ResizeObserver(() => {
    if (Math.abs(board.clientWidth - width) < 2) return;
    const first = !width;
    width = board.clientWidth;
    shown.forEach(block => block instanceof FigureBlock && (first ? block.draw() : block.resize()));
  });
  sizes.observe(board);
  if (model.get("panel")) receive({text: model.get("panel")}); // as it was when it was last sent whole
  send({event: "ready"}); // asks for the changes since, which may have to wait for the running cell
  return () => {
    model.off("msg:custom", receive);
    themes.disconnect();
    sizes.disconnect();
    dark.removeEventListener("change", redraw);
    shown.forEach(block => block.remove?.());
  };
}

export default {render};
