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
