"use strict";
// Tables that sort, filter and copy themselves, and one tip for everything that is pointed at.
// Without a script the page shows the same rows in depth order, and titles in place of tips.

function liveTables() {
  const compare = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
  const value = (row, column) => {
    const cell = row.cells[column];
    if (!("sort" in cell.dataset)) return cell.textContent.trim();
    return cell.dataset.sort === "" ? -Infinity : Number(cell.dataset.sort);
  };
  function sortBy(table, header) {
    const body = table.tBodies[0], column = header.cellIndex, rows = [...body.rows];
    const first = rows.length && typeof value(rows[0], column) === "number" ? -1 : 1;
    const now = { ascending: 1, descending: -1 }[header.getAttribute("aria-sort")];
    const sign = now ? -now : first;
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    body.append(...rows.sort((a, b) => sign * compare(value(a, column), value(b, column))));
  }
  function csvOf(table) {
    const names = [...table.tHead.rows[0].cells], chosen = names.map((_, at) => at).filter((at) => !names[at].classList.contains("drawing"));
    const quoted = (text) => {
      // a spreadsheet would run what begins like a formula, and names come from models that other people made
      const safe = /^[=+@\t\r-]/.test(text) && Number.isNaN(Number(text)) ? `'${text}` : text;
      return /[",\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
    };
    const cell = (row, at) => row.cells[at].dataset.sort ?? row.cells[at].textContent.trim().replace(/\s+/g, " ");
    const head = chosen.map((at) => quoted(names[at].dataset.csv || names[at].textContent.trim()));
    const rows = [...table.tBodies[0].rows].filter((row) => !row.hidden).map((row) => chosen.map((at) => quoted(cell(row, at))));
    return [head, ...rows].map((line) => line.join(",")).join("\n") + "\n";
  }
  async function copy(text) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      const done = document.execCommand("copy");
      area.remove();
      return done;
    }
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    for (const header of table.tHead.rows[0].cells) {
      if (header.classList.contains("drawing")) continue;
      const button = document.createElement("button");
      button.type = "button";
      button.append(...header.childNodes);
      header.append(button);
      button.addEventListener("click", () => sortBy(table, header));
    }
    const tools = document.querySelector(`.tools[data-for="${table.id}"]`);
    const [filter, button, said] = [".filter", ".copy", ".said"].map((name) => tools.querySelector(name));
    tools.hidden = false;
    const rows = [...table.tBodies[0].rows];
    filter.addEventListener("input", () => {
      const wanted = filter.value.trim().toLowerCase();
      for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
      const shown = rows.filter((row) => !row.hidden).length;
      said.textContent = wanted ? `${shown} of ${rows.length} rows` : "";
    });
    button.addEventListener("click", async () => {
      const shown = rows.filter((row) => !row.hidden).length;
      said.textContent = (await copy(csvOf(table))) ? `${shown} rows copied` : "the browser does not let this page copy";
    });
  }
}

function showTip(target, lines) {
  const tip = document.getElementById("tip");
  tip.replaceChildren(...lines.map((line) => Object.assign(document.createElement("div"), { textContent: line })));
  tip.hidden = false;
  const box = target.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const left = Math.max(8, Math.min(box.left + box.width / 2 - own.width / 2, document.documentElement.clientWidth - own.width - 8));
  const top = box.top - own.height - 10 < 0 ? box.bottom + 10 : box.top - own.height - 10;
  tip.style.translate = `${left}px ${top}px`;
}

function hideTip() {
  document.getElementById("tip").hidden = true;
}

function liveBars(data) {
  const percent = (share) => `${(100 * share).toFixed(1)}%`;
  const MEMBERS = 6;
  for (const bar of document.querySelectorAll(".chart a[data-group]")) {
    const group = data.groups[Number(bar.dataset.group)];
    const members = group.members.slice(0, MEMBERS).map((layer) => data.layers[layer]);
    const more = group.members.length - members.length;
    const width = data.slim
      ? `${group.units} → ${group.kept} channels, ${percent(group.units ? group.kept / group.units : 1)} kept`
      : `${group.units} channels`;
    const state = { frozen: `frozen: ${group.reason}`, stuck: "capacity bottleneck", wider: "wider than before" }[group.state];
    const lines = [group.name, width, ...(state ? [state] : []), `${percent(group.macs)} of the MACs, ${percent(group.params)} of the parameters`];
    lines.push(`${group.members.length} layers: ${members.join(", ")}${more > 0 ? ` and ${more} more` : ""}`);
    bar.setAttribute("aria-label", lines.slice(0, 2).join(": "));
    bar.querySelector("title").remove();
    bar.addEventListener("pointerenter", () => showTip(bar, lines));
    bar.addEventListener("pointerleave", hideTip);
  }
}
// The tree of modules over the channel groups, what of it is open, and what the open part is worth. No drawing here.
// An item is what one box stands for: one group, or all groups of a closed module.

const OPEN_UP_TO = 60; // items at first; more than that is not read but searched

