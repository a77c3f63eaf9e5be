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
