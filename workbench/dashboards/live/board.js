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
const TYPING = 200; // ms without a key before a filter is sent
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
  constructor(block, send) {
    this.content = make("div");
    this.content.addEventListener("click", ({target}) => {
      if (target.dataset.copy) navigator.clipboard?.writeText(target.dataset.copy).then(() => { target.textContent = "Copied"; });
      if (target.dataset.act) send({event: "act", action: target.dataset.act, key: target.dataset.key});
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

// the kernel filters rows and hides columns; the page sorts, folds and marks. A view keeps what its reader has folded and
// sorted in `state`, also while another panel is open
class GridBlock {
  constructor(block, send, states) {
    this.send = send;
    this.id = block.id;
    if (!states.has(block.id)) states.set(block.id, {sort: null, descending: false, all: false, unfolded: new Set()});
    this.state = states.get(block.id);
    this.filter = make("input", {type: "search", placeholder: "filter: words, lr>0.002", "aria-label": `filter ${block.id}`});
    this.filter.addEventListener("input", () => {
      clearTimeout(this.typing);
      this.typing = setTimeout(() => this.send({event: "filter", key: this.id, text: this.filter.value}), TYPING);
    });
    this.filter.value = block.query;
    this.count = make("span", {class: "wb-note", "aria-live": "polite"});
    this.problem = make("span", {class: "failed", role: "alert"});
    this.choice = make("details", {class: "wb-columns"}, make("summary", {}, "Columns"));
    this.note = make("p", {class: "wb-note"});
    this.more = make("button", {type: "button"});
    this.more.addEventListener("click", () => { this.state.all = true; this.draw(); });
    this.scroll = make("div", {class: "wb-scroll"});
    this.node = make("div", {"data-block": block.id, class: "wb-grid"}, title(block.title),
      make("div", {class: "wb-bar"}, this.filter, this.choice, this.count, this.problem), this.note, this.scroll, this.more);
  }

  show(block) {
    this.block = block;
    this.note.textContent = block.note;
    this.note.hidden = !block.note;
    this.problem.textContent = block.problem;
    this.showChoice();
    this.draw();
  }

  showChoice() {
    const {columns, frozen} = this.block;
    this.choice.hidden = !frozen;
    const boxes = columns.map(([text, , , hidden]) => {
      const box = make("input", {type: "checkbox", "data-title": text});
      box.checked = !hidden;
      box.addEventListener("change", () => {
        const shown = [...this.choice.querySelectorAll("input:checked")].map(node => node.dataset.title);
        this.send({event: "columns", key: this.id, shown});
      });
      return make("label", {}, box, ` ${text}`);
    });
    const list = this.choice.children[1];
    const inside = list?.contains(document.activeElement) ? document.activeElement.dataset.title : null;
    const next = make("div", {}, ...boxes);
    if (list) list.replaceWith(next); else this.choice.append(next);
    if (inside) [...next.querySelectorAll("input")].find(node => node.dataset.title === inside)?.focus();
  }

  order(rows) {
    const {sort, descending} = this.state;
    rows = [...rows];
    if (sort !== null && sort < this.block.columns.length) {
      rows.sort(({cells: a}, {cells: b}) => {
        const x = valueOf(a[sort]), y = valueOf(b[sort]);
        if (x == null || y == null) return (x == null) - (y == null); // missing values stay last
        const less = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
        return descending ? -less : less;
      });
    }
    const pinned = new Set(this.block.marked.pinned ?? []);
    return [...rows.filter(({key}) => pinned.has(key)), ...rows.filter(({key}) => !pinned.has(key))];
  }

  isUnfolded({key, unfolded}) {
    return Boolean(unfolded) !== this.state.unfolded.has(key);
  }

  draw() {
    const {rows, total, query, columns, marks, marked, action, empty, sortable, frozen} = this.block;
    const listed = this.order(rows).flatMap(row =>
      [[row, 0], ...(row.children && this.isUnfolded(row) ? this.order(row.children).map(child => [child, 1]) : [])]);
    const shown = this.state.all ? listed : listed.slice(0, FIRST_ROWS);
    const below = rows.reduce((sum, {children}) => sum + (children?.length ?? 0), 0);
    const runs = below ? `, ${below} below them` : "";
    this.count.textContent = (rows.length === total ? `${total} rows` : `${rows.length} of ${total} rows`) + runs;
    this.more.hidden = shown.length === listed.length;
    this.more.textContent = `show all ${listed.length}`;
    this.node.classList.toggle("wb-short", !sortable || (total + below < FILTER_ROWS && !query));
    this.node.classList.toggle("wb-frozen", frozen > 0);
    if (!rows.length) {
      this.scroll.replaceChildren(make("p", {}, query ? "No row satisfies the filter." : empty));
      return;
    }
    const places = columns.map((column, i) => i).filter(i => !columns[i][3]);
    const focus = this.scroll.contains(document.activeElement) ? document.activeElement.dataset.focus : null;
    const kept = this.scroll.scrollLeft;
    const titles = places.map(i => {
      const [text, numeric, colour] = columns[i];
      const kind = numeric ? "number" : null;
      if (!sortable) return make("th", {class: kind}, ...(colour ? [dot(colour)] : []), text);
      const button = make("button", {type: "button", "data-focus": `head ${i}`}, text);
      button.addEventListener("click", () => {
        this.state.descending = this.state.sort === i && !this.state.descending;
        this.state.sort = i;
        this.draw();
      });
      const order = this.state.sort === i ? (this.state.descending ? "descending" : "ascending") : "none";
      return make("th", {class: kind, "aria-sort": order}, button);
    });
    const acts = action ? [make("th", {}, "")] : [];
    const signs = marks.map(mark => make("th", {}, MARKS[mark][0]));
    const head = make("tr", {}, ...signs, ...(frozen ? [...acts, ...titles] : [...titles, ...acts]));
    const body = shown.map(([row, depth]) => this.row(row, depth, places));
    this.scroll.replaceChildren(make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)));
    if (frozen) this.freeze(marks.length + acts.length + frozen);
    this.scroll.scrollLeft = kept;
    if (focus) [...this.scroll.querySelectorAll("[data-focus]")].find(node => node.dataset.focus === focus)?.focus();
  }

  row(row, depth, places) {
    const {columns, marks, marked, action, frozen} = this.block;
    const {key, colour, cells, children} = row;
    const line = make("tr", {"data-key": key, class: depth ? "wb-below" : null});
    for (const mark of marks) {
      const on = (marked[mark] ?? []).includes(key);
      const [verb, off, sign] = MARKS[mark];
      const button = make("button", {type: "button", "aria-pressed": String(on), "aria-label": `${verb} ${key}`,
        title: verb, "data-mark": mark, "data-focus": `${mark} ${key}`}, on ? sign : off);
      button.addEventListener("click", () => this.send({event: "mark", mark, key, on: !on}));
      line.append(make("td", {class: "wb-mark"}, ...((row.marks ?? marks).includes(mark) ? [button] : [])));
    }
    if ((marked.hidden ?? []).includes(key)) line.classList.add("wb-hidden");
    if ((marked.pinned ?? []).includes(key)) line.classList.add("wb-pinned");
    const data = places.map((i, place) => {
      const text = textOf(cells[i]);
      const td = make("td", {class: `${columns[i][1] ? "number" : ""} ${toneOf(cells[i]) ?? ""}`.trim() || null});
      if (frozen && text.length > 40) td.title = text;
      if (place === 0 && children) td.append(this.fold(row));
      if (place === 0 && colour) td.append(dot(colour));
      td.append(text);
      return td;
    });
    const button = make("button", {type: "button", "aria-label": `${action} ${key}`, "data-act": action,
      "data-focus": `act ${key}`}, action);
    button.addEventListener("click", () => this.send({event: "act", action, key}));
    const acts = action ? [make("td", {class: "wb-act"}, ...(key && !children ? [button] : []))] : [];
    line.append(...(frozen ? [...acts, ...data] : [...data, ...acts]));
    return line;
  }

  fold(row) {
    const open = this.isUnfolded(row);
    const button = make("button", {type: "button", class: "wb-fold", "aria-expanded": String(open),
      "aria-label": `${open ? "fold" : "unfold"} ${row.key}`, "data-focus": `fold ${row.key}`}, open ? "▾" : "▸");
    button.addEventListener("click", () => {
      this.state.unfolded.delete(row.key) || this.state.unfolded.add(row.key);
      this.draw();
    });
    return button;
  }

  freeze(count) { // the first cells of every row stay at the left edge
    const lines = [...this.scroll.querySelectorAll("tr")];
    const left = [...lines[0].children].slice(0, count).map((cell, i) => cell.offsetLeft - Math.min(i, 1)); // no gaps
    for (const line of lines) {
      left.forEach((x, i) => {
        line.children[i].classList.add("wb-left");
        line.children[i].style.left = `${x}px`;
      });
    }
  }
}

const KINDS = {figure: FigureBlock, text: TextBlock, grid: GridBlock};

function render({model, el}) {
  source = model.get("plotly_js");
  const board = make("div", {class: "wb-board"});
  el.append(board);
  let shown = new Map();
  const states = new Map();
  const send = message => model.send(message);

  const showAll = blocks => {
    const next = new Map();
    for (const block of blocks) {
      const old = shown.get(block.id);
      const reused = old && old instanceof KINDS[block.kind];
      next.set(block.id, reused ? old : new KINDS[block.kind](block, send, states));
    }
    for (const [id, old] of shown) if (next.get(id) !== old) { old.remove?.(); old.node.remove(); }
    shown = next;
    const isOther = blocks.length && ![...next.keys()].some(id => board.querySelector(`[data-block="${CSS.escape(id)}"]`));
    if (isOther && board.getBoundingClientRect().top < 0) board.scrollIntoView();
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