function moduleBranches(groups) {
  const branch = (path) => ({ path, children: new Map(), own: [], all: [] });
  const root = branch("");
  groups.forEach((group, number) => {
    let node = root;
    node.all.push(number);
    for (const part of group.name.split(".")) {
      if (!node.children.has(part)) node.children.set(part, branch(node.path ? `${node.path}.${part}` : part));
      node = node.children.get(part);
      node.all.push(number);
    }
    node.own.push(number);
  });
  return root;
}

const parentsOf = (path) => path.split(".").map((_, at, parts) => parts.slice(0, at + 1).join("."));

function openTree(groups) {
  const root = moduleBranches(groups), open = new Set([""]), byHand = new Set();
  const single = (number) => ({ path: groups[number].name, groups: [number], closed: false });
  function itemsOf(node) {
    if (node.all.length === 1) return [single(node.all[0])];
    const passage = node.children.size === 1 && !node.own.length; // holds one module and nothing else
    if (!open.has(node.path) && !passage) return [{ path: node.path, groups: node.all, closed: true }];
    return [...node.own.map(single), ...[...node.children.values()].flatMap(itemsOf)];
  }
  const items = () => itemsOf(root).sort((a, b) => a.groups[0] - b.groups[0]);
  function openLevel() {
    const closed = items().filter((item) => item.closed).map((item) => item.path);
    closed.forEach((path) => open.add(path));
    return closed;
  }
  for (let opened = openLevel(); opened.length; opened = openLevel()) {
    if (items().length <= OPEN_UP_TO) continue;
    opened.forEach((path) => open.delete(path));
    break;
  }
  function close(path) {
    for (const other of [...open]) {
      if (other === path || other.startsWith(`${path}.`)) open.delete(other), byHand.delete(other);
    }
  }
  function closable() {
    const shown = new Set(items().flatMap((item) => parentsOf(item.path)));
    const inner = (path) => parentsOf(path).some((parent) => parent !== path && open.has(parent));
    return [...open].filter((path) => path && shown.has(path) && (byHand.has(path) || !inner(path)));
  }
  function reach(path) {
    if (!open.has(path)) byHand.add(path);
    open.add(path);
  }
  const reveal = (number) => parentsOf(groups[number].name).slice(0, -1).forEach(reach);
  return { items, openLevel, open: reach, close, closable, reveal };
}

function itemWorth(data) {
  const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);
  const spent = (kind) => {
    const of = new Map(), values = data.modules[kind] || [];
    data.modules.layer.forEach((layer, at) => of.set(layer, (of.get(layer) || 0) + (values[at] || 0)));
    return { of, total: sum(values) };
  };
  const costs = { macs: spent("macs"), time: spent("time") };
  const members = (item) => new Set(item.groups.flatMap((number) => data.groups[number].members));
  const width = (item, field) => sum(item.groups.map((number) => data.groups[number][field]));
  const share = (item, kind) => sum([...members(item)].map((layer) => costs[kind].of.get(layer) || 0)) / (costs[kind].total || 1);
  function density(item) {
    const known = item.groups.map((number) => data.groups[number].density).filter((value) => value !== null);
    return known.length ? sum(known) / known.length : null;
  }
  const kept = (item) => width(item, "kept") / (width(item, "units") || 1);
  return { members, width, kept, share, density, hasTime: costs.time.total > 0 };
}

const asPercent = (share) => `${(100 * share).toFixed(1)}%`;
const asTimes = (factor) => `${Number(factor.toPrecision(2))} x`;

function colourScales(worth, widest) {
  return {
    keep: { of: worth.kept, text: asPercent, ends: [0, Math.max(1, widest)] },
    density: { of: worth.density, text: asTimes, logarithmic: true },
    macs: { of: (item) => worth.share(item, "macs"), text: asPercent },
    time: { of: (item) => worth.share(item, "time"), text: asPercent },
  };
}

// Where each value lies between the ends of the scale, in [0, 1]; null where there is none.
function placed(values, scale) {
  const known = values.filter((value) => value !== null && (!scale.logarithmic || value > 0));
  if (!known.length) return { shares: values.map(() => null), ends: null };
  const ends = scale.ends || [scale.logarithmic ? Math.min(...known) : 0, Math.max(...known)];
  const at = scale.logarithmic ? Math.log : (value) => value, span = at(ends[1]) - at(ends[0]) || 1;
  const share = (value) => (value === null ? null : value <= ends[0] ? 0 : (at(value) - at(ends[0])) / span);
  return { shares: values.map(share), ends };
}
// Where boxes and lines of the graph go. Along: the longest path over the layers that lead forwards, so that a residual
// stream stands between the blocks that read and write it. Across: each column in the order of what it is joined to.
// Wide pages run from left to right, narrow ones from top to bottom.

const THICK = 16, TALLEST_PX = 1400;

function joinedItems(items, links) {
  const itemOf = new Map(), edges = new Map();
  items.forEach((item, at) => item.groups.forEach((number) => itemOf.set(number, at)));
  const ends = (numbers) => [...new Set(numbers.map((number) => itemOf.get(number)))];
  for (const [, reads, writes] of links) {
    for (const from of ends(reads)) {
      for (const to of ends(writes)) {
        if (from === to) continue;
        const low = Math.min(from, to), high = Math.max(from, to), key = `${low} ${high}`;
        if (!edges.has(key)) edges.set(key, { low, high, forward: false });
        edges.get(key).forward ||= from < to;
      }
    }
  }
  return [...edges.values()];
}

function columnsOf(items, edges) {
  const rank = items.map(() => 0), into = items.map(() => []), next = items.map(() => []), columns = [];
  for (const edge of edges) {
    if (edge.forward) into[edge.high].push(edge.low);
    next[edge.low].push(edge.high);
    next[edge.high].push(edge.low);
  }
  items.forEach((_, at) => {
    rank[at] = Math.max(0, ...into[at].map((from) => rank[from] + 1));
    (columns[rank[at]] ||= []).push(at);
  });
  return { rank, columns, next };
}

function rowsOf({ columns, next }) {
  const row = next.map(() => 0);
  const settle = (column) => column.forEach((at, place) => (row[at] = place - (column.length - 1) / 2));
  const mean = (numbers) => numbers.reduce((total, number) => total + number, 0) / numbers.length;
  columns.forEach(settle);
  for (let sweep = 0; sweep < 6; sweep++) {
    for (const column of sweep % 2 ? [...columns].reverse() : columns) {
      const wish = new Map(column.map((at) => [at, next[at].length ? mean(next[at].map((to) => row[to])) : row[at]]));
      column.sort((a, b) => wish.get(a) - wish.get(b) || a - b);
      settle(column);
    }
  }
  return row;
}

function networkLayout(items, edges, space, widthOf) {
  const found = columnsOf(items, edges), row = rowsOf(found), upright = space < 600;
  const ranks = found.columns.length, rows = Math.max(...found.columns.map((column) => column.length));
  const along = upright ? Math.max(18, Math.min(46, TALLEST_PX / ranks)) : Math.max(18, Math.min(150, space / (ranks + 0.4)));
  const across = upright ? Math.max(26, Math.min(90, space / (rows + 0.4))) : Math.max(24, Math.min(62, 520 / rows));
  const thick = Math.min(THICK, along * 0.6), widths = items.map((item) => widthOf(item) / item.groups.length);
  const widest = Math.max(...widths);
  const spots = items.map((_, at) => ({
    along: (found.rank[at] + 0.7) * along,
    across: row[at] * across,
    length: Math.max(5, across * (upright ? 0.7 : 0.62) * Math.sqrt(widths[at] / widest)),
    thick,
  }));
  return { spots, upright, along, across };
}

// The path of a line: straight into the next column, in an arc past the columns between, the deeper the longer.
function course(edge, layout) {
  const [a, b] = [layout.spots[edge.low], layout.spots[edge.high]].sort((one, other) => one.along - other.along);
  const start = a.along + a.thick / 2, end = b.along - b.thick / 2, steps = Math.round((b.along - a.along) / layout.along);
  const arc = steps > 1 ? (edge.forward ? -1 : 1) * Math.min(110, 10 + 11 * steps) : steps < 1 ? 30 : 0;
  const bend = Math.max(4, (end - start) / 2.4);
  const point = (along, across) => (layout.upright ? [across, along] : [along, across]).map((value) => value.toFixed(1)).join(" ");
  return `M${point(start, a.across)}C${point(start + bend, a.across + arc)} ${point(end - bend, b.across + arc)} ${point(end, b.across)}`;
}
// Draws the channel groups as a graph: modules open and close, a click lights what a group is coupled to.

const VIRIDIS = ["#440154", "#414487", "#2a788e", "#22a884", "#7ad151", "#fde725"];
const LETTER_PX = 6.1;

function viridis(share) {
  const at = Math.max(0, Math.min(1, share)) * (VIRIDIS.length - 1), low = Math.min(Math.floor(at), VIRIDIS.length - 2);
  const part = (code, from) => parseInt(code.slice(from, from + 2), 16);
  const mix = (from) => Math.round(part(VIRIDIS[low], from) * (1 - at + low) + part(VIRIDIS[low + 1], from) * (at - low));
  return `rgb(${mix(1)},${mix(3)},${mix(5)})`;
}

function svgElement(tag, attributes, parent) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  parent.append(element);
  return element;
}

function tell(tag, text, parent, name = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  if (name) element.className = name;
  parent.append(element);
  return element;
}

class Network {
  constructor(data, svg) {
    Object.assign(this, { data, svg, tree: openTree(data.groups), worth: itemWorth(data), picked: null, focus: 0 });
    this.scales = colourScales(this.worth, Math.max(...data.groups.map((group) => group.kept / (group.units || 1))));
    this.colour = document.getElementById("colour");
    this.find = document.getElementById("find");
    this.offerColours();
    this.listen();
    document.getElementById("network-tools").hidden = false;
    this.draw();
  }

  get space() {
    return this.svg.parentElement.clientWidth || 960;
  }

  offerColours() {
    const missing = {
      keep: !this.data.slim,
      density: this.data.groups.every((group) => group.density === null),
      time: !this.worth.hasTime,
    };
    for (const option of [...this.colour.options]) if (missing[option.value]) option.remove();
  }

  listen() {
    const on = (id, kind, action) => document.getElementById(id).addEventListener(kind, action);
    on("colour", "change", () => this.draw());
    on("find", "input", () => this.search());
    on("find", "keydown", (event) => {
      const groups = event.key === "Enter" ? this.search() : [];
      if (groups.length) this.reveal(groups[0]);
    });
    on("more", "click", () => {
      this.tree.openLevel();
      this.draw();
    });
    on("zoom-in", "click", () => this.zoom(1 / 1.5));
    on("zoom-out", "click", () => this.zoom(1.5));
    let space = this.space;
    window.addEventListener("resize", () => {
      if (this.space !== space) this.draw();
      space = this.space;
    });
    this.pan();
  }

  // --- drawing

  draw() {
    this.items = this.tree.items();
    this.edges = joinedItems(this.items, this.data.links);
    this.layout = networkLayout(this.items, this.edges, this.space, (item) => this.worth.width(item, "units"));
    const scale = this.scales[this.colour.value];
    const { shares, ends } = placed(this.items.map(scale.of), scale);
    this.svg.replaceChildren();
    const lines = svgElement("g", { class: "lines", "aria-hidden": "true" }, this.svg);
    lines.style.setProperty("--faintness", Math.max(0.12, Math.min(0.8, 6 / Math.sqrt(this.edges.length + 1))));
    this.lines = this.edges.map((edge) => svgElement("path", { d: course(edge, this.layout), class: edge.forward ? "" : "back" }, lines));
    this.nodes = this.items.map((item, at) => this.drawNode(item, at, shares[at]));
    this.fit();
    this.legend(scale, ends);
    this.chips();
    this.light();
    this.search();
  }

  drawNode(item, at, share) {
    const spot = this.layout.spots[at], { upright } = this.layout;
    const [width, height] = upright ? [spot.length, spot.thick] : [spot.thick, spot.length];
    const [x, y] = upright ? [spot.across, spot.along] : [spot.along, spot.across];
    const state = item.closed ? "closed" : this.data.groups[item.groups[0]].state;
    const node = svgElement("g", { class: `node ${state}`, role: "button", tabindex: at === this.focus ? 0 : -1 }, this.svg);
    node.setAttribute("aria-label", `${item.path}${item.closed ? `, ${item.groups.length} groups, closed` : ""}: ${this.widths(item)}`);
    const box = (name, shift = 0, least = 0) => {
      const [wide, high] = [Math.max(width, least), Math.max(height, least)];
      return svgElement("rect", { class: name, x: x - wide / 2 + shift, y: y - high / 2 - shift, width: wide, height: high, rx: 2 }, node);
    };
    box("grip", 0, 22);
    if (item.closed) box("under", 3.5);
    box("front").style.fill = share === null ? "var(--track)" : viridis(share);
    svgElement("text", { x, y: y + height / 2 + 12, "text-anchor": "middle" }, node).textContent = this.label(item);
    node.addEventListener("click", () => this.choose(item));
    node.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && showTip(node, this.tip(item)));
    node.addEventListener("pointerleave", hideTip);
    node.addEventListener("focus", () => (this.focus = at));
    node.addEventListener("keydown", (event) => this.press(event, item));
    return node;
  }

  // The name below a box, or nothing where it would run into the next one.
  label(item) {
    const { upright, along, across } = this.layout;
    const parts = item.path.split("."), name = item.closed ? `${parts.at(-1)} (${item.groups.length})` : parts.slice(-2).join(".");
    const room = Math.floor((upright ? across : along) / LETTER_PX), lines = upright ? along : across;
    if (lines < 30 || room < Math.min(name.length, 7)) return "";
    return name.length > room ? `…${name.slice(1 - room)}` : name;
  }

  widths(item) {
    const [units, kept] = ["units", "kept"].map((field) => this.worth.width(item, field));
    const text = units.toLocaleString("en-US");
    return this.data.slim ? `${text} → ${kept.toLocaleString("en-US")} channels (${asPercent(this.worth.kept(item))} kept)` : `${text} channels`;
  }

  state(group) {
    return { frozen: [`frozen: ${group.reason}`], stuck: ["capacity bottleneck"], wider: ["wider than before"], kept: [] }[group.state];
  }

  facts(item) {
    const density = this.worth.density(item);
    return [
      this.widths(item),
      ...(item.closed ? [`${item.groups.length} groups; click to open`] : this.state(this.data.groups[item.groups[0]])),
      `its layers do ${asPercent(this.worth.share(item, "macs"))} of the dense MACs`,
      ...(this.worth.hasTime ? [`and take ${asPercent(this.worth.share(item, "time"))} of the time`] : []),
      ...(density === null ? [] : [`saliency per MAC ${asTimes(density)} the median group's`]),
    ];
  }

  tip(item) {
    return [item.path, ...this.facts(item)];
  }

  // --- choosing and lighting

  choose(item) {
    hideTip();
    if (item.closed) {
      this.tree.open(item.path);
      this.picked = null;
      this.redraw(item.groups[0]);
    } else {
      this.picked = this.picked === item.groups[0] ? null : item.groups[0];
      this.light();
    }
    this.panel();
  }

  redraw(focused) {
    this.focus = Math.max(0, this.tree.items().findIndex((item) => item.groups.includes(focused)));
    this.draw();
  }

  reveal(number) {
    this.tree.reveal(number);
    this.picked = number;
    this.redraw(number);
    this.panel();
  }

  light() {
    const mine = this.picked === null ? -1 : this.items.findIndex((item) => item.groups.includes(this.picked));
    const members = new Set(mine < 0 ? [] : this.data.groups[this.picked].members), near = new Set([mine]);
    this.svg.classList.toggle("choosing", mine >= 0);
    this.edges.forEach((edge, at) => {
      const lit = mine >= 0 && (edge.low === mine || edge.high === mine);
      this.lines[at].classList.toggle("lit", lit);
      if (lit) near.add(edge.low).add(edge.high);
    });
    this.items.forEach((item, at) => {
      const holds = near.has(at) || (item.closed && [...this.worth.members(item)].some((layer) => members.has(layer)));
      this.nodes[at].classList.toggle("lit", mine >= 0 && holds);
      this.nodes[at].classList.toggle("picked", at === mine);
      this.nodes[at].setAttribute("aria-pressed", at === mine);
    });
    for (const bar of document.querySelectorAll(".chart a[data-group]")) {
      bar.classList.toggle("lit", this.picked !== null && Number(bar.dataset.group) === this.picked);
    }
  }

  press(event, item) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Enter" || event.key === " ") this.choose(item);
    else if (step) this.focus = (this.focus + step + this.nodes.length) % this.nodes.length;
    else return;
    event.preventDefault();
    this.nodes.forEach((node, at) => node.setAttribute("tabindex", at === this.focus ? 0 : -1));
    this.nodes[this.focus].focus();
  }

  // --- around the drawing

  panel() {
    const box = document.getElementById("picked"), { data, picked } = this;
    box.replaceChildren();
    box.hidden = picked === null;
    if (picked === null) return;
    const group = data.groups[picked];
    tell("h3", group.name, box);
    tell("p", this.facts({ path: group.name, groups: [picked], closed: false }).join(" · "), box);
    const through = (end) => new Set(data.links.filter((link) => link[end].includes(picked)).map(([layer]) => layer));
    const readers = through(1), writers = through(2);
    const others = group.members.filter((layer) => !writers.has(layer) && !readers.has(layer));
    for (const [title, layers] of [["written by", writers], ["read by", readers], ["cut along with them", others]]) {
      if (![...layers].length) continue;
      const line = tell("p", `${title} `, box, "layers");
      for (const layer of layers) line.append(tell("code", data.layers[layer], line), " ");
    }
    tell("a", "its row in the table", tell("p", "", box)).href = `#group-${picked}`;
  }

  legend(scale, ends) {
    const box = document.getElementById("scale"), [low, high] = box.querySelectorAll("span");
    box.hidden = !ends;
    if (ends) [low.textContent, high.textContent] = ends.map(scale.text);
  }

  chips() {
    const box = document.getElementById("open");
    box.replaceChildren();
    const paths = this.tree.closable().sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
    if (paths.length) tell("span", "close", box);
    for (const path of paths) {
      const chip = tell("button", path, box, "chip");
      chip.type = "button";
      chip.addEventListener("click", () => {
        this.tree.close(path);
        this.picked = null;
        this.redraw(0);
        this.panel();
      });
    }
    document.getElementById("more").disabled = !this.items.some((item) => item.closed);
  }

  search() {
    const wanted = this.find.value.trim().toLowerCase(), { groups, layers } = this.data;
    const has = (text) => wanted !== "" && text.toLowerCase().includes(wanted);
    const found = new Set([...layers.keys()].filter((layer) => has(layers[layer])));
    const matching = [...groups.keys()].filter((number) => has(groups[number].name) || groups[number].members.some((layer) => found.has(layer)));
    const shown = new Set(matching);
    this.items.forEach((item, at) => this.nodes[at].classList.toggle("match", item.groups.some((number) => shown.has(number))));
    document.getElementById("found").textContent = wanted
      ? `${found.size} layer${found.size === 1 ? "" : "s"} in ${matching.length} group${matching.length === 1 ? "" : "s"}`
      : "";
    return [...matching.filter((number) => has(groups[number].name)), ...matching]; // those that it names come first
  }

  // --- what part of it is seen

  fit() {
    const bounds = this.svg.getBBox(), margin = 14, { space } = this;
    const width = Math.max(bounds.width + 2 * margin, space), height = Math.max(bounds.height + 2 * margin, 140);
    this.full = { x: bounds.x + bounds.width / 2 - width / 2, y: bounds.y + bounds.height / 2 - height / 2, width, height };
    this.svg.style.height = `${Math.min(this.layout.upright ? TALLEST_PX : 640, Math.max(140, (height * space) / width))}px`;
    this.look(this.full);
  }

  look(view) {
    this.view = view;
    this.svg.setAttribute("viewBox", [view.x, view.y, view.width, view.height].map((value) => value.toFixed(1)).join(" "));
  }

  zoom(factor) {
    const { view, full } = this, width = Math.min(full.width, view.width * factor), height = full.height * (width / full.width);
    this.look(width === full.width ? full : { x: view.x + (view.width - width) / 2, y: view.y + (view.height - height) / 2, width, height });
  }

  pan() {
    let held = null;
    this.svg.addEventListener("pointerdown", (event) => {
      if (event.pointerType === "mouse" && this.view.width < this.full.width) held = { x: event.clientX, y: event.clientY, view: this.view };
    });
    window.addEventListener("pointerup", () => (held = null));
    this.svg.addEventListener("pointermove", (event) => {
      if (!held) return;
      const unit = held.view.width / this.svg.clientWidth;
      this.look({ ...held.view, x: held.view.x - (event.clientX - held.x) * unit, y: held.view.y - (event.clientY - held.y) * unit });
    });
  }
}

function drawNetwork(data) {
  const svg = document.getElementById("graph");
  return svg && data.groups.length ? new Network(data, svg) : null;
}
// Charts by Plotly, which the page carries compressed: unpacked here, drawn in the page's own colours, and drawn anew
// where those change, which is at dusk and on paper.

async function unpack(id) {
  const letters = atob(document.getElementById(id).textContent), packed = new Uint8Array(letters.length);
  for (let at = 0; at < packed.length; at++) packed[at] = letters.charCodeAt(at);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

function palette() {
  const style = getComputedStyle(document.documentElement);
  return (name) => style.getPropertyValue(`--${name}`).trim();
}

// Plotly reads some markup in texts; names are to be read as they are
const verbatim = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

function layoutOf(of, more) {
  const text = { tickfont: { size: 12 }, title: { font: { size: 13 } } };
  const axis = { ...text, gridcolor: of("line"), zeroline: false, linecolor: of("line"), tickcolor: of("line"), automargin: true };
  const { xaxis = {}, yaxis = {}, ...rest } = more;
  return {
    margin: { l: 56, r: 8, t: 8, b: 44 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: of("faint"), size: 13, family: getComputedStyle(document.body).fontFamily },
    hoverlabel: { bgcolor: of("text"), bordercolor: of("text"), font: { color: of("page") }, align: "left" },
    showlegend: false,
    dragmode: false,
    ...rest,
    xaxis: { ...axis, ...xaxis, title: { ...axis.title, ...xaxis.title } },
    yaxis: { ...axis, ...yaxis, title: { ...axis.title, ...yaxis.title } },
  };
}

// --- when to draw

const PAPER_WIDTH = 680;

// Each maker gives the traces and the layout of the place whose id it has; `begin` runs before them, each time anew.
async function keepDrawn(makers, choices, begin = () => []) {
  const places = Object.keys(makers).filter((id) => document.getElementById(id));
  const config = { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: false };
  const draw = (width) => {
    const more = begin();
    for (const id of places) {
      const [traces, layout] = makers[id](palette(), ...more);
      Plotly.react(id, traces, width ? { ...layout, width } : { ...layout, autosize: true }, config);
    }
  };
  if (places.length) await unpack("plotly");
  draw();
  for (const choice of document.querySelectorAll(choices)) choice.addEventListener("change", () => draw());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
  addEventListener("beforeprint", () => {
    document.documentElement.classList.add("paper");
    draw(PAPER_WIDTH);
  });
  addEventListener("afterprint", () => {
    document.documentElement.classList.remove("paper");
    draw();
  });
}

// The charts of a report, from the data that the page carries.

// --- where the cost goes

function moduleTree(modules, layers, kind) {
  const nodes = new Map([["", { id: "", label: "network", parent: null, own: 0, before: 0, after: 0 }]]);
  const reach = (path) => {
    if (nodes.has(path)) return nodes.get(path);
    const cut = path.lastIndexOf(".");
    const node = { id: path, label: path.slice(cut + 1), parent: reach(path.slice(0, Math.max(cut, 0))).id, own: 0, before: 0, after: 0 };
    nodes.set(path, node);
    return node;
  };
  modules.layer.forEach((layer, at) => {
    const node = reach(layers[layer]);
    node.own += modules[kind][at];
    for (let up = node; up; up = up.parent === null ? null : nodes.get(up.parent)) {
      up.total = (up.total || 0) + modules[kind][at];
      up.before += modules.macs[at];
      up.after += modules.after ? modules.after[at] : 0;
    }
  });
  return [...nodes.values()].filter((node) => node.total > 0);
}

function drawTreemap(data, of) {
  const kind = document.querySelector("input[name=cost]:checked").value;
  const nodes = moduleTree(data.modules, data.layers, kind), total = nodes[0]?.total || 1;
  const unit = { macs: "MACs", params: "parameters", bytes: "bytes", time: "ms" }[kind];
  const amount = (value) => (kind === "time" ? `${value.toPrecision(3)} ms` : `${value.toLocaleString("en-US")} ${unit}`);
  const kept = (node) => (node.before ? node.after / node.before : 1);
  const says = (node) => {
    const lines = [`<b>${verbatim(node.id || "network")}</b>`, amount(node.total), `${((100 * node.total) / total).toFixed(1)}% of the network`];
    if (data.slim && node.before) lines.push(`${(100 * kept(node)).toFixed(1)}% of its MACs kept`);
    return lines.join("<br>");
  };
  const trace = {
    type: "treemap",
    branchvalues: "remainder",
    ids: nodes.map((node) => `/${node.id}`),
    labels: nodes.map((node) => verbatim(node.label)),
    parents: nodes.map((node) => (node.parent === null ? "" : `/${node.parent}`)),
    values: nodes.map((node) => node.own),
    text: nodes.map((node) => `${((100 * node.total) / total).toFixed(1)}%`),
    textinfo: "label+text",
    customdata: nodes.map(says),
    hovertemplate: "%{customdata}<extra></extra>",
    textfont: { color: data.slim ? nodes.map((node) => (kept(node) < 0.55 ? "#ffffff" : "#10131a")) : of("page") },
    marker: {
      line: { width: 1, color: of("page") },
      pad: { t: 20, l: 3, r: 3, b: 3 },
      ...(data.slim
        ? { colors: nodes.map(kept), colorscale: "Viridis", cmin: 0, cmax: 1, showscale: false }
        : { colors: nodes.map(() => of("kept")) }),
    },
    root: { color: of("panel") },
    pathbar: { visible: true, thickness: 24, textfont: { size: 13 } },
    tiling: { pad: 2 },
  };
  return [[trace], layoutOf(of, { margin: { l: 0, r: 0, t: 26, b: 0 } })];
}

// --- saliency

function drawBoxes(data, of) {
  const shown = data.groups.map((group, at) => ({ ...group, at })).filter((group) => group.quantiles.length === 5 && group.state !== "frozen");
  const positive = shown.flatMap((group) => group.quantiles).filter((value) => value > 0);
  const least = Math.min(...positive), logarithmic = Math.max(...positive) > 30 * least;
  const on = (value) => (logarithmic ? Math.max(value, least) : value);
  const says = { kept: "free", stuck: "capacity bottleneck" };
  const stateOf = (group) => (group.state === "stuck" ? "stuck" : "kept");
  const traces = ["kept", "stuck"].map((state) => {
    const groups = shown.filter((group) => stateOf(group) === state), at = (place) => groups.map((group) => on(group.quantiles[place]));
    return {
      type: "box",
      name: says[state],
      x: groups.map((group) => group.at + 1),
      lowerfence: at(0), q1: at(1), median: at(2), q3: at(3), upperfence: at(4),
      customdata: groups.map((group) => verbatim(group.name)),
      hoverinfo: "skip",
      line: { color: of(state), width: 1 },
      fillcolor: of(state),
      whiskerwidth: 0,
      boxpoints: false,
    };
  });
  // a box says five numbers in five labels; one invisible point says them in one
  const number = (value) => value.toPrecision(3);
  traces.push({
    type: "scatter", mode: "markers", x: shown.map((group) => group.at + 1), y: shown.map((group) => on(group.quantiles[2])),
    marker: { opacity: 0 },
    text: shown.map((group) => `<b>${verbatim(group.name)}</b><br>median ${number(group.quantiles[2])}` +
      `<br>middle half ${number(group.quantiles[1])} to ${number(group.quantiles[3])}<br>5% to 95%: ${number(group.quantiles[0])} to ${number(group.quantiles[4])}`),
    hovertemplate: "%{text}<extra></extra>",
  });
  const layout = layoutOf(of, {
    xaxis: { title: { text: "group, in depth order" }, range: [0, data.groups.length + 1], showgrid: false },
    yaxis: { title: { text: "saliency of a unit" }, exponentformat: "power", ...(logarithmic ? { type: "log", dtick: 1 } : { rangemode: "tozero" }) },
    boxmode: "overlay", boxgap: 0.35, hovermode: "x", hoverdistance: 30,
  });
  return [traces, layout];
}

const SHOWN_BELOW_PLAN = 0.5;

function drawCurve(data, of) {
  const { curve } = data, [kept, lost] = curve.chosen, percent = (share) => `${(100 * share).toFixed(1)}%`;
  // losses grow without bound towards nothing kept, and would press the part that matters onto the axis
  const end = SHOWN_BELOW_PLAN * kept;
  function near(points) {
    const shown = points.filter(([share]) => share >= end), [after, before] = [points[shown.length], shown.at(-1)];
    if (!after || !before) return shown;
    return [...shown, [end, before[1] + ((after[1] - before[1]) * (before[0] - end)) / (before[0] - after[0])]];
  }
  const line = (points, name, style) => ({
    type: "scatter", mode: "lines", name, line: style,
    x: near(points).map(([share]) => 100 * share), y: near(points).map(([, loss]) => loss),
    text: near(points).map(([share, loss]) => `${name}<br>${percent(share)} of the ${curve.kind} kept<br>saliency lost ${loss.toPrecision(3)}`),
    hovertemplate: "%{text}<extra></extra>",
  });
  const chosen = {
    type: "scatter", mode: "markers", name: `this plan: ${percent(kept)}`, x: [100 * kept], y: [lost],
    marker: { color: of("stuck"), size: 12, line: { color: of("page"), width: 2 } },
    cliponaxis: false,
    hovertemplate: `this plan<br>${percent(kept)} of the ${curve.kind} kept<br>saliency lost ${lost.toPrecision(3)}<extra></extra>`,
  };
  const traces = [
    line(curve.uniform, "same fraction everywhere", { color: of("faint"), width: 2, dash: "dash" }),
    line(curve.best, "best widths", { color: of("kept"), width: 3 }),
    chosen,
  ];
  const layout = layoutOf(of, {
    xaxis: { title: { text: `${curve.kind} kept` }, ticksuffix: "%", range: [102, 100 * end] },
    yaxis: { title: { text: "saliency lost" }, rangemode: "tozero", exponentformat: "power" },
    hovermode: "closest",
    showlegend: true,
    legend: { x: 0.02, y: 0.98, xanchor: "left", yanchor: "top", bgcolor: "rgba(0,0,0,0)" },
  });
  return [traces, layout];
}

// --- training

function drawLearning(data, of) {
  const { dense, runs } = data.training, percent = (share) => `${(100 * share).toFixed(1)}%`;
  const starts = runs.map((_, at) => runs.slice(0, at).reduce((sum, run) => sum + run.epochs.length, 0));
  const end = starts.at(-1) + runs.at(-1).epochs.length;
  const epochs = (run, at, value) =>
    run.epochs.map((row, epoch) => ({ x: starts[at] + epoch + 1, y: row[value], where: `${run.name}, epoch ${epoch + 1}` }));
  // what is measured while a network learns belongs to that training alone, hence the gaps
  const apart = (value) => runs.flatMap((run, at) => [...epochs(run, at, value), { x: starts[at] + run.epochs.length, y: null, where: "" }]);
  const evaluated = runs.flatMap((run, at) => [{ x: starts[at], y: run.before, where: `before ${run.name}` }, ...epochs(run, at, 2)])
    .filter((point) => point.y !== null);
  const line = (name, all, yaxis, style, says) => ({
    type: "scatter", mode: "lines+markers", name, yaxis, ...style,
    x: all.map((point) => point.x), y: all.map((point) => point.y),
    text: all.map((point) => `${verbatim(point.where)}<br>${name} ${point.y === null ? "" : says(point.y)}`),
    hovertemplate: "%{text}<extra></extra>",
  });
  const trained = apart(1), learns = trained.some((point) => point.y !== null), measured = evaluated.length > 0 || learns;
  const traces = [];
  if (evaluated.length) traces.push(line("accuracy, evaluated", evaluated, "y2", { line: { color: of("kept"), width: 3 }, marker: { size: 7 } }, percent));
  if (learns) traces.push(line("accuracy in training", trained, "y2", { line: { color: of("faint"), width: 1.5, dash: "dot" }, marker: { size: 5 } }, percent));
  if (measured && dense !== null) {
    traces.push({
      type: "scatter", mode: "lines", name: "dense original", yaxis: "y2", x: [0, end], y: [dense, dense],
      line: { color: of("text"), width: 1.5, dash: "dash" }, hovertemplate: `dense original ${percent(dense)}<extra></extra>`,
    });
  }
  traces.push(line("loss", apart(0), "y", { line: { color: of("stuck"), width: 2 }, marker: { size: 5 } }, (value) => value.toPrecision(4)));
  const top = { xref: "x", yref: "paper", y: 1, yanchor: "bottom", showarrow: false, font: { size: 12 } };
  const layout = layoutOf(of, {
    margin: { l: 56, r: 8, t: 56, b: 44 },
    xaxis: { title: { text: "epoch" }, range: [-0.02 * end, 1.02 * end], showgrid: false, anchor: "y", dtick: end <= 12 ? 1 : undefined },
    yaxis: { title: { text: "loss" }, domain: measured ? [0, 0.34] : [0, 1] },
    hovermode: "closest",
    showlegend: true,
    legend: { orientation: "h", x: 0, y: 1.09, xanchor: "left", yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" },
    shapes: starts.slice(1).map((x) => ({ type: "line", xref: "x", yref: "paper", x0: x, x1: x, y0: 0, y1: 1, line: { color: of("faint"), width: 1, dash: "dot" } })),
    annotations: runs.length > 1 ? runs.map((run, at) => ({ ...top, x: starts[at] + run.epochs.length / 2, text: verbatim(run.name) })) : [],
  });
  if (measured) layout.yaxis2 = { ...layout.yaxis, title: { ...layout.yaxis.title, text: "top-1 accuracy" }, domain: [0.42, 1], tickformat: ".0%" };
  return [traces, layout];
}

function liveCharts(data) {
  const makers = { treemap: drawTreemap, boxes: drawBoxes, curve: drawCurve, learning: drawLearning };
  const drawn = Object.entries(makers).map(([id, make]) => [id, (of) => make(data, of)]);
  keepDrawn(Object.fromEntries(drawn), "input[name=cost]");
}

// Brings the page to life, part by part: the text stands without any of it.
const pageData = JSON.parse(document.getElementById("data").textContent);
// What is folded away would be missing on paper.
function unfoldOnPaper() {
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    folded.forEach((part) => (part.open = true));
  });
  addEventListener("afterprint", () => folded.forEach((part) => (part.open = false)));
}

unfoldOnPaper();
liveTables();
liveBars(pageData);
drawNetwork(pageData);
liveCharts(pageData);
